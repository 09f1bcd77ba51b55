"""A cache with a device tier, on the CPU that stands in for a GPU: every byte, from every tier, whatever happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvtier import TieredCache
from kvtier.core.keys import Keys
from kvtier.errors import CapacityError, ConfigError
from kvtier.pages import DeviceTensors
from kvtier.runtime import system_machine
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout

BLOCKS = 4
LAYOUTS = {
    "small blocks": tiny_layout(),
    "blocks of a page and a bit": tiny_layout(dim=65),
    "blocks of several slices": tiny_layout(layers=3, dim=8192),
    "padded slices": tiny_layout(layers=3, dim=8200),
}


class OnDevice(PseudoEngine):
    """The same pages, as tensors of a device."""

    def __init__(self, layout: Any, num_pages: int) -> None:
        super().__init__(layout, num_pages)
        self.memory = DeviceTensors(layout, [torch.from_numpy(tensor) for tensor in self.tensors])  # type: ignore[assignment]


class World:
    """One engine, one cache on a simulated machine; ``device_blocks`` and ``host_blocks`` fit its tiers."""

    def __init__(
        self,
        layout: Any,
        *,
        device_blocks: int = 8,
        host_blocks: int = 64,
        disk: bool = True,
        engine: Any = PseudoEngine,
        **how: Any,
    ) -> None:
        self.layout = layout
        self.simulation = Simulation(0)
        block_bytes = layout.record_pages[0] * 4096
        self.config: dict[str, Any] = {
            "device": {"capacity": device_blocks * block_bytes, "device": "cpu", **how},
            "host": {"capacity": host_blocks * block_bytes, "staging": "1MiB"},
            "disk": {"directories": ["/kv"] if disk else [], "capacity": "256MiB"},
        }
        self.engine = engine(layout, BLOCKS)
        self.cache = self.open()

    def open(self) -> TieredCache:
        return TieredCache(self.config, self.layout, "model", machine=self.simulation.machine())

    def keys(self, seed: int = 0) -> Keys:
        tokens = np.random.default_rng(seed).integers(0, 1000, BLOCKS * self.layout.block_tokens + 1)
        return self.cache.keys(tokens)

    def store(self, seed: int = 0, durability: str = "memory") -> None:
        self.engine.write(self.keys(seed), range(BLOCKS))
        result = self.cache.submit_store(self.keys(seed), self.engine.pages, durability=durability).result(600)
        assert not result.refused
        self.engine.wipe()

    def rest(self) -> None:
        self.simulation.run_idle()

    def load(self, seed: int = 0) -> dict[str, int]:
        """Load all of it, compare every byte; how many blocks came from which tier."""
        keys = self.keys(seed)
        self.engine.wipe()
        with self.cache.lookup(keys) as hit:
            result = self.cache.submit_load(hit, self.engine.pages).result(600)
        blocks = result.ok_tokens // self.layout.block_tokens
        assert self.engine.wrong_blocks(keys, range(blocks)) == []
        return {tier: tokens // self.layout.block_tokens for tier, tokens in result.by_tier.items() if tokens}

    @property
    def slab(self) -> Any:
        return self.cache._dispatch.channels[0]._plane._equipment.slab  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", [PseudoEngine, OnDevice])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_comes_back_from_device_host_and_disk_and_after_a_restart(name: str, engine: Any) -> None:
    world = World(LAYOUTS[name], device_blocks=5, host_blocks=10, engine=engine, verify=True)
    for seed in range(4):
        world.store(seed)
        world.rest()
    assert world.load(3) == {"device": BLOCKS}
    assert world.load(2) == {"host": BLOCKS}
    assert world.load(2) == {"device": BLOCKS}, "a copy is kept of what was loaded from host memory"
    assert world.load(0) == {"disk": BLOCKS}
    assert world.load(0) == {"host": BLOCKS}
    world.cache.flush("process", 600)
    assert world.cache.close(600)
    world.cache = world.open()
    world.cache.wait_attached(600)
    for seed in range(4):
        assert world.load(seed) == {"disk": BLOCKS}
    assert world.cache.close(600)


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_room_on_the_device_nothing_is_different(name: str) -> None:
    world = World(LAYOUTS[name], device_blocks=0)
    world.store()
    assert world.slab is None
    assert world.load() == {"host": BLOCKS}
    assert not [sample for sample in world.cache.stats() if "device" in sample]
    assert world.cache.close(600)


def test_what_was_acknowledged_survives_a_crash_and_what_was_on_the_device_alone_is_a_miss() -> None:
    world = World(LAYOUTS["small blocks"])
    world.store(0, "process")
    world.store(1)
    world.simulation.kill()
    world.cache = world.open()
    world.cache.wait_attached(600)
    assert world.load(0) == {"disk": BLOCKS}
    assert world.load(1) in ({}, {"disk": BLOCKS}), "it may have come so far by itself"
    assert world.cache.close(600)


def test_part_of_a_block_is_loaded_and_nothing_else_is_touched() -> None:
    layout = LAYOUTS["small blocks"]
    world = World(layout, engine=OnDevice)
    world.store()
    keys, size = world.keys(), layout.block_tokens
    with world.cache.lookup(keys) as hit:
        result = world.cache.submit_load(hit, world.engine.pages, start=size // 2, stop=3 * size).result(600)
    assert result.ok_tokens == 3 * size
    assert result.by_tier == {"device": 5 * size // 2, "host": 0, "disk": 0}
    assert world.engine.wrong_blocks(keys, range(1, 3)) == []
    for tensor in world.engine.tensors:
        assert not tensor[0, : size // 2].any()
        assert not tensor[3].any()
    assert world.cache.close(600)


@pytest.mark.parametrize("name", ["small blocks", "blocks of several slices"])
class TestDamage:
    def test_a_bit_that_flips_on_the_device_is_seen_with_verify_and_another_copy_is_read(self, name: str) -> None:
        world = World(LAYOUTS[name], disk=False, verify=True)
        world.store()
        world.rest()
        world.slab.record(1, 1)[17] ^= 4
        world.load()
        assert world.load() == {"device": BLOCKS - 1, "host": 1} or world.load() == {"device": BLOCKS}
        assert world.cache.stats()["lost_copies{tier=device}"] == 1
        assert world.cache.close(600)

    def test_a_bit_that_flipped_in_what_came_from_host_memory_does_not_get_a_new_checksum(self, name: str) -> None:
        """Its checksum came along: landing again compares it, whether the device verifies or not."""
        world = World(LAYOUTS[name], disk=False, device_blocks=5)
        for seed in range(2):
            world.store(seed)
            world.rest()
        assert world.load(0) == {"host": BLOCKS}
        state = world.cache._planner._state
        for entry in list(state.host.candidates()):
            state.host.drop(entry)
        world.slab.record(1, 1)[17] ^= 4
        for entry in list(state.device.candidates()):
            state.landing.enqueue(entry)
        world.cache._dispatch.decide(world.cache._planner.follow_up)
        world.rest()
        assert world.cache.stats()["lost_copies{tier=device}"] == 1
        world.load(0)
        assert world.cache.close(600)

    def test_a_plan_that_names_another_place_is_a_miss(self, name: str) -> None:
        world = World(LAYOUTS[name], disk=False)
        world.store()
        world.rest()
        world.slab.residents._at.clear()
        assert world.load() == {"device": BLOCKS}, "so it was promised, and read from host memory"
        assert world.cache.stats()["lost_copies{tier=device}"] == BLOCKS
        assert world.cache.close(600)


class TestOpening:
    def test_a_device_too_small_for_a_block_is_refused(self) -> None:
        layout = LAYOUTS["small blocks"]
        config = {"device": {"capacity": 4096, "device": "cpu"}, "host": {"capacity": "1MiB", "staging": "1MiB"}}
        with pytest.raises(CapacityError, match=r"device.capacity = 4096: one block .* at least 8192, or to 0"):
            TieredCache(config, layout, "model", machine=Simulation(0).machine())

    def test_a_stand_in_counts_as_memory_of_the_machine(self) -> None:
        config = {"device": {"capacity": "4PiB", "device": "cpu"}, "host": {"capacity": "1MiB", "staging": "1MiB"}}
        with pytest.raises(ConfigError, match=r"arena 'device': .* memory that .* available"):
            TieredCache(config, LAYOUTS["small blocks"], "model", machine=system_machine())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be found")
    def test_a_gpu_that_is_not_there_is_refused(self) -> None:
        config = {"device": {"capacity": "1MiB", "device": "cuda"}, "host": {"capacity": "1MiB", "staging": "1MiB"}}
        with pytest.raises(ConfigError, match=r'device.device = "cuda": torch sees 0 CUDA devices'):
            TieredCache(config, LAYOUTS["small blocks"], "model", machine=Simulation(0).machine())


def test_a_prefetch_brings_a_sequence_to_the_device() -> None:
    world = World(LAYOUTS["small blocks"])
    world.store(0, "process")
    result = world.cache.submit_prefetch(world.keys(), to="device").result(600)
    assert (result.fetched, result.existing) == (BLOCKS * world.layout.block_tokens, 0)
    assert world.load() == {"device": BLOCKS}
    assert world.cache.close(600)
