import numpy as np
import pytest

from kvtier.core.checks import flag, whole
from kvtier.errors import ConfigError


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7)])
def test_integers_of_any_kind_become_an_int(value):
    assert whole("start", value) == 7
    assert type(whole("start", value)) is int


@pytest.mark.parametrize("value", [True, np.True_, 7.0, np.float32(7), float("nan"), "7", None, [7]])
def test_what_is_no_integer_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^start = .*integer"):
        whole("start", value)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_flags_stay_what_they_are(value):
    assert flag("exact", value) is bool(value)


@pytest.mark.parametrize("value", [1, 0, "no", None, []])
def test_what_only_counts_as_true_or_false_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^exact = .*True or False"):
        flag("exact", value)
