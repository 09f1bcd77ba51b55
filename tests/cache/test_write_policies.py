"""When blocks reach the disk, by write policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from kvtier import TieredCache
from kvtier.core.plan import PAGE_BYTES
from kvtier.metrics.prometheus import PrometheusCollector
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens


def opened(directory: Path, write: str) -> TieredCache:
    config: dict[str, Any] = {
        "host": {"capacity": "1MiB", "staging": "1MiB"},
        "disk": {"directories": [str(directory)], "capacity": "8MiB", "segment": "1MiB"},
        "policy": {"write": write},
    }
    return TieredCache(config, LAYOUT, "m")


def store(cache: TieredCache, number: int) -> list[int]:
    engine, tokens = PseudoEngine(LAYOUT, 4), [number] * (4 * SIZE) + [0]
    keys = cache.keys(tokens)
    engine.write(keys, range(4))
    assert cache.submit_store(keys, engine.pages).result(30).stored == 4 * SIZE
    return tokens


def settled_disk_entries(cache: TieredCache) -> float:
    """Entries on disk once everything that is queued for it is there."""
    for _ in range(10_000):
        if not cache.stats()["write_backlog_entries"]:
            break
        cache.submit_flush("memory").result(30)
    return cache.stats()["disk_entries"]


def test_write_through_writes_every_block_when_it_is_stored(tmp_path: Path) -> None:
    with opened(tmp_path, "write_through") as cache:
        store(cache, 1)
        assert settled_disk_entries(cache) == 4


def test_write_through_selective_writes_a_block_when_it_is_used_again(tmp_path: Path) -> None:
    with opened(tmp_path, "write_through_selective") as cache:
        tokens, _ = store(cache, 1), store(cache, 2)
        assert settled_disk_entries(cache) == 0
        cache.lookup(tokens).release()
        assert settled_disk_entries(cache) == 4


def test_write_back_writes_when_host_memory_runs_full_and_keeps_the_disk_copy_of_what_comes_back(
    tmp_path: Path,
) -> None:
    """Over the high watermark the oldest blocks are written; promoted ones are not written a second time."""
    with opened(tmp_path, "write_back") as cache:
        tokens = store(cache, 0)
        assert settled_disk_entries(cache) == 0
        for number in range(1, 60):
            store(cache, number)
            settled_disk_entries(cache)
        assert 0 < settled_disk_entries(cache) < 240
        with cache.lookup(tokens) as hit:
            assert hit.by_tier["disk"] == 4 * SIZE
            engine = PseudoEngine(LAYOUT, 5)
            assert cache.submit_load(hit, engine.pages).result(30).ok_tokens == 4 * SIZE
            assert engine.wrong_blocks(hit.keys, range(4)) == []
        with cache.lookup(tokens) as hit:
            assert hit.by_tier["host"] == 4 * SIZE
        on_disk = settled_disk_entries(cache)
        assert cache.stats()["stored_disk_blocks"] == on_disk


def test_what_is_closed_is_found_again_whatever_the_policy(tmp_path: Path) -> None:
    for write in ("write_through", "write_through_selective", "write_back"):
        with opened(tmp_path / write, write) as cache:
            tokens = store(cache, 1)
        with opened(tmp_path / write, write) as cache:
            assert cache.match(tokens) == 4 * SIZE


def test_prometheus_reads_what_stats_says(tmp_path: Path) -> None:
    """Counters and gauges of planner and data plane, with their labels."""
    with opened(tmp_path, "write_through") as cache:
        store(cache, 1)
        cache.flush("process", 30)
        registry = CollectorRegistry()
        registry.register(PrometheusCollector(cache.samples))
        assert registry.get_sample_value("kvtier_stored_host_blocks_total") == 4
        assert registry.get_sample_value("kvtier_disk_entries") == 4
        assert registry.get_sample_value("kvtier_lane_queued_bytes", {"lane": "disk-0"}) == 0
        assert cache.stats()["lane_queued_bytes{lane=disk-0}"] == 0


def test_room_that_a_lease_held_is_made_once_it_goes() -> None:
    """All was pinned when there was a look at what may go; nothing is written, and no block comes or goes since.

    The store that finds it full asks for room, and is the last one that does not get any.
    """
    layout = tiny_layout(dim=64)
    size, pages = layout.block_tokens, layout.record_pages[0]
    world, engine = Simulation(1), PseudoEngine(layout, 8)
    config: dict[str, Any] = {
        "host": {"capacity": 10 * pages * PAGE_BYTES, "staging": "1MiB"},
        "disk": {"directories": ["/kv"], "capacity": "8MiB", "segment": "1MiB"},
        "policy": {"write": "write_back"},
    }
    cache = TieredCache(config, layout, "m", machine=world.machine())
    world.run_for(1)

    def stored(number: int, blocks: int) -> int:
        return cache.submit_store([number] * (blocks * size), engine.pages).result(60).stored

    hits = []
    for number, blocks in enumerate((8, 1, 1)):
        assert stored(number, blocks) == blocks * size
        hits.append(cache.lookup([number] * (blocks * size + 1)))
    world.run_for(1)
    hits[0].release()
    stored(9, 1)
    for number in range(10, 20):
        world.run_for(1)
        assert stored(number, 1) == size
