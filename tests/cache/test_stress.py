"""Many users at once on tiny tiers: every byte that comes back belongs to its key, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from kvtier import CacheManager, ClosedError, TieredCache
from kvtier.core.keys import Keys
from kvtier.hits import Hit
from kvtier.testing.contents import PseudoEngine, tiny_layout

BLOCKS = 12
LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
TASKS, THREADS = 32, 8


def config(directory: Path, write: str, codec: str) -> dict[str, object]:
    """With a codec, loads compete with spills for staging: what they read is not kept."""
    return {
        "host": {"capacity": "512KiB", "staging": "1MiB"},
        "disk": {"directories": [str(directory)], "capacity": "8MiB", "segment": "1MiB", "codec": codec},
        "policy": {"write": write},
        "read": {"promote": codec == "raw"},
    }


def sequence(rng: random.Random) -> list[int]:
    """One of a few hundred sequences that branch off each other at block borders and inside blocks."""
    tokens: list[int] = []
    for _ in range(rng.randint(1, BLOCKS)):
        tokens += [rng.randrange(3)] * SIZE
    return tokens + [7] * rng.randrange(SIZE)


class Seen:
    """What all users saw together."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def check(self, engine: PseudoEngine, hit: Hit, ok_tokens: int) -> None:
        blocks = range(ok_tokens // SIZE)
        self.counts["loaded_blocks"] += len(blocks)
        self.wrong += [f"block {block} of {hit!r}" for block in engine.wrong_blocks(hit.keys, blocks)]


def one_request(cache: TieredCache, engine: PseudoEngine, rng: random.Random, seen: Seen) -> None:
    """Look up, load, check, then store what was missing, as an engine would."""
    keys = cache.keys(sequence(rng), tenant=rng.choice(["a", "b"]))
    with cache.lookup(keys, session=f"s{rng.randrange(9)}") as hit:
        engine.wipe()
        job = cache.submit_load(hit, engine.pages, deadline_s=rng.choice([None, 0.001, 5.0]))
        if rng.random() < 0.1:
            job.cancel()
        ok_tokens = job.result(60).ok_tokens
        seen.check(engine, hit, ok_tokens)
    engine.write(keys, range(ok_tokens // SIZE, len(keys)))
    durability = rng.choice(["memory", "memory", "memory", "process", "durable"])
    store = cache.submit_store(keys, engine.pages, start=ok_tokens, durability=durability)
    store.wait_source_free(60)
    engine.wipe()  # what is stored must have been taken by now
    result = store.result(60)
    assert result.stored + result.existing + result.refused == (len(keys) - ok_tokens // SIZE) * SIZE
    seen.counts.update(stored=result.stored, refused=result.refused, operations=2)


def run_threads(cache: TieredCache, seed: int, operations: int, seen: Seen) -> list[threading.Thread]:
    errors: list[BaseException] = []

    def user(number: int) -> None:
        rng, engine = random.Random(f"{seed}-{number}"), PseudoEngine(LAYOUT, BLOCKS + 1)
        try:
            for _ in range(operations // THREADS // 2):
                seen.counts["attempts"] += 2
                one_request(cache, engine, rng, seen)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=user, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    return threads


async def one_async_request(cache: CacheManager, engine: PseudoEngine, rng: random.Random, seen: Seen) -> None:
    keys: Keys = cache.keys(sequence(rng), tenant=rng.choice(["a", "b"]))
    with cache.lookup(keys) as hit:
        engine.wipe()
        job = cache.load(hit, engine.pages)
        try:
            ok_tokens = (await job).ok_tokens
        except asyncio.CancelledError:
            job.cancel()
            await asyncio.shield(job)  # the pages are the job's until it is done
            raise
        seen.check(engine, hit, ok_tokens)
    engine.write(keys, range(ok_tokens // SIZE, len(keys)))
    store = cache.store(keys, engine.pages, start=ok_tokens, derived_from=hit)
    try:
        await store.wait_source_free()
    except asyncio.CancelledError:
        await asyncio.shield(store)
        raise
    engine.wipe()
    if rng.random() < 0.05:
        await cache.prefetch(keys)
    result = await store
    seen.counts.update(stored=result.stored, refused=result.refused, operations=2)


async def async_user(cache: CacheManager, number: int, seed: int, operations: int, seen: Seen) -> None:
    rng, engine = random.Random(f"{seed}-async-{number}"), PseudoEngine(LAYOUT, BLOCKS + 1)
    done = 0
    while done < operations // TASKS:
        seen.counts["attempts"] += 2
        request = asyncio.ensure_future(one_async_request(cache, engine, rng, seen))
        if rng.random() < 0.2:
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
            request.cancel()
            seen.counts["cancelled"] += 1
        await asyncio.wait([request])
        if not request.cancelled():
            request.result()
        done += 2


def settled(cache: TieredCache) -> dict[str, float]:
    """Levels once everything is written and no segment is being cleaned, which goes on behind everybody's back."""
    for _ in range(10_000):
        cache.flush("process", 60)
        stats = cache.stats()
        if not stats["hops"]:
            break
    return stats


def assert_nothing_left(cache: TieredCache) -> None:
    stats = settled(cache)
    for level in ("leases", "hops", "pinned_entries", "write_backlog_entries", "jobs", "runs", "memories"):
        assert stats[level] == 0, (level, stats)
    assert stats["staging_free"] == stats["staging_buffers"]
    assert stats["host_used_bytes"] == stats["host_entries"] * 2 * 4096
    assert not [name for name in stats if name.startswith(("damaged_reads", "failed_pieces"))]


async def stress(directory: Path, write: str, seed: int, operations: int, codec: str = "raw") -> Seen:
    seen = Seen()
    before = set(threading.enumerate())
    async with CacheManager(config(directory, write, codec), LAYOUT, "stress") as cache:
        threads = run_threads(cache.core, seed, operations // 2, seen)
        await asyncio.gather(*(async_user(cache, n, seed, operations // 2, seen) for n in range(TASKS)))
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        await asyncio.to_thread(assert_nothing_left, cache.core)
        core = cache.core
    with pytest.raises(ClosedError):
        core.match([1, 2, 3])
    left = {thread for thread in threading.enumerate() if thread not in before and "asyncio" not in thread.name}
    assert not left
    return seen


def check(seen: Seen, operations: int) -> None:
    assert not seen.wrong
    assert seen.counts["attempts"] >= operations
    assert seen.counts["operations"] > operations * 3 // 4, "a fifth of the asynchronous requests is cancelled"
    assert seen.counts["loaded_blocks"] > operations // 4
    assert seen.counts["cancelled"] > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("write", ["write_through", "write_back"])
async def test_every_loaded_byte_belongs_to_its_key_and_nothing_is_left(tmp_path: Path, write: str) -> None:
    """32 tasks and 8 threads with overlapping prefixes, deadlines and cancellation at random points."""
    check(await stress(tmp_path, write, seed=1, operations=10_240), 10_000)


@pytest.mark.timeout(300)
async def test_the_same_with_records_that_are_encoded_on_their_way_to_disk(tmp_path: Path) -> None:
    check(await stress(tmp_path, "write_back", seed=3, operations=5_120, codec="raw+lz4"), 5_000)


@pytest.mark.stress
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("write", ["write_through", "write_back"])
async def test_half_a_million_operations_leave_nothing_behind(tmp_path: Path, write: str) -> None:
    """The same for as long as it takes, with both write policies a million."""
    check(await stress(tmp_path, write, seed=2, operations=500_224), 500_000)
