"""How large a segment is, and how many are kept clean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvtier.core.plan import PAGE_BYTES
from kvtier.errors import CapacityError, ConfigError
from kvtier.tiers.disk.format import HEADER_SLOTS, footer_pages

MIN_RECORDS: Final = 8
"""Records of the largest group that a segment holds at least: at the end of a segment up to one record is wasted."""
MIN_SEGMENTS: Final = 4
"""One that is written, one that is clean, and some that hold blocks."""
MOST_SEGMENTS: Final = 1_000_000
"""Their files have numbers of six digits."""
FULL_SEGMENTS: Final = 64
"""How many segments a capacity is cut into before they become larger than the smallest good size."""
SMALLEST_GOOD_PAGES: Final = (64 << 20) // PAGE_BYTES
LARGEST_GOOD_PAGES: Final = (256 << 20) // PAGE_BYTES
CLEAN_PAGES: Final = (512 << 20) // PAGE_BYTES
"""How large a burst of writes is taken without any housekeeping, where the capacity allows it."""
CLEAN_SHARE: Final = 8
"""Clean segments hold no blocks: they take no more than this part of a capacity, one eighth."""
SLOW_SYNC_PAGES: Final = (128 << 20) // PAGE_BYTES
"""What a fast device writes while a sync is slow, 20 ms under load."""


@dataclass(frozen=True, slots=True)
class CleanPool:
    """How many segments are kept ready: ``target`` in the long run, and with less than ``low`` it is urgent."""

    target: int
    low: int


def segment_pages_for(record_pages: int, capacity_bytes: int, segment_bytes: int | None) -> int:
    """4 KiB pages of a segment: ``segment_bytes`` where it is given, else a size that whole raw records fill.

    ``record_pages`` is the largest raw record of the layout.

    Raises:
        CapacityError: the capacity is too small for 4 segments of 8 records.
        ConfigError: a segment of ``segment_bytes`` would hold fewer than 8 records, or the capacity fewer than 4 of
            them or more than a million.
    """
    capacity_pages = capacity_bytes // PAGE_BYTES
    least = max(pages_with(MIN_RECORDS, record_pages), -(-capacity_pages // MOST_SEGMENTS))
    if capacity_pages < MIN_SEGMENTS * least:
        raise CapacityError(
            f"disk.capacity = {capacity_bytes} per directory: too small for {MIN_SEGMENTS} segments of {MIN_RECORDS} "
            f"records of {record_pages * PAGE_BYTES} bytes; set it to at least {MIN_SEGMENTS * least * PAGE_BYTES} for "
            "each of disk.directories, or use fewer tokens per block"
        )
    if segment_bytes is None:
        return _filled(record_pages, least, capacity_pages)
    pages = segment_bytes // PAGE_BYTES
    if not least <= pages <= capacity_pages // MIN_SEGMENTS:
        raise ConfigError(
            f"disk.segment = {segment_bytes}: {MIN_RECORDS} records of {record_pages * PAGE_BYTES} bytes have to fit "
            f"into a segment, and {MIN_SEGMENTS} to {MOST_SEGMENTS} segments are to make up disk.capacity = "
            f"{capacity_bytes} per directory; headers and footer take room, too. Set "
            f'it to between {least * PAGE_BYTES} and {capacity_pages // MIN_SEGMENTS * PAGE_BYTES}, or to "auto"'
        )
    return pages


def clean_pool_for(segment_pages: int, capacity_pages: int, clean_segments: int | None) -> CleanPool:
    """``clean_segments`` where it is given, at most a quarter of the capacity; else 512 MiB, at most an eighth of it.

    In both cases one segment at least.
    """
    if clean_segments is None:
        wanted, most = -(-CLEAN_PAGES // segment_pages), capacity_pages // segment_pages // CLEAN_SHARE
    else:
        wanted, most = clean_segments, capacity_pages // segment_pages // MIN_SEGMENTS
    target = max(1, min(wanted, most))
    return CleanPool(target, min(target, max(target // 2, -(-SLOW_SYNC_PAGES // segment_pages))))


def pages_with(records: int, record_pages: int) -> int:
    """Pages of a segment that exactly ``records`` records fill."""
    return HEADER_SLOTS + records * record_pages + footer_pages(records)


def largest_record_pages(segment_pages: int) -> int:
    """Pages of the largest record that fits into a clean segment."""
    return segment_pages - HEADER_SLOTS - footer_pages(1)


def _filled(record_pages: int, least: int, capacity_pages: int) -> int:
    wanted = min(max(capacity_pages // FULL_SEGMENTS, SMALLEST_GOOD_PAGES), LARGEST_GOOD_PAGES)
    allowed = max(least, min(wanted, capacity_pages // MIN_SEGMENTS))
    records = (allowed - HEADER_SLOTS - 1) // record_pages
    while records > MIN_RECORDS and pages_with(records, record_pages) > allowed:
        records -= 1
    while pages_with(records, record_pages) < least:
        records += 1
    return pages_with(records, record_pages)
