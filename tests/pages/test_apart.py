import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.pages import apart
from kvtier.pages.apart import check_apart

SIZE = 64


@st.composite
def views(draw):
    """Any view of one buffer: an offset, up to three dimensions, strides of either sign."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    strides = draw(st.lists(st.integers(-7, 7), min_size=len(shape), max_size=len(shape)))
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    least, most = -sum(step for step in reach if step < 0), SIZE - 1 - sum(step for step in reach if step > 0)
    return draw(st.integers(least, most)) if least <= most else least, shape, strides


def _bytes_of(buffer, view):
    offset, shape, strides = view
    numbers = np.lib.stride_tricks.as_strided(
        np.arange(-SIZE, 2 * SIZE)[offset + SIZE :], shape, [8 * s for s in strides]
    )
    return np.lib.stride_tricks.as_strided(buffer[offset + SIZE :], shape, strides), set(numbers.ravel().tolist())


@settings(max_examples=500)
@given(st.lists(views(), max_size=5))
def test_tensors_are_refused_exactly_if_two_of_them_have_a_byte_in_common(given_views):
    buffer = np.zeros(3 * SIZE, np.uint8)
    pairs = [_bytes_of(buffer, view) for view in given_views]
    parts = [(f"part {number}", data) for number, (data, _) in enumerate(pairs)]
    met = [(a, b) for b in range(len(pairs)) for a in range(b) if pairs[a][1] & pairs[b][1]]
    if not met:
        check_apart(parts)
        return
    with pytest.raises(ConfigError) as caught:
        check_apart(parts)
    named = [(a, b) for a, b in met if str(caught.value).startswith(f"part {a} and part {b} share memory")]
    assert named


def test_what_is_too_hard_to_tell_is_accepted(monkeypatch):
    monkeypatch.setattr(apart, "MAX_WORK", 1)
    buffer = np.zeros(1 << 16, np.uint8)
    steps = np.lib.stride_tricks.as_strided
    one, other = steps(buffer, (9, 10, 11), (6, 10, 15)), steps(buffer[1:], (9, 11, 10), (35, 21, 14))
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(one, other, max_work=1)
    check_apart([("one", one), ("other", other)])
