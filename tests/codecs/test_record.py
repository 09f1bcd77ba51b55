"""The record header: round trips, damage, hostile tables, another place."""

from __future__ import annotations

from dataclasses import replace
from struct import pack_into

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.codecs.checksums import content_sum, page_sum
from kvtier.codecs.record import (
    MAGIC,
    SUM_AT,
    RecordHeader,
    Slice,
    check_content,
    check_payload,
    check_stored,
    raw_slice,
    record_pages,
    restamp,
    zero_padding,
)
from kvtier.errors import CorruptBlockError

digests = st.binary(min_size=32, max_size=32)
sums = st.binary(min_size=16, max_size=16)


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    content = draw(st.integers(1, 2**26))
    checksum = draw(sums)
    if draw(st.booleans()) and content > 1:
        return Slice(draw(st.integers(1, content - 1)), content, checksum, draw(sums))
    return Slice(content, content, checksum, checksum)


headers = st.builds(
    RecordHeader,
    key=digests,
    parent=digests,
    placement=digests,
    group=st.integers(0, 2**16 - 1),
    depth=st.integers(0, 2**31 - 1),
    tokens=st.integers(1, 2**31 - 1),
    lineage=st.integers(0, 1),
    error=st.floats(0, 1, width=32),
    chain=st.sampled_from(["raw", "raw+lz4", "x" * 32]),
    slices=st.lists(slices(), min_size=1, max_size=64).map(tuple),
    nonce=sums,
    segment=st.integers(-1, 2**31 - 1),
    generation=st.integers(0, 2**63 - 1),
    page=st.integers(-1, 2**31 - 1),
    sequence=st.integers(0, 2**63 - 1),
)


def example(**changes: object) -> RecordHeader:
    payload = Slice(5000, 5000, b"c" * 16, b"c" * 16), Slice(4096, 9000, b"d" * 16, b"e" * 16)
    header = RecordHeader(b"k" * 32, b"p" * 32, b"l" * 32, 2, 7, 64, 0, 0.0, "raw+lz4", payload, b"n" * 16, 3, 9, 1, 5)
    return replace(header, **changes)


def packed(header: RecordHeader) -> np.ndarray:
    page = np.full(4096, 0xFF, np.uint8)
    header.pack_into(page)
    return page


def resealed(page: np.ndarray) -> np.ndarray:
    """``page`` with a valid checksum: hostile rather than damaged."""
    pack_into("<Q", page, SUM_AT, page_sum(page[:SUM_AT]))
    return page


@given(header=headers)
def test_a_header_survives_its_page(header: RecordHeader) -> None:
    assert RecordHeader.unpack(packed(header)) == header


def test_packing_writes_every_byte_of_the_page() -> None:
    """What the memory held before must not reach the disk."""
    other = np.zeros(4096, np.uint8)
    example().pack_into(other)
    assert np.array_equal(packed(example()), other)


def test_every_single_bit_flip_of_a_header_page_is_damage() -> None:
    page = packed(example())
    for bit in range(8 * page.nbytes):
        page[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptBlockError):
            RecordHeader.unpack(page)
        page[bit // 8] ^= 1 << (bit % 8)
    assert RecordHeader.unpack(page) == example()


@pytest.mark.parametrize("nbytes", [0, 7, 8, 4095, 4097, 8192])
def test_a_page_of_another_size_is_damage(nbytes: int) -> None:
    page = np.zeros(nbytes, np.uint8)
    page[: min(nbytes, 4096)] = packed(example())[: min(nbytes, 4096)]
    with pytest.raises(CorruptBlockError):
        RecordHeader.unpack(page)


@given(seed=st.integers(0, 2**32 - 1))
def test_noise_is_damage(seed: int) -> None:
    page = np.random.default_rng(seed).integers(0, 256, 4096, np.uint8)
    with pytest.raises(CorruptBlockError):
        RecordHeader.unpack(page)
    page[:8] = np.frombuffer(MAGIC, np.uint8)
    with pytest.raises(CorruptBlockError):
        RecordHeader.unpack(page)


@pytest.mark.parametrize(
    ("at", "code", "value"),
    [
        (8, "<H", 2),  # format
        (10, "<H", 0),  # header pages
        (10, "<H", 2),
        (12, "<H", 0),  # slices
        (12, "<H", 1),  # fewer than its pages need
        (12, "<H", 3),  # an empty third slice
        (12, "<H", 65),
        (12, "<H", 0xFFFF),
        (114, "<B", 2),  # lineage
        (116, "<i", -1),  # depth
        (120, "<i", 0),  # tokens
        (120, "<i", -5),
        (124, "<f", float("nan")),  # error
        (124, "<f", -1.0),
        (128, "<B", 0),  # chain
        (128, "<B", 0xC3),
        (160, "<I", 0),  # pages
        (160, "<I", 5),
        (160, "<I", 2**32 - 1),
        (256, "<I", 0),  # stored bytes of slice 0
        (256, "<I", 5001),  # more than its content
        (256, "<I", 2**32 - 1),
        (264, "<B", 0),  # content checksum of a slice that is stored as it is
        (300, "<I", 4095),  # content bytes of slice 1 below its stored bytes
    ],
)
def test_a_hostile_header_with_a_valid_checksum_is_damage(at: int, code: str, value: float) -> None:
    page = packed(example())
    pack_into(code, page, at, value)
    with pytest.raises(CorruptBlockError):
        RecordHeader.unpack(resealed(page))


@given(data=st.data())
def test_any_hostile_bytes_with_a_valid_checksum_are_damage_or_a_sound_header(data: st.DataObject) -> None:
    page = packed(data.draw(headers))
    for _ in range(data.draw(st.integers(1, 8))):
        page[data.draw(st.integers(8, 1023))] = data.draw(st.integers(0, 255))
    try:
        header = RecordHeader.unpack(resealed(page))
    except CorruptBlockError:
        return
    assert 0 < len(header.slices) <= 64
    assert header.pages == int(page[160:164].view("<u4")[0])
    assert all(0 < row.stored_bytes <= row.content_bytes for row in header.slices)


@pytest.mark.parametrize("field", ["key", "group", "placement", "nonce", "segment", "generation", "page"])
def test_a_header_matches_only_when_all_of_identity_and_place_agree(field: str) -> None:
    header = example()
    asked = {
        name: getattr(header, name) for name in ("key", "group", "placement", "nonce", "segment", "generation", "page")
    }
    assert header.matches(**asked)
    value = asked[field]
    asked[field] = bytes(len(value)) if isinstance(value, bytes) else value + 1
    assert not header.matches(**asked)


def test_a_header_for_host_memory_belongs_to_no_store() -> None:
    header = RecordHeader(
        b"k" * 32, b"p" * 32, b"l" * 32, 0, 0, 64, 0, 0.0, "raw", (Slice(1, 1, b"c" * 16, b"c" * 16),)
    )
    assert RecordHeader.unpack(packed(header)).matches(key=b"k" * 32, group=0, placement=b"l" * 32)


@given(header=headers, place=st.tuples(sums, *[st.integers(0, 2**31 - 1)] * 4))
def test_restamping_changes_the_place_and_nothing_else(header: RecordHeader, place: tuple) -> None:
    nonce, segment, generation, page_number, sequence = place
    page = packed(header)
    restamp(page, nonce=nonce, segment=segment, generation=generation, page_number=page_number, sequence=sequence)
    expected = replace(header, nonce=nonce, segment=segment, generation=generation, page=page_number, sequence=sequence)
    assert np.array_equal(page, packed(expected))


def test_restamping_a_damaged_header_does_not_bless_it() -> None:
    page = packed(example())
    page[40] ^= 1
    before = page.copy()
    with pytest.raises(CorruptBlockError):
        restamp(page, nonce=b"m" * 16, segment=1, generation=1, page_number=1, sequence=1)
    assert np.array_equal(page, before)


@given(header=headers)
def test_slices_begin_at_pages_and_fill_the_record(header: RecordHeader) -> None:
    offsets = header.slice_offsets()
    assert offsets[0] == 4096
    assert all(offset % 4096 == 0 for offset in offsets)
    ends = [offset + row.stored_bytes for offset, row in zip(offsets, header.slices, strict=True)]
    assert all(0 <= start - end < 4096 for start, end in zip([*offsets[1:], 4096 * header.pages], ends, strict=True))
    assert header.pages == record_pages([row.stored_bytes for row in header.slices])


def test_the_layout_has_the_last_word_on_sizes() -> None:
    example().check_sizes([5000, 9000])
    for sizes in ([5000], [5000, 9001], [5000, 9000, 1], []):
        with pytest.raises(CorruptBlockError, match="the layout has"):
            example().check_sizes(sizes)


def test_slices_are_checked_against_their_rows() -> None:
    content, coded = np.arange(200, dtype=np.uint8), np.arange(50, dtype=np.uint8)
    row = Slice(50, 200, content_sum(content), content_sum(coded))
    assert row.coded
    assert not raw_slice(content).coded
    check_stored(row, coded)
    check_content(row, content)
    for check, good in ((check_stored, coded), (check_content, content)):
        for bad in (good[:-1], np.append(good, np.uint8(0)), good ^ np.uint8(1)):
            with pytest.raises(CorruptBlockError):
                check(row, bad)


def test_a_payload_is_checked_slice_by_slice_and_padding_is_cleared() -> None:
    rng = np.random.default_rng(3)
    record = rng.integers(1, 256, 6 * 4096, np.uint8)
    spans = ((4096, 5000), (4096 * 3, 9000))
    header = example(slices=tuple(raw_slice(record[start : start + size]) for start, size in spans))
    assert header.pages == 6
    zero_padding(header, record)
    check_payload(header, record)
    assert not record[4096 + 5000 : 3 * 4096].any()
    assert not record[3 * 4096 + 9000 :].any()
    for start, size in spans:
        for at in (start, start + size - 1):
            record[at] ^= 1
            with pytest.raises(CorruptBlockError):
                check_payload(header, record)
            record[at] ^= 1
