"""The size of a segment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import CapacityError, ConfigError
from kvtier.tiers.disk.format import HEADER_SLOTS, footer_pages
from kvtier.tiers.disk.geometry import CleanPool, clean_pool_for, largest_record_pages, pages_with, segment_pages_for

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


@given(record=st.integers(2, 20_000), capacity=st.integers(1, 1 << 42))
def test_a_chosen_segment_holds_eight_records_and_the_capacity_four_segments(record: int, capacity: int) -> None:
    try:
        pages = segment_pages_for(record, capacity, None)
    except CapacityError:
        assert capacity < 4 * 4096 * pages_with(8, record) + 4096
        return
    records = (pages - HEADER_SLOTS) // record
    while pages_with(records, record) > pages:
        records -= 1
    assert records >= 8
    assert pages == pages_with(records, record)  # no page is left over
    assert 4 * pages * 4096 <= capacity
    assert pages * 4096 <= max(256 * MIB, 4096 * pages_with(8, record))


@given(record=st.integers(2, 3000), capacity=st.integers(1 << 28, 1 << 40), segment=st.integers(1, 1 << 36))
def test_a_given_segment_is_taken_or_refused_with_the_range_that_would_do(
    record: int, capacity: int, segment: int
) -> None:
    try:
        pages = segment_pages_for(record, capacity, segment)
    except CapacityError:
        assert capacity < 4 * 4096 * pages_with(8, record) + 4096
    except ConfigError as error:
        least, most = (int(word) for word in str(error).split("between ")[1].split(", or")[0].split(" and "))
        assert not least <= segment <= most
        assert segment_pages_for(record, capacity, least) * 4096 == least
        assert segment_pages_for(record, capacity, most) * 4096 == most
    else:
        assert pages == segment // 4096
        assert pages_with(8, record) <= pages <= capacity // 4096 // 4


def test_there_are_no_more_segments_than_their_files_have_numbers() -> None:
    with pytest.raises(ConfigError, match=r"disk\.segment = 1048576: .* 1000000 segments .*Set it to between \d+"):
        segment_pages_for(2, TIB, MIB)
    assert TIB // (4096 * segment_pages_for(2, TIB, 2 * MIB)) < 1_000_000


@given(record=st.integers(2, 30_000), capacity=st.integers(1 << 40, 1 << 54))
def test_a_chosen_segment_is_large_enough_for_that_too(record: int, capacity: int) -> None:
    """And filled by whole records all the same, as few as that takes."""
    pages = segment_pages_for(record, capacity, None)
    assert capacity // 4096 // pages <= 1_000_000
    records = (pages - HEADER_SLOTS) // record
    while pages_with(records, record) > pages:
        records -= 1
    assert pages == pages_with(records, record)
    assert pages * 4096 <= max(256 * MIB, 4096 * pages_with(8, record), capacity // 1_000_000 + 4096 * (record + 2))


def test_too_small_a_capacity_says_how_much_it_takes() -> None:
    with pytest.raises(
        CapacityError, match=r"disk\.capacity = 1000000 per directory: .* set it to at least (\d+)"
    ) as failure:
        segment_pages_for(257, 1_000_000, None)
    enough = int(str(failure.value).split("at least ")[1].split(" ")[0])
    assert segment_pages_for(257, enough, None)
    with pytest.raises(CapacityError):
        segment_pages_for(257, enough - 4096, None)


@pytest.mark.parametrize(
    ("capacity", "megabytes"), [(64 * MIB, 16), (1 * GIB, 64), (8 * GIB, 128), (16 * GIB, 256), (1 * TIB, 256)]
)
def test_segments_grow_with_the_capacity(capacity: int, megabytes: int) -> None:
    """Of 1 MiB records: never more than the size wanted, and less by no more than one record."""
    pages = segment_pages_for(257, capacity, None)
    assert 0 <= megabytes * MIB - pages * 4096 <= 258 * 4096


@pytest.mark.parametrize(
    ("segment", "segments", "target", "low"),
    [(64, 128, 8, 4), (64, 32, 4, 2), (64, 16, 2, 2), (64, 15, 1, 1), (64, 4, 1, 1), (128, 64, 4, 2), (256, 64, 2, 1),
     (1024, 64, 1, 1), (16, 1000, 32, 16), (1, 8, 1, 1)],
)  # fmt: skip
def test_512_mib_are_kept_clean_or_an_eighth_of_it_all(segment: int, segments: int, target: int, low: int) -> None:
    """And it is urgent with less than half of them, or than the 128 MiB that are written during a slow sync."""
    pages = segment * MIB // 4096
    assert clean_pool_for(pages, segments * pages, None) == CleanPool(target, low)


@given(segment=st.integers(20, 1 << 20), segments=st.integers(4, 5000), wanted=st.none() | st.integers(1, 64))
def test_clean_segments_never_take_much_of_the_capacity(segment: int, segments: int, wanted: int | None) -> None:
    pool = clean_pool_for(segment, segments * segment, wanted)
    assert 1 <= pool.low <= pool.target <= max(1, segments // (8 if wanted is None else 4))
    assert wanted is None or pool.target <= wanted


def test_the_largest_record_fills_a_segment_alone() -> None:
    assert pages_with(1, largest_record_pages(500)) == 500
    assert footer_pages(1) == 2
