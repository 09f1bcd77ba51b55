"""The cache that ships, on a simulated machine: one thread, virtual time, a disk that forgets what was not synced."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from kvtier import PrefetchResult, TieredCache
from kvtier.core.keys import Keys, Root
from kvtier.runtime.seam import IORequest, Op
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.testing.simfile import Snapshot
from kvtier.tiers.disk.health import POISONED_IN_A_ROW, WRITE_PAUSE_S

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
BLOCKS = 8
SETTINGS: dict[str, Any] = {
    "host": {"capacity": "256KiB", "staging": "1MiB"},
    "disk": {"directories": ["/kv"], "capacity": "8MiB", "segment": "1MiB"},
}
NEWEST_RECORDS = 4 * (1024 - 64) // 8  # capacity less one open, two clean and one segment of headers and footers


class World:
    """A simulated machine, a cache on it, and what was acknowledged as durable so far, oldest first."""

    def __init__(self, seed: int, write: str = "write_through") -> None:
        self.world = Simulation(seed)
        self.rng = random.Random(seed)
        self.config = SETTINGS | {"policy": {"write": write}}
        self.durable: list[bytes] = []
        self.engine = PseudoEngine(LAYOUT, BLOCKS + 1)
        self.cache = self.open()

    def open(self) -> TieredCache:
        return TieredCache(self.config, LAYOUT, "sim", machine=self.world.machine())

    def store(self, durability: str) -> None:
        tokens = [self.rng.randrange(4) for _ in range(SIZE * self.rng.randint(1, BLOCKS))]
        keys = self.cache.keys(tokens)
        self.engine.write(keys, range(len(keys)))
        result = self.cache.submit_store(keys, self.engine.pages, durability=durability).result(600)
        if durability == "durable" and not result.refused:
            self.durable += [key for key in keys.digests if key not in self.durable]

    def load(self) -> None:
        tokens = [self.rng.randrange(4) for _ in range(SIZE * BLOCKS + 1)]
        self.check(self.cache.keys(tokens))

    def check(self, keys: Keys) -> int:
        """Load what is found of ``keys``, and compare every byte."""
        with self.cache.lookup(keys) as hit:
            self.engine.wipe()
            ok_tokens = self.cache.submit_load(hit, self.engine.pages).result(600).ok_tokens
            assert self.engine.wrong_blocks(keys, range(ok_tokens // SIZE)) == []
            return ok_tokens

    def missing(self) -> list[bytes]:
        """Durable blocks among the newest that are not found by their key alone."""
        gone = []
        for key in self.durable[-NEWEST_RECORDS:]:
            keys = Keys(Root("sim"), SIZE)
            keys.digests, keys.chained, keys.num_tokens = [key], False, SIZE + 1
            if not self.check(keys):
                gone.append(key)
        return gone


@pytest.mark.parametrize("write", ["write_through", "write_back"])
@pytest.mark.parametrize("seed", range(6))
def test_what_was_durable_survives_power_cuts_and_nothing_is_ever_wrong(seed: int, write: str) -> None:
    """Random stores and loads, cut off by power cuts at random moments, on one disk."""
    world = World(seed, write)
    for _ in range(5):
        for _ in range(world.rng.randrange(40)):
            if world.rng.random() < 0.6:
                world.store(world.rng.choice(["memory", "process", "durable", "durable"]))
            else:
                world.load()
        world.world.power_cut()
        world.cache = world.open()
        assert world.missing() == []
    assert world.durable


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_takes_the_same_steps(seed: int) -> None:
    """Every decision of every loop is the seed's: two runs leave the same trace."""

    def trace() -> str:
        world = World(seed)
        for _ in range(20):
            world.store("process")
            world.load()
        world.cache.close()
        return world.world.trace_digest()

    assert trace() == trace()


def test_a_slow_disk_costs_the_deadline_and_no_wrong_byte() -> None:
    """Loads from a disk that takes seconds end at their deadline, as misses; their buffers come back later."""
    world = World(3)
    keys = [world.cache.keys([number] * (SIZE * BLOCKS)) for number in range(8)]
    for own in keys:
        world.engine.write(own, range(BLOCKS))
        assert world.cache.submit_store(own, world.engine.pages, durability="process").result(600).refused == 0
    world.world.disk.latency_s = 30.0
    started = world.world.clock.monotonic()
    with world.cache.lookup([*[0] * (SIZE * BLOCKS), 1]) as hit:
        assert hit.by_tier["disk"] > 0
        world.engine.wipe()
        result = world.cache.submit_load(hit, world.engine.pages, deadline_s=0.5).result(600)
        assert "abandoned" in result.failed
        assert world.world.clock.monotonic() - started < 1.0
        assert world.engine.wrong_blocks(hit.keys, range(result.ok_tokens // SIZE)) == []
    world.world.run_for(100)
    stats = world.cache.stats()
    assert (stats["hops"], stats["pinned_entries"], stats["runs"]) == (0, 0, 0)
    assert stats["staging_free"] == stats["staging_buffers"]


@pytest.mark.parametrize(("outage_s", "is_forgotten"), [(1.0, False), (100.0, True)])
def test_a_device_that_reads_nothing_for_a_while_makes_nobody_forget_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, outage_s: float, is_forgotten: bool
) -> None:
    """One bad record among good ones is forgotten at once, and everything that cannot be read for long."""
    world = World(3)
    prompts = [[number] * (SIZE * BLOCKS) + [1] for number in range(8)]
    for prompt in prompts:
        keys = world.cache.keys(prompt)
        world.engine.write(keys, range(BLOCKS))
        assert world.cache.submit_store(keys, world.engine.pages, durability="process").result(600).refused == 0

    def load(prompt: list[int]) -> int:
        with world.cache.lookup(prompt) as hit:
            return world.cache.submit_load(hit, world.engine.pages).result(600).ok_tokens

    on_disk = [prompt for prompt in prompts if world.cache.lookup(prompt).by_tier["disk"]]
    assert len(on_disk) > 3
    with monkeypatch.context() as failing:
        failing.setattr(world.world.disk, "_read", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no answer")))
        load(on_disk[0])
        world.world.run_for(outage_s)
        for prompt in on_disk[1:]:
            load(prompt)
    found = sum(world.cache.match(prompt) == SIZE * BLOCKS for prompt in on_disk)
    assert found == 0 if is_forgotten else found >= len(on_disk) - 1
    if not is_forgotten:
        assert load(on_disk[-1]) == SIZE * BLOCKS
        assert world.engine.wrong_blocks(world.cache.keys(on_disk[-1]), range(BLOCKS)) == []


def test_after_a_failed_sync_other_blocks_are_durable_again_and_those_of_its_segment_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel may have dropped what it could not sync: of that nothing is promised any more, of the rest all is."""
    world = World(3)
    disk = world.world.disk
    old, new = ([number] * (SIZE * BLOCKS) for number in (1, 2))
    assert world.cache.submit_store(old, world.engine.pages, durability="process").result(600).refused == 0
    with monkeypatch.context() as failing:
        failing.setattr(disk, "_sync", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "once")))
        assert world.cache.submit_flush("durable").result(600).reason == "io_error"
    world.world.run_for(1)
    for _ in range(2):
        assert world.cache.submit_store(new, world.engine.pages, durability="durable").result(600).failed == {}
        world.world.run_for(600)
    again = world.cache.submit_store(old, world.engine.pages, durability="durable").result(600)
    assert again.failed == {"io_error": SIZE * BLOCKS}
    assert world.cache.submit_store(old, world.engine.pages, durability="process").result(600).failed == {}


def test_a_load_without_a_deadline_of_its_own_has_that_of_the_configuration() -> None:
    world = World(3)
    world.cache.close()
    world.config = SETTINGS | {"read": {"deadline_s": 2.0}}
    tokens = [1] * (SIZE * BLOCKS)
    with world.open() as cache:
        assert cache.submit_store(tokens, world.engine.pages, durability="process").result(600).refused == 0
    cache = world.open()
    cache.wait_attached(600)
    world.world.disk.latency_s = 30.0
    started_s = world.world.clock.monotonic()
    with cache.lookup([*tokens, 1]) as hit:
        assert hit.by_tier["disk"] == SIZE * BLOCKS
        assert cache.submit_load(hit, world.engine.pages).result(600).failed == {"abandoned": SIZE * BLOCKS}
    assert 2.0 <= world.world.clock.monotonic() - started_s < 3.0


@pytest.mark.parametrize("seed", range(4))
def test_a_store_that_waits_for_the_buffers_of_loads_goes_on_when_they_end(seed: int) -> None:
    """Encoding takes buffers of the same staging as loads that keep nothing in host memory; here there are four."""
    simulation, large = Simulation(seed), tiny_layout(dim=4096)
    engine, tokens = PseudoEngine(large, BLOCKS), [1] * (SIZE * BLOCKS)
    config = {
        "host": {"capacity": "8MiB", "staging": "1MiB"}, "read": {"promote": False},
        "disk": {"directories": ["/kv"], "capacity": "64MiB", "codec": "raw+lz4"},
    }  # fmt: skip
    with TieredCache(config, large, "sim", machine=simulation.machine()) as cache:
        assert cache.submit_store(tokens, engine.pages, durability="process").result(600).refused == 0
    with TieredCache(config, large, "sim", machine=simulation.machine()) as cache:
        cache.wait_attached(600)
        simulation.disk.latency_s = 1.0
        with cache.lookup([*tokens, 1]) as hit:
            load = cache.submit_load(hit, engine.pages)
            assert simulation.run_until(lambda: not cache.stats()["staging_free"], timeout_s=10)
            store = cache.submit_store([2] * SIZE, PseudoEngine(large, 1).pages, durability="process")
            assert load.result(600).ok_tokens == SIZE * BLOCKS
        assert store.result(600).stored == SIZE


class Prefetching(World):
    """A prompt whose blocks are only on a disk that takes half a minute for anything, and a prefetch policy."""

    def __init__(self, policy: str) -> None:
        super().__init__(4)
        self.cache.close()
        self.config = SETTINGS | {"prefetch": {"policy": policy, "timeout_base_s": 1.0}, "read": {"promote": False}}
        self.cache = self.open()
        documents = [self.cache.keys([number] * (SIZE * BLOCKS)) for number in range(8)]
        for own in documents:
            self.engine.write(own, range(BLOCKS))
            self.cache.submit_store(own, self.engine.pages, durability="process").result(600)
        self.keys = documents[0]
        self.world.disk.latency_s = 30.0
        self.started_s = self.world.clock.monotonic()

    def prefetch(self, deadline_s: float | None = None) -> PrefetchResult:
        assert self.on_host() == 0
        return self.cache.submit_prefetch(self.keys, deadline_s=deadline_s).result(600)

    def took_s(self) -> float:
        return self.world.clock.monotonic() - self.started_s

    def on_host(self) -> int:
        with self.cache.lookup(self.keys) as hit:
            return hit.by_tier["host"]


def test_a_prefetch_that_may_time_out_leaves_the_rest_on_disk() -> None:
    world = Prefetching("timeout")
    assert world.prefetch() == PrefetchResult(0, 0, {"abandoned": SIZE * BLOCKS})
    assert 1.0 < world.took_s() < 2.0
    world.world.run_for(600)
    assert world.on_host() == 0


def test_a_prefetch_that_waits_for_all_brings_all() -> None:
    world = Prefetching("wait_complete")
    assert world.prefetch() == PrefetchResult(SIZE * BLOCKS, 0)
    assert world.took_s() >= 30.0
    assert world.on_host() == SIZE * (BLOCKS - 1)


def test_nobody_waits_for_a_prefetch_that_does_its_best_and_it_goes_on_all_the_same() -> None:
    world = Prefetching("best_effort")
    assert world.prefetch() == PrefetchResult(0, 0, {}, pending=SIZE * BLOCKS)
    assert world.took_s() < 1.0
    assert world.on_host() == 0
    world.world.run_for(600)
    assert world.on_host() == SIZE * (BLOCKS - 1)
    assert world.cache.submit_prefetch(world.keys).result(600) == PrefetchResult(0, SIZE * BLOCKS)
    stats = world.cache.stats()
    assert (stats["hops"], stats["jobs"], stats["pinned_entries"]) == (0, 0, 0)


@pytest.mark.parametrize("policy", ["best_effort", "wait_complete"])
def test_a_deadline_of_its_own_is_how_long_a_prefetch_may_take(policy: str) -> None:
    world = Prefetching(policy)
    assert world.prefetch(deadline_s=3.0) == PrefetchResult(0, 0, {"abandoned": SIZE * BLOCKS})
    assert 3.0 < world.took_s() < 4.0


def test_a_disk_that_fails_segment_after_segment_leaves_host_memory_in_use_and_is_tried_again_later() -> None:
    world = Simulation(1)
    config = {"host": {"capacity": "256KiB", "staging": "1MiB"}, "disk": SETTINGS["disk"]}
    cache = TieredCache(config, LAYOUT, "sim", machine=world.machine())
    world.run_for(1)
    engine, finish = PseudoEngine(LAYOUT, BLOCKS), world.disk.finish

    def fail_writes(request: IORequest, snapshot: Snapshot | None) -> None:
        if request.op is Op.WRITE:
            raise OSError(errno.EIO, "broken")
        finish(request, snapshot)

    def stored(number: int, durability: str) -> dict[str, int]:
        keys = cache.keys([number] * (SIZE * BLOCKS))
        return cache.submit_store(keys, engine.pages, durability=durability).result(600).failed

    assert stored(50, "process") == {}
    world.disk.finish = fail_writes  # type: ignore[method-assign]
    for number in range(POISONED_IN_A_ROW):
        assert stored(number, "process") == {"io_error": SIZE * BLOCKS}
    world.run_for(0.1)
    started_s = world.clock.monotonic()
    for number in range(100, 200):
        assert stored(number, "memory") == {}
        assert cache.match([number] * (SIZE * BLOCKS + 1)) == SIZE * BLOCKS
    assert stored(300, "process") == {"no_disk": SIZE * BLOCKS}
    assert stored(50, "durable") == {}, "it is on disk, and only has to be synced"
    assert world.clock.monotonic() - started_s < 1, "nobody waits for it"
    world.disk.finish = finish  # type: ignore[method-assign]
    world.run_for(WRITE_PAUSE_S + 1)
    stored(400, "process")  # finds host memory full of what was never written, until that is on disk
    world.run_for(1)
    assert stored(401, "process") == {}
    assert cache.close(600)
