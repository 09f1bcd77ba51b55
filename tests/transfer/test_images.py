"""Records many at a time against the same records one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.codecs.base import pages_of
from kvtier.core.plan import PAGE_BYTES
from kvtier.testing.simulation import SimArena
from kvtier.transfer.images import Extents

NBYTES = st.sampled_from([1, 512, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES, 3 * PAGE_BYTES - 8])
SLOTS = 6


def _extents(pages: int, slots: list[int]) -> tuple[SimArena, Extents]:
    """Records of ``pages`` pages in some of six slots of an arena full of 0xAA."""
    arena = SimArena(SLOTS * pages * PAGE_BYTES)
    arena.data[:] = 0xAA
    first = np.array(slots, np.int32) * pages
    return arena, Extents(arena, first, np.full(len(slots), pages, np.int32))


def _payloads(count: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng(nbytes).integers(0, 256, (count, nbytes), np.uint8)


@given(NBYTES, st.permutations(range(SLOTS)), st.integers(1, SLOTS))
def test_payloads_are_written_behind_their_header_pages_with_zeros_up_to_the_next_page(
    nbytes: int, slots: list[int], count: int
) -> None:
    pages = 1 + pages_of(nbytes)
    arena, extents = _extents(pages, slots[:count])
    payloads = _payloads(count, nbytes)
    extents.write_payloads(payloads)
    for at, payload in enumerate(payloads):
        record = extents.one(at)
        assert (record[:PAGE_BYTES] == 0xAA).all()
        assert np.array_equal(record[PAGE_BYTES : PAGE_BYTES + nbytes], payload)
        assert not record[PAGE_BYTES + nbytes :].any()
    others = np.delete(arena.data.reshape(SLOTS, -1), slots[:count], axis=0)
    assert (others == 0xAA).all()


@given(NBYTES, st.permutations(range(SLOTS)), st.integers(1, SLOTS))
def test_headers_and_payloads_are_those_of_each_record_wherever_it_lies(
    nbytes: int, slots: list[int], count: int
) -> None:
    arena, extents = _extents(1 + pages_of(nbytes), slots[:count])
    arena.data[:] = np.random.default_rng(0).integers(0, 256, arena.data.nbytes, np.uint8)
    images = [extents.one(at).copy() for at in range(count)]
    assert len(extents) == count
    payloads, headers = extents.payloads(nbytes), extents.headers()
    assert payloads.flags.c_contiguous
    for at, image in enumerate(images):
        assert np.array_equal(extents.one(at), image)
        assert np.array_equal(payloads[at], image[PAGE_BYTES : PAGE_BYTES + nbytes])
        assert np.array_equal(headers.table[headers.rows[at]], image[:PAGE_BYTES])


@given(NBYTES, st.permutations(range(SLOTS)), st.integers(1, SLOTS))
def test_buffers_are_all_bytes_of_all_records_in_order_and_adjacent_records_have_one(
    nbytes: int, slots: list[int], count: int
) -> None:
    arena, extents = _extents(1 + pages_of(nbytes), slots[:count])
    arena.data[:] = np.random.default_rng(0).integers(0, 256, arena.data.nbytes, np.uint8)
    buffers = extents.buffers()
    assert np.array_equal(np.concatenate(buffers), np.concatenate([extents.one(at) for at in range(count)]))
    assert len(buffers) == 1 + sum(slots[at + 1] != slots[at] + 1 for at in range(count - 1))


@given(NBYTES, st.permutations(range(SLOTS)), st.integers(1, SLOTS), st.permutations(range(SLOTS)))
def test_records_behind_other_header_pages_have_all_else_of_their_own(
    nbytes: int, slots: list[int], count: int, others: list[int]
) -> None:
    arena, extents = _extents(1 + pages_of(nbytes), slots[:count])
    arena.data[:] = np.random.default_rng(0).integers(0, 256, arena.data.nbytes, np.uint8)
    elsewhere = SimArena(SLOTS * PAGE_BYTES)
    headers = Extents(elsewhere, np.array(others[:count]), np.ones(count, np.int32))
    extents.copy_headers(headers.headers())
    wanted = np.concatenate([extents.one(at) for at in range(count)])
    extents.headers().table[extents.headers().rows] = 0xAA
    assert np.array_equal(np.concatenate(extents.behind(headers)), wanted)


@given(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS))
def test_a_part_of_them_is_those_records(kept: list[bool]) -> None:
    _, extents = _extents(2, list(range(SLOTS)))
    part = extents.part(np.array(kept))
    assert [one.ctypes.data for one in map(part.one, range(len(part)))] == [
        extents.one(at).ctypes.data for at in range(SLOTS) if kept[at]
    ]


@pytest.mark.parametrize("odd", [0, 2])
def test_one_record_of_another_length_is_enough_to_be_noticed(odd: int) -> None:
    arena = SimArena(9 * PAGE_BYTES)
    lengths = np.full(3, 2, np.int32)
    extents = Extents(arena, np.array([0, 3, 6]), lengths)
    assert extents.are_long(2)
    lengths[odd] = 3
    assert not extents.are_long(2)
