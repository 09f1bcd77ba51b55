"""Hops in flight: one plan per rank over the same rows, and what the ranks have answered so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import COMPLETED, NOWHERE, Completion, PlanKind, Reason, Status, Table, Tier
from kvtier.index.entries import EntryRows, Mask
from kvtier.planner.tickets import Ticket

Ints: TypeAlias = npt.NDArray[np.int32]
Extent: TypeAlias = tuple[int, int, int]
"""(rank, first page, pages) of a host arena."""

HOP_BYTES: Final = 32 << 20
_SILENT: Final = 255


@dataclass(slots=True, eq=False)
class Join:
    """A ticket that waits for rows of somebody else's hop: row ``rows[i]`` is its block ``blocks[i]``."""

    ticket: Ticket
    rows: Ints
    blocks: Ints


@dataclass(slots=True, eq=False)
class Targets:
    """Host extents reserved on one rank; NOWHERE for rows without one."""

    page: Ints
    pages: Ints

    def merged(self, other: Targets) -> Targets:
        """Both, which are of different rows of one hop."""
        mine = self.page >= 0
        return Targets(np.where(mine, self.page, other.page), np.where(mine, self.pages, other.pages))


@dataclass(slots=True, eq=False)
class Hop:
    """One hop over ``entries`` on all ranks of ``ranks`` (a bit mask).

    ``blocks`` are the rows' positions in the request. Masks hold the ranks that have not answered every row yet, not
    released the source yet, not said their last word yet.
    """

    plan_id: int
    kind: PlanKind
    entries: EntryRows
    blocks: Ints
    ranks: int
    version: str
    ticket: Ticket | None = None
    targets: dict[int, Targets] = field(default_factory=dict)
    joins: list[Join] = field(default_factory=list)
    segment: int = NOWHERE
    generation: int = 0
    nbytes: int = 0
    failed: Mask = field(init=False)
    reason: npt.NDArray[np.uint8] = field(init=False)
    answers: dict[int, Table] = field(default_factory=dict)
    unanswered: dict[int, int] = field(init=False)
    sources_left: int = field(init=False)
    finals_left: int = field(init=False)
    source_told: bool = False
    settled: bool = False
    _quarantined: bool = False

    def __post_init__(self) -> None:
        """Nobody has answered yet."""
        count = max(1, len(self.entries))
        self.failed = np.zeros(count, np.bool_)
        self.reason = np.zeros(count, np.uint8)
        self.sources_left = self.finals_left = self.ranks
        self.unanswered = {rank: len(self.entries) for rank in range(self.ranks.bit_length()) if self.ranks >> rank & 1}
        for rank in self.unanswered:
            self.answers[rank] = np.zeros(len(self.entries), COMPLETED)
            self.answers[rank]["status"] = _SILENT

    @property
    def answered(self) -> bool:
        """Whether every rank has said how every row ended."""
        return not any(self.unanswered.values())

    def take(self, completion: Completion) -> list[Extent]:
        """Note what one rank reports; returns the reserved room that its rows do not need any more."""
        rank, rows = completion.rank, completion.rows
        if not len(rows):
            return []
        freed: list[Extent] = []
        if rows["status"].any():
            freed, rows = self._take_trouble(rank, rows)
        if len(self.entries) and len(rows):
            fresh = np.count_nonzero(self.answers[rank]["status"][rows["row"]] == _SILENT)
            self.answers[rank][rows["row"]] = rows
            self.unanswered[rank] -= int(fresh)
            if rank in self.targets:
                freed += self._surplus(rank, rows)
        return freed

    def _take_trouble(self, rank: int, rows: Table) -> tuple[list[Extent], Table]:
        """Note failures and releases; returns what the releases free, and the rows that are answers."""
        released = rows["status"] == Status.RELEASED
        freed = self._free_quarantined(rank, rows["row"][released])
        rows = rows[~released]
        bad = rows["status"] != Status.OK
        self._fail(rows["row"][bad], rows["reason"][bad])
        self._quarantined = self._quarantined or bool((rows["status"] == Status.QUARANTINED).any())
        return freed, rows

    def end(self, rank: int) -> list[Extent]:
        """The last word of ``rank``: rows that it never answered failed; nothing of it is in flight any more."""
        silent, self.unanswered[rank] = self.unanswered[rank], 0
        self._rank_done(rank)
        if not silent and not self._quarantined:
            return []
        answers = self.answers[rank]
        unsaid = np.flatnonzero(answers["status"] == _SILENT)
        self._fail(unsaid, np.full(len(unsaid), Reason.GONE, np.uint8))
        answers["status"][unsaid] = Status.QUARANTINED
        return self._free_quarantined(rank, np.arange(len(answers)))

    def void(self, rank: int) -> None:
        """The memory and the answers of ``rank`` are worth nothing: it began a new life."""
        self.fail_all(Reason.GONE)
        self.answers[rank]["status"] = Status.FAILED
        self.targets.pop(rank, None)
        self._rank_done(rank)

    def fail_all(self, reason: Reason) -> None:
        """No row of it counts."""
        self.fail(np.arange(len(self.failed)), reason)

    def fail(self, rows: npt.NDArray[np.integer], reason: Reason) -> None:
        """These rows do not count."""
        self._fail(rows, np.full(len(rows), reason, np.uint8))

    def landed(self, rank: int, tier: Tier) -> Mask:
        """Rows of which ``rank`` made a copy in ``tier``."""
        answers = self.answers[rank]
        there: Mask = (answers["status"] == Status.OK) & (answers["tier"] == tier)
        return there

    def _rank_done(self, rank: int) -> None:
        self.unanswered[rank] = 0
        self.sources_left &= ~(1 << rank)
        self.finals_left &= ~(1 << rank)

    def _fail(self, rows: npt.NDArray[np.integer], reasons: npt.NDArray[np.uint8]) -> None:
        fresh = ~self.failed[rows]
        self.reason[rows[fresh]] = reasons[fresh]
        self.failed[rows] = True

    def _surplus(self, rank: int, rows: Table) -> list[Extent]:
        """Trim what landed to its length; free the reservation of what did not land."""
        targets, at = self.targets[rank], rows["row"]
        used = np.where((rows["status"] == Status.OK) & (rows["tier"] == Tier.HOST), rows["pages"], 0)
        first, reserved = targets.page[at], targets.pages[at]
        loose = (first >= 0) & (used < reserved) & (rows["status"] != Status.QUARANTINED)
        if not loose.any():
            return []
        loose_rows = loose.nonzero()[0]
        extents = [(rank, int(first[i] + used[i]), int(reserved[i] - used[i])) for i in loose_rows.tolist()]
        targets.page[at[loose_rows[used[loose_rows] == 0]]] = NOWHERE
        return extents

    def _free_quarantined(self, rank: int, rows: npt.NDArray[np.integer]) -> list[Extent]:
        answers, targets = self.answers[rank], self.targets.get(rank)
        rows = rows[answers["status"][rows] == Status.QUARANTINED] if len(rows) else rows
        answers["status"][rows] = Status.FAILED
        if targets is None:
            return []
        rows = rows[targets.page[rows] >= 0]
        extents = [(rank, int(targets.page[row]), int(targets.pages[row])) for row in rows.tolist()]
        targets.page[rows] = NOWHERE
        return extents


def stretches(rows: int, nbytes: int) -> list[slice]:
    """Cut ``rows`` rows of ``nbytes`` each into runs that are one hop: short enough for the hops to overlap."""
    size = max(1, HOP_BYTES // nbytes)
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]
