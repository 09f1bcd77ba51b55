"""Queues are bounded in bytes: over budget stores and loads are refused and counted, never waited for."""

from __future__ import annotations

from typing import Any

from kvtier import TieredCache
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE, BLOCK_BYTES = LAYOUT.block_tokens, LAYOUT.block_bytes[0]
BLOCKS = 16
"""More than is moved on the spot."""


def opened(**host: Any) -> TieredCache:
    """On a simulated machine nothing moves before somebody waits, so what is under way stays under way."""
    return TieredCache(
        {"host": {"capacity": "1MiB", "staging": "1MiB"} | host}, LAYOUT, "m", machine=Simulation(1).machine()
    )


def test_stores_over_the_store_queue_are_refused_tail_first() -> None:
    cache, engine = opened(store_queue=(BLOCKS + 1) * BLOCK_BYTES), PseudoEngine(LAYOUT, BLOCKS)
    first = cache.submit_store([1] * (BLOCKS * SIZE), engine.pages)
    second = cache.submit_store([2] * (BLOCKS * SIZE), engine.pages)
    assert first.result(1).stored == BLOCKS * SIZE
    assert second.result(1).stored == SIZE
    assert second.result(1).failed == {"refused": (BLOCKS - 1) * SIZE}
    assert cache.match([2] * (BLOCKS * SIZE)) == SIZE
    assert cache.submit_store([3] * (BLOCKS * SIZE), engine.pages).result(1).stored == BLOCKS * SIZE


def test_loads_over_the_load_queue_are_refused_and_one_alone_always_runs() -> None:
    cache, engine = opened(load_queue=BLOCK_BYTES), PseudoEngine(LAYOUT, BLOCKS + 1)
    tokens = [1] * (BLOCKS * SIZE) + [0]
    cache.submit_store(tokens, engine.pages).result(1)
    with cache.lookup(tokens) as hit:
        first, second = (cache.submit_load(hit, engine.pages) for _ in range(2))
        assert second.result(1).failed == {"refused": BLOCKS * SIZE}
        assert first.result(1).ok_tokens == BLOCKS * SIZE
        assert cache.submit_load(hit, engine.pages).result(1).ok_tokens == BLOCKS * SIZE


def test_a_few_small_blocks_are_moved_before_submit_returns() -> None:
    """On a simulated machine nobody else has moved anything by then."""
    cache, engine = opened(), PseudoEngine(LAYOUT, 5)
    tokens = [1] * (4 * SIZE) + [0]
    assert cache.submit_store(tokens, engine.pages).done
    with cache.lookup(tokens) as hit:
        assert hit.num_tokens == 4 * SIZE
        assert cache.submit_load(hit, engine.pages).done
    assert not cache.submit_store([2] * (BLOCKS * SIZE), PseudoEngine(LAYOUT, BLOCKS).pages).done
