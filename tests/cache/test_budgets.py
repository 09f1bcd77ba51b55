"""Queues are bounded in bytes: over budget stores and loads are refused and counted, never waited for."""

from __future__ import annotations

from typing import Any

from kvtier import TieredCache
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE, BLOCK_BYTES = LAYOUT.block_tokens, LAYOUT.block_bytes[0]
BLOCKS = 16


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


def test_submit_moves_nothing_itself_and_plans_nothing() -> None:
    """On a simulated machine nobody else has done anything by then."""
    cache, engine = opened(), PseudoEngine(LAYOUT, BLOCKS)
    jobs = [cache.submit_store([number] * SIZE + [0], engine.pages) for number in range(2)]
    assert not any(job.done for job in jobs)
    assert cache._planner.levels()["entries"] == 0
    assert [job.result(1).stored for job in jobs] == [SIZE, SIZE]


def test_what_was_wished_for_before_a_lookup_is_pending_in_it() -> None:
    cache, engine = opened(), PseudoEngine(LAYOUT, BLOCKS)
    tokens = [1] * (4 * SIZE) + [0]
    job = cache.submit_store(tokens, engine.pages)
    with cache.lookup(tokens) as hit:
        assert (hit.num_tokens, hit.pending) == (0, 4 * SIZE)
    assert job.result(1).stored == 4 * SIZE


def test_a_load_may_be_wished_for_and_its_hit_released_before_anybody_plans_it() -> None:
    cache, engine = opened(), PseudoEngine(LAYOUT, BLOCKS)
    tokens = [1] * (4 * SIZE) + [0]
    cache.submit_store(tokens, engine.pages).result(1)
    with cache.lookup(tokens) as hit:
        job = cache.submit_load(hit, engine.pages)
    assert job.result(1).ok_tokens == 4 * SIZE


def test_a_version_that_is_retired_after_a_wish_ends_it_as_a_miss() -> None:
    cache, engine = opened(), PseudoEngine(LAYOUT, BLOCKS)
    job = cache.submit_store([1] * SIZE, engine.pages)
    cache.set_weights_version("next")
    assert job.result(1).failed == {"retired": SIZE}


def test_keys_that_grow_after_a_wish_do_not_change_it() -> None:
    cache, engine = opened(), PseudoEngine(LAYOUT, BLOCKS)
    keys = cache.keys([1] * SIZE)
    job = cache.submit_store(keys, engine.pages)
    keys.append([2] * SIZE)
    assert job.result(1).stored == SIZE
    assert cache.match(keys) == SIZE


def test_a_wish_that_nobody_plans_before_the_end_ends_with_it() -> None:
    cache, engine = opened(), PseudoEngine(LAYOUT, BLOCKS)
    job = cache.submit_store([1] * SIZE, engine.pages)
    assert cache.close()
    assert job.done
    assert cache.stats()["jobs"] == 0


def test_a_wish_wakes_a_copy_thread_and_does_not_wait_for_housekeeping() -> None:
    """Which looks for what was forgotten every 20 ms of virtual time."""
    simulation, engine = Simulation(1), PseudoEngine(LAYOUT, BLOCKS)
    config = {"host": {"capacity": "1MiB", "staging": "1MiB"}}
    cache = TieredCache(config, LAYOUT, "m", machine=simulation.machine())
    for number in range(3):
        simulation.run_until(lambda: False, timeout_s=0.001)  # everybody who still has something to do does it
        before_s = simulation.clock.monotonic()
        assert cache.submit_store([number] * SIZE, engine.pages).result(1).stored == SIZE
        assert simulation.clock.monotonic() < before_s + 0.001
