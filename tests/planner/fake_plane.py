"""A data plane without data: it keeps which key lies where, answers plans as it is told, and objects to what cannot be.

It objects when two plans use one extent at the same time and one of them writes, and it knows, for every load,
what really lay in the place that the plan named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvtier.core.plan import (
    COMPLETED,
    DIRECTORY_SHIFT,
    LOST,
    NOWHERE,
    PAGE_BYTES,
    RECOVERED,
    Completion,
    DiskState,
    Farewell,
    Hello,
    Lost,
    Message,
    Plan,
    PlanKind,
    Reason,
    Recovered,
    Status,
    Tier,
)
from kvtier.models import KVLayout

Outcome = Status | Reason
"""What becomes of a row: OK, QUARANTINED, or the reason of its failure."""

SEGMENT_END = ARENA_END = 10**6


class Content(NamedTuple):
    """What a record holds."""

    key: bytes
    parent: bytes
    group: int
    lineage: int
    depth: int
    tokens: int


class Place(NamedTuple):
    """Where a record lies on disk."""

    segment: int
    generation: int
    page: int


@dataclass(eq=False)
class Flight:
    """A plan under way. ``quarantined`` rows have been answered but may still be written."""

    plan: Plan
    open: set[int]
    quarantined: set[int] = field(default_factory=set)

    def writes(self) -> Iterator[tuple[int, int]]:
        """Extents that it may still write."""
        for row in self.open | self.quarantined:
            yield from self._extent(self.plan.target, "target", row)

    def reads(self) -> Iterator[tuple[int, int]]:
        """Extents that it may still read."""
        for row in self.open if self.plan.kind != PlanKind.STORE else ():
            yield from self._extent(Tier.DEVICE, "device", row)
            yield from self._extent(Tier.HOST, "host", row)

    def _extent(self, tier: Tier, name: str, row: int) -> Iterator[tuple[int, int]]:
        page, pages = int(self.plan.rows[f"{name}_page"][row]), int(self.plan.rows[f"{name}_pages"][row])
        if page != NOWHERE:  # of no two tiers any pages are the same
            yield tier * ARENA_END + page, tier * ARENA_END + page + pages


@dataclass
class Segment:
    """One life of a segment: ``used`` pages from the first on."""

    generation: int = 1
    used: int = 0
    state: str = "clean"


class FakePlane:
    """One rank. ``outbox`` is what it has to say; ``loaded`` what loads brought, as (plan, block, content)."""

    def __init__(
        self,
        rank: int,
        *,
        host_pages: int,
        layout: KVLayout,
        device_pages: int = 0,
        segments: int = 0,
        segment_pages: int = 0,
        clean_target: int = 1,
        directories: int = 1,
    ) -> None:
        self.rank = rank
        self.incarnation = 1
        self.arena_pages = {Tier.DEVICE: device_pages, Tier.HOST: host_pages}
        self.layout = layout
        self.segment_pages = segment_pages
        self.clean_target = clean_target
        self.directories = range(directories)
        self.off: set[int] = set()
        numbers = [(at % directories << DIRECTORY_SHIFT) + at // directories for at in range(segments)]
        self.segments = {number: Segment() for number in sorted(numbers)}
        self.disk: dict[Place, tuple[Content, int, int]] = {}
        self.compress = False
        self.loaded: list[tuple[int, int, Content]] = []
        self.misplaced = 0
        self._sequence = 0
        self._begin_life()

    @property
    def host_pages(self) -> int:
        """Of its host arena."""
        return self.arena_pages[Tier.HOST]

    @host_pages.setter
    def host_pages(self, pages: int) -> None:
        self.arena_pages[Tier.HOST] = pages

    @property
    def usable(self) -> bool:
        """Whether there is a directory that takes records."""
        return bool(self.segments) and len(self.off) < len(self.directories)

    @usable.setter
    def usable(self, usable: bool) -> None:
        self.off = set() if usable else set(self.directories)

    def _begin_life(self) -> None:
        self.memory: dict[Tier, dict[int, tuple[Content, int]]] = {Tier.DEVICE: {}, Tier.HOST: {}}
        self.flights: dict[int, Flight] = {}
        self.outbox: list[Message] = []
        self.cancelled: list[int] = []
        self.dead = False

    # --- coming and going -------------------------------------------------------------------------------------------

    def hello(self) -> None:
        """Say who it is."""
        segment_bytes = self.segment_pages * PAGE_BYTES
        self.outbox.append(
            Hello(
                self.rank, self.incarnation, self.layout.placement, self.layout.block_tokens, self.layout.record_pages,
                self.arena_pages[Tier.HOST], len(self.segments) * segment_bytes, segment_bytes,
                tuple(f"/disk-{number}" for number in self.directories), self.arena_pages[Tier.DEVICE],
            )
        )  # fmt: skip

    def die(self) -> None:
        """Its process is gone: its channel says so after what it had said before."""
        outbox = self.outbox
        self._begin_life()
        self.outbox = [*outbox, Farewell(self.rank, self.incarnation)]
        self.dead = True

    def restart(self) -> None:
        """A new process in the same directory: host memory, plans and unsent messages are gone, the disk is not."""
        self._begin_life()
        self.incarnation += 1
        for segment in self.segments.values():
            segment.state = {"reclaiming": "sealed"}.get(segment.state, segment.state)
        self.hello()

    def recover(self, *, batch: int = SEGMENT_END, order: Callable[[list[Place]], None] = list.sort) -> None:
        """Report what is on disk, ``batch`` rows a message."""
        places = [place for place in self.disk if self._alive(place)]
        order(places)
        for at in range(0, len(places), batch):
            self.recovered(places[at : at + batch])
        self.outbox.append(Recovered(self.rank, self.incarnation, np.empty(0, RECOVERED), final=True))
        self.disk_state(sealed_anew=True)

    def recovered(self, places: list[Place]) -> None:
        """One batch."""
        rows = np.zeros(len(places), RECOVERED)
        for row, place in zip(rows, places, strict=True):
            content, pages, sequence = self.disk[place]
            row["key"] = np.frombuffer(content.key, np.uint8)
            row["parent"] = np.frombuffer(content.parent, np.uint8)
            row["group"], row["lineage"] = content.group, content.lineage
            row["depth"], row["tokens"] = content.depth, content.tokens
            row["segment"], row["generation"], row["page"] = place
            row["pages"], row["sequence"] = pages, sequence
        self.outbox.append(Recovered(self.rank, self.incarnation, rows))

    def disk_state(self, *, sealed_anew: bool = False, newly: tuple[int, ...] = ()) -> None:
        """Say how every directory is."""
        for directory in self.directories:
            mine = {at: one for at, one in self.segments.items() if at >> DIRECTORY_SHIFT == directory}
            clean = sum(segment.state == "clean" for segment in mine.values())
            told = [at for at in mine if sealed_anew or at in newly]
            sealed = [(at, mine[at].generation) for at in told if mine[at].state == "sealed"]
            usable = directory not in self.off
            self.outbox.append(
                DiskState(
                    self.rank, self.incarnation, usable, clean, max(0, self.clean_target - clean) if usable else 0,
                    np.array(sorted(sealed, key=lambda life: life[1]), np.int64).reshape(-1, 2), directory=directory,
                )
            )  # fmt: skip

    # --- plans ------------------------------------------------------------------------------------------------------

    def submit(self, plan: Plan) -> None:
        """Begin ``plan``: from now on it uses its extents."""
        assert plan.rank == self.rank
        flight = Flight(plan, set(range(len(plan.rows))))
        for other in self.flights.values():
            for extent in flight.writes():
                assert not any(_overlap(extent, used) for used in other.writes()), "two plans write one extent"
                assert not any(_overlap(extent, used) for used in other.reads()), "a plan writes what another reads"
            for extent in flight.reads():
                assert not any(_overlap(extent, used) for used in other.writes()), "a plan reads what another writes"
        self.flights[plan.plan_id] = flight

    def finish(self, plan_id: int, outcome: Callable[[int], Outcome] = lambda row: Status.OK) -> None:
        """Answer all rows that are open with one last completion; quarantined ones are left for ``release``."""
        flight = self.flights[plan_id]
        if not len(flight.plan.rows):
            self._finish_without_rows(flight, outcome(0))
        else:
            self.answer(plan_id, {row: outcome(row) for row in sorted(flight.open)})

    def answer(self, plan_id: int, outcomes: dict[int, Outcome], *, source_free: bool = True) -> None:
        """Answer some rows; with the last one the plan ends unless a row is quarantined."""
        flight = self.flights[plan_id]
        rows = [self._row(flight, row, outcome) for row, outcome in outcomes.items()]
        flight.open -= set(outcomes)
        final = not flight.open and not flight.quarantined
        self._complete(flight, rows, source_free=source_free or final, final=final)

    def free_source(self, plan_id: int) -> None:
        """The engine may use its pages again; nothing has ended."""
        self._complete(self.flights[plan_id], [], source_free=True, final=False)

    def release(self, plan_id: int, rows: set[int] | None = None) -> None:
        """What was quarantined is over: until now its target might have been written, and it was."""
        flight = self.flights[plan_id]
        over = flight.quarantined if rows is None else rows
        answers = []
        for row in sorted(over):
            page, pages = int(flight.plan.rows["target_page"][row]), int(flight.plan.rows["target_pages"][row])
            self._erase(flight.plan.target, page, page + pages)
            answers.append((row, Status.RELEASED, Reason.ABANDONED, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0))
        flight.quarantined = flight.quarantined - over
        self._complete(flight, answers, source_free=True, final=not flight.open and not flight.quarantined)

    def lose(self, key: bytes, group: int, tier: Tier, place: tuple[int, int, int]) -> None:
        """Report a copy as damaged; ``place`` is (segment, page, generation)."""
        table = np.zeros(1, LOST)
        table["key"] = np.frombuffer(key, np.uint8)
        table["group"], table["tier"], table["reason"] = group, tier, Reason.DAMAGED
        table["segment"], table["page"], table["generation"] = place
        self.outbox.append(Lost(self.rank, self.incarnation, table))

    # --- inside -----------------------------------------------------------------------------------------------------

    def _complete(self, flight: Flight, rows: list[tuple[int, ...]], *, source_free: bool, final: bool) -> None:
        plan = flight.plan
        if final:
            del self.flights[plan.plan_id]
        self.outbox.append(
            Completion(
                plan.plan_id, self.rank, self.incarnation, np.array(rows, COMPLETED), plan.chains,
                source_free=source_free, final=final,
            )
        )  # fmt: skip

    def _finish_without_rows(self, flight: Flight, outcome: Outcome) -> None:
        plan, rows = flight.plan, []
        if outcome is not Status.OK:
            rows.append((0, Status.FAILED, outcome, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0))
        elif plan.kind == PlanKind.RECLAIM:
            segment = self.segments[plan.segment]
            assert segment.state == "sealed", "only sealed segments are reclaimed"
            assert segment.generation == plan.generation
            self.segments[plan.segment] = Segment(segment.generation + 1)
        self._complete(flight, rows, source_free=True, final=True)
        if plan.kind == PlanKind.RECLAIM:
            self.disk_state()

    def _row(self, flight: Flight, row: int, outcome: Outcome) -> tuple[int, ...]:
        if outcome is Status.OK:
            outcome = getattr(self, "_run_" + flight.plan.kind.name.lower())(flight.plan, row)
        if isinstance(outcome, tuple):
            return outcome
        if outcome is Status.QUARANTINED:
            if flight.plan.rows["target_page"][row] == NOWHERE:
                outcome = Reason.ABANDONED
            else:
                flight.quarantined.add(row)
                return (row, Status.QUARANTINED, Reason.ABANDONED, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0)
        return (row, Status.FAILED, outcome, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0)

    def _run_store(self, plan: Plan, row: int) -> tuple[int, ...]:
        one = plan.rows[row]
        compress = self.compress and plan.target == Tier.HOST
        pages = max(1, int(one["target_pages"]) - (int(one["key"][0]) % 2 if compress else 0))
        return self._landed(plan, row, pages, _content(one))

    def _run_land(self, plan: Plan, row: int) -> tuple[int, ...] | Reason:
        one = plan.rows[row]
        content, pages = self.memory[Tier.DEVICE].get(int(one["device_page"]), (None, 0))
        if content is None or content.key != one["key"].tobytes():
            self.misplaced += 1
            return Reason.GONE
        assert one["parent"].tobytes() in (content.parent, bytes(32)), "a record with another parent"
        return self._landed(plan, row, pages, content)

    def _landed(self, plan: Plan, row: int, pages: int, content: Content) -> tuple[int, ...]:
        page = int(plan.rows["target_page"][row])
        self._write(plan.target, page, pages, content)
        return (row, Status.OK, 0, plan.target, 0, NOWHERE, page, pages, 0, pages * PAGE_BYTES)

    def _run_load(self, plan: Plan, row: int) -> tuple[int, ...] | Reason:
        one = plan.rows[row]
        wanted = (one["key"].tobytes(), int(one["group"]))
        tier, place, found = self._find(one)
        if tier is None:
            return Reason.GONE
        if found is None or (found[0].key, found[0].group) != wanted:
            self.misplaced += 1
            self.lose(*wanted, tier, place)
            return Reason.DAMAGED
        if plan.pages is not None:
            self.loaded.append((plan.plan_id, int(one["block"]), found[0]))
        if int(one["target_page"]) == NOWHERE or tier <= plan.target:
            return (row, Status.OK, 0, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, PAGE_BYTES)
        return self._landed(plan, row, found[1], found[0])

    def _find(self, one: np.void) -> tuple[Tier | None, tuple[int, int, int], tuple[Content, int] | None]:
        """The fastest copy that a row names, its (segment, page, generation), and what really lies there."""
        for tier, name in ((Tier.DEVICE, "device_page"), (Tier.HOST, "host_page")):
            if (page := int(one[name])) != NOWHERE:
                return tier, (-1, page, 0), self.memory[tier].get(page)
        place = Place(int(one["disk_segment"]), int(one["disk_generation"]), int(one["disk_page"]))
        if place.segment == NOWHERE:
            return None, (-1, -1, 0), None
        there = self.disk.get(place) if self._alive(place) else None
        return Tier.DISK, (place.segment, place.page, place.generation), there[:2] if there else None

    _run_fetch = _run_load

    def _run_spill(self, plan: Plan, row: int) -> tuple[int, ...] | Reason:
        one = plan.rows[row]
        content, pages = self.memory[Tier.HOST].get(int(one["host_page"]), (None, 0))
        if content is None or content.key != one["key"].tobytes():
            self.misplaced += 1
            return Reason.GONE
        place = self._place(pages) if self.usable else None
        if place is None:
            return Reason.NO_SPACE
        self._sequence += 1
        self.disk[place] = content, pages, self._sequence
        return (row, Status.OK, 0, Tier.DISK, 0, place.segment, place.page, pages, place.generation, pages * PAGE_BYTES)

    def _run_sync(self, plan: Plan, row: int) -> tuple[int, ...] | Reason:
        one = plan.rows[row]
        place = Place(int(one["disk_segment"]), int(one["disk_generation"]), int(one["disk_page"]))
        if place not in self.disk or not self._alive(place):
            self.misplaced += 1
            return Reason.GONE
        return (row, Status.OK, 0, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0)

    def _place(self, pages: int) -> Place | None:
        usable = {at: one for at, one in self.segments.items() if at >> DIRECTORY_SHIFT not in self.off}
        for at, segment in usable.items():
            if segment.state == "open" and segment.used + pages > self.segment_pages:
                segment.state = "sealed"
                self.disk_state(newly=(at,))
        for wanted in ("open", "clean"):
            for at, segment in usable.items():
                if segment.state == wanted:
                    segment.state = "open"
                    segment.used += pages
                    if wanted == "clean":
                        self.disk_state()
                    return Place(at, segment.generation, segment.used - pages)
        return None

    def _alive(self, place: Place) -> bool:
        return self.segments[place.segment].generation == place.generation

    def _write(self, tier: Tier, page: int, pages: int, content: Content) -> None:
        assert page >= 0
        assert page + pages <= self.arena_pages[tier]
        self._erase(tier, page, page + pages)
        self.memory[tier][page] = content, pages

    def _erase(self, tier: Tier, first: int, stop: int) -> None:
        for page, (_, pages) in list(self.memory[tier].items()):
            if _overlap((first, stop), (page, page + pages)):
                del self.memory[tier][page]


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _content(row: np.void) -> Content:
    return Content(
        row["key"].tobytes(), row["parent"].tobytes(), int(row["group"]), int(row["lineage"]), int(row["depth"]),
        int(row["tokens"]),
    )  # fmt: skip
