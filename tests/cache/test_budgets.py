"""Queues are bounded in bytes: over budget stores and loads are refused and counted, never waited for."""

from __future__ import annotations

from typing import Any

from kvtier import TieredCache
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE, BLOCK_BYTES = LAYOUT.block_tokens, LAYOUT.block_bytes[0]


def opened(**host: Any) -> TieredCache:
    """On a simulated machine nothing moves before somebody waits, so what is under way stays under way."""
    return TieredCache(
        {"host": {"capacity": "1MiB", "staging": "1MiB"} | host}, LAYOUT, "m", machine=Simulation(1).machine()
    )


def test_stores_over_the_store_queue_are_refused_tail_first() -> None:
    cache, engine = opened(store_queue=5 * BLOCK_BYTES), PseudoEngine(LAYOUT, 4)
    first = cache.submit_store([1] * (4 * SIZE), engine.pages)
    second = cache.submit_store([2] * (4 * SIZE), engine.pages)
    assert first.result(1).stored == 4 * SIZE
    assert second.result(1).stored == SIZE
    assert second.result(1).failed == {"refused": 3 * SIZE}
    assert cache.match([2] * (4 * SIZE)) == SIZE
    assert cache.submit_store([3] * (4 * SIZE), engine.pages).result(1).stored == 4 * SIZE


def test_loads_over_the_load_queue_are_refused_and_one_alone_always_runs() -> None:
    cache, engine = opened(load_queue=BLOCK_BYTES), PseudoEngine(LAYOUT, 5)
    tokens = [1] * (4 * SIZE) + [0]
    cache.submit_store(tokens, engine.pages).result(1)
    with cache.lookup(tokens) as hit:
        first, second = (cache.submit_load(hit, engine.pages) for _ in range(2))
        assert second.result(1).failed == {"refused": 4 * SIZE}
        assert first.result(1).ok_tokens == 4 * SIZE
        assert cache.submit_load(hit, engine.pages).result(1).ok_tokens == 4 * SIZE
