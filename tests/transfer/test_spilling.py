"""Spills that go through staging: who has its few buffers, and who goes on when some are free."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from kvtier.core.memory import PageTable
from kvtier.core.plan import NOWHERE, Completion, Lost, Plan, PlanKind, Priority, Reason, Status
from kvtier.errors import CorruptBlockError
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine
from kvtier.transfer import DataPlane, spilling
from kvtier.transfer.spilling import _WRITE_PATIENCE_S
from tests.transfer.opened import LAYOUT, PAGES, Ends, Opened, all_well, end_of, rows, spill, store

DISK = {"directories": ["/kv"], "capacity": "4MiB", "segment": "1MiB", "codec": "raw+lz4"}


class Coding(Opened):
    """A data plane in a simulation whose spills are coded; one block is in host memory.

    ``at_ends`` is how many staging buffers were in use whenever a plan was said to have ended.
    """

    def __init__(self) -> None:
        self.at_ends: list[int] = []
        self.world = Simulation(1)
        super().__init__(self.world.machine(), disk=DISK)
        self.share = self.buffers("staging_buffers") // 4
        engine = PseudoEngine(LAYOUT, 1)
        self.plane.submit([store(self.plane, engine.memory, engine)])
        assert self.ends_after(1) == all_well(1, 1)

    def listen(self) -> None:
        super().listen()
        if any(isinstance(message, Completion) and message.final for message in self.messages):
            self.at_ends.append(self.buffers("staging_buffers") - self.buffers("staging_free"))

    def buffers(self, name: str) -> int:
        [value] = [sample.value for sample in self.plane.samples() if sample.name == name]
        return int(value)

    def ends_after(self, seconds: float) -> list[Ends]:
        self.world.run_for(seconds)
        return self.ends()

    def spill(self, number: int, count: int = 1) -> None:
        """What is in host page 0, ``count`` times."""
        rows = spill(number, count).rows
        self.plane.submit([Plan(number, 0, PlanKind.SPILL, Priority.SPILL, rows, chains=("raw+lz4",))])

    def fill(self) -> None:
        """Write until no clean segment is left: nobody reclaims one here."""
        number = 100
        self.plane.submit([spill(number, 64)])
        while self.ends_after(1):
            number += 1
            self.plane.submit([spill(number, 64)])
        assert self.ends_after(_WRITE_PATIENCE_S)


def test_spills_that_wait_for_a_buffer_get_those_of_a_write_that_is_given_up() -> None:
    """All of them, and at once, not with whatever moves next: nobody else may have anything to do."""
    coding = Coding()
    coding.fill()
    coding.spill(2, coding.share)
    coding.world.run_for(1)
    for number in range(3, 3 + coding.share):
        coding.spill(number)
    coding.world.run_for(1)
    coding.at_ends.clear()
    assert coding.ends_after(_WRITE_PATIENCE_S) == [(2, Counter({(Status.FAILED, Reason.NO_SPACE): coding.share}))]
    assert coding.at_ends == [coding.share]


@pytest.mark.parametrize(
    ("error", "reason", "lost"),
    [(CorruptBlockError("a checksum"), Reason.DAMAGED, True), (MemoryError(), Reason.IO_ERROR, False)],
    ids=["damage", "mistake"],
)
def test_a_record_that_cannot_be_encoded_leaves_its_buffer(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: Reason, *, lost: bool
) -> None:
    """Only what is damaged is forgotten: of anything else the copy in host memory is as good as before."""
    coding = Coding()
    with monkeypatch.context() as patched:
        patched.setattr(spilling, "encode_record", Mock(side_effect=error))
        coding.spill(2, 2 * coding.share)
        coding.world.run_for(1)
        assert any(isinstance(message, Lost) for message in coding.messages) is lost
        assert coding.ends_after(0) == [(2, Counter({(Status.FAILED, reason): 2 * coding.share}))]
    assert coding.at_ends[-1] == 0
    coding.spill(3, 2 * coding.share)
    assert coding.ends_after(1) == all_well(3, 2 * coding.share)


class Raw(Opened):
    """A data plane in a simulation that writes records as they are, and ``blocks`` whole ones in host memory."""

    def __init__(self, blocks: int, **disk: Any) -> None:
        self.world = Simulation(1)
        super().__init__(self.world.machine(), disk=DISK | {"codec": "raw"} | disk)
        engine = PseudoEngine(LAYOUT, blocks)
        self.plan = store_all(self.plane, engine, blocks)
        self.plane.submit([self.plan])
        self.world.run_for(1)
        assert self.ends() == all_well(1, blocks)

    def write(self, rows: np.ndarray) -> tuple[Completion, list[Lost]]:
        """Spill ``rows``: what became of them, and what was lost meanwhile."""
        self.plane.submit([Plan(2, 0, PlanKind.SPILL, Priority.SPILL, rows)])
        self.world.run_for(_WRITE_PATIENCE_S)
        messages, self.messages = self.messages, []
        [completion] = [message for message in messages if isinstance(message, Completion)]
        return completion, [message for message in messages if isinstance(message, Lost)]


def test_a_damaged_header_among_many_is_lost_and_the_others_are_written_without_a_hole() -> None:
    raw = Raw(5)
    host = raw.plane._equipment.host
    host.view(2 * PAGES, 1)[100] ^= 1
    completion, lost = raw.write(in_host_memory(raw.plan.rows))
    ended = list(map(end_of, completion.rows))
    assert ended == [(Status.OK, Reason.NONE)] * 2 + [(Status.FAILED, Reason.DAMAGED)] + [(Status.OK, Reason.NONE)] * 2
    assert [message.rows["page"].tolist() for message in lost] == [[2 * PAGES]]
    written = completion.rows["page"][[0, 1, 3, 4]]
    assert (np.diff(written) == PAGES).all()
    assert raw.plane._equipment.headers.free == raw.plane._equipment.headers.count


def test_records_that_do_not_fit_one_segment_go_on_in_the_next() -> None:
    raw = Raw(4, segment="1MiB", clean_segments=2)
    count = 300 // PAGES // 4 * 4  # a segment has 256 pages
    completion, _ = raw.write(np.tile(in_host_memory(raw.plan.rows), count // 4))
    assert list(map(end_of, completion.rows)) == [(Status.OK, Reason.NONE)] * count
    assert completion.rows["row"].tolist() == list(range(count))
    places = [(int(row["segment"]), int(row["page"])) for row in completion.rows]
    assert len(set(places)) == count
    assert len({segment for segment, _ in places}) == 2


def in_host_memory(stored: np.ndarray) -> np.ndarray:
    """Rows that spill what the rows of a store brought to host memory."""
    table = stored.copy()
    table["host_page"], table["host_pages"] = table["target_page"], table["target_pages"]
    table["target_page"] = NOWHERE
    return table


def store_all(plane: DataPlane, engine: PseudoEngine, blocks: int) -> Plan:
    """All blocks of ``engine``, to the first extents of host memory."""
    table = rows(blocks)
    table["target_page"], table["target_pages"] = np.arange(blocks) * PAGES, PAGES
    pages = PageTable(plane.register(engine.memory), engine.pages.table.groups)
    return Plan(1, 0, PlanKind.STORE, Priority.SPILL, table, pages=pages, stop=blocks * LAYOUT.block_tokens)
