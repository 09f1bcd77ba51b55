"""One plan on its way: which rows have ended, and the completions that say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import COMPLETED, NOWHERE, Completion, Lost, Plan, Priority, Reason, Status, Table, Tier
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.shapes import RecordShape

Ints: TypeAlias = npt.NDArray[np.signedinteger[Any]]
_NO_ROWS: Final = np.empty(0, COMPLETED)


class Run:
    """What every kind of plan has in common; subclasses move the bytes. Called under the data plane's lock."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """Nothing has moved yet."""
        self.plan = plan
        self.equipment = equipment
        self.abandoned = False
        self.final = False
        self.answered = np.zeros(len(plan.rows), np.bool_)
        self.quarantined: set[int] = set()
        self._open = len(plan.rows)
        self._tables: list[Table] = []
        self._single: list[tuple[int, ...]] = []
        """Answers by row, in order: one may be quarantined first, and then released."""
        self._source_free = False

    def begin(self) -> None:
        """Queue the first work."""
        raise TypeError(f"{type(self).__name__} does not say how it begins")

    def abandon(self, reason: Reason) -> None:
        """Nobody waits any more: rows that have not begun end now, those in flight are quarantined till they return."""
        self.abandoned = True

    def end(self, reason: Reason) -> None:
        """Fail what has not ended: nobody works on it, or ever will."""
        for row in np.flatnonzero(~self.answered).tolist():
            self.failed(row, reason)
        if not len(self.plan.rows) and not self.final:
            self.failed_as_a_whole(reason)
        self.settle()

    # --- how rows end -----------------------------------------------------------------------------------------------

    def ok(
        self,
        row: int,
        *,
        moved_bytes: int,
        tier: Tier = Tier.ENGINE,
        segment: int = NOWHERE,
        page: int = NOWHERE,
        pages: int = 0,
        generation: int = 0,
        chain: int = 0,
    ) -> None:
        """Row ``row`` is where it has to be; ``tier`` and the place say where a new copy is."""
        self._answer(row, (row, Status.OK, Reason.NONE, tier, chain, segment, page, pages, generation, moved_bytes))

    def all_ok(
        self,
        rows: list[int],
        *,
        moved_bytes: Ints | int,
        tier: Ints | Tier = Tier.ENGINE,
        segment: int = NOWHERE,
        page: Ints | int = NOWHERE,
        pages: Ints | int = 0,
        generation: int = 0,
        chain: int = 0,
    ) -> None:
        """``rows``, none of which has ended before, are where they have to be: as ``ok`` of each."""
        table = np.zeros(len(rows), COMPLETED)
        table["row"], table["tier"], table["chain"], table["segment"] = rows, tier, chain, segment
        table["page"], table["pages"], table["generation"] = page, pages, generation
        table["moved_bytes"] = moved_bytes
        self._tables.append(table)
        self.answered[rows] = True
        self._open -= len(rows)

    def failed(self, row: int, reason: Reason) -> None:
        """Row ``row`` will not get there. One that was quarantined is released."""
        status = Status.FAILED
        if row in self.quarantined:
            self.quarantined.discard(row)
            status = Status.RELEASED
        self._answer(row, (row, status, reason, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0))

    def quarantine(self, row: int, reason: Reason) -> None:
        """Nobody waits for ``row`` any more, but something may still write to its target."""
        self.quarantined.add(row)
        self._answer(row, (row, Status.QUARANTINED, reason, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0))

    def failed_as_a_whole(self, reason: Reason) -> None:
        """A plan without rows failed."""
        self._single.append((0, Status.FAILED, reason, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0))

    def free_source(self) -> None:
        """The engine may use its pages again."""
        if not self._source_free and not self.final:
            self._source_free = True
            self._tell(source_free=True)

    def tell_lost(self, table: Table, tier: Tier) -> None:
        """Tell the index to forget the copies in ``table`` (dtype ``LOST``), all of them in ``tier``."""
        equipment = self.equipment
        equipment.metrics.add("lost_copies", len(table), tier=tier.label)
        equipment.outbox.append(Lost(equipment.rank, equipment.incarnation, table))

    def settle(self) -> None:
        """Report what ended since the last report once every row has, and again when the last quarantine is over."""
        if self.final or self._open:
            return
        self.final = not self.quarantined
        if self._tables or self._single or self.final:
            self._tell(source_free=True)

    def by_group(self, rows: Iterable[int]) -> Iterator[tuple[RecordShape, list[int]]]:
        """``rows`` of each group that has some, with what its records look like."""
        shapes, groups = self.equipment.shapes, self.plan.rows["group"].tolist()
        if len(shapes) == 1:
            yield shapes[0], list(rows)
            return
        for shape in shapes:
            own = [row for row in rows if groups[row] == shape.group]
            if own:
                yield shape, own

    def _answer(self, row: int, answer: tuple[int, ...]) -> None:
        self._single.append(answer)
        if not self.answered[row]:
            self.answered[row] = True
            self._open -= 1

    def _tell(self, *, source_free: bool) -> None:
        self.equipment.outbox.append(
            Completion(
                self.plan.plan_id, self.plan.rank, self.equipment.incarnation, self._take_answers(), self.plan.chains,
                source_free=source_free, final=self.final,
            )
        )  # fmt: skip

    def _take_answers(self) -> Table:
        """What was answered since the last time, by row: control takes in fastest what it need not sort."""
        tables, self._tables = self._tables, []
        if self._single:
            tables.append(np.array(self._single, COMPLETED))
            self._single = []
        if len(tables) < 2:
            return tables[0] if tables else _NO_ROWS
        rows = np.concatenate(tables)
        return rows[rows["row"].argsort(kind="stable")]

    @property
    def priority(self) -> Priority:
        """The plan's class of service."""
        return self.plan.priority
