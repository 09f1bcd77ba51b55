"""A data plane by itself, opened for tests, and plans made by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from kvtier import load_config
from kvtier.core.memory import PageTable
from kvtier.core.plan import NOWHERE, ROW, Completion, Message, Plan, PlanKind, Priority, Reason, Status
from kvtier.runtime.seam import Machine
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.transfer import DataPlane

LAYOUT = tiny_layout()
PAGES = LAYOUT.record_pages[0]
Ends = tuple[int, Counter[tuple[Status, Reason]]]


class Opened:
    """A data plane, and what it said; whoever has news for us takes it out at once."""

    def __init__(self, machine: Machine, **settings: Any) -> None:
        self.messages: list[Message] = []
        self.is_made = False
        config = load_config({"host": {"capacity": "1MiB", "staging": "1MiB"}} | settings)
        self.plane = DataPlane(config, LAYOUT, machine, on_news=self.listen)
        self.is_made = True
        self.listen()

    def listen(self) -> None:
        if self.is_made:
            self.messages += self.plane.poll()

    def ends(self) -> list[Ends]:
        """Per plan that ended since the last call, how many of its rows ended how."""
        messages, self.messages = self.messages, []
        ended = [message for message in messages if isinstance(message, Completion) and message.final]
        return [(message.plan_id, Counter(map(end_of, message.rows))) for message in ended]


def end_of(row: Any) -> tuple[Status, Reason]:
    return Status(row["status"]), Reason(row["reason"])


def all_well(number: int, count: int) -> list[Ends]:
    return [(number, Counter({(Status.OK, Reason.NONE): count}))]


def rows(count: int) -> np.ndarray:
    """Blocks of one sequence, with nothing that could be read or written."""
    table = np.zeros(count, ROW)
    table["block"], table["tokens"] = np.arange(count), LAYOUT.block_tokens
    for column in ("device_page", "host_page", "disk_segment", "target_page"):
        table[column] = NOWHERE
    return table


def store(plane: DataPlane, memory: Any, engine: PseudoEngine) -> Plan:
    """Block 0 of ``engine`` to host page 0."""
    table = rows(1)
    table["target_page"], table["target_pages"] = 0, PAGES
    pages = PageTable(plane.register(memory), engine.pages.table.groups)
    return Plan(1, 0, PlanKind.STORE, Priority.SPILL, table, pages=pages, stop=LAYOUT.block_tokens)


def spill(number: int, count: int) -> Plan:
    """What is in host page 0, ``count`` times."""
    table = rows(count)
    table["host_page"], table["host_pages"] = 0, PAGES
    return Plan(number, 0, PlanKind.SPILL, Priority.SPILL, table)


def sync(number: int) -> Plan:
    """What is written so far becomes durable."""
    return Plan(number, 0, PlanKind.SYNC, Priority.SPILL)
