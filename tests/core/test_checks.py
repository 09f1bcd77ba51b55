import numpy as np
import pytest

from kvtier.core.checks import at_least, flag, is_number, one_of, several, timeout, whole
from kvtier.errors import ConfigError


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7)])
def test_integers_of_any_kind_become_an_int(value):
    assert whole("start", value) == 7
    assert type(whole("start", value)) is int


@pytest.mark.parametrize("value", [True, np.True_, 7.0, np.float32(7), float("nan"), "7", None, [7]])
def test_what_is_no_integer_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^start = .*integer"):
        whole("start", value)


@pytest.mark.parametrize("value", [1, np.int64(1), 7])
def test_integers_from_the_least_up_become_an_int(value):
    assert at_least("size", value, 1) == value
    assert type(at_least("size", value, 1)) is int


@pytest.mark.parametrize("value", [0, np.int8(-1), True, 1.0, None])
def test_integers_below_the_least_are_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^size = "):
        at_least("size", value, 1)


@pytest.mark.parametrize("value", [0, -0.5, float("inf"), np.float32(1), np.int64(2)])
def test_numbers_of_any_kind_are_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, np.True_, "1", None, [], 1j])
def test_what_only_counts_as_a_number_is_none(value):
    assert not is_number(value)


@pytest.mark.parametrize("value", ["c", "", None, 1, ["a"], {}, np.array(["a", "b"])])
def test_a_word_that_is_not_known_is_refused_with_those_that_are(value):
    one_of("rule", "a", ("a", "b"))
    with pytest.raises(ConfigError, match=r"^rule = .*: one of 'a', 'b'"):
        one_of("rule", value, ("a", "b"))


@pytest.mark.parametrize("value", [(1, 2), [1, 2]])
def test_tuples_and_lists_become_a_tuple(value):
    assert several("shape", value) == (1, 2)


@pytest.mark.parametrize("value", ["12", None, 5, {1, 2}, np.array([1, 2])])
def test_what_is_neither_a_tuple_nor_a_list_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^shape = .*tuple"):
        several("shape", value)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_flags_stay_what_they_are(value):
    assert flag("exact", value) is bool(value)


@pytest.mark.parametrize("value", [1, 0, "no", None, []])
def test_what_only_counts_as_true_or_false_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^exact = .*True or False"):
        flag("exact", value)


@pytest.mark.parametrize(
    ("value", "seconds"), [(0, 0.0), (-1, 0.0), (np.float32(2), 2.0), (10**400, 9.0), (1e300, 9.0)]
)
def test_a_timeout_is_neither_below_zero_nor_beyond_the_most(value, seconds):
    assert timeout(value, 9.0) == seconds
    assert type(timeout(value, 9.0)) is float


@pytest.mark.parametrize("value", [None, "1", True, float("nan"), np.float32("nan"), []])
def test_what_is_no_time_is_refused_with_what_may_be_given(value):
    with pytest.raises(ConfigError, match=r"^timeout_s = .*: must be a number of seconds, .* or never"):
        timeout(value, 9.0, or_else=" or never")
