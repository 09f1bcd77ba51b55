"""How rows of a plan end: one by one and all at once, told in order."""

from __future__ import annotations

from typing import Any, cast
from unittest.mock import Mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.plan import COMPLETED, PAGE_BYTES, ROW, Completion, Plan, PlanKind, Priority, Reason, Status, Tier
from kvtier.transfer.run import Run

COUNT = 6


def _run() -> Run:
    equipment = Mock(outbox=[], incarnation=1)
    return Run(Plan(1, 0, PlanKind.SPILL, Priority.SPILL, np.zeros(COUNT, ROW)), equipment)


def _told(run: Run) -> Completion:
    run.settle()
    [completion] = cast(Any, run.equipment).outbox
    assert completion.final
    return cast(Completion, completion)


@given(st.permutations(range(COUNT)), st.integers(0, COUNT), st.integers(0, COUNT))
def test_rows_that_end_together_are_told_as_if_each_had_ended_by_itself(
    order: list[int], first: int, second: int
) -> None:
    one_by_one, together = _run(), _run()
    cuts = sorted((first, second))
    for begin, end in ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], COUNT)):
        rows = sorted(order[begin:end])
        places = {"segment": 7 + begin, "generation": 1 << 40, "chain": 1, "tier": Tier.DISK, "pages": 17}
        pages = 100 * begin + 17 * np.arange(len(rows))
        for row, page in zip(rows, pages.tolist(), strict=True):
            one_by_one.ok(row, moved_bytes=17 * PAGE_BYTES, page=page, **places)  # type: ignore[arg-type]
        together.all_ok(rows, moved_bytes=17 * PAGE_BYTES, page=pages, **places)  # type: ignore[arg-type]
    singly, at_once = _told(one_by_one), _told(together)
    singly.rows.sort(order="row")
    assert at_once.rows.dtype == COMPLETED
    assert at_once.rows.tobytes() == singly.rows.tobytes()


@given(st.permutations(range(COUNT)), st.integers(1, COUNT - 1))
def test_answers_are_told_by_row_whatever_ended_first_and_however(order: list[int], well: int) -> None:
    run = _run()
    for row in order[well:]:
        run.failed(row, Reason.IO_ERROR)
    run.all_ok(sorted(order[:well]), moved_bytes=0)
    rows = _told(run).rows
    assert rows["row"].tolist() == list(range(COUNT))
    assert [row for row in range(COUNT) if rows["status"][row] == Status.FAILED] == sorted(order[well:])


def test_a_row_that_is_quarantined_and_then_released_is_told_so_in_that_order() -> None:
    run = _run()
    run.quarantine(2, Reason.ABANDONED)
    run.all_ok([0, 1, 3, 4, 5], moved_bytes=0)
    run.failed(2, Reason.ABANDONED)
    told = [(int(row["row"]), Status(row["status"])) for row in _told(run).rows]
    assert [status for row, status in told if row == 2] == [Status.QUARANTINED, Status.RELEASED]
