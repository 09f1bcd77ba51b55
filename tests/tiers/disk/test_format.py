"""The pages of the disk tier: round trips, damage, and the bytes that version 1 promises."""

from __future__ import annotations

from dataclasses import replace
from struct import pack_into

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.codecs.checksums import content_sum, page_sum
from kvtier.core.plan import RECOVERED
from kvtier.errors import CorruptBlockError
from kvtier.tiers.disk.format import (
    ENTRY,
    FooterTail,
    SegmentHeader,
    SegmentState,
    Superblock,
    footer_pages,
    new_pages,
    pack_footer,
    unpack_footer,
)

SUPERBLOCK = Superblock(7, 1.7e9, b"u" * 16, b"n" * 16, b"p" * 32)
SEGMENT = SegmentHeader(SegmentState.SEALED, 3, 500, 9 << 40, b"u" * 16, b"n" * 16, b"p" * 32)


def entries(count: int, segment: int = 3, generation: int = 9 << 40) -> np.ndarray:
    table = np.zeros(count, ENTRY)
    table["segment"], table["generation"] = segment, generation
    table["page"], table["pages"] = 2 + 3 * np.arange(count), 3
    table["sequence"] = np.arange(count)
    table["key"] = np.random.default_rng(count).integers(0, 256, (count, 32))
    return table


def test_an_entry_of_a_footer_is_a_recovered_row() -> None:
    """Recovery hands the table on without looking at single rows."""
    assert ENTRY == RECOVERED
    assert ENTRY.itemsize == 104


@pytest.mark.parametrize("page", [SUPERBLOCK, SEGMENT], ids=["superblock", "segment"])
def test_a_page_survives_and_every_single_bit_flip_is_damage(page: Superblock | SegmentHeader) -> None:
    packed = page.pack()
    assert type(page).unpack(packed) == page
    for bit in range(8 * packed.nbytes):
        packed[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptBlockError):
            type(page).unpack(packed)
        packed[bit // 8] ^= 1 << (bit % 8)


@given(seed=st.integers(0, 2**32 - 1), nbytes=st.sampled_from([0, 8, 4095, 4096, 4097]))
def test_noise_is_damage(seed: int, nbytes: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    for kind in (Superblock, SegmentHeader, FooterTail):
        with pytest.raises(CorruptBlockError):
            kind.unpack(noise)


def test_one_kind_of_page_is_not_another() -> None:
    with pytest.raises(CorruptBlockError):
        SegmentHeader.unpack(SUPERBLOCK.pack())
    with pytest.raises(CorruptBlockError):
        FooterTail.unpack(SEGMENT.pack())


def test_a_superblock_of_a_newer_version_is_told_from_a_damaged_one() -> None:
    assert Superblock.unpack(replace(SUPERBLOCK, major=2, incompat=4).pack()).major == 2


def test_a_segment_header_of_a_newer_version_or_unknown_state_is_not_read() -> None:
    for at, code, value in ((8, "<H", 2), (12, "<I", 3), (12, "<I", 0)):
        page = SEGMENT.pack()
        pack_into(code, page, at, value)
        pack_into("<Q", page, 4088, page_sum(page[:4088]))
        with pytest.raises(CorruptBlockError):
            SegmentHeader.unpack(page)


def test_the_younger_copy_of_a_header_ranks_higher() -> None:
    opened = replace(SEGMENT, state=SegmentState.OPEN)
    assert opened.rank < SEGMENT.rank < replace(opened, generation=SEGMENT.generation + 1).rank


@pytest.mark.parametrize("count", [0, 1, 39, 40, 1000])
def test_a_footer_survives(count: int) -> None:
    table = entries(count)
    pages = pack_footer(table, segment=3, generation=9 << 40, nonce=b"n" * 16)
    assert pages.nbytes == 4096 * footer_pages(count)
    tail = FooterTail.unpack(pages[-4096:])
    assert (tail.segment, tail.count, tail.generation, tail.nonce) == (3, count, 9 << 40, b"n" * 16)
    found = unpack_footer(tail, pages[:-4096], 5000)
    assert np.array_equal(found, table)


def test_every_single_bit_flip_of_a_footer_is_damage() -> None:
    pages = pack_footer(entries(2), segment=3, generation=9 << 40, nonce=b"n" * 16)
    for bit in range(8 * pages.nbytes):
        pages[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptBlockError):
            unpack_footer(FooterTail.unpack(pages[-4096:]), pages[:-4096], 500)
        pages[bit // 8] ^= 1 << (bit % 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [("page", 1), ("page", -1), ("page", 2**31 - 1), ("pages", 1), ("pages", -5), ("pages", 2**31 - 1), ("pages", 498),
     ("segment", 4), ("generation", 8)],
)  # fmt: skip
def test_a_hostile_entry_with_a_valid_checksum_is_damage(field: str, value: int) -> None:
    table = entries(2)
    table[field][1] = value
    pages = pack_footer(table, segment=3, generation=9 << 40, nonce=b"n" * 16)
    with pytest.raises(CorruptBlockError, match="points outside"):
        unpack_footer(FooterTail.unpack(pages[-4096:]), pages[:-4096], 500)


def test_memory_for_direct_io_is_aligned_and_zero() -> None:
    for pages in (0, 1, 3):
        memory = new_pages(pages)
        assert memory.nbytes == 4096 * pages
        assert memory.ctypes.data % 4096 == 0 or not pages
        assert not memory.any()


def test_the_bytes_of_version_1_do_not_change() -> None:
    """These digests are the format: a change here needs a new major version and a reader for the old one."""
    footer = pack_footer(entries(40), segment=3, generation=9 << 40, nonce=b"n" * 16)
    assert content_sum(SUPERBLOCK.pack()).hex() == "1ab5069c13ecdc986787371256b89610"
    assert content_sum(SEGMENT.pack()).hex() == "ffa7eec01428fb524c0708cbc1b0fbb5"
    assert content_sum(footer).hex() == "8afcdedfa441c0b4af5e38d5c4e972ef"
