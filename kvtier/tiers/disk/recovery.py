"""Reading what an earlier life left in a segment.

A sealed segment says in its footer what it holds. Of any other segment all is read, and every 4 KiB page tried as the
beginning of a record: several writers leave holes, and what lies behind a hole may have been acknowledged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np

from kvtier.codecs.chain import chain_of
from kvtier.codecs.record import RecordHeader, check_payload, find_headers
from kvtier.core.memory import Bytes1D
from kvtier.core.plan import PAGE_BYTES, Table
from kvtier.errors import ConfigError, CorruptBlockError
from kvtier.models import KVLayout
from kvtier.runtime.seam import Files
from kvtier.tiers.disk.format import (
    ENTRY,
    HEADER_SLOTS,
    FooterTail,
    SegmentHeader,
    SegmentState,
    Superblock,
    footer_pages,
    new_pages,
    unpack_footer,
)

WINDOW_PAGES: Final = (8 << 20) // PAGE_BYTES
_TAIL_PAGES: Final = 16
"""Read from the end of a segment at once: the footer of up to 590 records."""
_UNREADABLE_PAGES: Final = 16
"""So many of one segment may be passed over: a device that fails altogether takes seconds for each."""


@dataclass(slots=True, eq=False)
class Found:
    """What is in one segment. ``header`` None: no copy of it is whole and of this place; nothing in it can be trusted.

    No crash does that: the copies are written one after the other, and a file has its name once one is durable.
    """

    header: SegmentHeader | None = None
    foreign: bool = False
    """It has a whole header, of another store or of another segment."""
    slot: int = 0
    entries: Table = field(default_factory=lambda: np.empty(0, ENTRY))
    footed: bool = False
    """It is sealed and its footer is whole."""
    cut_off: bool = False
    """The file is shorter than its segment."""
    scanned: bool = False
    unreadable: set[int] = field(default_factory=set)
    """Pages that the scan passed over; what does not lie on them is found."""
    damaged: int = 0
    """Records that are not whole, or not of this place though they begin so: torn by a crash, or rotten."""

    @property
    def sealed(self) -> bool:
        """Whether the header says so; without a good footer it has to be sealed once more."""
        return self.header is not None and self.header.state is SegmentState.SEALED

    @property
    def end(self) -> int:
        """The first page behind all records."""
        ends = self.entries["page"].astype(np.int64) + self.entries["pages"]
        return int(ends.max(initial=HEADER_SLOTS))


@dataclass(slots=True)
class Recovery:
    """What opening a directory found, counted."""

    segments: int = 0
    records: int = 0
    scanned: int = 0
    """Segments without a good footer, read from end to end: in one that is open there is none."""
    damaged_records: int = 0
    """In segments that were scanned. What a crash tore in an open one cannot be told from rot."""
    damaged_segments: int = 0
    """Neither copy of the header is whole, so that nothing in them is found."""
    damaged_tails: int = 0
    """Sealed without a whole footer, or shorter than the header says: no crash does that."""
    unreadable_pages: int = 0
    """In segments that were scanned; none of these takes records any more in this life."""
    foreign_segments: int = 0
    """Of another store or another place, so that nothing in them is found."""
    unreadable_segments: int = 0
    first_error: str = ""
    """Why the first of them cannot be read."""

    def add(self, found: Found) -> None:
        """One segment that could be read."""
        self.segments += 1
        self.records += len(found.entries)
        self.scanned += found.scanned
        self.damaged_records += found.damaged
        self.unreadable_pages += len(found.unreadable)
        self.damaged_tails += found.cut_off or (found.sealed and not found.footed)
        if found.header is None:
            self.foreign_segments += found.foreign
            self.damaged_segments += not found.foreign

    def add_unreadable(self, number: int, error: OSError) -> None:
        """One segment that the device did not read."""
        self.unreadable_segments += 1
        self.first_error = self.first_error or f"segment {number}: {error}"

    def samples(self) -> dict[str, int]:
        """What a cache shows of it, by the names of its counters."""
        return {
            "recovered_segments": self.segments,
            "recovered_records": self.records,
            "damaged_records": self.damaged_records,
            "damaged_segments": self.damaged_segments,
            "damaged_tails": self.damaged_tails,
            "unreadable_pages": self.unreadable_pages,
            "foreign_segments": self.foreign_segments,
            "unreadable_segments": self.unreadable_segments,
        }

    def complaint(self, *, read_only: bool) -> str:
        """What a person should know of, empty after an ordinary crash. Nothing was written yet."""
        fate = "are left alone" if read_only else "are now written over or removed: only a copy has them still"
        segments = (
            (self.foreign_segments, f"are of another store, or of another number in this one, and {fate}"),
            (self.damaged_segments, f"have no whole header, and {fate}"),
            (self.damaged_tails, "are cut off or have lost their footer, and were read from end to end"),
            (self.unreadable_segments, f"cannot be read and are left alone in this life ({self.first_error})"),
        )
        parts = [f"{count} segments {what}" for count, what in segments if count]
        if self.unreadable_pages:
            parts.append(f"{self.unreadable_pages} pages cannot be read and were passed over")
        return "; ".join(parts)


class SegmentReader:
    """Reads segments of one store, one after the other, through one buffer."""

    def __init__(self, files: Files, store: Superblock, layout: KVLayout) -> None:
        """``store`` says which segments and records are its own, ``layout`` how long a record may be."""
        self._files = files
        self._store = store
        self._layout = layout
        self._window = new_pages(0)
        self._window_pages = max(WINDOW_PAGES, *layout.record_pages)

    def read(self, fd: int, number: int) -> Found:
        """What is in the segment behind ``fd``.

        Raises:
            OSError: the device failed, for the header or too many pages; the segment is left alone.
        """
        found = Found()
        self._read_header(fd, number, found)
        if found.header is None:
            return found
        pages = min(found.header.pages, self._files.size(fd) // PAGE_BYTES)
        found.cut_off = pages < found.header.pages
        if found.sealed:  # before that a footer may be there and its records not: both become durable with one sync
            with suppress(CorruptBlockError, OSError):
                found.entries = self._read_footer(fd, found.header, pages)
                found.footed = True
        if not found.footed:
            self._scan(fd, found, pages)
        return found

    def _read_header(self, fd: int, number: int, found: Found) -> None:
        """The copy in force. Where one cannot be read nobody knows which that is, so both must be."""
        copies = new_pages(HEADER_SLOTS)
        self._files.read_at(fd, 0, copies)
        for slot in range(HEADER_SLOTS):
            with suppress(CorruptBlockError):
                header = SegmentHeader.unpack(copies[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES])
                own = (header.uuid, header.nonce, header.placement, header.segment) == (
                    self._store.uuid, self._store.nonce, self._store.placement, number,
                )  # fmt: skip
                found.foreign |= not own
                if own and (found.header is None or header.rank > found.header.rank):
                    found.header, found.slot = header, slot

    def _read_footer(self, fd: int, header: SegmentHeader, pages: int) -> Table:
        guessed = max(0, pages - _TAIL_PAGES)
        last = self._pages(fd, guessed, pages)
        tail = FooterTail.unpack(last[-PAGE_BYTES:])
        first = pages - footer_pages(tail.count)
        if (tail.segment, tail.generation, tail.nonce) != (header.segment, header.generation, self._store.nonce):
            raise CorruptBlockError("the footer of another life")
        if tail.count < 0 or first < HEADER_SLOTS:
            raise CorruptBlockError(f"a footer of {tail.count} entries in a segment of {pages} pages")
        if first < guessed:
            return unpack_footer(tail, self._pages(fd, first, pages - 1), pages)
        return unpack_footer(tail, last[(first - guessed) * PAGE_BYTES : -PAGE_BYTES], pages)

    def _pages(self, fd: int, first: int, stop: int) -> Bytes1D:
        buffer = new_pages(stop - first)
        if self._files.read_at(fd, first * PAGE_BYTES, buffer) < buffer.nbytes:
            raise CorruptBlockError("the file is shorter than its segment")
        return buffer

    def _scan(self, fd: int, found: Found, stop: int) -> None:
        rows = [_row(header) for header in self._whole_records(fd, found, stop)]
        found.entries = np.array(rows, ENTRY)
        found.scanned = True

    def _whole_records(self, fd: int, found: Found, stop: int) -> Iterator[RecordHeader]:
        """Every record of this life whose header and payload are whole, wherever it begins."""
        assert found.header is not None
        first = past = HEADER_SLOTS
        while first < stop:
            window = self._fill_window(fd, found, first, stop)
            end = first + window.nbytes // PAGE_BYTES
            stop = stop if end - first == self._window_pages else end
            next_first = end
            for candidate in find_headers(window, found.header.generation).tolist():
                page = first + candidate
                image = window[candidate * PAGE_BYTES :]
                header = self._header(image[:PAGE_BYTES], found.header, page, stop)
                if page < past:
                    continue
                if header is None:
                    found.damaged += 1
                    continue
                if page + header.pages > end:
                    next_first = page  # its end comes with the next window
                    break
                if _is_whole(header, image):
                    past = page + header.pages
                    yield header
                else:
                    found.damaged += 1
            first = next_first

    def _fill_window(self, fd: int, found: Found, first: int, stop: int) -> Bytes1D:
        if not self._window.nbytes:
            self._window = new_pages(self._window_pages)
        window = self._window[: min(self._window_pages, stop - first) * PAGE_BYTES]
        try:
            read = self._files.read_at(fd, first * PAGE_BYTES, window)
        except OSError:
            return self._page_by_page(fd, found, first, window)
        return window[: read // PAGE_BYTES * PAGE_BYTES]

    def _page_by_page(self, fd: int, found: Found, first: int, window: Bytes1D) -> Bytes1D:
        """``window``, with zeros where a page cannot be read."""
        for at, page in enumerate(window.reshape(-1, PAGE_BYTES)):
            try:
                self._files.read_at(fd, (first + at) * PAGE_BYTES, page)
            except OSError:
                found.unreadable.add(first + at)
                if len(found.unreadable) > _UNREADABLE_PAGES:
                    raise
                page[:] = 0
        return window

    def _header(self, image: Bytes1D, segment: SegmentHeader, page: int, stop: int) -> RecordHeader | None:
        """The header in ``image`` if it belongs at ``page`` of this life, with lengths that the layout allows."""
        try:
            header = RecordHeader.unpack(image)
            header.check_sizes(_content_sizes(header.chain, self._layout, header.group))
        except (CorruptBlockError, ConfigError):
            return None
        own = (header.nonce, header.placement) == (self._store.nonce, self._store.placement)
        here = (header.segment, header.generation, header.page) == (segment.segment, segment.generation, page)
        return header if own and here and page + header.pages <= stop else None


def _is_whole(header: RecordHeader, image: Bytes1D) -> bool:
    try:
        check_payload(header, image)
    except CorruptBlockError:
        return False
    return True


@lru_cache(maxsize=64)
def _content_sizes(chain: str, layout: KVLayout, group: int) -> tuple[int, ...]:
    if group >= len(layout.groups):
        raise CorruptBlockError(f"group {group} of {len(layout.groups)}")
    return chain_of(chain).content_sizes(layout, group)


def _row(header: RecordHeader) -> tuple[object, ...]:
    key, parent = (np.frombuffer(digest, np.uint8) for digest in (header.key, header.parent))
    return (
        key, parent, header.group, header.lineage, 0, header.depth, header.tokens, header.segment, header.page,
        header.pages, header.generation, header.sequence,
    )  # fmt: skip
