"""The disk tier: stores that survive kill -9 and cold loads, against bare direct I/O of the same bytes.

Both are whole journeys: engine pages -> checksummed records -> file, and file -> checksums -> engine pages. The
cache is full, so that every store gives an old segment back; full segments are sealed between rounds, not in them. For
the loads it is opened anew: host memory is empty, and the
counters of the device prove that every byte came from it. What was stored is loaded and compared byte for byte.

Beside large records stands the bare pipeline, which does the same without a cache: what it does not reach, this machine
does not allow. The bare disk moves a record with one call. Small and odd records are moved by the bare disk as many at
once as kvtier may move; ``python`` is the CPU time a block that kvtier spends outside kernels, reads and writes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from benchmarks.beside import COPY_THREADS, REQUESTS, Beside, Measured, Pipeline, PythonTime
from benchmarks.cold import ColdReads
from benchmarks.engine import EngineMemory
from benchmarks.kinds import deepseek_v4_flash, deepseek_v32, llama_8b, small_blocks
from benchmarks.machine import huge_pages
from benchmarks.pairs import Contestant, Times, alternate
from benchmarks.payload import Prompts, Request
from benchmarks.rawdisk import RawDisk
from benchmarks.rows import AT_LEAST, SURELY, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import Job, KVLayout, StoreResult, TieredCache
from kvtier.core.plan import PAGE_BYTES

IO_THREADS: Final = 4
SETTLE_S: Final = 0.01
WARMUP: Final = 1
SPARE_BYTES: Final = 2 << 30
"""Of the cache, beyond what is loaded later: clean segments, and those that are just given back."""


@dataclass(frozen=True, slots=True)
class Case:
    """One layout, how much of it is moved a round, and how fast it has to be."""

    name: str
    what: str
    layout: Callable[[], KVLayout]
    io_bytes: int
    """That the bare disk moves with one call."""
    store: float
    load: float
    ok_if: str = SURELY
    has_pipeline: bool = True
    pairs: int = 5
    quick_pairs: int = 6
    pair_bytes: int = 2 << 30
    quick_pair_bytes: int = 256 << 20
    engine_bytes: int = 4 << 30
    host_bytes: int = 3 << 30


def _large(name: str, mib: int) -> Case:
    return Case(name, "Llama 8B, bfloat16", partial(llama_8b, mib * 8), mib << 20, 0.92, 0.95)


def _small(name: str, what: str, layout: Callable[[], KVLayout]) -> Case:
    return Case(
        name, what, layout, 8 << 20, 0.7, 0.7, ok_if=AT_LEAST, has_pipeline=False, pairs=10, quick_pairs=3,
        pair_bytes=512 << 20, quick_pair_bytes=128 << 20, engine_bytes=2 << 30, host_bytes=2 << 30,
    )  # fmt: skip


CASES: Final = (
    _large("2MiB", 2),
    _large("8MiB", 8),
    _small("64KiB", "8 layers of one head", small_blocks),
    _small("v32", "DeepSeek V3.2", deepseek_v32),
    _small("v4flash.128", "DeepSeek V4 Flash", partial(deepseek_v4_flash, 128)),
    _small("v4flash.256", "DeepSeek V4 Flash", partial(deepseek_v4_flash, 256)),
)


def run(settings: Settings) -> Iterator[Row]:
    """Both directions, for every layout."""
    for case in CASES:
        with closing(_Bench(case, settings)) as bench:
            stores, loads = bench.stores(), bench.loads()
            yield from bench.rows(stores, loads)


class _Bench:
    """A directory that is full, and a file for the bare disk in which every round has areas of its own."""

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case = case
        self.settings = settings
        self.pairs = settings.pairs_of(case.pairs, case.quick_pairs)
        self.rounds = self.pairs + WARMUP
        self.areas = 3 if case.has_pipeline else 2
        """Of the bare disk, for every round: for the raw loops, for the same again, and for the bare pipeline."""
        self.layout = case.layout()
        page_bytes = sum(part.page_bytes for part in self.layout.groups[0].parts)
        block_pages = self.layout.block_tokens // self.layout.page_tokens
        wanted = case.quick_pair_bytes if settings.quick else case.pair_bytes
        self.request_pages = wanted // REQUESTS // page_bytes // block_pages * block_pages
        pages = case.engine_bytes // 2 // page_bytes
        self.engine = EngineMemory(self.layout, pages, pages)
        self.pair_bytes = REQUESTS * self.engine.request_bytes(self.request_pages)
        self.capacity = SPARE_BYTES + self.rounds * REQUESTS * self.engine.record_bytes(self.request_pages) * 41 // 40
        self._check_room()
        raw_bytes = self.pair_bytes // PAGE_BYTES * PAGE_BYTES
        self.cold = ColdReads(settings.directory, raw_bytes)
        self.raw = RawDisk(
            settings.directory / "raw",
            areas=self.areas * self.rounds,
            area_bytes=raw_bytes,
            memory_bytes=case.host_bytes,
            threads=IO_THREADS,
        )
        self.beside = self._beside()
        self.cache = self._open()
        self.prompts = Prompts()
        self.stored: list[list[Request]] = []
        self.jobs: list[Job[StoreResult]] = []
        self.refused_tokens = 0

    def _beside(self) -> Beside:
        if self.case.has_pipeline:
            return Pipeline(self.engine, self.raw, self.request_pages, self.areas, self.case.io_bytes)
        return PythonTime(self.engine, self.request_pages)

    def close(self) -> None:
        """Close and remove everything."""
        self.cache.close()
        self.beside.close()
        self.raw.close()
        shutil.rmtree(self.settings.directory / "cache")

    # --- store ------------------------------------------------------------------------------------------------------

    def stores(self) -> dict[str, Times]:
        """Stores with durability "process", and ``pwritev``."""
        self._fill()
        return alternate(
            [
                Contestant(
                    "kvtier",
                    self.beside.watched("store", self._store),
                    self._begin_stores,
                    self._settle,
                    self._end_stores,
                ),
                Contestant("raw", lambda number: self.raw.write(self.areas * number, self.case.io_bytes)),
                Contestant("again", lambda number: self.raw.write(self.areas * number + 1, self.case.io_bytes)),
                *self.beside.stores(),
            ],
            self.pairs,
            warmup=WARMUP,
        )

    def _fill(self) -> None:
        """Until segments are given back: from then on none is made any more."""
        for _ in range(2 * self.capacity // self.pair_bytes):
            if self.cache.stats().get("reclaimed_segments", 0) > 0:
                return
            self._begin_stores(0)
            self._store(0)
        raise BenchmarkError("the directory never became full")

    def _begin_stores(self, _: int) -> None:
        tokens = self.request_pages * self.layout.page_tokens
        self.requests = [
            Request(self.prompts.take(tokens + 1), self.engine.sources(self.request_pages)) for _ in range(REQUESTS)
        ]

    def _store(self, _: int) -> None:
        self.jobs = [
            self.cache.submit_store(request.tokens, self.engine.pages(request.sources), durability="process")
            for request in self.requests
        ]
        for job in self.jobs:
            job.result()

    def _settle(self, _: int) -> None:
        """Until full segments are sealed and given back: otherwise that would disturb whoever comes next."""
        for job in self.jobs:
            job.result()
        while self._untidy():
            time.sleep(SETTLE_S)

    def _untidy(self) -> bool:
        stats = self.cache.stats()
        return stats["hops"] > 0 or any(
            count > 0
            for name, count in stats.items()
            if name.startswith("disk_segments") and ("full" in name or "reclaiming" in name)
        )

    def _end_stores(self, _: int) -> None:
        self.stored.append(self.requests)
        for result in (job.result() for job in self.jobs):
            self.refused_tokens += result.refused + result.existing

    # --- load -------------------------------------------------------------------------------------------------------

    def loads(self) -> dict[str, Times]:
        """Cold loads of everything that was stored, compared byte for byte, and ``preadv``."""
        self._reopen()
        return alternate(
            [
                Contestant("kvtier", self.beside.watched("load", self._load), self._begin_loads, check=self._end_loads),
                Contestant("raw", self._read_raw, self.cold.begin, check=self.cold.check("raw")),
                Contestant("again", self._read_raw_again, self.cold.begin, check=self.cold.check("again")),
                *self.beside.loads(self.cold),
            ],
            self.pairs,
            warmup=WARMUP,
        )

    def _begin_loads(self, number: int) -> None:
        self.requests = self.stored[number]
        self.targets = self.engine.targets_apart(REQUESTS, self.request_pages)
        for targets in self.targets:
            self.engine.clear(targets)
        self.cold.begin(number)

    def _load(self, _: int) -> None:
        hits = [self.cache.lookup(request.tokens) for request in self.requests]
        jobs = [
            self.cache.submit_load(hit, self.engine.pages(targets))
            for hit, targets in zip(hits, self.targets, strict=True)
        ]
        self.loaded = [job.result() for job in jobs]
        for hit in hits:
            hit.release()

    def _end_loads(self, number: int) -> None:
        self.cold.check("kvtier")(number)
        for request, targets, result in zip(self.requests, self.targets, self.loaded, strict=True):
            if result.by_tier["disk"] != len(request.tokens) - 1:
                raise BenchmarkError(f"{len(request.tokens) - 1} tokens should have come from disk: {result}")
            if not self.engine.same(request.sources, targets):
                raise BenchmarkError("bytes that were loaded are not those that were stored")

    def _read_raw(self, number: int) -> None:
        self.raw.read(self.areas * number, self.case.io_bytes)

    def _read_raw_again(self, number: int) -> None:
        self.raw.read(self.areas * number + 1, self.case.io_bytes)

    # --- both -------------------------------------------------------------------------------------------------------

    def rows(self, stores: dict[str, Times], loads: dict[str, Times]) -> Iterator[Row]:
        """What came of both; stores count because everything that they wrote was loaded and compared."""
        store = "plan, gather from engine pages, checksums, header, write, commit; old segments are given back"
        measured = self._measured("store", stores, "pwritev O_DIRECT", self.case.store)
        yield from self._rows(measured, {"includes": store})
        load = "lookup with pins, plan, read into host memory (promoted), checksums, scatter into engine pages"
        measured = self._measured("load", loads, "preadv O_DIRECT", self.case.load)
        yield from self._rows(measured, {"includes": load, **self.cold.least()})

    def _open(self) -> TieredCache:
        return TieredCache(
            {
                "host": {"capacity": self.case.host_bytes, "copy_threads": COPY_THREADS},
                "disk": {
                    "directories": [str(self.settings.directory / "cache")],
                    "capacity": self.capacity,
                    "io_threads": IO_THREADS,
                },
            },
            self.layout,
            "disk-benchmark",
        )

    def _reopen(self) -> None:
        if not self.cache.close():
            raise BenchmarkError("the cache did not close: something is still being read or written")
        self.cache = self._open()

    def _check_room(self) -> None:
        wanted = self.capacity + self.areas * self.rounds * self.pair_bytes + (1 << 30)
        free = shutil.disk_usage(self.settings.directory).free
        if free < wanted:
            raise BenchmarkError(
                f"{self.settings.directory}: {free >> 30} GiB free, {-(-wanted // (1 << 30))} GiB wanted; "
                "pass --dir, fewer --pairs, or --quick"
            )

    def _rows(self, measured: Measured, includes: dict[str, Any]) -> Iterator[Row]:
        yield Row.of(
            measured.name,
            **measured.against_raw("kvtier"),
            target=measured.target,
            ok_if=self.case.ok_if,
            data_checked=True,
            refused_tokens=self.refused_tokens,
            config={**measured.config, **includes},
        )
        yield self.beside.row(measured)
        yield itself(f"{measured.name}.itself", **measured.against_raw("again"), config=measured.config)

    def _measured(self, verb: str, times: dict[str, Times], raw_name: str, target: float) -> Measured:
        name, config = f"disk.{verb}.{self.case.name}", self._config(times["raw"])
        return Measured(verb, name, times, self.pair_bytes, raw_name, target, self.refused_tokens, config)

    def _config(self, raw: Times) -> dict[str, Any]:
        return {
            "layout": f"{self.case.what}, {self.layout.page_tokens}-token pages at random places",
            "block_tokens": self.layout.block_tokens,
            "record_payload_bytes": self.layout.block_bytes[0],
            "bytes_per_pair": self.pair_bytes,
            "requests_per_pair": REQUESTS,
            "raw_bytes_per_call": self.case.io_bytes,
            "io_threads": IO_THREADS,
            "huge_pages": huge_pages(),
            "engine_bytes": self.case.engine_bytes,
            "host_capacity_bytes": self.case.host_bytes,
            "disk_capacity_bytes": self.capacity,
            "baseline_cpu_s_per_gib": round(raw.cpu_s_per_gib(self.pair_bytes), 4),
        }
