"""Hops in flight: one plan per rank over the same rows, and what the ranks have answered so far.

Nearly always a rank answers all rows of a hop at once, in order, and all is well: then its answer is kept as it came.
Anything else is taken apart row by row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import COMPLETED, NOWHERE, Completion, PlanKind, Reason, Status, Table, Tier
from kvtier.index.entries import EntryRows, Mask
from kvtier.planner.tickets import Ticket

Ints: TypeAlias = npt.NDArray[np.int32]
Extent: TypeAlias = tuple[int, int, int]
"""(rank, first page, pages) of a memory tier's arena."""

WRITE_HOP_BYTES: Final = 16 << 20
"""Of what goes to disk: the first blocks are written while the last ones are still gathered."""
FIRST_WRITE_HOP_BYTES: Final = 8 << 20
"""Of the same while nothing else is under way: the disk waits for the first hop, and for none behind it."""
STORE_HOP_BYTES: Final = 256 << 20
"""Of a store for whose disk copy nobody waits: every hop costs the control plane as much as a block or two."""
NO_ENTRIES: Final = np.empty(0, np.int32)
SILENT: Final = 255
"""In place of the status of a row that has not been answered."""

# Comparing an array with a member of an enum takes numpy five times as long as with a plain number.
_OK: Final = int(Status.OK)
_FAILED: Final = int(Status.FAILED)
_QUARANTINED: Final = int(Status.QUARANTINED)
_RELEASED: Final = int(Status.RELEASED)


@dataclass(slots=True, eq=False)
class Join:
    """A ticket that waits for rows of somebody else's hop: row ``rows[i]`` is its block ``blocks[i]``."""

    ticket: Ticket
    rows: Ints
    blocks: Ints


@dataclass(slots=True, eq=False)
class Share:
    """A ticket of a joint hop: ``rows`` are its blocks, one after another."""

    ticket: Ticket
    rows: range


@dataclass(slots=True, eq=False)
class Targets:
    """Extents reserved on one rank; NOWHERE for rows without one."""

    page: Ints
    pages: Ints

    def merged(self, other: Targets) -> Targets:
        """Both, which are of different rows of one hop."""
        mine = self.page >= 0
        return Targets(np.where(mine, self.page, other.page), np.where(mine, self.pages, other.pages))

    def of_rows(self, rows: slice | Mask) -> Targets:
        """Those of some rows."""
        return Targets(self.page[rows], self.pages[rows])


@dataclass(slots=True, eq=False)
class Hop:
    """One hop over ``entries`` on all ranks of ``ranks`` (a bit mask).

    ``blocks`` are the rows' positions in the request, which is that of ``ticket``, or of all ``shares`` together.
    ``failed`` maps rows that do not count to their first reason;
    ``answers`` holds what each rank said of every row, once it has said anything. Masks hold the ranks that have not
    released the source yet, and not said their last word yet.
    """

    plan_id: int
    kind: PlanKind
    entries: EntryRows
    blocks: Ints
    ranks: int
    version: str
    ticket: Ticket | None = None
    targets: dict[int, Targets] = field(default_factory=dict)
    tier: Tier = Tier.HOST
    """The memory tier that its targets are in."""
    joins: list[Join] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    between: EntryRows = field(default_factory=lambda: NO_ENTRIES)
    """Of a store: windows and states that no hit is likely to end with."""
    stored_at: int | None = None
    """Of a store: the next count of uses when it was asked for, the same for all of its hops."""
    segment: int = NOWHERE
    generation: int = 0
    nbytes: int = 0
    failed: dict[int, int] = field(default_factory=dict)
    answers: dict[int, Table] = field(default_factory=dict)
    unanswered: dict[int, int] = field(init=False)
    sources_left: int = field(init=False)
    finals_left: int = field(init=False)
    source_told: bool = False
    stores: bool = False
    """Whether its entries are those that are being stored."""
    settled: bool = False
    _quarantined: bool = False
    _row_of: dict[int, int] | None = None

    def __post_init__(self) -> None:
        """Nobody has answered yet."""
        ranks, count = self.ranks, len(self.entries)
        self.sources_left = self.finals_left = ranks
        self.unanswered = {0: count} if ranks == 1 else {r: count for r in range(ranks.bit_length()) if ranks >> r & 1}

    @property
    def row_of(self) -> dict[int, int]:
        """Of each entry, its row."""
        if self._row_of is None:
            self._row_of = {entry: row for row, entry in enumerate(self.entries.tolist())}
        return self._row_of

    @property
    def answered(self) -> bool:
        """Whether every rank has said how every row ended."""
        return not any(self.unanswered.values())

    def take(self, completion: Completion) -> list[Extent]:
        """Note what one rank reports; returns the reserved room that its rows do not need any more."""
        rank, rows = completion.rank, completion.rows
        if not len(rows):
            return []
        if rank not in self.answers and len(self.entries) and _is_plain(rows, len(self.entries)):
            self.answers[rank] = rows
            self.unanswered[rank] = 0
            return self._surplus(rank, rows)
        return self._take_apart(rank, rows)

    def _take_apart(self, rank: int, rows: Table) -> list[Extent]:
        freed: list[Extent] = []
        self._check_rows(rows["row"])
        if np.count_nonzero(rows["status"]):
            freed, rows = self._take_trouble(rank, rows)
        if len(self.entries) and len(rows):
            answers = self._answers_of(rank)
            self.unanswered[rank] -= int(np.count_nonzero(answers["status"][rows["row"]] == SILENT))
            answers[rows["row"]] = rows
            freed += self._surplus(rank, rows)
        return freed

    def _check_rows(self, rows: Ints) -> None:
        """Refuse rows that the hop does not have, before any is noted; one without entries may fail as row 0."""
        low, high, last = rows.min(), rows.max(), max(0, len(self.entries) - 1)
        if low < 0 or high > last:  # numpy would count those below 0 from the end
            raise ValueError(f"row {low if low < 0 else high}: places are reserved for rows 0 to {last}")

    def _take_trouble(self, rank: int, rows: Table) -> tuple[list[Extent], Table]:
        """Note failures and releases; returns what the releases free, and the rows that are answers."""
        released = rows["status"] == _RELEASED
        freed = self._free_quarantined(rank, rows["row"][released])
        rows = rows[~released]
        bad = rows["status"] != _OK
        self._fail(rows["row"][bad].tolist(), rows["reason"][bad].tolist())
        self._quarantined = self._quarantined or bool((rows["status"] == _QUARANTINED).any())
        return freed, rows

    def end(self, rank: int) -> list[Extent]:
        """The last word of ``rank``: rows that it never answered failed; nothing of it is in flight any more."""
        silent = self.unanswered[rank]
        self._rank_done(rank)
        if not silent and not self._quarantined:
            return []
        answers = self._answers_of(rank)
        unsaid = np.flatnonzero(answers["status"] == SILENT)
        self.fail(unsaid, Reason.GONE)
        answers["status"][unsaid] = _QUARANTINED
        return self._free_quarantined(rank, np.arange(len(answers)))

    @property
    def tickets(self) -> list[Ticket]:
        """Whoever waits for it."""
        own = [self.ticket] if self.ticket is not None else []
        return [*own, *(share.ticket for share in self.shares), *(join.ticket for join in self.joins)]

    def let_go(self) -> list[Ticket]:
        """Nobody waits for it any more; returns who did."""
        tickets = self.tickets
        self.ticket, self.shares, self.joins = None, [], []
        return tickets

    def distrust(self, rank: int, *, final: bool) -> None:
        """Nobody knows how far an answer of ``rank`` was taken in: no row counts, and its room is nobody's any more."""
        self.fail_all(Reason.REFUSED)
        self._answers_of(rank)["status"] = _FAILED
        self.targets.pop(rank, None)
        if final:
            self._rank_done(rank)

    def void(self, rank: int) -> None:
        """The memory and the answers of ``rank`` are worth nothing: it began a new life."""
        self.fail_all(Reason.GONE)
        self.answers.pop(rank, None)
        self._answers_of(rank)["status"] = _FAILED
        self.targets.pop(rank, None)
        self._rank_done(rank)

    def fail_all(self, reason: Reason) -> None:
        """No row of it counts."""
        self.fail(range(max(1, len(self.entries))), reason)

    def fail(self, rows: Iterable[int], reason: Reason) -> None:
        """These rows do not count."""
        for row in rows:
            self.failed.setdefault(int(row), reason)

    def good(self) -> Mask:
        """Rows that count."""
        good = np.ones(len(self.entries), np.bool_)
        if self.failed and len(good):
            good[list(self.failed)] = False
        return good

    def landed(self, rank: int, tier: Tier) -> Mask:
        """Rows of which ``rank`` made a copy in ``tier``."""
        answers = self._answers_of(rank)
        there: Mask = (answers["status"] == _OK) & (answers["tier"] == int(tier))
        return there

    def landed_whole(self) -> bool:
        """Whether every rank made a copy of every row in the tier of the targets."""
        if self.failed:
            return False
        whole = bytes((self.tier,)) * len(self.entries)
        return all(answers["tier"].tobytes() == whole for answers in self.answers.values())

    @property
    def moved_bytes(self) -> int:
        """Bytes that all ranks moved for it."""
        return sum(sum(answers["moved_bytes"].tolist()) for answers in self.answers.values())

    def _answers_of(self, rank: int) -> Table:
        """What ``rank`` said, to be written to; SILENT where it said nothing."""
        answers = self.answers.get(rank)
        if answers is None:
            answers = self.answers[rank] = np.zeros(len(self.entries), COMPLETED)
            answers["status"] = SILENT
        elif not answers.flags.writeable:  # it came over a wire
            answers = self.answers[rank] = answers.copy()
        return answers

    def _rank_done(self, rank: int) -> None:
        self.unanswered[rank] = 0
        self.sources_left &= ~(1 << rank)
        self.finals_left &= ~(1 << rank)

    def _fail(self, rows: list[int], reasons: list[int]) -> None:
        for row, reason in zip(rows, reasons, strict=True):
            self.failed.setdefault(row, reason)

    def _surplus(self, rank: int, rows: Table) -> list[Extent]:
        """Trim what landed to its length; free the reservation of what did not land."""
        targets, at = self.targets.get(rank), rows["row"]
        if targets is None:
            _check_nothing_landed(rows, self.tier)
            return []
        if _fills(rows, targets, self.tier):
            return []
        _check_places(rows, targets, self.tier)
        used = np.where((rows["status"] == _OK) & (rows["tier"] == int(self.tier)), rows["pages"], 0)
        first, reserved = targets.page[at], targets.pages[at]
        loose = (first >= 0) & (used < reserved) & (rows["status"] != _QUARANTINED)
        if not loose.any():
            return []
        loose_rows = loose.nonzero()[0]
        extents = [(rank, int(first[i] + used[i]), int(reserved[i] - used[i])) for i in loose_rows.tolist()]
        targets.page[at[loose_rows[used[loose_rows] == 0]]] = NOWHERE
        return extents

    def _free_quarantined(self, rank: int, rows: npt.NDArray[np.integer]) -> list[Extent]:
        answers, targets = self._answers_of(rank), self.targets.get(rank)
        rows = rows[answers["status"][rows] == _QUARANTINED] if len(rows) else rows
        answers["status"][rows] = _FAILED
        if targets is None:
            return []
        rows = rows[targets.page[rows] >= 0]
        extents = [(rank, int(targets.page[row]), int(targets.pages[row])) for row in rows.tolist()]
        targets.page[rows] = NOWHERE
        return extents


def _is_plain(rows: Table, count: int) -> bool:
    """Whether ``rows`` answer all of ``count`` rows in order, and all is well."""
    if len(rows) != count:
        return False
    if count == 1:
        return bool(rows["row"][0] == 0 and rows["status"][0] == _OK)
    return not np.count_nonzero(rows["status"]) and not np.count_nonzero(rows["row"] != np.arange(count))


def _fills(rows: Table, targets: Targets, tier: Tier) -> bool:
    """Whether ``rows`` answer all rows, and each of them takes all of its reserved extent."""
    return (
        rows["pages"].tobytes() == targets.pages.tobytes()
        and rows["page"].tobytes() == targets.page.tobytes()
        and rows["tier"].tobytes() == bytes((tier,)) * len(rows)
        and not np.count_nonzero(rows["status"])
        and len(rows) == len(targets.page)
    )


def _check_nothing_landed(rows: Table, tier: Tier) -> None:
    if int(tier) in rows["tier"].tolist():
        raise ValueError(f"a copy in {tier.label} memory where no room was reserved for one")


def _check_places(rows: Table, targets: Targets, tier: Tier) -> None:
    """What landed lies where room was reserved for it, and takes no more: nobody's word can publish another place."""
    there = (rows["status"] == _OK) & (rows["tier"] == int(tier))
    at, page, pages = rows["row"][there], rows["page"][there], rows["pages"][there]
    fits = (at >= 0) & (page == targets.page[at]) & (page >= 0) & (pages > 0) & (pages <= targets.pages[at])
    if not fits.all():
        worst = int(np.flatnonzero(~fits)[0])
        raise ValueError(f"row {at[worst]}: {pages[worst]} pages at {page[worst]} are not what was reserved for it")


def stretches(rows: int, nbytes: int, hop_bytes: int, *, first_bytes: int | None = None) -> list[slice]:
    """Cut ``rows`` rows of ``nbytes`` each into runs that are one hop; from ``first_bytes`` on each twice the last."""
    most = max(1, hop_bytes // nbytes)
    size = most if first_bytes is None else max(1, first_bytes // nbytes)
    runs, at = [], 0
    while at < rows:
        stop = min(at + size, rows)
        runs.append(slice(at, stop))
        at, size = stop, min(2 * size, most)
    return runs
