"""Closing a data plane whose threads are in the middle of something."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvtier.config import load_config
from kvtier.core.memory import PageTable
from kvtier.core.plan import ROW, Completion, Plan, PlanKind, Priority, Reason
from kvtier.runtime import system_machine
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.transfer import DataPlane

LAYOUT = tiny_layout()


class HeldMemory:
    """Engine memory whose copies wait until they are let go."""

    placement = LAYOUT.placement

    def __init__(self) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()

    def check(self, table: PageTable, start: int, stop: int) -> None:
        """Everything fits."""

    def gather(self, *_: object) -> None:
        self.entered.set()
        assert self.go_on.wait(60)

    scatter = gather


@pytest.mark.timeout(60)
def test_a_second_close_waits_for_what_still_runs_and_for_nothing_that_nobody_runs() -> None:
    """The copy thread that was told to stop ends its piece; nobody takes the next one, so it ends as closed."""
    config = load_config({"host": {"capacity": "1MiB", "staging": "1MiB", "copy_threads": 1}})
    memory, plane = HeldMemory(), DataPlane(config, LAYOUT, system_machine("threads"))
    pages = PageTable(plane.register(memory), PseudoEngine(LAYOUT, 1).pages.table.groups)
    rows = np.zeros(1, ROW)
    rows["target_pages"] = 2
    plane.submit(
        Plan(number, 0, PlanKind.STORE, Priority.SPILL, rows, pages=pages, stop=LAYOUT.block_tokens)
        for number in range(2)
    )
    assert memory.entered.wait(60)
    assert not plane.close(0.01)
    memory.go_on.set()
    assert plane.close(3600)
    ended = {message.plan_id: message for message in plane.poll() if isinstance(message, Completion) and message.final}
    assert {number: int(message.rows["reason"][0]) for number, message in ended.items()} == {
        0: Reason.NONE, 1: Reason.CLOSED,
    }  # fmt: skip
