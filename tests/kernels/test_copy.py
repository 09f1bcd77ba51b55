import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.kernels import gather_pages, page_rows, scatter_pages

IDS = st.lists(st.integers(0, 19), unique=True, max_size=20)


def _pages(count=20, page_bytes=48):
    return np.random.default_rng(0).integers(0, 256, (count, page_bytes), np.uint8)


@given(IDS)
def test_gather_copies_the_named_pages_in_their_order(ids):
    source = _pages()
    out = np.zeros(len(ids) * 48, np.uint8)
    gather_pages(source, page_rows(np.array(ids, np.int32)), out)
    assert out.tobytes() == b"".join(source[page].tobytes() for page in ids)


@given(IDS)
def test_scatter_writes_the_named_pages_and_no_others(ids):
    target = _pages()
    before = target.copy()
    source = np.arange(len(ids) * 48).astype(np.uint8)
    scatter_pages(target, page_rows(np.array(ids, np.int32)), source)
    for page in range(20):
        at = ids.index(page) * 48 if page in ids else None
        want = before[page] if at is None else source[at : at + 48]
        assert np.array_equal(target[page], want)


@pytest.mark.parametrize(
    ("ids", "run"),
    [
        ([], slice(0, 0)),
        ([7], slice(7, 8)),
        ([3, 4, 5, 6], slice(3, 7)),
        ([4, 3], None),
        ([3, 5, 4, 6], None),
        ([3, 5], None),
        ([5, 5], None),
    ],
)
def test_only_neighbours_in_ascending_order_are_one_run(ids, run):
    rows = page_rows(np.array(ids, np.int32))
    if run is None:
        assert isinstance(rows, np.ndarray)
        assert rows.tolist() == ids
    else:
        assert rows == run


def test_bytes_that_are_not_as_long_as_the_pages_are_refused():
    source = _pages()
    for rows in (page_rows(np.array([1, 2])), page_rows(np.array([2, 1]))):
        with pytest.raises(ValueError):
            gather_pages(source, rows, np.zeros(3 * 48, np.uint8))
        with pytest.raises(ValueError):
            scatter_pages(source, rows, np.zeros(3 * 48, np.uint8))
