"""The compiled kernels against numpy and xxhash."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from kvtier.kernels import FastPages, address_of, compiled

pytest.importorskip("numba", reason="numba is not installed: pip install 'kvtier[fast]'")

PAGES = 12
PAGE_SIZES = st.lists(st.sampled_from([1, 24, 64, 192, 320, 1024, 4096, 8448]), min_size=1, max_size=4)
SIZES = [241, 255, 256, 257, 319, 320, 1023, 1024, 1025, 1088, 2047, 2048, 2049, 8448, 41_984, 65_536, (1 << 20) + 13]


def _arrays(sizes, offset=0):
    """Pages of each size, each in memory of its own that begins ``offset`` bytes behind a line."""
    random = np.random.default_rng(0)
    return [_at(random.integers(0, 256, PAGES * size, np.uint8), offset).reshape(PAGES, size) for size in sizes]


def _at(data, offset):
    """A copy of ``data`` that begins ``offset`` bytes behind a multiple of 64."""
    room = np.zeros(data.nbytes + 128, np.uint8)
    start = -address_of(room) % 64 + offset
    copy = room[start : start + data.nbytes]
    copy[:] = data
    return copy


def _pages_of(data, blocks, block_pages):
    """Pages in any order, none twice; often some that lie one after another."""
    count = blocks * block_pages
    if data.draw(st.booleans()):
        first = data.draw(st.integers(0, PAGES - count))
        return np.arange(first, first + count, dtype=np.int32)
    return np.array(data.draw(st.permutations(range(PAGES)))[:count], np.int32)


def _expected(arrays, ids, parts):
    return b"".join(arrays[part][page].tobytes() for part in parts for page in ids)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("offset", [0, 3])
def test_sums_are_those_of_xxhash(nbytes, offset):
    data = _at(np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8), offset)
    sums = np.zeros((1, 1, 2), np.uint64)
    compiled().sum_records(np.array([address_of(data)]), np.array([[0, nbytes]]), sums)
    assert sums.tobytes() == xxh3_128_digest(data.data)


@settings(deadline=None)
@given(PAGE_SIZES, st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 3]), st.data())
def test_gather_copies_what_the_table_names_and_scatter_undoes_it(sizes, blocks, block_pages, offset, data):
    arrays = _arrays(sizes, offset)
    ids = _pages_of(data, blocks, block_pages)
    first = data.draw(st.integers(0, len(sizes)))
    parts = range(first, data.draw(st.integers(first, len(sizes))))
    fast = FastPages.of(arrays, block_pages)
    bases = np.arange(blocks) * block_pages
    nbytes = sum(sizes[part] for part in parts) * block_pages
    out = _at(np.zeros(blocks * nbytes, np.uint8), offset).reshape(blocks, nbytes)
    fast.gather(ids, bases, parts, out)
    for block in range(blocks):
        own = ids[block * block_pages : (block + 1) * block_pages]
        assert out[block].tobytes() == _expected(arrays, own, parts)
    wanted = [array.copy() for array in arrays]
    for part in parts:
        wanted[part][ids] = ~wanted[part][ids]
    fast.scatter(ids, bases, parts, ~out)
    assert all(np.array_equal(array, want) for array, want in zip(arrays, wanted, strict=True))


def _slices(sizes, block_pages, cuts):
    """Slices of whole parts, each on a 4 KiB page of its own behind a header page."""
    rows, at = [], 4096
    for first, last in zip([0, *cuts], [*cuts, len(sizes)], strict=True):
        nbytes = sum(sizes[first:last]) * block_pages
        rows.append((at, nbytes, first, last))
        at += -(-nbytes // 4096) * 4096
    return np.array(rows, np.int64), at


class _Case:
    """Blocks in pages, and records for them; each slice is long enough to be summed."""

    def __init__(self, data):
        self.sizes = data.draw(st.lists(st.sampled_from([256, 264, 1024, 4096, 8448, 41_984]), min_size=1, max_size=4))
        self.blocks, self.block_pages = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        self.arrays = _arrays(self.sizes)
        self.ids = _pages_of(data, self.blocks, self.block_pages)
        cuts = sorted(data.draw(st.sets(st.integers(1, len(self.sizes) - 1)))) if len(self.sizes) > 1 else []
        self.slices, self.record_bytes = _slices(self.sizes, self.block_pages, cuts)
        self.arena = _at(np.full(self.blocks * self.record_bytes, 0xEE, np.uint8), 0).reshape(self.blocks, -1)
        self.records = address_of(self.arena) + self.record_bytes * np.arange(self.blocks)
        self.bases = np.arange(self.blocks) * self.block_pages
        self.fast = FastPages.of(self.arrays, self.block_pages)

    def gather(self):
        return self.fast.gather_records(self.ids, self.bases, self.slices, self.records)

    def own(self, block):
        return self.ids[block * self.block_pages : (block + 1) * self.block_pages]


@settings(deadline=None)
@given(st.data())
def test_records_hold_the_pages_of_their_blocks_zeros_behind_them_and_sums_that_fit(data):
    case = _Case(data)
    sums = case.gather().reshape(case.blocks, -1, 16)
    for block in range(case.blocks):
        assert set(case.arena[block, :4096].tolist()) == {0xEE}  # the header page is somebody else's
        for column, (at, nbytes, first, last) in enumerate(case.slices.tolist()):
            content = _expected(case.arrays, case.own(block), range(first, last))
            assert case.arena[block, at : at + nbytes].tobytes() == content
            assert not case.arena[block, at + nbytes : at + -(-nbytes // 4096) * 4096].any()
            assert sums[block, column].tobytes() == xxh3_128_digest(content)


@settings(deadline=None)
@given(st.data(), st.booleans())
def test_records_return_to_the_pages_that_they_are_loaded_into(data, verifies):
    case = _Case(data)
    wanted = [array.copy() for array in case.arrays]
    sums = case.gather()
    for array in case.arrays:
        array[case.ids] = 0
    good = case.fast.scatter_records(case.ids, case.bases, case.slices, case.records, sums if verifies else None)
    assert good.all()
    assert all(np.array_equal(array, want) for array, want in zip(case.arrays, wanted, strict=True))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_slice_touches_no_page_and_only_its_record_is_bad(data):
    case = _Case(data)
    sums = case.gather()
    block, column = data.draw(st.integers(0, case.blocks - 1)), data.draw(st.integers(0, len(case.slices) - 1))
    at, nbytes, first, _ = case.slices[column].tolist()
    case.arena[block, at + data.draw(st.integers(0, nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    wanted = [array.copy() for array in case.arrays]
    for part, array in enumerate(case.arrays):
        array[case.ids] = 0
        if part >= first:
            wanted[part][case.own(block)] = 0
    good = case.fast.scatter_records(case.ids, case.bases, case.slices, case.records, sums)
    assert good.tolist() == [number != block for number in range(case.blocks)]
    assert all(np.array_equal(array, want) for array, want in zip(case.arrays, wanted, strict=True))


def test_more_bytes_than_stay_in_a_cache_are_copied_past_it_and_are_the_same():
    arrays = _arrays([64 << 10, 192 << 10])
    fast, ids = FastPages.of(arrays, 4), np.array([7, 3, 4, 5, 11, 0, 1, 2], np.int32)
    out = np.zeros((2, 4 * (256 << 10)), np.uint8)
    fast.gather(ids, np.array([0, 4]), range(2), out)
    assert out[0].tobytes() == _expected(arrays, ids[:4], range(2))
    assert out[1].tobytes() == _expected(arrays, ids[4:], range(2))
    kept = [array.copy() for array in arrays]
    for array in arrays:
        array[:] = 0
    fast.scatter(ids, np.array([0, 4]), range(2), out)
    for array, want in zip(arrays, kept, strict=True):
        assert np.array_equal(array[ids], want[ids])
        assert not array[[6, 8, 9, 10]].any()


@pytest.mark.parametrize(("ids", "base"), [([0, PAGES], 0), ([-1, 0], 0), ([0, 1], 1), ([0, 1], -1)])
def test_a_page_that_is_not_there_is_refused_before_anything_is_copied(ids, base):
    arrays = _arrays([1024])
    fast, ids, bases = FastPages.of(arrays, 2), np.array(ids, np.int32), np.array([base])
    out, before = np.full((1, 2048), 7, np.uint8), arrays[0].copy()
    slices, records = np.array([(0, 2048, 0, 1)], np.int64), np.array([address_of(out)])
    for refused in (
        lambda: fast.gather(ids, bases, range(1), out),
        lambda: fast.scatter(ids, bases, range(1), out),
        lambda: fast.gather_records(ids, bases, slices, records),
        lambda: fast.scatter_records(ids, bases, slices, records, None),
    ):
        with pytest.raises(IndexError):
            refused()
    assert set(out.reshape(-1).tolist()) == {7}
    assert np.array_equal(arrays[0], before)


def test_bytes_of_another_length_or_with_gaps_are_refused():
    fast, ids, bases = FastPages.of(_arrays([64]), 1), np.array([0, 1], np.int32), np.array([0, 1])
    for out in (np.zeros((2, 65), np.uint8), np.zeros((1, 64), np.uint8), np.zeros((2, 128), np.uint8)[:, :64]):
        with pytest.raises(ValueError):
            fast.gather(ids, bases, range(1), out)
        with pytest.raises(ValueError):
            fast.scatter(ids, bases, range(1), out)


def test_page_numbers_may_begin_anywhere_and_be_read_only():
    """As those that were cut from a message are."""
    arrays, wanted = _arrays([64]), np.array([3, 1, 2], np.int32)
    message = b"x" + wanted.tobytes()
    ids = np.frombuffer(message, np.int32, offset=1)
    out = np.zeros((1, 192), np.uint8)
    FastPages.of(arrays, 3).gather(ids, np.array([0]), range(1), out)
    assert out.tobytes() == _expected(arrays, wanted, range(1))


def test_slices_that_are_too_short_to_be_summed_are_left_to_others():
    fast, room = FastPages.of(_arrays([16]), 2), np.zeros(64, np.uint8)
    slices, records = np.array([(0, 32, 0, 1)], np.int64), np.array([address_of(room)])
    ids, bases = np.array([0, 1], np.int32), np.array([0])
    assert fast.gather_records(ids, bases, slices, records) is None
    assert fast.scatter_records(ids, bases, slices, records, None) is None
    assert not room.any()
