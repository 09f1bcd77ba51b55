"""Closing a data plane whose threads are in the middle of something."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.config import load_config
from kvtier.core.memory import PageTable
from kvtier.core.plan import NOWHERE, ROW, Completion, Plan, PlanKind, Priority, Reason
from kvtier.errors import TierError
from kvtier.runtime import system_machine
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.transfer import DataPlane

LAYOUT = tiny_layout()
PAGES = LAYOUT.record_pages[0]
PATIENCE_S = 60.0
A_MOMENT_S = 0.02


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


def store(number: int, pages: PageTable) -> Plan:
    """Block 0 to host page 0."""
    rows = np.zeros(1, ROW)
    rows["target_pages"] = PAGES
    return Plan(number, 0, PlanKind.STORE, Priority.SPILL, rows, pages=pages, stop=LAYOUT.block_tokens)


def spill(number: int) -> Plan:
    """What is in host page 0."""
    rows = np.zeros(1, ROW)
    rows["host_pages"], rows["disk_segment"], rows["target_page"] = PAGES, NOWHERE, NOWHERE
    return Plan(number, 0, PlanKind.SPILL, Priority.SPILL, rows)


@pytest.mark.timeout(60)
def test_a_close_that_runs_out_of_time_leaves_the_threads_to_end_what_was_begun() -> None:
    """Who waits for it is told without anybody closing again, and a second close finds nothing left to wait for."""
    config = load_config({"host": {"capacity": "1MiB", "staging": "1MiB", "copy_threads": 1}})
    news = threading.Event()
    memory, plane = HeldMemory(), DataPlane(config, LAYOUT, system_machine("threads"), on_news=news.set)
    pages = PageTable(plane.register(memory), PseudoEngine(LAYOUT, 1).pages.table.groups)
    plane.submit([store(0, pages), store(1, pages)])
    assert memory.entered.wait(60)
    assert not plane.close(0.01)
    memory.go_on.set()
    ended: dict[int, int] = {}
    while len(ended) < 2:
        assert news.wait(60)
        news.clear()
        answers = [message for message in plane.poll() if isinstance(message, Completion) and len(message.rows)]
        ended |= {message.plan_id: int(message.rows["reason"][0]) for message in answers}
    assert ended == {0: Reason.NONE, 1: Reason.NONE}
    assert plane.close(3600)


class Held:
    """Files, or an arena, of which an operation, once ``held`` names it, does not return before it may.

    Housekeeping's do.
    """

    def __init__(self, what: Any) -> None:
        self._what = what
        self.held = ""
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._what, name)

        def maybe_held(*arguments: Any, **settings: Any) -> Any:
            if name == self.held and not threading.current_thread().name.startswith("housekeeping"):
                self.entered.set()
                assert self.go_on.wait(PATIENCE_S)
            return operation(*arguments, **settings)

        return maybe_held if callable(operation) else operation


class Opened:
    """A data plane over ``directory``, with one block on disk that is not durable."""

    def __init__(self, directory: Path) -> None:
        machine = system_machine("threads")
        self.files = Held(machine.files)
        self.arenas: list[Held] = []
        settings = {"directories": [str(directory)], "capacity": "4MiB", "segment": "1MiB"}
        self.config = load_config({"host": {"capacity": "1MiB", "staging": "1MiB"}, "disk": settings})
        self._ended = threading.Event()

        def arena(name: str, nbytes: int) -> Held:
            self.arenas.append(Held(machine.arena(name, nbytes)))
            return self.arenas[-1]

        machine_of_ours = replace(machine, files=self.files, arena=arena)
        self.plane = DataPlane(self.config, LAYOUT, machine_of_ours, on_news=self._ended.set)
        engine = PseudoEngine(LAYOUT, 1)
        pages = PageTable(self.plane.register(engine.memory), engine.pages.table.groups)
        for plan in (store(1, pages), spill(2)):
            self.plane.submit([plan])
            while not any(isinstance(message, Completion) and message.final for message in self.plane.poll()):
                assert self._ended.wait(PATIENCE_S)
                self._ended.clear()

    def open_again(self) -> DataPlane:
        return DataPlane(self.config, LAYOUT, system_machine("threads"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("operation", ["sync", "close", "arena"])
def test_of_several_who_close_none_is_told_so_before_everything_is(tmp_path: Path, operation: str) -> None:
    """However far the one has come who closes it: another waits for that, and no longer than its own time."""
    opened = Opened(tmp_path)
    held = opened.arenas[0] if operation == "arena" else opened.files
    held.held = "sync" if operation == "sync" else "close"
    closed: list[bool] = []
    patient = [threading.Thread(target=lambda: closed.append(opened.plane.close(PATIENCE_S))) for _ in range(3)]
    for thread in patient:
        thread.start()
    assert held.entered.wait(PATIENCE_S)
    for timeout_s in (0.0, A_MOMENT_S):
        assert not opened.plane.close(timeout_s)
    if held is opened.files:
        with pytest.raises(TierError, match="in use by another cache"):
            opened.open_again()
    held.go_on.set()
    for thread in patient:
        thread.join(PATIENCE_S)
    assert closed == [True] * 3
    assert opened.plane.close(0)
    assert opened.open_again().close(PATIENCE_S)


@pytest.mark.timeout(120)
def test_a_sync_that_hangs_keeps_closing_no_longer_than_its_time(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    opened.files.held = "sync"
    for timeout_s in (A_MOMENT_S, 0.0):
        assert not opened.plane.close(timeout_s)
    opened.files.go_on.set()
    assert opened.plane.close(PATIENCE_S)
    assert opened.open_again().close(PATIENCE_S)
