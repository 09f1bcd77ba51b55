"""A data plane by itself, with plans made by hand: how it ends when something keeps it from ending."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtier.core.memory import PageTable
from kvtier.core.plan import Completion, Plan, PlanKind, Priority, Reason, Status
from kvtier.kernels import compiled
from kvtier.pages import PagedTensors
from kvtier.runtime import system_machine
from kvtier.runtime.seam import IORequest, Op
from kvtier.testing import SimDisk, Simulation
from kvtier.testing.contents import PseudoEngine
from kvtier.testing.simfile import Snapshot
from kvtier.transfer import DataPlane, gathering
from kvtier.transfer.spilling import _WRITE_PATIENCE_S
from tests.transfer.opened import LAYOUT, PAGES, Ends, Opened, all_well, rows, spill, store, sync

PATIENCE_S = 30.0


class Stuck:
    """Engine memory whose copies do not return before they may."""

    def __init__(self, engine: PseudoEngine) -> None:
        self.memory = engine.memory
        self.entered, self.may_return = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def gather(self, *arguments: Any) -> None:
        self.entered.set()
        assert self.may_return.wait(PATIENCE_S)
        self.memory.gather(*arguments)


class StuckAtTheLast(Stuck):
    """Of ``calls`` copies only the last one does not return."""

    def __init__(self, engine: PseudoEngine, calls: int) -> None:
        super().__init__(engine)
        self.left = calls

    def gather(self, *arguments: Any) -> None:
        self.left -= 1
        if not self.left:
            super().gather(*arguments)
        else:
            self.memory.gather(*arguments)


def test_closing_gives_nothing_back_while_a_thread_still_copies() -> None:
    """The buffers stay where they are; calling again goes on waiting, and the copy is whole."""
    opened, engine = Opened(system_machine()), PseudoEngine(LAYOUT, 1)
    plane, stuck = opened.plane, Stuck(engine)
    plane.submit([store(plane, stuck, engine)])
    assert stuck.entered.wait(PATIENCE_S)
    for _ in range(2):
        assert plane.close(0.0) is False
        assert opened.ends() == []
    stuck.may_return.set()
    assert plane.close(PATIENCE_S) is True
    assert opened.ends() == all_well(1, 1)


def test_pages_are_free_again_only_after_the_last_of_them_was_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine overwrites them as soon as it hears so: under the key of a block there would be another's bytes."""
    monkeypatch.setattr("kvtier.transfer.work.PIECE_BYTES", 1)
    opened = Opened(system_machine(), host={"capacity": "1MiB", "staging": "1MiB", "copy_threads": 1})
    engine = PseudoEngine(LAYOUT, 3)
    memory = StuckAtTheLast(engine, 3)
    table = rows(3)
    table["target_page"], table["target_pages"] = np.arange(3) * PAGES, PAGES
    pages = PageTable(opened.plane.register(memory), engine.pages.table.groups)
    opened.plane.submit([Plan(1, 0, PlanKind.STORE, Priority.SPILL, table, pages=pages, stop=3 * LAYOUT.block_tokens)])
    assert memory.entered.wait(PATIENCE_S)
    assert not [message for message in opened.messages if isinstance(message, Completion)]
    memory.may_return.set()
    assert opened.plane.close(PATIENCE_S)
    assert opened.ends() == all_well(1, 3)


class Interrupted(PagedTensors):
    """Engine memory that notes its copies; while the first one runs somebody asks for a load."""

    def ask(self, plane: DataPlane, load: Plan) -> None:
        self.noted: list[str] = []
        self.plane, self.load, self.loaded = plane, load, threading.Event()

    def gather_records(self, *arguments: Any) -> Any:
        self.noted.append("gather")
        if self.noted == ["gather"]:
            self.plane.submit([self.load])
        return super().gather_records(*arguments)

    def scatter_records(self, *arguments: Any) -> Any:
        self.noted.append("scatter")
        self.loaded.set()
        return super().scatter_records(*arguments)


@pytest.mark.skipif(compiled() is None, reason="without numba pieces of work are short: pip install 'kvtier[fast]'")
def test_a_load_does_not_wait_for_all_of_a_long_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.transfer.work.STEP_BYTES", 1)
    opened = Opened(system_machine(), host={"capacity": "1MiB", "staging": "1MiB", "copy_threads": 1})
    engine = PseudoEngine(LAYOUT, 4)
    memory = Interrupted(LAYOUT, engine.tensors)
    pages = PageTable(opened.plane.register(memory), engine.pages.table.groups)
    table, there = rows(4), rows(1)
    table["target_page"], table["target_pages"] = np.arange(4) * PAGES, PAGES
    there["host_page"], there["host_pages"] = 0, PAGES
    stop = LAYOUT.block_tokens
    memory.ask(opened.plane, Plan(2, 0, PlanKind.LOAD, Priority.DEMAND, there, pages=pages, stop=stop))
    opened.plane.submit([Plan(1, 0, PlanKind.STORE, Priority.SPILL, table, pages=pages, stop=4 * stop)])
    assert memory.loaded.wait(PATIENCE_S)
    assert opened.plane.close(PATIENCE_S)
    assert memory.noted == ["gather", "scatter", "gather", "gather", "gather"]
    assert opened.ends() == all_well(2, 1) + all_well(1, 4)


def test_a_mistake_of_ours_while_gathering_is_no_error_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do its blocks look as if their memory had gone."""
    world = Simulation(1)
    opened, engine = Opened(world.machine()), PseudoEngine(LAYOUT, 1)
    for name in ("move_records", "fill_records"):  # with compiled kernels, and without
        monkeypatch.setattr(gathering, name, lambda *_: int("no number"))
    opened.plane.submit([store(opened.plane, engine.memory, engine)])
    world.run_for(1)
    assert opened.ends() == [(1, Counter({(Status.FAILED, Reason.IO_ERROR): 1}))]
    assert opened.plane.close(PATIENCE_S)


def test_a_write_waits_for_a_clean_segment_and_not_for_ever() -> None:
    """Nobody reclaims a segment here, so what does not fit the first time never will."""
    world = Simulation(1)
    opened = Opened(world.machine(), disk={"directories": ["/kv"], "capacity": "4MiB", "segment": "1MiB"})
    plane, engine = opened.plane, PseudoEngine(LAYOUT, 1)
    plane.submit([store(plane, engine.memory, engine)])
    world.run_for(1)
    assert opened.ends() == all_well(1, 1)
    most = 4 * (1 << 20) // (PAGES * 4096)
    plane.submit([spill(2, most)])
    world.run_for(0.9 * _WRITE_PATIENCE_S)
    assert opened.ends() == []
    world.run_for(0.2 * _WRITE_PATIENCE_S)
    [(number, counts)] = opened.ends()
    written, refused = counts[Status.OK, Reason.NONE], counts[Status.FAILED, Reason.NO_SPACE]
    assert number == 2
    assert written + refused == most
    assert written > most // 2
    assert refused > 0
    assert plane.close(PATIENCE_S)


def test_the_queue_of_a_slow_disk_takes_none_of_a_write_s_patience() -> None:
    world = Simulation(1)
    disk = SimDisk(world)
    settings = {"directories": ["/kv"], "capacity": "4MiB", "segment": "1MiB", "io_threads": 1}
    opened = Opened(world.machine(disk), disk=settings)
    plane, engine = opened.plane, PseudoEngine(LAYOUT, 1)
    plane.submit([store(plane, engine.memory, engine)])
    world.run_for(1)
    assert opened.ends() == all_well(1, 1)
    disk.latency_s = _WRITE_PATIENCE_S / 2
    for number in range(2, 8):
        plane.submit([spill(number, 1)])
    world.run_for(8 * _WRITE_PATIENCE_S)
    assert opened.ends() == [end for number in range(2, 8) for end in all_well(number, 1)]
    assert plane.close(PATIENCE_S)


class Failing(SimDisk):
    """Operations of ``fails`` fail once each; a sync takes a second."""

    def __init__(self, world: Simulation) -> None:
        super().__init__(world)
        self.fails: set[Op] = set()
        self.asked: Counter[Op] = Counter()

    def service_s(self, request: IORequest) -> float:
        return super().service_s(request) + (request.op is Op.SYNC)

    def finish(self, request: IORequest, snapshot: Snapshot | None) -> None:
        self.asked[request.op] += 1
        if request.op in self.fails:
            self.fails.remove(request.op)
            raise OSError(errno.EIO, "Input/output error")
        super().finish(request, snapshot)


class Written:
    """A data plane over a disk with faults; one record is written, in plan 2, and not durable."""

    def __init__(self, **disk: int) -> None:
        self.world = Simulation(1)
        self.disk = Failing(self.world)
        settings = {"directories": ["/kv"], "capacity": "4MiB", "segment": "1MiB"} | disk
        self.opened, engine = Opened(self.world.machine(self.disk), disk=settings), PseudoEngine(LAYOUT, 1)
        self.plane = self.opened.plane
        self.plane.submit([store(self.plane, engine.memory, engine)])
        assert self.ends_after(0.1) == all_well(1, 1)
        self.plane.submit([spill(2, 1)])
        assert self.ends_after(0.1) == all_well(2, 1)

    def ends_after(self, seconds: float) -> list[Ends]:
        self.world.run_for(seconds)
        return self.opened.ends()


def test_a_sync_does_not_wait_for_writes_that_find_no_clean_segment() -> None:
    """What is to be durable has been written: the writes behind which the sync was asked for are others."""
    written = Written()
    written.disk.fails = {Op.WRITE}  # its segment is not sealed, and what is in it has to be synced
    written.plane.submit([spill(3, 1)])
    assert written.ends_after(0.1) == [(3, Counter({(Status.FAILED, Reason.IO_ERROR): 1}))]
    written.plane.submit([spill(4, 4 * (1 << 20) // (PAGES * 4096))])
    assert written.ends_after(1) == []
    written.plane.submit([sync(5)])
    assert written.ends_after(1.5) == [(5, Counter())]
    assert written.disk.asked[Op.SYNC] == 1
    assert written.plane.close(PATIENCE_S)


def test_of_two_syncs_of_one_file_both_fail_when_the_first_does() -> None:
    """The second waits for the first, and then must not be asked: it would claim that the lost bytes are durable."""
    written = Written()
    written.disk.fails = {Op.SYNC}
    written.plane.submit([sync(3), sync(4)])
    failed = Counter({(Status.FAILED, Reason.IO_ERROR): 1})
    assert written.ends_after(10) == [(3, failed), (4, failed)]
    assert written.disk.asked[Op.SYNC] == 1
    assert written.plane.close(PATIENCE_S)


def test_one_sync_more_is_enough_for_all_who_ask_while_one_is_under_way() -> None:
    """It begins when the first has ended, and covers what was written until then."""
    written = Written()
    written.plane.submit([sync(3)])
    for number in range(4, 40, 2):
        written.plane.submit([spill(number, 1)])
        assert written.ends_after(0.01) == all_well(number, 1)
        written.plane.submit([sync(number + 1)])
    assert written.ends_after(10) == [(3, Counter())] + [(number + 1, Counter()) for number in range(4, 40, 2)]
    assert written.disk.asked[Op.SYNC] == 2
    assert written.plane.close(PATIENCE_S)


def test_a_sync_that_joins_one_with_nothing_left_to_do_is_not_over_with_it() -> None:
    """Plan 4 asks for no more than the sync that is under way covers, plan 6 for what was written since."""
    written = Written()
    for plan in (sync(3), sync(4), spill(5, 1), sync(6)):
        written.plane.submit([plan])
        written.world.run_for(0.01)
    assert written.ends_after(10) == [*all_well(5, 1), (3, Counter()), (4, Counter()), (6, Counter())]
    assert written.disk.asked[Op.SYNC] == 2
    assert written.plane.close(PATIENCE_S)


def test_a_sync_of_several_files_ends_with_the_last_of_them_however_often_the_first_is_looked_at() -> None:
    """What comes after a failed write is in another file, and the engine syncs one after the other."""
    written = Written(io_threads=1)
    written.disk.fails = {Op.WRITE}
    written.plane.submit([spill(3, 1)])
    assert written.ends_after(0.1) == [(3, Counter({(Status.FAILED, Reason.IO_ERROR): 1}))]
    written.plane.submit([spill(4, 1)])
    assert written.ends_after(0.1) == all_well(4, 1)
    for number in (5, 6):
        written.plane.submit([sync(number)])
    assert written.ends_after(1.9) == []
    assert written.ends_after(0.2) == [(5, Counter()), (6, Counter())]
    assert written.disk.asked[Op.SYNC] == 2
    assert written.plane.close(PATIENCE_S)


def test_writes_do_not_wait_for_a_sync_that_waits_for_another() -> None:
    written = Written()
    written.plane.submit([sync(3), sync(4), spill(5, 1)])
    assert written.ends_after(0.5) == all_well(5, 1)
    assert written.ends_after(10) == [(3, Counter()), (4, Counter())]
    assert written.plane.close(PATIENCE_S)


def test_closing_hears_of_the_last_end_also_where_another_who_closes_took_the_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both wait for one event, and who wakes first clears it."""
    written = Written()
    written.plane.submit([sync(3)])
    monkeypatch.setattr(written.plane._progress, "set", lambda: None)
    started_s = written.world.clock.monotonic()
    assert written.plane.close(PATIENCE_S)
    assert 1 <= written.world.clock.monotonic() - started_s < 1.5
    assert written.opened.ends() == [(3, Counter())]


class Unstoppable:
    """The runtime of a simulation whose loops take all the time that they are given to stop, and then have not."""

    def __init__(self, world: Simulation) -> None:
        self.world = world
        self.given_s: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.world, name)

    def spawn(self, *arguments: Any) -> Unstoppable:
        self.world.spawn(*arguments)
        return self

    def stop(self, timeout_s: float) -> bool:
        self.given_s.append(timeout_s)
        self.world.event().wait(timeout_s)
        return False


def test_loops_that_do_not_stop_share_the_time_of_closing() -> None:
    world = Simulation(1)
    runtime = Unstoppable(world)
    settings = {"capacity": "1MiB", "staging": "1MiB", "copy_threads": 3}
    opened = Opened(replace(world.machine(), runtime=runtime), host=settings)
    assert not opened.plane.close(5)
    assert runtime.given_s == [5, 0, 0, 0]


@pytest.mark.parametrize("incarnation", [0, 2])
def test_a_plan_of_another_life_of_the_rank_is_not_run(incarnation: int) -> None:
    """It was on its way when the rank died: its pages are the engine's again, its room another block's."""
    world = Simulation(1)
    engine = PseudoEngine(LAYOUT, 1)
    opened = Opened(world.machine())
    plane = opened.plane
    before = plane._equipment.host.data.copy()
    plane.submit([replace(store(plane, engine.memory, engine), incarnation=incarnation)])
    world.run_for(1)
    assert opened.ends() == [(1, Counter({(Status.FAILED, Reason.GONE): 1}))]
    assert np.array_equal(plane._equipment.host.data, before)
    assert plane.close(PATIENCE_S)
