import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.kernels import RowSpace

SHAPES = st.lists(st.tuples(st.integers(1, 12), st.sampled_from([16, 48, 64, 160])), min_size=1, max_size=5)


def _arrays(shapes, shared):
    """Arrays of pages, each in an allocation of its own, or all cut from one with gaps between them."""
    random = np.random.default_rng(0)
    if not shared:
        return [random.integers(0, 256, shape, np.uint8) for shape in shapes]
    pool = random.integers(0, 256, sum(pages * size + 16 for pages, size in shapes), np.uint8)
    arrays, at = [], 0
    for pages, size in shapes:
        arrays.append(pool[at : at + pages * size].reshape(pages, size))
        at += pages * size + 16
    return arrays


def _draw_pages(data, arrays):
    """Some pages of each array, in any order, none twice."""
    return [
        np.array(data.draw(st.lists(st.integers(0, len(array) - 1), unique=True)), np.int32).reshape(-1)
        for array in arrays
    ]


def _rows(space, wanted):
    return np.concatenate([space.rows_of(number, pages).reshape(-1) for number, pages in enumerate(wanted)])


@given(SHAPES, st.booleans(), st.data())
def test_gather_copies_the_named_pages_of_every_array_in_their_order(shapes, shared, data):
    arrays = _arrays(shapes, shared)
    wanted = _draw_pages(data, arrays)
    expected = b"".join(array[page].tobytes() for array, pages in zip(arrays, wanted, strict=True) for page in pages)
    space = RowSpace(arrays)
    out = np.zeros(len(expected), np.uint8)
    space.gather(_rows(space, wanted), out)
    assert out.tobytes() == expected


@given(SHAPES, st.booleans(), st.data())
def test_scatter_writes_the_named_pages_and_no_others(shapes, shared, data):
    arrays = _arrays(shapes, shared)
    wanted = _draw_pages(data, arrays)
    expected = [array.copy() for array in arrays]
    nbytes = sum(pages.size * array.shape[1] for pages, array in zip(wanted, arrays, strict=True))
    source = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    at = 0
    for array, pages in zip(expected, wanted, strict=True):
        for page in pages:
            array[page] = source[at : at + array.shape[1]]
            at += array.shape[1]
    space = RowSpace(arrays)
    space.scatter(_rows(space, wanted), source)
    for array, want in zip(arrays, expected, strict=True):
        assert np.array_equal(array, want)


def test_arrays_of_one_allocation_have_rows_of_a_whole_page():
    pool = np.zeros((4, 10, 4096), np.uint8)
    space = RowSpace(list(pool))
    assert space.row_bytes == 4096
    assert space.rows_of(2, np.array([[1, 3]])).tolist() == [[[21], [23]]]


def test_pages_of_different_sizes_share_the_largest_row_that_fits_both():
    pool = np.zeros(10 * (4096 + 1024), np.uint8)
    space = RowSpace([pool[: 10 * 4096].reshape(10, 4096), pool[10 * 4096 :].reshape(10, 1024)])
    assert space.row_bytes == 1024
    assert space.rows_a_page == [4, 1]


@pytest.mark.parametrize("gap", [16, 64, 48 + 4096])
def test_arrays_at_odd_distances_have_rows_of_a_whole_page_all_the_same(gap):
    """Arrays from a heap lie so; what all distances share, 16 bytes, would be very short rows."""
    pool = np.zeros(2 * (10 * 4096) + gap, np.uint8)
    space = RowSpace([pool[: 10 * 4096].reshape(10, 4096), pool[10 * 4096 + gap :].reshape(10, 4096)])
    assert space.row_bytes == 4096
    assert space.rows_a_page == [1, 1]


def test_many_pages_at_odd_distances_are_copied_in_their_order():
    """More than go through a core's cache at once."""
    pool = np.random.default_rng(2).integers(0, 256, 2 * (16 << 16) + 16, np.uint8)
    arrays = [pool[: 16 << 16].reshape(16, 1 << 16), pool[(16 << 16) + 16 :].reshape(16, 1 << 16)]
    space, wanted = RowSpace(arrays), [np.array([3, 15, 0, *range(5, 14)])] * 2
    rows, out = _rows(space, wanted), np.zeros(24 << 16, np.uint8)
    space.gather(rows, out)
    assert out.tobytes() == b"".join(array[wanted[0]].tobytes() for array in arrays)
    before = [array.copy() for array in arrays]
    space.scatter(rows, ~out)
    for array, old in zip(arrays, before, strict=True):
        old[wanted[0]] = ~old[wanted[0]]
        assert np.array_equal(array, old)


@pytest.mark.parametrize("count", [1, 2])
def test_bytes_that_are_not_as_long_as_the_rows_are_refused(count):
    arrays = _arrays([(8, 48)] * count, shared=True)
    space = RowSpace(arrays)
    with pytest.raises(ValueError):
        space.gather(np.array([1, 2]), np.zeros(3 * 48, np.uint8))
    for pages in (1, 3):
        with pytest.raises(ValueError):
            space.scatter(np.array([1, 2]), np.zeros(pages * 48, np.uint8))


def test_bytes_that_do_not_lie_side_by_side_are_refused():
    """A copy of them would be filled, and thrown away."""
    space = RowSpace([np.zeros((8, 48), np.uint8)])
    with pytest.raises(ValueError, match="contiguous"):
        space.gather(np.array([1, 2]), np.zeros((2, 96), np.uint8)[:, :48])
