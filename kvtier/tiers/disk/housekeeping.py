"""What a disk tier does when nobody asks: make segments ahead, seal full ones, clean those that control gave back.

One bounded step at a time, all in one thread. The order of writes and syncs in here is what recovery relies on:

    new header durable -> records -> footer -> records and footer durable -> header says sealed, durable

Nobody trusts a footer before the header says so.

A sync holds up whatever else the device has to do. So all of it waits until nobody uses the directory, except that
clean segments are made when there are few, and full ones sealed when many wait or when control has none to give back.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvtier.core.memory import Bytes1D
from kvtier.core.plan import PAGE_BYTES
from kvtier.runtime.seam import Clock, Files
from kvtier.tiers.disk.book import SegmentBook
from kvtier.tiers.disk.directory import UNFINISHED, PlacementDirectory
from kvtier.tiers.disk.format import HEADER_SLOTS, SegmentHeader, SegmentState, footer_pages, new_pages, pack_footer
from kvtier.tiers.disk.segment import Segment, Stage

STEP_PAGES: Final = (8 << 20) // PAGE_BYTES
HEALTH_S: Final = 1.0


@dataclass(slots=True)
class Unfinished:
    """A segment that is being made: ``zeroed`` of its pages are written."""

    number: int
    fd: int
    path: str
    zeroed: int = 0


class Housekeeper:
    """The background work of one directory. ``step`` must not be called by two threads at once."""

    def __init__(self, files: Files, clock: Clock, directory: PlacementDirectory, book: SegmentBook) -> None:
        """Nothing is touched before the first step."""
        self._files = files
        self._clock = clock
        self._directory = directory
        self._book = book
        self._unfinished: Unfinished | None = None
        self._zeros: Bytes1D = new_pages(0)
        self._next_look_s = 0.0

    def step(self) -> bool:
        """One piece of work, at most one sync or 8 MiB of writing; True when there may be more to do now."""
        if self._directory.read_only or not self._book.health.usable or not self._is_there():
            return False
        return (
            (self._book.may_disturb and self._reclaim())
            or (self._book.must_seal and self.seal())
            or (self._book.may_disturb and self._grow())
            or (self._book.quiet and self.seal())
        )

    def seal(self) -> bool:
        """One of the two steps of sealing a full segment that nothing is under way to; False when there is none."""
        segment = self._book.next_to_seal()
        if segment is None:
            return False
        try:
            if not segment.footed:
                self._write_footer(segment)
                self._book.footed(segment)
            else:
                slot = self._write_header(segment, SegmentState.SEALED, segment.generation)
                self._book.sealed(segment, slot)
        except Exception as error:  # of the disk, or for want of memory: it must not be left in our hands
            self._book.could_not_seal(segment, error)
        return True

    def close(self) -> None:
        """Remove what is not finished."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            self._discard(unfinished)

    # --- looking ----------------------------------------------------------------------------------------------------

    def _is_there(self) -> bool:
        now_s = self._clock.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + HEALTH_S
            if self._directory.gone:
                self._book.turn_off(f"{self._directory.path} was removed")
                return False
        return True

    # --- sealing and reclaiming -------------------------------------------------------------------------------------

    def _write_footer(self, segment: Segment) -> None:
        entries = segment.entry_table()
        footer = pack_footer(
            entries, segment=segment.number, generation=segment.generation, nonce=self._directory.superblock.nonce
        )
        self._files.write_at(segment.fd, (segment.pages - footer_pages(len(entries))) * PAGE_BYTES, footer)
        self._files.sync(segment.fd)  # the records before it, too: nothing is under way to them

    def _write_header(self, segment: Segment, state: SegmentState, generation: int) -> int:
        """Write the copy of the header that is not in force and make it so, durably; returns where it lies."""
        store = self._directory.superblock
        slot = (segment.slot + 1) % HEADER_SLOTS
        page = SegmentHeader(
            state, segment.number, segment.pages, generation, store.uuid, store.nonce, store.placement
        ).pack()
        self._files.write_at(segment.fd, slot * PAGE_BYTES, page)
        self._files.sync(segment.fd)
        return slot

    def _reclaim(self) -> bool:
        segment = self._book.next_to_reclaim()
        if segment is None:
            return False
        try:
            if not self._is_reusable(segment):
                self._remove(segment)
                return True
            generation = self._book.new_generation()
            slot = self._write_header(segment, SegmentState.OPEN, generation)
            self._book.cleaned(segment, generation, slot)
        except Exception as error:  # of the disk, or for want of memory: it must not be left in our hands
            self._book.could_not_clean(segment, error)
        return True

    def _is_reusable(self, segment: Segment) -> bool:
        """Whether it may live again: a whole file of the size of now, for which there is room."""
        book = self._book
        if segment.pages != book.segment_pages or book.exceeds_capacity() or book.is_hopeless(segment):
            return False
        return self._files.links(segment.fd) > 0 and self._files.size(segment.fd) == segment.pages * PAGE_BYTES

    def _remove(self, segment: Segment) -> None:
        self._book.dropped(segment)
        with suppress(OSError):
            self._files.close(segment.fd)
        with suppress(OSError):
            self._files.unlink(self._directory.segment_path(segment.number))
            self._files.sync_directory(self._directory.path)

    # --- making segments --------------------------------------------------------------------------------------------

    def _grow(self) -> bool:
        """Every extent is written once here: the first write of a fresh one is a quarter slower than any later."""
        if self._unfinished is None and not self._book.wants_segment():
            return False
        try:
            if self._unfinished is None:
                self._unfinished = self._begin_segment()
            elif self._unfinished.zeroed < self._book.segment_pages:
                self._zero_more(self._unfinished)
            else:
                self._finish(self._unfinished)
                self._unfinished = None
        except OSError as error:
            self._give_up_growing(error)
        return True

    def _begin_segment(self) -> Unfinished:
        number = self._book.free_number()
        path = self._directory.segment_path(number) + UNFINISHED
        made = Unfinished(number, self._files.open(path, create=True), path)
        try:
            self._files.allocate(made.fd, self._book.segment_pages * PAGE_BYTES)
        except OSError:
            self._discard(made)
            raise
        return made

    def _zero_more(self, made: Unfinished) -> None:
        if not self._zeros.nbytes:
            self._zeros = new_pages(STEP_PAGES)
        pages = min(STEP_PAGES, self._book.segment_pages - made.zeroed)
        self._files.write_at(made.fd, made.zeroed * PAGE_BYTES, self._zeros[: pages * PAGE_BYTES])
        made.zeroed += pages

    def _finish(self, made: Unfinished) -> None:
        segment = Segment(
            made.number, made.fd, self._book.segment_pages, self._book.new_generation(), HEADER_SLOTS - 1, Stage.CLEAN
        )
        segment.slot = self._write_header(segment, SegmentState.OPEN, segment.generation)
        self._files.rename(made.path, self._directory.segment_path(made.number))
        self._files.sync_directory(self._directory.path)
        self._book.grew(segment)

    def _give_up_growing(self, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        self._book.could_not_grow(f"the file system of {self._directory.path} is full" if full else str(error))
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            self._discard(unfinished)

    def _discard(self, made: Unfinished) -> None:
        with suppress(OSError):
            self._files.close(made.fd)
        with suppress(OSError):
            self._files.unlink(made.path)
