"""What a job and a block cost by themselves: blocks of 512 bytes in host memory, 256 jobs in flight.

A job is a store or a load, from ``submit_*`` to the poll that returns it; its keys are known and its hit is pinned
already. The baseline hands as many jobs to as many threads and back, and does nothing in between. A block is the
slope between jobs of one block and jobs of 64. What a whole request of a model pays is in ``requests``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from select import select
from typing import Any, Final

import numpy as np

from benchmarks import requests
from benchmarks.pairs import Contestant, Floats, Times, alternate, freeze_heap, ratio_of
from benchmarks.payload import Prompts
from benchmarks.rows import AT_MOST, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import Hit, KVGroup, KVLayout, PagedTensors, Part, TieredCache
from kvtier.core.keys import Keys
from kvtier.core.memory import PageTable
from kvtier.jobs import AnyJob, Client
from kvtier.runtime.notify import Notifier

IN_FLIGHT: Final = 256
JOBS: Final = 1024
BARE_JOBS: Final = 32 * JOBS
LARGE_BLOCKS: Final = 64
BLOCK_TOKENS: Final = 16
COPY_THREADS: Final = 2
JOB_TARGET_US: Final = 20.0
BLOCK_TARGET_US: Final = 2.0


def run(settings: Settings) -> Iterator[Row]:
    """Stores and loads, of one block and of 64, then requests of a model."""
    with closing(_Bench()) as bench:
        freeze_heap()
        times = alternate(bench.contestants(), settings.pairs_of(20, 5))
        yield from bench.rows(times)
    yield from requests.rows(settings)


@dataclass(slots=True)
class _Batch:
    """The jobs of one round: their keys, and for loads their hits."""

    blocks: int
    keys: list[Keys] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    done: list[AnyJob] = field(default_factory=list)


class _Bench:
    """A cache, and engine memory with pages for every job in flight. Stored: the first half; loaded: the second."""

    def __init__(self) -> None:
        part = Part(0, "k", "float32", ("token", "head", "dim"), (BLOCK_TOKENS, 1, 4))
        group = KVGroup("attention", (part, replace(part, kind="v")))
        self.layout = KVLayout(BLOCK_TOKENS, BLOCK_TOKENS, (group,))
        self.pages = JOBS * LARGE_BLOCKS
        random = np.random.default_rng(0)
        shape = (2 * self.pages, *part.shape)
        self.tensors = [random.random(shape, np.float32) for _ in group.parts]
        self.cache = TieredCache(
            {"host": {"capacity": "2GiB", "copy_threads": COPY_THREADS, "staging": "1MiB"}},
            self.layout,
            "overhead-benchmark",
        )
        self.memory = PagedTensors(self.layout, self.tensors)
        self.memory_id = self.cache.register(self.memory)
        self.client = self.cache.client()
        self.prompts = Prompts()
        self.hand_over = _HandOver(COPY_THREADS)
        self.batches = {blocks: _Batch(blocks) for blocks in (1, LARGE_BLOCKS)}
        self.refused_tokens = 0

    def close(self) -> None:
        """End everything."""
        self.cache.close()
        self.client.close()
        self.hand_over.close()

    def contestants(self) -> list[Contestant]:
        """Stores and loads of either size, and two times the baseline."""
        both = [
            contestant
            for blocks in self.batches
            for contestant in (
                Contestant(f"store.{blocks}", self._stores(blocks), self._fresh(blocks), check=self._stored(blocks)),
                Contestant(f"load.{blocks}", self._loads(blocks), self._kept(blocks), check=self._loaded(blocks)),
            )
        ]
        return [*both, Contestant("bare", self.hand_over.run), Contestant("again", self.hand_over.run)]

    # --- store ------------------------------------------------------------------------------------------------------

    def _fresh(self, blocks: int) -> Callable[[int], None]:
        def prepare(_: int) -> None:
            tokens = (self.prompts.take(blocks * BLOCK_TOKENS + 1) for _ in range(JOBS))
            self.batches[blocks] = _Batch(blocks, [self.cache.keys(prompt) for prompt in tokens])
            self._tables(blocks, 0)

        return prepare

    def _stores(self, blocks: int) -> Callable[[int], None]:
        def run(_: int) -> None:
            batch = self.batches[blocks]

            def submit(number: int) -> AnyJob:
                return self.cache.submit_store(batch.keys[number], self.tables[number], client=self.client)

            batch.done = _keep_in_flight(submit, self.client)

        return run

    def _stored(self, blocks: int) -> Callable[[int], None]:
        def check(_: int) -> None:
            for job in self.batches[blocks].done:
                self.refused_tokens += job.result().refused + job.result().existing

        return check

    # --- load -------------------------------------------------------------------------------------------------------

    def _kept(self, blocks: int) -> Callable[[int], None]:
        def prepare(number: int) -> None:
            if not self.batches[blocks].keys:
                self._fresh(blocks)(number)
                self._stores(blocks)(number)
            batch = self.batches[blocks]
            batch.hits = [self.cache.lookup(keys) for keys in batch.keys]
            for tensor in self.tensors:
                tensor[self.pages :] = 0
            self._tables(blocks, self.pages)

        return prepare

    def _loads(self, blocks: int) -> Callable[[int], None]:
        def run(_: int) -> None:
            batch = self.batches[blocks]

            def submit(number: int) -> AnyJob:
                return self.cache.submit_load(batch.hits[number], self.tables[number], client=self.client)

            batch.done = _keep_in_flight(submit, self.client)

        return run

    def _loaded(self, blocks: int) -> Callable[[int], None]:
        def check(_: int) -> None:
            for hit in self.batches[blocks].hits:
                hit.release()
            used = JOBS * blocks
            for tensor in self.tensors:
                if not np.array_equal(tensor[:used], tensor[self.pages : self.pages + used]):
                    raise BenchmarkError("bytes that were loaded are not those that were stored")

        return check

    def _tables(self, blocks: int, first_page: int) -> None:
        self.tables = []
        for number in range(JOBS):
            at = first_page + number * blocks
            table = self.memory.pages(np.arange(at, at + blocks)).table
            self.tables.append(PageTable(self.memory_id, table.groups))

    # --- rows -------------------------------------------------------------------------------------------------------

    def rows(self, times: dict[str, Times]) -> Iterator[Row]:
        """Microseconds a job, and a block, for either verb."""
        bare_us = times["bare"].wall_s * 1e6 / BARE_JOBS
        config = {"jobs_in_flight": IN_FLIGHT, "jobs_per_pair": JOBS, "block_bytes": 512, "copy_threads": COPY_THREADS}
        name = "queue to 2 threads and back, per job"
        for verb in ("store", "load"):
            job_us = _us_a_job(times[f"{verb}.1"])
            block_us = (_us_a_job(times[f"{verb}.{LARGE_BLOCKS}"]) - job_us) / (LARGE_BLOCKS - 1)
            for what, measured, target in (("job", job_us, JOB_TARGET_US), ("block", block_us, BLOCK_TARGET_US)):
                yield Row.of(
                    f"overhead.{verb}.{what}",
                    float(np.median(measured)),
                    "us",
                    baseline=float(np.median(bare_us)),
                    baseline_name=name,
                    ratio=ratio_of(measured, bare_us),
                    target=target,
                    ok_if=AT_MOST,
                    data_checked=True,
                    refused_tokens=self.refused_tokens,
                    config=config,
                )
        again_us = times["again"].wall_s * 1e6 / BARE_JOBS
        yield itself(
            "overhead.itself",
            float(np.median(again_us)),
            "us",
            baseline=float(np.median(bare_us)),
            baseline_name=name,
            ratio=ratio_of(again_us, bare_us),
            config=config,
        )


def _us_a_job(times: Times) -> Floats:
    return times.wall_s * 1e6 / JOBS


def _keep_in_flight(submit: Callable[[int], AnyJob], client: Client) -> list[AnyJob]:
    """Submit all jobs, ``IN_FLIGHT`` at a time; the jobs, in the order in which they ended."""
    done: list[AnyJob] = []
    submitted = 0
    while len(done) < JOBS:
        while submitted < min(JOBS, len(done) + IN_FLIGHT):
            submit(submitted)
            submitted += 1
        done += _take(client.poll, client.fileno())
    return done


def _take(poll: Callable[[], Sequence[Any]], fileno: int) -> Sequence[Any]:
    while not (ready := poll()):
        select([fileno], [], [])
    return ready


class _HandOver:
    """Jobs that do nothing: through a queue to threads, and back through a deque that wakes its reader."""

    def __init__(self, threads: int) -> None:
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._done: deque[int] = deque()
        self._notifier = Notifier()
        self._threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def run(self, _: int) -> None:
        """As many in flight as kvtier gets, but more of them: they are over so soon."""
        submitted = done = 0
        while done < BARE_JOBS:
            while submitted < min(BARE_JOBS, done + IN_FLIGHT):
                self._queue.put(submitted)
                submitted += 1
            done += len(_take(self._poll, self._notifier.fileno()))

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._notifier.close()

    def _poll(self) -> list[int]:
        self._notifier.clear()
        return [self._done.popleft() for _ in range(len(self._done))]

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            armed = not self._done
            self._done.append(job)
            if armed:
                self._notifier.set()
