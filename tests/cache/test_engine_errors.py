"""Engine memory that raises: its blocks say so, the log has the traceback, and everything else goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier import ConfigError, TieredCache
from kvtier.core.memory import KVPages
from kvtier.testing import Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout
from tests.cache.raising_memory import RaisingMemory

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
BLOCKS = 8
ERRORS = [RuntimeError("CUDA error: an illegal memory access"), ConfigError("page 9: there are 8"), SystemExit(1)]


@pytest.fixture
def engine() -> PseudoEngine:
    return PseudoEngine(LAYOUT, BLOCKS)


@pytest.fixture(params=["host", "disk", "lz4"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TieredCache]:
    """A cache whose loads come from host memory, or from disk, raw or coded."""
    config: dict[str, Any] = {"host": {"capacity": "1MiB", "staging": "1MiB"}}
    if request.param != "host":
        codec = "raw" if request.param == "disk" else "raw+lz4"
        config["disk"] = {"directories": [str(tmp_path)], "capacity": "8MiB", "segment": "1MiB", "codec": codec}
        with TieredCache(config, LAYOUT, "m") as earlier:
            store(earlier, PseudoEngine(LAYOUT, BLOCKS))
    with TieredCache(config, LAYOUT, "m") as opened:
        if request.param == "host":
            store(opened, PseudoEngine(LAYOUT, BLOCKS))
        yield opened


def store(cache: TieredCache, engine: PseudoEngine, number: int = 1) -> None:
    keys = cache.keys([number] * (SIZE * BLOCKS))
    engine.write(keys, range(BLOCKS))
    durability = "process" if cache.config.disk.directories else "memory"
    assert cache.submit_store(keys, engine.pages, durability=durability).result(30).stored == SIZE * BLOCKS


def loads(cache: TieredCache, engine: PseudoEngine, number: int = 1) -> bool:
    with cache.lookup([number] * (SIZE * BLOCKS + 1)) as hit:
        engine.wipe()
        ok_tokens = cache.submit_load(hit, engine.pages).result(30).ok_tokens
        return ok_tokens == SIZE * BLOCKS and not engine.wrong_blocks(hit.keys, range(BLOCKS))


def assert_nothing_leaks(cache: TieredCache) -> None:
    stats = cache.stats()
    assert (stats["jobs"], stats["hops"], stats["pinned_entries"], stats["memories"]) == (0, 0, 0, 0)
    assert stats["staging_free"] == stats["staging_buffers"]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The errors whose tracebacks the data plane has logged."""
    return [repr(record.exc_info[1]) for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_store_from_memory_that_raises_is_refused_as_an_error_of_the_engine(
    cache: TieredCache, engine: PseudoEngine, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    pages = KVPages(RaisingMemory(engine.memory, "gather", error), engine.pages.table)
    used_bytes = cache.stats()["host_used_bytes"]
    for durability in ("memory", "durable") if cache.config.disk.directories else ("memory",):
        result = cache.submit_store([7] * (SIZE * BLOCKS), pages, durability=durability).result(30)
        assert (result.stored, result.failed) == (0, {"engine_error": SIZE * BLOCKS})
    assert cache.stats()["host_used_bytes"] == used_bytes
    store(cache, engine, 7)
    assert loads(cache, engine, 7)
    assert loads(cache, engine)
    assert_nothing_leaks(cache)
    assert cache.close()
    assert told(caplog) == [repr(error)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_load_to_memory_that_raises_is_an_error_of_the_engine_and_says_nothing_about_the_block(
    cache: TieredCache, engine: PseudoEngine, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Not one of the disk, and no damage: the copies stay, and the next load finds all of them."""
    pages = KVPages(RaisingMemory(engine.memory, "scatter", error), engine.pages.table)
    with cache.lookup([1] * (SIZE * BLOCKS + 1)) as hit:
        result = cache.submit_load(hit, pages).result(30)
    assert (result.ok_tokens, result.failed) == (0, {"engine_error": SIZE * BLOCKS})
    counted = cache.stats()
    assert not [name for name in counted if name.startswith(("damaged_reads", "lost_copies", "read_errors"))]
    assert loads(cache, engine)
    store(cache, engine, 7)
    assert_nothing_leaks(cache)
    assert cache.close()
    assert told(caplog) == [repr(error)]


def test_what_raises_with_every_block_is_told_once_and_counted_every_time(
    engine: PseudoEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each type and place: the second verb is another place, the second type another error."""
    with TieredCache({"host": {"capacity": "1MiB", "staging": "1MiB"}}, LAYOUT, "m") as cache:
        store(cache, engine)
        for verb, error in (("gather", ValueError()), ("gather", KeyError()), ("scatter", ValueError())):
            pages = KVPages(RaisingMemory(engine.memory, verb, error), engine.pages.table)
            for number in range(10, 15):
                if verb == "gather":
                    cache.submit_store([number] * SIZE, pages).result(30)
                else:
                    with cache.lookup([1] * (SIZE + 1)) as hit:
                        cache.submit_load(hit, pages).result(30)
        stats = cache.stats()
    assert stats["failed_pieces{error=ValueError}"] == 10
    assert stats["failed_pieces{error=KeyError}"] == 5
    assert told(caplog) == ["ValueError()", "KeyError()", "ValueError()"]


class Sharing:
    """A cache in a simulation, and two requests over the pages of one memory, of which the second has a bad one.

    What both submit at once goes into one plan, and small blocks with one call.
    """

    half = BLOCKS // 2

    def __init__(self, source: str, verb: str) -> None:
        self.world = Simulation(1)
        self.config: dict[str, Any] = {"host": {"capacity": "1MiB", "staging": "1MiB", "copy_threads": 1}}
        if source != "host":
            codec = "raw" if source == "disk" else "raw+lz4"
            self.config["disk"] = {"directories": ["/kv"], "capacity": "8MiB", "segment": "1MiB", "codec": codec}
        self.cache = self.opened()
        self.engine = PseudoEngine(LAYOUT, BLOCKS)
        self.keys = [self.cache.keys([number] * (SIZE * self.half + 1)) for number in (1, 2)]
        self.raising = RaisingMemory(self.engine.memory, verb, IndexError("page 6 is gone"), pages=[6])
        ids = self.engine.ids
        self.pages = [KVPages(self.raising, self.engine.memory.pages(own).table) for own in (ids[:4], ids[4:])]

    def opened(self) -> TieredCache:
        cache = TieredCache(self.config, LAYOUT, "m", machine=self.world.machine())
        self.world.run_for(1)
        return cache

    def fill(self) -> None:
        """Both prefixes are stored; from disk they come when the cache is opened again."""
        for keys in self.keys:
            self.engine.write(keys, range(self.half))
            durability = "process" if "disk" in self.config else "memory"
            assert self.cache.submit_store(keys, self.engine.pages, durability=durability).result(30).stored
        if "disk" in self.config:
            assert self.cache.close()
            self.cache = self.opened()


@pytest.mark.parametrize("source", ["host", "disk", "lz4"])
def test_of_loads_that_share_a_plan_only_the_blocks_fail_whose_pages_raise(source: str) -> None:
    sharing = Sharing(source, "scatter")
    sharing.fill()
    sharing.engine.wipe()
    hits = [sharing.cache.lookup(keys) for keys in sharing.keys]
    jobs = [sharing.cache.submit_load(hit, pages) for hit, pages in zip(hits, sharing.pages, strict=True)]
    good, bad = (job.result(30) for job in jobs)
    assert (good.ok_tokens, good.failed) == (SIZE * sharing.half, {})
    assert sharing.engine.wrong_blocks(sharing.keys[0], range(sharing.half)) == []
    assert (bad.ok_tokens, bad.failed) == (SIZE * 2, {"engine_error": SIZE})
    for hit in hits:
        hit.release()
    assert_nothing_leaks(sharing.cache)


def test_of_stores_that_share_a_plan_only_the_blocks_fail_whose_pages_raise() -> None:
    sharing = Sharing("host", "gather")
    sharing.engine.write(sharing.keys[0], range(sharing.half))
    jobs = [sharing.cache.submit_store(keys, pages) for keys, pages in zip(sharing.keys, sharing.pages, strict=True)]
    good, bad = (job.result(30) for job in jobs)
    assert (good.stored, good.failed) == (SIZE * sharing.half, {})
    assert (bad.stored, bad.failed) == (SIZE * 3, {"engine_error": SIZE})
    with sharing.cache.lookup(sharing.keys[0]) as hit:
        sharing.engine.wipe()
        assert sharing.cache.submit_load(hit, sharing.engine.pages).result(30).ok_tokens == SIZE * sharing.half
    assert sharing.engine.wrong_blocks(sharing.keys[0], range(sharing.half)) == []
    assert_nothing_leaks(sharing.cache)
