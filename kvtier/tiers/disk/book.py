"""All segments of a directory: which takes the next record, which is full, which must not be written any more.

Memory only, under one lock that is held for microseconds: the lanes take places and report writes, housekeeping asks
what to do next and reports how it went. Every change of a segment's stage is in this file.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable
from itertools import count
from typing import Final

from kvtier.codecs.headers import Pages
from kvtier.core.plan import PAGE_BYTES, Reason
from kvtier.errors import CapacityError
from kvtier.runtime.remarks import Remarks
from kvtier.runtime.seam import Clock, Lock
from kvtier.tiers.disk.geometry import CleanPool, largest_record_pages
from kvtier.tiers.disk.health import Health
from kvtier.tiers.disk.news import News
from kvtier.tiers.disk.places import DiskEvents, Place, SyncTarget
from kvtier.tiers.disk.segment import Segment, Stage
from kvtier.tiers.disk.traffic import Traffic

log = logging.getLogger(__name__)

_OF_A_LIFE: Final = 40
"""Generations and sequences begin at (life of the store) << 40: they are never used twice, whatever was lost."""
_RECLAIM_TRIES: Final = 2
"""Before a segment is given up for good, and then only if others can be written."""
_HOLDING: Final = frozenset((Stage.RECLAIMING, Stage.SEALED, Stage.POISONED, Stage.FULL))
"""Segments that hold blocks, and are not written any more."""


class SegmentBook:
    """The segments of one directory and what happens to each."""

    def __init__(
        self, lock: Lock, clock: Clock, wake: Callable[[], None], *, segment_pages: int, capacity_pages: int,
        pool: CleanPool,
    ) -> None:  # fmt: skip
        """``wake`` is called whenever housekeeping has something new to do. Nothing is placed before ``begin_life``."""
        self.segment_pages = segment_pages
        self.capacity_pages = capacity_pages
        self.pool = pool
        self.largest_record_pages = largest_record_pages(segment_pages)
        self.segments: dict[int, Segment] = {}
        self.health = Health(clock)
        self.remarks = Remarks(log)
        self._lock = lock
        self._wake = wake
        self._traffic = Traffic(clock)
        self._placing = False
        self._used_pages = 0
        self._odd = 0
        """Segments of another size: an earlier life was configured differently."""
        self._cleaned = 0
        """Segments that were made clean in this life."""
        self._next_generation = 0
        self._next_sequence = 0
        self._open: deque[Segment] = deque()
        """Those that take records; the first one does it now, and the others are of an earlier life."""
        self._clean: deque[Segment] = deque()
        self._full: deque[Segment] = deque()
        self._reclaiming: deque[Segment] = deque()
        self._queues = {
            Stage.OPEN: self._open, Stage.CLEAN: self._clean, Stage.FULL: self._full,
            Stage.RECLAIMING: self._reclaiming,
        }  # fmt: skip
        self._news = News()

    # --- opening and closing ----------------------------------------------------------------------------------------

    def begin_life(self, life: int, highest: int) -> None:
        """Every segment that was found is in: from now on records are placed, and the oldest segment goes first.

        ``highest`` is the highest number found, of a generation or a sequence: one of a later life, where the
        superblocks were lost or restored, is left behind, too.
        """
        with self._lock:
            for queue in self._queues.values():
                ordered = sorted(queue, key=lambda segment: segment.generation)
                queue.clear()
                queue.extend(ordered)
            life = max(life, (highest >> _OF_A_LIFE) + 1)
            self._next_generation = self._next_sequence = life << _OF_A_LIFE
            self._placing = True
        self._wake()

    def add(self, segment: Segment) -> None:
        """A segment that was found, or made."""
        with self._lock:
            self.segments[segment.number] = segment
            self._used_pages += segment.pages
            self._odd += segment.pages != self.segment_pages
            self._move(segment, segment.stage)
            if segment.stage in (Stage.SEALED, Stage.POISONED):
                self._news.may_be_reclaimed(segment)

    def stop_placing(self) -> None:
        """No record is placed any more."""
        with self._lock:
            self._placing = False

    @property
    def owes(self) -> int:
        """Segments that closing has to write to: full ones without a footer, and those that a sync would still help."""
        with self._lock:
            return sum(
                (segment.stage is Stage.FULL and not segment.in_flight)
                or (segment.unsynced and not segment.sync_failed)
                for segment in self.segments.values()
            )

    def turn_off(self, reason: str) -> None:
        """The directory cannot be used any more, for reading or writing."""
        with self._lock:
            self._placing, self.health.usable, self.health.standing_reason = False, False, reason
            while self._reclaiming:  # nobody will clean them
                self._news.reclaim_ended(self._reclaiming.popleft().number)
        self.remarks.add(logging.ERROR, f"disk tier off: {reason}")

    # --- what the lanes ask for -------------------------------------------------------------------------------------

    def place(self, pages: int, most: int = 1) -> Place | None:
        """Room for as many records of ``pages`` as fit a segment, up to ``most``; None while no segment is ready.

        Raises:
            CapacityError: no segment will ever be large enough.
        """
        if pages > self.largest_record_pages:
            raise CapacityError(
                f"a record of {pages * PAGE_BYTES} bytes does not fit into a segment of "
                f"{self.segment_pages * PAGE_BYTES}; raise disk.segment or use fewer tokens per block"
            )
        with self._lock:
            if not self._placing or not self.health.takes_writes:
                return None
            segment = self._with_room(pages)
            if segment is None:
                return None
            count = segment.room_for(pages, most)
            place = segment.take(pages, count, self._next_sequence + 1)
            self._next_sequence += count
            self._traffic.began(count)
            return place

    def written(self, place: Place, headers: Pages) -> None:
        """The write to ``place`` returned; ``headers`` are the header pages that it wrote, one a record."""
        with self._lock:
            segment = self.segments[place.segment]
            segment.add_entries(place, headers)
            segment.writes += place.count
            self._ended(segment, place)

    def failed(self, place: Place, error: OSError | None) -> None:
        """The write to ``place`` failed: nothing more is written to its segment in this generation.

        Unless it was cancelled: then nobody knows of a fault, and it counts as abandoned.
        """
        if _is_cancelled(error):
            self.abandoned(place)
            return
        with self._lock:
            segment = self.segments[place.segment]
            poisoned = self._poison(segment)
            self._ended(segment, place)
        if poisoned:
            self._tell_poisoned(segment, f"a write failed: {error}")

    def abandoned(self, place: Place) -> None:
        """Nothing was written to ``place`` and nothing will be; the segment is as good as before."""
        with self._lock:
            self._ended(self.segments[place.segment], place)

    def locate(self, number: int, generation: int) -> int | None:
        """The file that holds this life of a segment; None when there is none any more."""
        segment = self.segments.get(number)
        if segment is None or segment.generation != generation or not self.health.usable or segment.fd < 0:
            return None
        self._traffic.seen()
        return segment.fd

    def unsynced(self) -> list[SyncTarget]:
        """What must be synced so that everything written so far is durable."""
        with self._lock:
            return [segment.sync_target() for segment in self.segments.values() if segment.unsynced]

    def begin_sync(self, target: SyncTarget) -> bool:
        """Ask before a sync is issued; False while another sync of the same file is under way, or when ``sync_over``.

        Two at a time would be wrong: the kernel reports a failure once per open file, to one of them. It covers all
        that was written when it begins, and not only what ``target`` asks for.
        """
        with self._lock:
            segment = self._relied_on(target)
            if segment is None or segment.syncing or _sync_over(segment, target) is not None:
                return False
            segment.syncing, segment.syncing_writes = True, segment.writes
            self._traffic.began()
            return True

    def sync_over(self, target: SyncTarget) -> Reason | None:
        """How a sync ended that will never be begun; None while it may be.

        NONE: another sync has covered it; or control has let go of that life of the segment, nobody relies on it, and
        its file is housekeeping's or another's. IO_ERROR: a sync of the file failed, and any later one would claim that
        what the kernel dropped is durable.
        """
        with self._lock:
            segment = self._relied_on(target)
            return Reason.NONE if segment is None else _sync_over(segment, target)

    def synced(self, target: SyncTarget, error: OSError | None) -> None:
        """A sync of ``target`` ended. One that failed is never tried again: the kernel may have dropped the data.

        One that was cancelled never began: what it was to make durable still can be.
        """
        with self._lock:
            self._traffic.ended()
            segment = self._in_life(target)
            if segment is None:
                return
            segment.syncing = False
            poisoned = error is not None and not _is_cancelled(error) and self._sync_failed(segment)
            if error is None:
                segment.synced_writes = max(segment.synced_writes, segment.syncing_writes)
                self.health.went_well()
            self._settle(segment)
        if poisoned:
            self._tell_poisoned(segment, f"a sync failed: {error}")

    def reclaim(self, number: int, generation: int) -> None:
        """Control has unpublished this life of a segment: it may be written anew. Ends with a ``reclaimed`` event."""
        with self._lock:
            segment = self.segments.get(number)
            if segment is None or segment.generation != generation or not self.health.usable:
                self._news.reclaim_ended(number)
            elif segment.stage in (Stage.SEALED, Stage.POISONED):
                self._move(segment, Stage.RECLAIMING)
        self._wake()

    def take_events(self) -> DiskEvents | None:
        """What changed since the last call; None when nothing did."""
        with self._lock:
            state = (self.health.usable, self.health.reason, len(self._clean), self._reclaims_wanted())
            return self._news.take(state)

    def stages(self) -> Counter[str]:
        """Segments by stage, every stage named: "clean", "open", "full" and so on."""
        with self._lock:
            found = Counter(segment.stage.name.lower() for segment in self.segments.values())
        return Counter({stage.name.lower(): found[stage.name.lower()] for stage in Stage})

    # --- what housekeeping asks for, and how it went ----------------------------------------------------------------

    @property
    def may_disturb(self) -> bool:
        """Whether clean segments should be made now: nobody is in the way, or there will soon be too few."""
        with self._lock:
            return self._traffic.quiet or self._is_short()

    @property
    def quiet(self) -> bool:
        """Whether nobody uses the directory."""
        with self._lock:
            return self._traffic.quiet

    @property
    def must_seal(self) -> bool:
        """Whether a full segment has to be sealed even though somebody uses the directory.

        As many may wait for it as there are kept clean. But control gives back sealed ones only, and none that is being
        read: once no clean segment is left, it gets all to choose from.
        """
        with self._lock:
            return len(self._full) > self._clean_wanted() or (not self._clean and self._reclaims_wanted() > 0)

    def new_generation(self) -> int:
        """One that no segment of this store has ever had."""
        with self._lock:
            self._next_generation += 1
            return self._next_generation

    def next_to_reclaim(self) -> Segment | None:
        """A segment to make clean, or a clean one too many.

        The caller ends with ``cleaned``, ``could_not_clean`` or ``dropped``.
        """
        with self._lock:
            if surplus := self._surplus_clean():
                self._clean.remove(surplus[0])
                return surplus[0]
            segment = _first_idle(self._reclaiming) if self.health.may_reclaim else None
            if segment is not None:
                self._reclaiming.remove(segment)
            return segment

    def is_hopeless(self, segment: Segment) -> bool:
        """Whether it could not be made clean again and again, while others could."""
        with self._lock:
            return segment.failed_reclaims >= _RECLAIM_TRIES and self._cleaned > segment.cleaned_before

    def next_to_seal(self) -> Segment | None:
        """A full segment that nothing is under way to: the oldest. Ends with what became of the step.

        That is ``footed``, ``sealed``, or ``could_not_seal``.
        """
        with self._lock:
            segment = _first_idle(self._full)
            if segment is not None:
                segment.syncing = True  # until the step is over, nobody else syncs this file
            return segment

    def footed(self, segment: Segment) -> None:
        """Its records and its footer are durable."""
        with self._lock:
            segment.synced_writes, segment.footed, segment.syncing = segment.writes, True, False

    def sealed(self, segment: Segment, slot: int) -> None:
        """Its header is durable, and says so."""
        with self._lock:
            self._move(segment, Stage.SEALED)
            segment.slot, segment.syncing = slot, False
            segment.entries = bytearray()
            self.health.went_well()
            self._news.may_be_reclaimed(segment)

    def could_not_seal(self, segment: Segment, error: Exception) -> None:
        """A sync or a write of the seal failed."""
        with self._lock:
            segment.syncing = False
            self._sync_failed(segment)
            self._settle(segment)
        self._tell_poisoned(segment, f"sealing it failed: {error}")

    def cleaned(self, segment: Segment, generation: int, slot: int) -> None:
        """Its header of a new generation is durable."""
        with self._lock:
            self._news.reclaim_ended(segment.number)
            segment.renew(generation, slot)
            self._move(segment, Stage.CLEAN)
            self._cleaned += 1
            self.health.went_well()

    def could_not_clean(self, segment: Segment, error: Exception) -> None:
        """Writing its new header failed. It is tried again, behind the others: what is wrong may pass.

        Until then control is asked for one more, to see whether that one can be written, and never for all of them.
        Where others are clean it is one fault, however often it is tried: they take records meanwhile.
        """
        with self._lock:
            first = not segment.failed_reclaims
            if first:
                segment.cleaned_before = self._cleaned
            segment.failed_reclaims += 1
            self._move(segment, Stage.RECLAIMING)
            self.health.could_not_reclaim()
            pauses = (first or not self._clean) and self.health.poisoned()
        if first:
            self.remarks.add(logging.WARNING, f"segment {segment.number} cannot be made clean for now: {error}")
        if pauses:
            self.remarks.add(logging.ERROR, f"disk tier: {self.health.reason}")

    def dropped(self, segment: Segment) -> None:
        """Its file is gone: too much for the capacity, of another size, or not writable."""
        with self._lock:
            self._news.reclaim_ended(segment.number)
            del self.segments[segment.number]
            self._used_pages -= segment.pages
            self._odd -= segment.pages != self.segment_pages

    def wants_segment(self) -> bool:
        """Whether a segment more should be made now."""
        with self._lock:
            return len(self._clean) < self._clean_wanted() and self._may_grow()

    def could_not_grow(self, reason: str) -> None:
        """Making a segment failed: go on with those that there are, and try again later."""
        with self._lock:
            self.health.could_not_grow(reason)
        self.remarks.add(
            logging.WARNING, f"disk tier cannot grow and goes on with {len(self.segments)} segments: {reason}"
        )

    def grew(self, segment: Segment) -> None:
        """``segment`` was made."""
        with self._lock:
            self.health.grew()
        self.add(segment)

    def exceeds_capacity(self) -> bool:
        """Whether there are more segments than the capacity allows."""
        with self._lock:
            return self._excess_pages > 0

    def free_number(self) -> int:
        """A number that no segment has."""
        with self._lock:
            return next(number for number in count() if number not in self.segments)

    # --- below, under the lock --------------------------------------------------------------------------------------

    def _with_room(self, pages: int) -> Segment | None:
        while True:
            if not self._open:
                if not self._clean:
                    return None
                self._move(self._clean[0], Stage.OPEN)
                self._wake()
            if self._open[0].fits(pages):
                return self._open[0]
            self._move(self._open[0], Stage.FULL)
            self._wake()

    def _move(self, segment: Segment, stage: Stage) -> None:
        """``segment`` is at ``stage`` from now on, and stands in that queue and no other."""
        for queue in self._queues.values():
            if segment in queue:
                queue.remove(segment)
        segment.stage = stage
        if stage in self._queues:
            self._queues[stage].append(segment)

    def _ended(self, segment: Segment, place: Place) -> None:
        segment.in_flight -= place.count
        self._traffic.ended(place.count)
        self._settle(segment)

    def _settle(self, segment: Segment) -> None:
        if not segment.idle:
            return
        if segment.stage is Stage.POISONED:
            self._news.may_be_reclaimed(segment)
        elif segment.stage in (Stage.FULL, Stage.RECLAIMING):
            self._wake()

    def _sync_failed(self, segment: Segment) -> bool:
        segment.sync_failed = True
        return self._poison(segment)

    def _poison(self, segment: Segment) -> bool:
        """True when it was good until now."""
        if segment.stage not in (Stage.OPEN, Stage.FULL):
            return False
        self._move(segment, Stage.POISONED)
        if self.health.poisoned():
            self.remarks.add(logging.ERROR, f"disk tier: {self.health.reason}")
        self._wake()
        return True

    def _tell_poisoned(self, segment: Segment, why: str) -> None:
        self.remarks.add(logging.WARNING, f"segment {segment.number} is not written any more: {why}")

    def _in_life(self, target: SyncTarget) -> Segment | None:
        segment = self.segments.get(target.segment)
        return segment if segment is not None and segment.generation == target.generation else None

    def _relied_on(self, target: SyncTarget) -> Segment | None:
        segment = self._in_life(target)
        return segment if segment is not None and segment.stage is not Stage.RECLAIMING else None

    @property
    def _excess_pages(self) -> int:
        """What the segments take beyond the capacity; below 0 there is room."""
        return self._used_pages - self.capacity_pages

    def _surplus_clean(self) -> list[Segment]:
        """Clean segments that have to go because a capacity became smaller: rather they than any that holds blocks."""
        excess_pages, left = self._excess_pages, len(self._clean)
        surplus = []
        for segment in self._clean:
            if excess_pages <= 0:
                break
            if segment.pages != self.segment_pages or left > self._clean_wanted():
                surplus.append(segment)
                excess_pages, left = excess_pages - segment.pages, left - 1
        return surplus

    def _may_grow(self) -> bool:
        room = self._used_pages + self.segment_pages <= self.capacity_pages
        return room and self._placing and self.health.may_grow

    def _is_short(self) -> bool:
        return len(self._clean) < min(self.pool.low, self._clean_wanted())

    def _clean_wanted(self) -> int:
        """Segments to keep clean; of fewer than the capacity allows, where the file system is full, the same share."""
        if self.health.may_grow:
            return self.pool.target
        return max(1, self.pool.target * self._used_pages // self.capacity_pages)

    def _reclaims_wanted(self) -> int:
        """How many segments control should give up in all, the oldest first, so that all fits and some are clean."""
        if not self._placing or self._may_grow():
            return 0
        surplus = self._surplus_clean()
        clean = len(self._clean) - len(surplus)
        wanted_pages = max(0, self._clean_wanted() - clean) * self.segment_pages
        over_pages = self._excess_pages - sum(segment.pages for segment in surplus)
        if over_pages > 0 or self.health.may_grow:
            wanted_pages += over_pages
        stuck = sum(segment.failed_reclaims > 0 for segment in self._reclaiming)
        return self._oldest_with(wanted_pages) + (stuck == 1)

    def _oldest_with(self, pages: int) -> int:
        """How many of the oldest segments that hold blocks take ``pages`` together."""
        if not self._odd:
            return max(0, -(-pages // self.segment_pages))
        holding = [segment for segment in self.segments.values() if segment.stage in _HOLDING]
        holding.sort(key=lambda segment: (segment.stage is not Stage.RECLAIMING, segment.generation))
        count = 0
        while pages > 0 and count < len(holding):
            pages -= holding[count].pages
            count += 1
        return count


def _sync_over(segment: Segment, target: SyncTarget) -> Reason | None:
    if segment.synced_writes >= target.writes:
        return Reason.NONE
    return Reason.IO_ERROR if segment.sync_failed else None


def _is_cancelled(error: OSError | None) -> bool:
    """Whether the request never began, because its I/O engine was closed."""
    return error is not None and error.errno == errno.ECANCELED


def _first_idle(queue: deque[Segment]) -> Segment | None:
    return next((segment for segment in queue if segment.idle), None)
