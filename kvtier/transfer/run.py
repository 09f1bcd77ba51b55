"""One plan on its way: which rows have ended, and the completions that say so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvtier.core.plan import COMPLETED, NOWHERE, Completion, Plan, Priority, Reason, Status, Tier
from kvtier.transfer.parts import Equipment
from kvtier.transfer.work import PIECE_BYTES


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
        self._answers: list[tuple[int, ...]] = []
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

    def part_ready(self, part: int) -> bool:
        """Whether every row's ``part`` is where it has to be: coarse, all parts come at once."""
        del part
        return not self._open

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
        self._answers.append((0, Status.FAILED, reason, Tier.ENGINE, 0, NOWHERE, NOWHERE, 0, 0, 0))

    def free_source(self) -> None:
        """The engine may use its pages again."""
        if not self._source_free and not self.final:
            self._source_free = True
            self._tell(source_free=True)

    def settle(self) -> None:
        """Report what ended since the last report once every row has, and again when the last quarantine is over."""
        if self.final or self._open:
            return
        self.final = not self.quarantined
        if self._answers or self.final:
            self._tell(source_free=True)

    def pieces(self, rows: list[int], nbytes: int) -> Iterator[list[int]]:
        """``rows`` in runs of about one piece of work each, ``nbytes`` a row."""
        size = max(1, PIECE_BYTES // max(1, nbytes))
        for at in range(0, len(rows), size):
            yield rows[at : at + size]

    def _answer(self, row: int, answer: tuple[int, ...]) -> None:
        self._answers.append(answer)
        if not self.answered[row]:
            self.answered[row] = True
            self._open -= 1

    def _tell(self, *, source_free: bool) -> None:
        rows = np.array(self._answers, COMPLETED) if self._answers else np.empty(0, COMPLETED)
        self._answers = []
        self.equipment.outbox.append(
            Completion(
                self.plan.plan_id, self.plan.rank, self.equipment.incarnation, rows, self.plan.chains,
                source_free=source_free, final=self.final,
            )
        )  # fmt: skip

    @property
    def priority(self) -> Priority:
        """The plan's class of service."""
        return self.plan.priority
