"""A directory that a newer version made, and of which it says that older ones may only read it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvtier import TieredCache
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.tiers.disk.directory import SUPERBLOCKS, read_superblocks

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
BLOCKS = 8
AT_ONCE_S = 0.1


class World:
    """A cache over directories, of which ``read_only`` ones became so after document 1 was stored in all."""

    def __init__(self, *directories: str, read_only: tuple[str, ...]) -> None:
        self.world = Simulation(1)
        self.engine = PseudoEngine(LAYOUT, BLOCKS)
        self.config: dict[str, Any] = {
            "host": {"capacity": "256KiB", "staging": "1MiB"},
            "disk": {"directories": list(directories), "capacity": "16MiB", "segment": "1MiB"},
        }
        self.cache = self.opened()
        for number in range(1, 5):
            assert self.store(number, "durable") == {}
        assert self.cache.close()
        for directory in read_only:
            self._mark(directory)
        self.cache = self.opened()
        self.started_s = self.world.clock.monotonic()

    def opened(self) -> TieredCache:
        return TieredCache(self.config, LAYOUT, "sim", machine=self.world.machine())

    def _mark(self, directory: str) -> None:
        files, path = self.world.disk, f"{directory}/{LAYOUT.placement}"
        found = read_superblocks(files, path)
        assert found is not None
        for name in SUPERBLOCKS:
            fd = files.open(f"{path}/{name}", direct=False)
            files.write_at(fd, 0, replace(found, ro_compat=1).pack())
            files.close(fd)

    def store(self, number: int, durability: str) -> dict[str, int]:
        """What was refused of document ``number``, and why."""
        keys = self.cache.keys([number] * (SIZE * BLOCKS))
        self.engine.write(keys, range(BLOCKS))
        return self.cache.submit_store(keys, self.engine.pages, durability=durability).result(600).failed

    def loads(self, number: int) -> bool:
        with self.cache.lookup([number] * (SIZE * BLOCKS + 1)) as hit:
            self.engine.wipe()
            ok_tokens = self.cache.submit_load(hit, self.engine.pages).result(600).ok_tokens
            return ok_tokens == SIZE * BLOCKS and not self.engine.wrong_blocks(hit.keys, range(BLOCKS))

    @property
    def took_s(self) -> float:
        return self.world.clock.monotonic() - self.started_s


@pytest.mark.parametrize("durability", ["process", "durable"])
@pytest.mark.parametrize("is_told", [True, False])
def test_what_must_be_written_to_it_is_refused_at_once_and_reads_go_on(durability: str, is_told: bool) -> None:
    """Whether control has heard of it yet or not."""
    world = World("/kv", read_only=("/kv",))
    if is_told:
        world.world.run_for(1)
        world.started_s = world.world.clock.monotonic()
    assert world.store(9, durability) == {"no_disk": SIZE * BLOCKS}
    assert world.took_s < AT_ONCE_S
    assert world.loads(9), "host memory has it"
    assert all(world.loads(number) for number in range(1, 5))
    assert world.took_s < AT_ONCE_S
    assert world.cache.close()


def test_host_memory_that_cannot_be_written_to_disk_makes_room_at_once() -> None:
    world = World("/kv", read_only=("/kv",))
    world.world.run_for(1)
    world.started_s = world.world.clock.monotonic()
    for number in range(100, 140):
        assert world.store(number, "memory") == {}
    assert world.took_s < AT_ONCE_S
    stats = world.cache.stats()
    assert (stats["write_backlog_entries"], stats.get("spilled_bytes", 0)) == (0, 0)


def test_of_two_directories_the_other_is_written_to() -> None:
    world = World("/a", "/b", read_only=("/a",))
    for number in range(100, 140):
        assert world.store(number, "process") == {}
    assert world.took_s < AT_ONCE_S * 5
    assert all(world.loads(number) for number in (1, 2, 3, 4, 100, 139))
