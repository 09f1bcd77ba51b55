"""What stands beside the disk tier: what is Python's is what no call that moves bytes took."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import python
from benchmarks.beside import REQUESTS, Measured, PythonTime
from benchmarks.engine import EngineMemory
from benchmarks.kinds import small_blocks
from benchmarks.pairs import Times
from benchmarks.python import ByteClock, WatchedStep
from kvtier.runtime import blocking

PAGES = 16


@pytest.fixture
def cpu_s(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes on when it is told to, for one thread and for the process."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(python, "thread_time", lambda: clock.now)
    monkeypatch.setattr(python, "process_time", lambda: clock.now)
    return clock


def measured(rounds: int, verb: str = "store") -> Measured:
    times = {"kvtier": Times(np.ones(rounds), np.ones(rounds)), "raw": Times(np.full(rounds, 0.5), np.ones(rounds))}
    return Measured(verb, f"disk.{verb}.x", times, 1 << 30, "pwritev", 0.7, 3, {"io_threads": 4})


def test_what_a_round_takes_outside_the_calls_is_told_from_what_it_takes_inside(cpu_s: SimpleNamespace) -> None:
    def move(seconds: float) -> str:
        cpu_s.now += seconds
        return "moved"

    disk, clock = SimpleNamespace(move=move), ByteClock()
    clock.around(disk, "move")

    def run(number: int) -> None:
        cpu_s.now += 1 + number
        assert disk.move(seconds=10.0) == "moved"

    watched = WatchedStep(run, clock)
    for number in range(3):
        watched(number)
    others_s, bytes_s = watched.last(2)
    assert (others_s.tolist(), bytes_s.tolist()) == ([2.0, 3.0], [10.0, 10.0])
    clock.close()
    assert disk.move is move


def test_the_rows_say_microseconds_a_block_in_each_direction(cpu_s: SimpleNamespace) -> None:
    blocks = REQUESTS * PAGES
    with closing(PythonTime(EngineMemory(small_blocks(), PAGES, PAGES), PAGES)) as beside:
        store = beside.watched("store", lambda _: setattr(cpu_s, "now", cpu_s.now + 20e-6 * blocks))
        load = beside.watched("load", lambda _: setattr(cpu_s, "now", cpu_s.now + 10e-6 * blocks))
        for number in range(2):
            store(number)
        for number in range(2):
            load(number)
        stored, loaded = (beside.row(measured(2, verb)) for verb in ("store", "load"))
    assert (stored.bench, round(stored.value, 6), stored.unit) == ("disk.store.x.python", 20.0, "us")
    assert (stored.target, stored.ok, stored.config["refused_tokens"]) == (15.0, False, 3)
    assert (loaded.bench, round(loaded.value, 6)) == ("disk.load.x.python", 10.0)


def test_kernels_and_system_calls_are_timed_and_left_as_they_were() -> None:
    before = blocking.preadv, blocking.pwritev
    engine = EngineMemory(small_blocks(), PAGES, PAGES)
    beside = PythonTime(engine, PAGES)
    assert blocking.preadv is not before[0]
    assert {"gather_records", "scatter_records"} <= set(vars(engine.memory))
    beside.close()
    assert (blocking.preadv, blocking.pwritev) == before


def test_speed_is_that_of_the_median_round() -> None:
    against = measured(3).against_raw("kvtier")
    assert (against["value"], against["baseline"]) == ((1 << 30) / 1e9, 2 * (1 << 30) / 1e9)
    assert against["ratio"].ratio == 0.5
