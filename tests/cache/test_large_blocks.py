"""Blocks of several MiB on a simulated machine: each is read and written in several requests."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from kvtier import TieredCache
from kvtier.core.keys import Keys
from kvtier.core.plan import PAGE_BYTES
from kvtier.runtime.seam import IORequest, Op
from kvtier.testing import SimDisk, Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.testing.simfile import Snapshot

LAYOUT = tiny_layout(layers=5, dim=32768)  # ten parts of 1 MiB
SIZE = LAYOUT.block_tokens
BLOCKS = 3
SETTINGS: dict[str, Any] = {
    "host": {"capacity": "64MiB", "staging": "64MiB"},
    "disk": {"directories": ["/kv"], "capacity": "512MiB", "segment": "auto"},
    "read": {"promote": False},
}


class _Disk(SimDisk):
    """Fails the next so many requests of ``op``, those of the housekeeping excepted."""

    op = Op.READ
    failures = 0
    served = 0
    damaged_at = -1
    """Where in a segment a byte is read wrong."""

    def finish(self, request: IORequest, snapshot: Snapshot | None) -> None:
        if request.op is self.op and request.tag is not None:
            self.served += 1
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, "it failed")
        super().finish(request, snapshot)
        within = self.damaged_at - request.offset
        if request.op is Op.READ and 0 <= within < request.nbytes:
            last = next(reversed(request.buffers))
            assert within >= request.nbytes - last.nbytes
            last[within - request.nbytes] ^= 1


class _World:
    """A machine, a cache on it, and an engine whose blocks say to whom they belong."""

    def __init__(self, seed: int) -> None:
        self.world = Simulation(seed)
        self.disk = _Disk(self.world)
        self.engine = PseudoEngine(LAYOUT, BLOCKS)
        self.open()

    def open(self) -> None:
        self.cache = TieredCache(SETTINGS, LAYOUT, "large", machine=self.world.machine(self.disk))

    def keys(self, number: int) -> Keys:
        return self.cache.keys([number] * (SIZE * BLOCKS + 1))

    def store(self, number: int, durability: str = "process") -> Any:
        keys = self.keys(number)
        self.engine.write(keys, range(BLOCKS))
        return self.cache.submit_store(keys, self.engine.pages, durability=durability)

    def load(self, number: int, deadline_s: float | None = None) -> Any:
        """Load what is found, and compare every byte."""
        with self.cache.lookup(self.keys(number)) as hit:
            self.engine.wipe()
            result = self.cache.submit_load(hit, self.engine.pages, deadline_s=deadline_s).result(600)
            assert self.engine.wrong_blocks(hit.keys, range(result.ok_tokens // SIZE)) == []
            return result

    def reopened(self) -> None:
        assert self.cache.close()
        self.open()


@pytest.fixture
def world() -> _World:
    return _World(1)


def test_what_was_stored_comes_back_from_disk_in_more_requests_than_blocks(world: _World) -> None:
    assert world.store(1).result(600).refused == 0
    world.reopened()
    world.disk.served = 0
    assert world.load(1).by_tier["disk"] == BLOCKS * SIZE
    assert world.disk.served == BLOCKS * 5


def test_a_request_that_fails_fails_its_block_once_and_it_is_read_again(world: _World) -> None:
    world.store(1).result(600)
    world.reopened()
    world.disk.failures = 1
    assert world.load(1).ok_tokens == BLOCKS * SIZE
    assert world.cache.stats()["read_errors"] == 1


def test_a_block_that_cannot_be_read_is_read_twice_and_then_a_miss(world: _World) -> None:
    world.store(1).result(600)
    world.reopened()
    world.disk.failures = 10_000
    result = world.load(1)
    assert (result.ok_tokens, list(result.failed)) == (0, ["io_error"])
    assert world.cache.stats()["read_errors"] == 2 * BLOCKS
    stats = world.cache.stats()
    assert stats["staging_free"] == stats["staging_buffers"]


def test_a_block_whose_last_byte_is_damaged_is_read_twice_and_then_a_miss(world: _World) -> None:
    world.store(1).result(600)
    world.reopened()
    world.disk.damaged_at = (2 + BLOCKS * LAYOUT.record_pages[0]) * PAGE_BYTES - 1
    result = world.load(1)
    assert (result.ok_tokens, list(result.failed)) == ((BLOCKS - 1) * SIZE, ["damaged"])
    counted = {name: n for name, n in world.cache.stats().items() if name.startswith(("damaged_reads", "lost_copies"))}
    assert sorted(counted.values()) == [1, 2]  # one copy lost, once, of two reads


def test_a_request_that_fails_keeps_its_block_off_the_disk(world: _World) -> None:
    world.disk.op, world.disk.failures = Op.WRITE, 1
    assert world.store(1).result(600).refused == SIZE
    world.world.kill()
    world.open()
    assert world.load(1).ok_tokens == 0


def test_a_load_that_is_given_up_half_way_gets_its_buffers_back(world: _World) -> None:
    world.store(1).result(600)
    world.reopened()
    world.disk.latency_s = 30.0
    assert "abandoned" in world.load(1, deadline_s=45.0).failed
    world.world.run_for(600)
    stats = world.cache.stats()
    assert (stats["hops"], stats["pinned_entries"], stats["runs"]) == (0, 0, 0)
    assert stats["staging_free"] == stats["staging_buffers"]


def test_a_cache_that_is_closed_half_way_through_a_block_leaves_nothing_behind(world: _World) -> None:
    world.store(1).result(600)
    world.reopened()
    world.disk.latency_s = 3.0
    with world.cache.lookup(world.keys(1)) as hit:
        job = world.cache.submit_load(hit, world.engine.pages)
        world.world.run_for(4.0)
        assert world.cache.close()
        assert job.result(600).ok_tokens == 0


@pytest.mark.parametrize("seed", range(4))
def test_what_was_durable_survives_a_power_cut_and_a_block_that_was_being_written_is_never_wrong(seed: int) -> None:
    """The requests of a block take effect in any order, or in part: it is found whole or not at all."""
    world, rng, durable = _World(seed), random.Random(seed), []
    for number in range(6):
        if rng.random() < 0.5:
            world.store(number, "durable").result(600)
            durable.append(number)
        else:
            world.store(number, "process")
            world.world.run_for(rng.random() * 0.03)
            world.world.power_cut()
            world.open()
            for other in range(number + 1):
                assert world.load(other).ok_tokens == BLOCKS * SIZE or other not in durable
