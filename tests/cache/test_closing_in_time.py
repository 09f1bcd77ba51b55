"""How long closing may take: one deadline for all of it, in virtual time, with disks that take far longer."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kvtier import TieredCache
from kvtier.jobs import FlushResult, Job
from kvtier.testing import SimDisk, Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
BLOCKS = 8
STUCK_S = 60.0
A_MOMENT_S = 1e-3
SETTINGS: dict[str, Any] = {
    "host": {"capacity": "1MiB", "staging": "1MiB", "copy_threads": 3},
    "disk": {"directories": ["/a", "/b"], "capacity": "8MiB", "segment": "1MiB"},
}


class Stuck:
    """A cache over two directories of a disk that has just begun to take a minute for everything."""

    def __init__(self) -> None:
        self.world = Simulation(1)
        self.disk = SimDisk(self.world)
        self.engine = PseudoEngine(LAYOUT, BLOCKS)
        self.cache = self.opened()
        self.disk.latency_s = STUCK_S
        for number in range(4):
            self.keys = self.cache.keys([number] * (SIZE * BLOCKS + 1))
            self.engine.write(self.keys, range(BLOCKS))
            self.job = self.cache.submit_store(self.keys, self.engine.pages, durability="process")
        self.world.run_for(1)

    def opened(self) -> TieredCache:
        return TieredCache(SETTINGS, LAYOUT, "sim", machine=self.world.machine(self.disk))

    def close(self, timeout_s: float) -> tuple[bool, float]:
        """What closing says, and the seconds that it took."""
        started_s = self.world.clock.monotonic()
        closed = self.cache.close(timeout_s)
        return closed, self.world.clock.monotonic() - started_s


@pytest.mark.parametrize("timeout_s", [0.0, 0.5, 5.0])
def test_closing_over_a_stuck_disk_takes_no_longer_than_it_may_however_often(timeout_s: float) -> None:
    stuck = Stuck()
    for _ in range(3):
        closed, took_s = stuck.close(timeout_s)
        assert not closed
        assert took_s <= timeout_s + A_MOMENT_S


@pytest.mark.parametrize("timeout_s", [0.0, 5.0])
def test_closing_again_with_more_time_ends_it(timeout_s: float) -> None:
    """Every job has ended by then, everything is given back, and the directories can be opened at once."""
    stuck = Stuck()
    assert not stuck.cache.close(timeout_s)
    closed, took_s = stuck.close(600)
    assert closed
    assert took_s <= 2 * STUCK_S
    assert stuck.job.result(0).refused + stuck.job.result(0).stored == SIZE * BLOCKS
    assert stuck.cache.stats()["jobs"] == stuck.cache.stats()["pinned_entries"] == 0
    assert stuck.opened().close()


def test_a_disk_that_is_only_too_slow_for_all_of_it_is_left_in_order(caplog: pytest.LogCaptureFixture) -> None:
    """Of the time some is kept to end what is under way: one call gives everything back."""
    world = Simulation(1)
    disk = {"directories": ["/kv"], "capacity": "32MiB", "segment": "4MiB", "io_threads": 1}
    config = {"host": {"capacity": "16MiB", "staging": "1MiB"}, "disk": disk}
    cache, engine = TieredCache(config, LAYOUT, "sim", machine=world.machine()), PseudoEngine(LAYOUT, 64)
    world.run_for(1)
    world.disk.bytes_per_s = 1 << 20
    for number in range(16):
        assert cache.submit_store([number] * (SIZE * 64), engine.pages).result(600).refused == 0
    started_s = world.clock.monotonic()
    with caplog.at_level(logging.WARNING):
        assert cache.close(5)
    assert world.clock.monotonic() - started_s <= 5 + A_MOMENT_S
    assert "did not take everything" in caplog.text


def rested(world: Simulation, blocks: int) -> TieredCache:
    """A cache with ``blocks`` blocks, all of them durable, in which nothing is under way."""
    cache, engine = TieredCache(SETTINGS, LAYOUT, "sim", machine=world.machine()), PseudoEngine(LAYOUT, BLOCKS)
    if blocks:
        stored = cache.submit_store([1] * (SIZE * blocks), engine.pages, durability="durable").result(600)
        assert stored.stored == SIZE * blocks
    world.run_for(1)
    return cache


@pytest.mark.parametrize("blocks", [0, BLOCKS])
def test_where_there_is_nothing_to_do_no_time_is_enough(blocks: int, caplog: pytest.LogCaptureFixture) -> None:
    cache = rested(Simulation(1), blocks)
    with caplog.at_level(logging.WARNING):
        assert cache.close(0)
    assert caplog.text == ""


def test_with_no_time_what_is_not_on_disk_is_told(caplog: pytest.LogCaptureFixture) -> None:
    cache = rested(Simulation(1), 0)
    cache.submit_store([1] * (SIZE * BLOCKS), PseudoEngine(LAYOUT, BLOCKS).pages)
    with caplog.at_level(logging.WARNING):
        cache.close(0)
    assert "did not take everything" in caplog.text


class Slow:
    """A rank that takes all the time that it is given to close, and then has not."""

    def __init__(self, world: Simulation) -> None:
        self.world = world
        self.given_s: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: []

    def close(self, timeout_s: float) -> bool:
        self.given_s.append(timeout_s)
        self.world.event().wait(timeout_s)
        return False


def test_ranks_share_the_time() -> None:
    world = Simulation(1)
    world.after(1e9, "the end", lambda: None)
    ranks = [Slow(world), Slow(world)]
    cache = TieredCache({"host": {"capacity": "1MiB"}}, LAYOUT, "sim", machine=world.machine(), channels=ranks)
    started_s = world.clock.monotonic()
    assert not cache.close(5)
    assert world.clock.monotonic() - started_s <= 5 + A_MOMENT_S
    assert [rank.given_s for rank in ranks] == [[5.0], [0.0]]


def test_what_closing_cuts_short_is_no_fault_of_the_disk(caplog: pytest.LogCaptureFixture) -> None:
    """Writes and syncs that wait when time runs out were never begun: their segments are as good as before."""
    world = Simulation(1)
    cache = TieredCache(
        SETTINGS | {"disk": SETTINGS["disk"] | {"io_threads": 1}}, LAYOUT, "sim", machine=world.machine()
    )
    engine = PseudoEngine(LAYOUT, BLOCKS)
    world.run_for(1)
    assert cache.submit_store([1] * SIZE, engine.pages, durability="process").result(600).stored == SIZE
    world.disk.latency_s = 3.0
    cache.submit_flush("durable")
    for number in range(5):
        cache.submit_store([number + 5] * SIZE, engine.pages, durability="durable")
    world.run_for(0.5)
    with caplog.at_level(logging.WARNING):
        assert not cache.close(1)
        assert cache.close(600)
    assert "is not written any more" not in caplog.text
    assert not [name for name, value in cache.stats().items() if "write_errors" in name and value]


def test_who_only_looks_whether_it_is_closed_keeps_nobody_else_who_closes_waiting() -> None:
    """The first one waits for the disk; were its threads stopped meanwhile, it would wait for all of its time."""
    world = Simulation(1)
    cache = rested(world, 0)
    assert cache.submit_store([1] * (SIZE * BLOCKS), PseudoEngine(LAYOUT, BLOCKS).pages).result(600).refused == 0
    world.disk.latency_s = 1.0
    looks: list[bool] = []
    submit_flush = cache.submit_flush

    def flushing(durability: str) -> Job[FlushResult]:
        job = submit_flush(durability)
        looks.append(cache.close(0))
        return job

    cache.submit_flush = flushing  # type: ignore[method-assign, assignment]
    started_s = world.clock.monotonic()
    assert cache.close(600)
    assert looks == [False]
    assert world.clock.monotonic() - started_s < 60


def test_what_comes_back_from_the_disk_when_nobody_works_any_more_gives_its_buffers_back() -> None:
    world = Simulation(1)
    disk = SimDisk(world)
    tokens, engine = [1] * (SIZE * BLOCKS + 1), PseudoEngine(LAYOUT, BLOCKS + 1)
    config = SETTINGS | {"read": {"promote": False}}
    with TieredCache(config, LAYOUT, "sim", machine=world.machine(disk)) as cache:
        assert cache.submit_store(tokens, engine.pages, durability="process").result(600).refused == 0
    cache = TieredCache(config, LAYOUT, "sim", machine=world.machine(disk))
    cache.wait_attached(600)
    disk.latency_s = 1.0
    with cache.lookup(tokens) as hit:
        assert hit.by_tier["disk"] == SIZE * BLOCKS
        job = cache.submit_load(hit, engine.pages)
        world.run_for(0.5)
        plane = cache._dispatch.channels[0]._plane  # type: ignore[attr-defined]
        assert all(worker.stop(60) for worker in plane._workers)
        world.run_for(60)
        assert cache.close(600)
    assert sum(job.result(0).failed.values()) == SIZE * BLOCKS
    assert cache.stats()["staging_free"] == cache.stats()["staging_buffers"]


@pytest.mark.parametrize("verb", ["submit_load", "submit_prefetch"])
def test_jobs_end_by_themselves_where_closing_ran_out_of_time(verb: str) -> None:
    """Whoever waits for one is seldom the one who closes, and could not close again."""
    world = Simulation(1)
    disk = SimDisk(world)
    tokens, engine = [1] * (SIZE * BLOCKS + 1), PseudoEngine(LAYOUT, BLOCKS + 1)
    with TieredCache(SETTINGS, LAYOUT, "sim", machine=world.machine(disk)) as cache:
        assert cache.submit_store(tokens, engine.pages, durability="process").result(600).refused == 0
    cache = TieredCache(SETTINGS, LAYOUT, "sim", machine=world.machine(disk))
    cache.wait_attached(600)
    disk.latency_s = 1.0
    with cache.lookup(tokens) as hit:
        job = (
            cache.submit_load(hit, engine.pages)
            if verb == "submit_load"
            else cache.submit_prefetch(tokens, deadline_s=9)
        )
        world.run_for(0.5)
        assert not cache.close(0)
        assert job.result(600).failed
    assert cache.close(600)
    assert cache.stats()["staging_free"] == cache.stats()["staging_buffers"]
