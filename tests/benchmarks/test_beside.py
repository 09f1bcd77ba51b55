"""What stands beside the disk tier: its contestants do what they say, and its rows are made of the right times."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from benchmarks.beside import REQUESTS, Kernels, Measured
from benchmarks.cold import ColdReads
from benchmarks.engine import EngineMemory
from benchmarks.kinds import small_blocks
from benchmarks.pairs import Times, alternate

PAGES = 16


@pytest.fixture
def engine() -> EngineMemory:
    return EngineMemory(small_blocks(), 4 * PAGES, REQUESTS * PAGES)


def measured(**times: Times) -> Measured:
    return Measured("disk.store.x", times, 1 << 30, "pwritev", 0.7, 3, {"io_threads": 4})


def test_cpu_time_that_neither_kernels_nor_the_bare_disk_take_is_that_of_python(engine: EngineMemory) -> None:
    blocks = REQUESTS * PAGES
    own = Times(np.array([1.0, 1.0, 1.0]), np.array([70.0, 60.0, 90.0]) * 1e-6 * blocks)
    kernels = Times(np.array([1.0, 1.0, 1.0]), np.array([30.0, 30.0, 30.0]) * 1e-6 * blocks)
    raw = Times(np.array([1.0, 1.0, 1.0]), np.array([20.0, 20.0, 20.0]) * 1e-6 * blocks)
    with closing(Kernels(engine, PAGES)) as beside:
        row = beside.row(measured(kvtier=own, kernels=kernels, raw=raw))
    assert (row.bench, row.value, row.unit, row.baseline) == ("disk.store.x.python", 20.0, "us", 50.0)
    assert (row.target, row.ok, row.config["refused_tokens"]) == (15.0, False, 3)


def test_speed_is_that_of_the_median_round() -> None:
    times = Times(np.array([0.5, 1.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    against = measured(kvtier=times, raw=times).against_raw("kvtier")
    assert against["value"] == against["baseline"] == (1 << 30) / 1e9
    assert against["ratio"].ratio == 1.0


def test_kernels_move_and_compare_as_many_requests_as_kvtier(
    engine: EngineMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {"gather_records": 0, "gather": 0, "scatter_records": 0, "scatter": 0}

    def counted(name: str) -> None:
        inner = getattr(engine.memory, name)

        def call(table, group, first_tokens, *rest):
            moved[name] += len(first_tokens)
            return inner(table, group, first_tokens, *rest)

        monkeypatch.setattr(engine.memory, name, call)

    with closing(Kernels(engine, PAGES)) as beside:
        for name in moved:
            counted(name)
        cold: ColdReads | None = None
        alternate([beside.stores(), beside.loads(cold)], 1, warmup=0)  # type: ignore[arg-type]
    blocks = REQUESTS * PAGES
    assert moved["gather_records"] + moved["gather"] == blocks + PAGES, "and one request to load from"
    assert moved["scatter_records"] + moved["scatter"] == blocks
