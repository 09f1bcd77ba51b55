"""Opening and closing: every job ends, and a failed opening leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier import ClosedError, Job, PagedTensors, StoreResult, TieredCache, TierError
from kvtier.runtime import system_machine
from kvtier.testing.contents import PseudoEngine, tiny_layout
from tests.interrupts import interrupt_start, once, open_files

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
BURST = 2000


def settings(*directories: Path) -> dict[str, Any]:
    return {
        "host": {"capacity": "16MiB", "staging": "1MiB"},
        "disk": {"directories": [str(path) for path in directories], "capacity": "16MiB", "segment": "1MiB"},
    }


@pytest.mark.parametrize("durability", ["memory", "process", "durable"])
def test_every_job_ends_when_the_cache_is_closed_over_it(tmp_path: Path, durability: str) -> None:
    cache, engine = TieredCache(settings(tmp_path), LAYOUT, "m"), PseudoEngine(LAYOUT, 200)
    stores = [cache.submit_store([number] * (200 * SIZE), engine.pages, durability=durability) for number in range(8)]
    jobs = [*stores, cache.submit_flush("durable"), cache.submit_prefetch([1] * (200 * SIZE))]
    assert cache.close(timeout_s=30) is True
    for job in jobs:
        assert job.result(10) is not None
        assert job.source_free
    for job in stores:
        result = job.result(0)
        assert result.stored + result.existing + result.refused == 200 * SIZE


def test_jobs_end_also_when_closing_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    cache, engine = TieredCache(settings(tmp_path), LAYOUT, "m"), PseudoEngine(LAYOUT, 200)
    jobs = [cache.submit_store([n] * (200 * SIZE), engine.pages, durability="process") for n in range(8)]
    cache.close(timeout_s=0.01)
    cache.close(timeout_s=30)
    assert all(job.result(10) is not None for job in jobs)


def test_a_failed_opening_gives_back_what_it_took(tmp_path: Path) -> None:
    """The first directory can be opened at once when the mistake about the second is corrected."""
    (tmp_path / "file").write_text("no directory")
    before = set(threading.enumerate())
    with pytest.raises(TierError, match="file"):
        TieredCache(settings(tmp_path / "a", tmp_path / "file"), LAYOUT, "m")
    assert not set(threading.enumerate()) - before
    with TieredCache(settings(tmp_path / "a"), LAYOUT, "m"):
        pass


def test_memory_that_no_gpu_is_there_to_pin_for_is_given_back_at_every_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(TierError, match=r"host\.pin"):
            TieredCache({"host": {"capacity": "16MiB", "staging": "1MiB", "pin": "on"}}, LAYOUT, "m")
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_directories_share_the_writes(tmp_path: Path) -> None:
    """One after the other, so that no queue decides: both directories fill alike, and both serve."""
    directories = (tmp_path / "a", tmp_path / "b")
    engine = PseudoEngine(LAYOUT, 9)
    with TieredCache(settings(*directories), LAYOUT, "m") as cache:
        for number in range(100):
            keys = cache.keys([number] * (8 * SIZE + 1))
            engine.write(keys, range(8))
            assert cache.submit_store(keys, engine.pages, durability="process").result(30).stored == 8 * SIZE
    sizes = [sum(1 for _ in path.glob("*/seg-*")) for path in directories]
    assert min(sizes) > 3
    with TieredCache(settings(*directories), LAYOUT, "m") as cache:
        for number in range(100):
            with cache.lookup(cache.keys([number] * (8 * SIZE + 1))) as hit:
                assert hit.num_tokens == 8 * SIZE
                assert cache.submit_load(hit, engine.pages).result(30).ok_tokens == 8 * SIZE
                assert engine.wrong_blocks(hit.keys, range(8)) == []


def test_one_of_two_directories_may_go(tmp_path: Path) -> None:
    """What lay in it is a miss, what lies in the other is found, and writing goes on there."""
    directories = (tmp_path / "a", tmp_path / "b")
    config = settings(*directories) | {"host": {"capacity": "128KiB", "staging": "1MiB"}}
    engine = PseudoEngine(LAYOUT, 5)
    with TieredCache(config, LAYOUT, "m") as cache:
        documents = [cache.keys([number] * (4 * SIZE + 1)) for number in range(40)]
        for keys in documents:
            engine.write(keys, range(4))
            assert cache.submit_store(keys, engine.pages, durability="process").result(30).refused == 0
        shutil.rmtree(directories[1])
        found = 0
        for _ in range(20):
            found = 0
            for keys in documents:
                with cache.lookup(keys) as hit:
                    ok_tokens = cache.submit_load(hit, engine.pages).result(30).ok_tokens
                    assert engine.wrong_blocks(keys, range(ok_tokens // SIZE)) == []
                    found += ok_tokens
        assert found > 0
        again = cache.keys([99] * (4 * SIZE + 1))
        engine.write(again, range(4))
        results = [cache.submit_store(again, engine.pages, durability="process").result(30) for _ in range(3)]
        assert results[-1].existing == 4 * SIZE


def _burst(cache: TieredCache, memory: PagedTensors, first: int, jobs: list[Job[StoreResult]]) -> None:
    """Many jobs of one block each, faster than they can be planned."""
    numbers = range(first, first + BURST)
    keys = [cache.keys([number] * (SIZE + 1)) for number in numbers]
    pages = [memory.pages([number % memory.num_pages[0]]) for number in numbers]
    for own, page in zip(keys, pages, strict=True):
        jobs.append(cache.submit_store(own, page))


def _paged(pages: int = 64) -> PagedTensors:
    return PagedTensors(
        LAYOUT, [np.zeros((pages, *part.shape), part.dtype) for group in LAYOUT.groups for part in group.parts]
    )


def test_wishes_that_nobody_has_planned_yet_end_when_the_cache_is_closed() -> None:
    """More than a turn plans, so that some are left to copy threads that have stopped by then."""
    cache, memory = TieredCache({"host": {"capacity": "64MiB", "staging": "1MiB"}}, LAYOUT, "m"), _paged()
    cache.register(memory)
    jobs: list[Job[StoreResult]] = []
    _burst(cache, memory, 0, jobs)
    assert cache.close() is True
    assert not [job for job in jobs if not job.done]
    assert cache.stats()["jobs"] == cache.stats()["pinned_entries"] == 0


def test_every_job_ends_that_was_submitted_while_another_thread_closed() -> None:
    memory = _paged()
    for _ in range(5):
        cache = TieredCache({"host": {"capacity": "16MiB", "staging": "1MiB"}}, LAYOUT, "m")
        cache.register(memory)
        jobs: list[Job[StoreResult]] = []

        def submit(first: int, cache: TieredCache = cache, jobs: list[Job[StoreResult]] = jobs) -> None:
            with suppress(ClosedError):
                for number in range(first, first + 100 * BURST, BURST):
                    _burst(cache, memory, number, jobs)

        threads = [threading.Thread(target=submit, args=(1_000_000 * (1 + number),)) for number in range(3)]
        for thread in threads:
            thread.start()
        while not jobs:
            threads[0].join(0.001)
        assert cache.close() is True
        for thread in threads:
            thread.join()
        assert not [job for job in jobs if not job.done]
        assert cache.stats()["jobs"] == cache.stats()["pinned_entries"] == 0


@pytest.mark.parametrize("place", ["start", "join", "close"])
def test_a_cache_that_ctrl_c_kept_from_closing_is_closed_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """While the thread that writes the rest is started, while a thread is waited for, or while a file is closed."""
    files, threads = open_files(), set(threading.enumerate())
    cache, engine = TieredCache(settings(tmp_path), LAYOUT, "m"), PseudoEngine(LAYOUT, 20)
    cache.submit_store([1] * (20 * SIZE), engine.pages, durability="process").result(10)
    with monkeypatch.context() as patched:
        if place == "start":
            interrupt_start(patched, "closing")
        elif place == "join":
            patched.setattr(threading.Thread, "join", once(threading.Thread.join, KeyboardInterrupt(), after=2))
        else:
            patched.setattr(os, "close", once(os.close, KeyboardInterrupt(), after=1))
        with pytest.raises(KeyboardInterrupt):
            cache.close(30)
    assert cache.close(30) is True
    assert open_files() == files
    assert set(threading.enumerate()) == threads
    with TieredCache(settings(tmp_path), LAYOUT, "m") as again:
        assert again.match([1] * (20 * SIZE + 1)) == 20 * SIZE


def test_whoever_ctrl_c_struck_as_it_began_to_close_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TieredCache({"host": {"capacity": "16MiB", "staging": "1MiB"}}, LAYOUT, "m")
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_begin_to_close", once(cache._begin_to_close, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            cache.close(30)
    assert cache.close(0.1) is True


def test_a_result_that_nobody_is_left_to_tell_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.cache._TELLING_S", 0.0)
    cache = TieredCache(settings(tmp_path), LAYOUT, "m")
    while not cache._dispatch._turn.ask():  # whose turn it was when Ctrl-C struck never ends it
        pass
    cache.close(0.1)
    assert cache.close(30) is True


@pytest.mark.parametrize("which", range(6))
def test_ctrl_c_while_a_directory_is_recovered_closes_its_files_and_unlocks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Superblocks are read, then segments: two of them, as one does not hold so many blocks."""
    engine = PseudoEngine(LAYOUT, 200)
    with TieredCache(settings(tmp_path), LAYOUT, "m") as cache:
        cache.submit_store([1] * (200 * SIZE), engine.pages, durability="process").result(10)
    files, threads, machine = open_files(), set(threading.enumerate()), system_machine()
    with monkeypatch.context() as patched:
        patched.setattr(machine.files, "read_at", once(machine.files.read_at, KeyboardInterrupt(), after=which))
        with pytest.raises(KeyboardInterrupt):
            TieredCache(settings(tmp_path), LAYOUT, "m", machine=machine)
    assert open_files() == files
    assert set(threading.enumerate()) == threads
    with TieredCache(settings(tmp_path), LAYOUT, "m") as again:
        assert again.match([1] * (200 * SIZE + 1)) == 200 * SIZE


def test_several_threads_may_close_at_once(tmp_path: Path) -> None:
    for number in range(10):
        cache, engine = TieredCache(settings(tmp_path / str(number)), LAYOUT, "m"), PseudoEngine(LAYOUT, 20)
        job = cache.submit_store([number] * (20 * SIZE), engine.pages, durability="process")
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda _, cache=cache: cache.close(), range(4)))
        assert job.result(10) is not None
