"""The disk tier of one directory: records in preallocated log segments, no journal.

The journeys: ``open`` recovers; ``place`` -> write -> ``written`` stores; ``locate`` -> read loads; ``unsynced`` ->
sync -> ``synced`` makes durable; ``reclaim`` gives a segment back; ``housekeep`` does what none of them waits for.
The tier never reads or writes a record itself, except to recover: lanes do, through an I/O engine.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtier.codecs.headers import Pages
from kvtier.config import MOST_SECONDS
from kvtier.core.memory import Bytes1D
from kvtier.core.plan import PAGE_BYTES, Reason, Table
from kvtier.errors import TierError
from kvtier.models import KVLayout
from kvtier.runtime.deadline import Deadline
from kvtier.runtime.seam import Event, Files, Runtime, Worker
from kvtier.tiers.disk.book import SegmentBook
from kvtier.tiers.disk.directory import PlacementDirectory, explained
from kvtier.tiers.disk.geometry import clean_pool_for, segment_pages_for
from kvtier.tiers.disk.housekeeping import Housekeeper
from kvtier.tiers.disk.places import DiskEvents, Place, SyncTarget
from kvtier.tiers.disk.recovery import Found, Recovery, SegmentReader
from kvtier.tiers.disk.segment import Segment, Stage

log = logging.getLogger(__name__)

_NO_FILE: Final = frozenset({errno.ENOTSUP, errno.EISDIR, errno.ELOOP})
"""What opening a FIFO, a directory or a link ends with: it has a segment's name, and takes nothing of the capacity."""


@dataclass(frozen=True, slots=True)
class _Closing:
    """A thread that writes what closing owes, and what says that it has nothing left to write."""

    worker: Worker
    done: Event


class DiskTier:
    """One directory. ``place`` to ``take_events`` are safe to call from any thread, and none of them waits for a disk.

    ``housekeep`` belongs to one loop, which sleeps on ``wake``; ``open`` and ``close`` come before and after it. Any
    number of threads may close.
    """

    wake: Event
    """Set whenever ``housekeep`` has something new to do. The owner may put its own event here before ``open``."""

    def __init__(
        self,
        files: Files,
        runtime: Runtime,
        *,
        directory: str,
        layout: KVLayout,
        capacity_bytes: int,
        segment_bytes: int | None,
        clean_segments: int | None = None,
        owner: str = "",
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Nothing is touched before ``open``.

        ``segment_bytes`` None chooses. ``clean_segments`` are kept ready ahead, fewer where the capacity is small;
        None chooses. ``owner`` says in the lock file, for people, who uses the directory.

        Raises:
            CapacityError: the capacity is too small for the layout's records.
            ConfigError: a segment of ``segment_bytes`` is, or does not go with the capacity.
        """
        pages = segment_pages_for(max(layout.record_pages), capacity_bytes, segment_bytes)
        self.segment_bytes = pages * PAGE_BYTES
        self.capacity_bytes = capacity_bytes // self.segment_bytes * self.segment_bytes
        self.placement = bytes.fromhex(layout.placement)
        self.recovery = Recovery()
        self.wake = runtime.event()
        self._files = files
        self._clock = runtime.clock
        self._runtime = runtime
        self._closing_lock = runtime.lock()
        self._closing: _Closing | None = None
        self._held = ExitStack()  # what giving back takes, the last step first
        self._is_open = False
        self._given_back = runtime.event()
        self._given_back.set()
        self._layout = layout
        self._directory = PlacementDirectory(files, directory, layout, owner=owner, random_bytes=random_bytes)
        self._book = SegmentBook(
            runtime.lock(), runtime.clock, self._wake_up, segment_pages=pages,
            capacity_pages=capacity_bytes // PAGE_BYTES,
            pool=clean_pool_for(pages, capacity_bytes // PAGE_BYTES, clean_segments),
        )  # fmt: skip
        self._housekeeper = Housekeeper(files, runtime.clock, self._directory, self._book)

    # --- opening and closing ----------------------------------------------------------------------------------------

    def open(self) -> Iterator[Table]:
        """Lock the directory and recover what is in it, in batches of rows (dtype ``RECOVERED``), writable copies.

        All of them must be taken before the first record is placed. A key may come more than once: which copy wins is
        the caller's to say. What is damaged, foreign or cannot be read is counted in ``recovery`` and told in the log
        before anything is written over, never raised.

        Raises:
            TierError: the directory cannot be used; nothing that was in it is changed.
        """
        self._is_open = True
        for step in (self._leave_directory, self._close_segments, self._housekeeper.close):
            self._held.callback(step)
        try:
            self._directory.open(self._clock.wall())
            with explained(self.path):
                numbers = self._directory.segment_numbers()
                self._check_room(numbers)
        except BaseException:
            self.give_back()
            raise
        return self._recover(numbers)

    def close(self, timeout_s: float = MOST_SECONDS) -> bool:
        """Seal what is full, make the rest durable, and give everything back; idempotent. True when all of it is done.

        It takes ``timeout_s`` seconds at most. False: the device did not answer in time. What was not synced may not
        survive a power cut, and everything stays open; calling again goes on, also where Ctrl-C ended it.
        Partly filled segments stay open and are filled on in the next life. Files that something is still under way
        to are left to the process, so that no descriptor is used twice.
        """
        deadline, began_s = Deadline(self._clock, timeout_s), self._clock.monotonic()
        self._book.stop_placing()
        all_written = self._write_rest(deadline)
        self.write_log()
        if not all_written:
            log.warning(
                "disk directory %s: %d segments are not sealed or synced after %.1f s: what is in them may not survive"
                " a power cut", self.path, self._owed, self._clock.monotonic() - began_s,
            )  # fmt: skip
            return False
        self.give_back()
        return self._given_back.wait(deadline.left_s()) and not self._is_open

    def give_back(self) -> None:
        """Close every file and leave the directory, and write nothing; idempotent. For an opening that failed."""
        with self._closing_lock:
            if not self._is_open:
                return
            self._is_open = False
            self._given_back.clear()
        try:
            self._held.close()  # each step once, whatever becomes of the others
        except BaseException:
            self._is_open = True  # Ctrl-C: whoever closes again takes the steps that are left
            raise
        finally:
            self._given_back.set()

    # --- the lanes --------------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """The directory of this placement."""
        return self._directory.path

    @property
    def nonce(self) -> bytes:
        """What the header of every record in this store carries, 16 bytes."""
        return self._directory.superblock.nonce

    @property
    def usable(self) -> bool:
        """False once the directory is gone."""
        return self._book.health.usable

    @property
    def writable(self) -> bool:
        """False where nothing will ever be placed in this life: it is gone, or a newer version made it."""
        return self.usable and not self._directory.read_only

    @property
    def takes_writes(self) -> bool:
        """False where it is not writable, or is left alone for a while because segment after segment failed."""
        return self.writable and self._book.health.takes_writes

    def place(self, pages: int, most: int = 1) -> Place | None:
        """Room for records of ``pages`` 4 KiB pages each, adjacent, as many of ``most`` as fit one segment.

        None while no clean segment is ready. Every place ends with exactly one of ``written``, ``failed`` and
        ``abandoned``.

        Raises:
            CapacityError: no segment will ever be large enough.
        """
        return self._book.place(pages, most)

    def written(self, place: Place, headers: Pages | Bytes1D) -> None:
        """The write to ``place`` returned; ``headers`` are the header pages that it wrote, in order.

        Of a single record it may be the page itself, uint8 ``[4096]``.
        """
        pages = headers if isinstance(headers, Pages) else Pages(headers[None], np.zeros(1, np.intp))
        self._book.written(place, pages)

    def failed(self, place: Place, error: OSError | None = None) -> None:
        """The write to ``place`` failed: its segment takes no more, keeps what it has, and is reclaimed in time.

        With ECANCELED it was cut short by an engine that closes, and the segment is as good as before.
        """
        self._book.failed(place, error)

    def abandoned(self, place: Place) -> None:
        """No write to ``place`` was begun, and none will be: a hole, and no fault of the segment."""
        self._book.abandoned(place)

    def locate(self, segment: int, generation: int) -> int | None:
        """The file to read this life of a segment from; None when there is none any more."""
        return self._book.locate(segment, generation)

    def unsynced(self) -> list[SyncTarget]:
        """What must be synced so that everything written so far is durable."""
        return self._book.unsynced()

    def begin_sync(self, target: SyncTarget) -> bool:
        """Ask before the sync is issued; False while another sync of this file is under way, or when ``sync_over``."""
        return self._book.begin_sync(target)

    def sync_over(self, target: SyncTarget) -> Reason | None:
        """How a sync ended that will never be begun: NONE, nothing is left to sync, or IO_ERROR. None: it may be."""
        return self._book.sync_over(target)

    def synced(self, target: SyncTarget, error: OSError | None) -> None:
        """The sync ended. After an error the segment takes no more, and is never synced again.

        ECANCELED is none: the sync never began, and the next one tells the truth.
        """
        self._book.synced(target, error)

    def reclaim(self, segment: int, generation: int) -> None:
        """This life of a segment is unpublished and nobody reads it: write it anew. Ends with a ``reclaimed`` event."""
        self._book.reclaim(segment, generation)

    def take_events(self) -> DiskEvents | None:
        """What changed since the last call; None when nothing did."""
        return self._book.take_events()

    def stages(self) -> Counter[str]:
        """Segments by stage, every stage named: "clean", "open", "full" and so on."""
        return self._book.stages()

    def housekeep(self) -> bool:
        """One bounded step of background work; True when there may be more to do now."""
        busy = self._housekeeper.step()
        self.write_log()
        return busy

    def write_log(self) -> None:
        """Log what was noticed since the last call; with no lock held."""
        self._book.remarks.write()

    # --- below ------------------------------------------------------------------------------------------------------

    def _wake_up(self) -> None:
        self.wake.set()

    def _check_room(self, numbers: list[int]) -> None:
        free_bytes = self._files.free_bytes(self.path)
        if not numbers and free_bytes < self.segment_bytes:
            raise TierError(
                f"disk directory {self.path}: its file system has {free_bytes} bytes free and a segment takes "
                f"{self.segment_bytes}; make room, or lower disk.capacity or disk.segment"
            )

    def _recover(self, numbers: list[int]) -> Iterator[Table]:
        reader = SegmentReader(self._files, self._directory.superblock, self._layout)
        highest = 0
        for number in numbers:
            segment, found = self._read_segment(reader, number)
            self._book.add(segment)
            highest = max(highest, segment.generation)
            if found is not None:
                self.recovery.add(found)
                if len(found.entries):
                    highest = max(highest, int(found.entries["sequence"].max()))
                    yield found.entries.copy()
        if complaint := self.recovery.complaint(read_only=self._directory.read_only):
            log.warning("disk directory %s: not all of its blocks are found: %s", self.path, complaint)
        if self._directory.read_only:
            self._book.health.standing_reason = "made by a newer version of kvtier: it is read, and not written"
        else:
            self._directory.remove_unfinished()
            self._book.begin_life(self._directory.superblock.sequence, highest)

    def _read_segment(self, reader: SegmentReader, number: int) -> tuple[Segment, Found | None]:
        """Open one file. One that the device cannot read is left alone: it may be able to next time.

        Until the book has it, nobody else knows of the descriptor.
        """
        fd = -1
        found: Found | None
        try:
            fd = self._files.open(self._directory.segment_path(number), writable=not self._directory.read_only)
            found = reader.read(fd, number)
            segment = _segment_of(found, number, fd, self._files.size(fd) // PAGE_BYTES)
        except OSError as error:
            self.recovery.add_unreadable(number, error)
            pages = 0 if error.errno in _NO_FILE else self.segment_bytes // PAGE_BYTES
            found, segment = None, Segment(number, fd, pages, 0, 0, Stage.UNREADABLE)
        except BaseException:
            if fd >= 0:
                self._close_file(fd, f"segment {number}")
            raise
        return segment, found

    @property
    def _owed(self) -> int:
        """Segments that closing has to write to, in a directory that can be written."""
        return self._book.owes if self.writable else 0

    def _write_rest(self, deadline: Deadline) -> bool:
        with self._closing_lock:
            if self._owed and deadline.left_s() and (self._closing is None or self._closing.done.wait(0)):
                self._closing = self._begin_closing()
            closing = self._closing
        if closing is not None and closing.done.wait(deadline.left_s()):
            closing.worker.stop(deadline.left_s())
        return not self._owed

    def _begin_closing(self) -> _Closing | None:
        """Write what is owed, on a thread that a device which does not answer keeps in place of who closes.

        Nor does Ctrl-C strike there, in the middle of a sync that nobody could tell the outcome of.
        """
        done = self._runtime.event()

        def step() -> bool:
            more = False
            try:
                more = self._write_one()
            finally:
                if not more:
                    done.set()
            return more

        try:
            return _Closing(self._runtime.spawn("closing", step, self._runtime.event()), done)
        except TierError as error:
            log.warning("disk directory %s: nothing is sealed or synced now: %s", self.path, error)
            return None

    def _close_segments(self) -> None:
        with ExitStack() as steps:
            steps.callback(self._book.segments.clear)
            for segment in self._book.segments.values():
                steps.callback(self._close_segment, segment)

    def _close_segment(self, segment: Segment) -> None:
        fd, segment.fd = segment.fd, -1  # first: a second time it may be a stranger's
        if segment.idle and fd >= 0:
            self._close_file(fd, f"segment {segment.number}")

    def _close_file(self, fd: int, what: str) -> None:
        try:
            self._files.close(fd)
        except OSError as error:  # it is closed all the same; NFS and quotas tell so late what they did not write
            log.warning("disk directory %s: closing %s failed: %s", self.path, what, error)

    def _leave_directory(self) -> None:
        try:
            self._directory.close()
        except OSError as error:  # as above: the lock is gone
            log.warning("disk directory %s: closing its lock failed: %s", self.path, error)

    def _write_one(self) -> bool:
        """One step of sealing, or one sync; False when neither is left."""
        return self.writable and (self._housekeeper.seal() or self._sync_one())

    def _sync_one(self) -> bool:
        for target in self._book.unsynced():
            if target.fd < 0 or not self._book.begin_sync(target):
                continue
            error = None
            try:
                self._files.sync(target.fd)
            except OSError as failure:
                error = failure
            self._book.synced(target, error)
            return True
        return False


def _segment_of(found: Found, number: int, fd: int, file_pages: int) -> Segment:
    header = found.header
    if header is None:
        return Segment(number, fd, file_pages, 0, 0, Stage.RECLAIMING)
    segment = Segment(number, fd, header.pages, header.generation, found.slot, Stage.SEALED)
    if found.footed:
        return segment
    segment.entries += np.ascontiguousarray(found.entries).tobytes()
    segment.placed = segment.writes = len(found.entries)
    segment.cursor = found.end
    if file_pages < header.pages or found.unreadable:
        segment.stage = Stage.POISONED
    elif found.sealed:
        segment.stage = Stage.FULL
    else:
        segment.stage = Stage.OPEN if segment.writes else Stage.CLEAN
    return segment
