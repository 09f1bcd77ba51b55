"""The disk tier: stores that survive kill -9 and cold loads, against bare direct I/O of the same bytes.

Both are whole journeys: engine pages -> checksummed records -> file, and file -> checksums -> engine pages. Beside them
stands the bare pipeline, which does the same without a cache: what it does not reach, this machine does not allow. The
cache is full, so that every store gives an old segment back; full segments are sealed between rounds, not in them. For
the loads it is opened anew: host memory is empty, and the
counters of the device prove that every byte came from it. What was stored is loaded and compared byte for byte.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import numpy as np

from benchmarks.machine import DeviceCounters, huge_pages
from benchmarks.pairs import Contestant, Step, Times, alternate, ratio_of
from benchmarks.payload import PAGE_TOKENS, EngineMemory, Ids, Prompts, Request, llama_8b
from benchmarks.pipeline import BarePipeline
from benchmarks.rawdisk import RawDisk
from benchmarks.rows import SURELY, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import Job, StoreResult, TieredCache

RECORD_BYTES: Final = (2 << 20, 8 << 20)
TOKEN_BYTES: Final = 128 << 10
PAIR_BYTES: Final = 2 << 30
QUICK_PAIR_BYTES: Final = 256 << 20
REQUESTS: Final = 4
ENGINE_BYTES: Final = 4 << 30
HOST_BYTES: Final = 3 << 30
IO_THREADS: Final = 4
COPY_THREADS: Final = 2
SETTLE_S: Final = 0.005
WARMUP: Final = 1
STORE_TARGET: Final = 0.92
LOAD_TARGET: Final = 0.95
_AREAS: Final = 3
"""Of the bare disk, for every round: for the raw loops, for the same again, and for the bare pipeline."""


def run(settings: Settings) -> Iterator[Row]:
    """Both directions, for small and for large records."""
    for record_bytes in RECORD_BYTES:
        with closing(_Bench(record_bytes, settings)) as bench:
            stores, loads = bench.stores(), bench.loads()
            yield from bench.rows(stores, loads)


class _Bench:
    """A directory that is full, and a file for the bare disk in which every round has areas of its own."""

    def __init__(self, record_bytes: int, settings: Settings) -> None:
        self.record_bytes = record_bytes
        self.settings = settings
        self.pairs = settings.pairs_of(5, 6)
        self.rounds = self.pairs + WARMUP
        self.pair_bytes = QUICK_PAIR_BYTES if settings.quick else PAIR_BYTES
        self.layout = llama_8b(record_bytes // TOKEN_BYTES)
        page_bytes = PAGE_TOKENS * TOKEN_BYTES
        self.request_pages = self.pair_bytes // REQUESTS // page_bytes
        self.capacity = self.rounds * self.pair_bytes * 21 // 20 + (2 << 30)  # records are longer by their headers
        self._check_room()
        self.device = DeviceCounters.under(settings.directory)
        self.engine = EngineMemory(self.layout, *[ENGINE_BYTES // 2 // page_bytes] * 2)
        self.raw = RawDisk(
            settings.directory / "raw",
            areas=_AREAS * self.rounds,
            area_bytes=self.pair_bytes,
            memory_bytes=HOST_BYTES,
            threads=IO_THREADS,
        )
        self.pipeline = BarePipeline(self.engine, self.raw, threads=COPY_THREADS)
        self.bare_sources: list[Ids] = []
        self.cache = self._open()
        self.prompts = Prompts()
        self.stored: list[list[Request]] = []
        self.jobs: list[Job[StoreResult]] = []
        self.refused_tokens = 0
        self.cold: dict[str, list[float]] = {}

    def close(self) -> None:
        """Close and remove everything."""
        self.cache.close()
        self.pipeline.close()
        self.raw.close()
        shutil.rmtree(self.settings.directory / "cache")

    # --- store ------------------------------------------------------------------------------------------------------

    def stores(self) -> dict[str, Times]:
        """Stores with durability "process", and ``pwritev``."""
        self._fill()
        return alternate(
            [
                Contestant("kvtier", self._store, self._begin_stores, self._settle, self._end_stores),
                Contestant("raw", lambda number: self.raw.write(_AREAS * number, self.record_bytes)),
                Contestant("again", lambda number: self.raw.write(_AREAS * number + 1, self.record_bytes)),
                Contestant("bare", self._store_bare, self._begin_bare, check=self._check_bare),
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
        tokens = self.request_pages * PAGE_TOKENS
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

    def _begin_bare(self, _: int) -> None:
        self.bare_pages = self.engine.sources(REQUESTS * self.request_pages)

    def _store_bare(self, number: int) -> None:
        self.bare_buffer = self.pipeline.store(_AREAS * number + 2, self.bare_pages)

    def _check_bare(self, number: int) -> None:
        if not np.array_equal(self.raw.read(_AREAS * number + 2, self.record_bytes), self.bare_buffer):
            raise BenchmarkError("the bare pipeline did not write what it gathered")
        self.bare_sources.append(self.bare_pages)

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
                Contestant("kvtier", self._load, self._begin_loads, check=self._end_loads),
                Contestant("raw", self._read_raw, self._count, check=self._check_cold("raw")),
                Contestant("again", self._read_raw_again, self._count, check=self._check_cold("again")),
                Contestant("bare", self._load_bare, self._begin_load_bare, check=self._end_load_bare),
            ],
            self.pairs,
            warmup=WARMUP,
        )

    def _begin_loads(self, number: int) -> None:
        self.requests = self.stored[number]
        pages = self.engine.targets(REQUESTS * self.request_pages)
        self.targets = [pages[at::REQUESTS] for at in range(REQUESTS)]
        self.engine.clear(pages)
        self._count(number)

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
        self._check_cold("kvtier")(number)
        for request, targets, result in zip(self.requests, self.targets, self.loaded, strict=True):
            if result.by_tier["disk"] != len(request.tokens) - 1:
                raise BenchmarkError(f"{len(request.tokens) - 1} tokens should have come from disk: {result}")
            if not self.engine.same(request.sources, targets):
                raise BenchmarkError("bytes that were loaded are not those that were stored")

    def _read_raw(self, number: int) -> None:
        self.raw.read(_AREAS * number, self.record_bytes)

    def _read_raw_again(self, number: int) -> None:
        self.raw.read(_AREAS * number + 1, self.record_bytes)

    def _begin_load_bare(self, number: int) -> None:
        self.bare_pages = self.engine.targets(REQUESTS * self.request_pages)
        self.engine.clear(self.bare_pages)
        self._count(number)

    def _load_bare(self, number: int) -> None:
        self.pipeline.load(_AREAS * number + 2, self.bare_pages)

    def _end_load_bare(self, number: int) -> None:
        self._check_cold("bare")(number)
        if not self.engine.same(self.bare_sources[number], self.bare_pages):
            raise BenchmarkError("the bare pipeline did not load what it had stored")

    def _count(self, _: int) -> None:
        self.before = self.device.read_bytes()

    def _check_cold(self, side: str) -> Step:
        def check(_: int) -> None:
            pairs = zip(self.device.read_bytes(), self.before, strict=True)
            share = min((now - before) / self.pair_bytes for now, before in pairs)
            if share < 1.0:
                raise BenchmarkError(f"{side}: only {share:.3f} of what was read came from the device: it was not cold")
            self.cold.setdefault(side, []).append(share)

        return check

    # --- both -------------------------------------------------------------------------------------------------------

    def rows(self, stores: dict[str, Times], loads: dict[str, Times]) -> Iterator[Row]:
        """What came of both; stores count because everything that they wrote was loaded and compared."""
        store = "plan, gather from engine pages, checksums, header, write, commit; old segments are given back"
        yield from self._rows("store", stores, "pwritev O_DIRECT", STORE_TARGET, {"includes": store})
        load = "lookup with pins, plan, read into host memory (promoted), checksums, scatter into engine pages"
        cold = {f"{side}_device_bytes_per_byte": round(min(shares), 4) for side, shares in self.cold.items()}
        yield from self._rows("load", loads, "preadv O_DIRECT", LOAD_TARGET, {"includes": load, **cold})

    def _open(self) -> TieredCache:
        return TieredCache(
            {
                "host": {"capacity": HOST_BYTES, "copy_threads": COPY_THREADS},
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
        wanted = self.capacity + _AREAS * self.rounds * self.pair_bytes + (1 << 30)
        free = shutil.disk_usage(self.settings.directory).free
        if free < wanted:
            raise BenchmarkError(
                f"{self.settings.directory}: {free >> 30} GiB free, {-(-wanted // (1 << 30))} GiB wanted; "
                "pass --dir, fewer --pairs, or --quick"
            )

    def _rows(
        self, verb: str, times: dict[str, Times], raw_name: str, target: float, more: dict[str, Any]
    ) -> Iterator[Row]:
        name = f"disk.{verb}.{self.record_bytes >> 20}MiB"
        kvtier, raw, again, bare = (times[side] for side in ("kvtier", "raw", "again", "bare"))
        speeds = {side: self.pair_bytes / 1e9 / measured.median_s for side, measured in times.items()}
        config = {
            "layout": "Llama 8B, bfloat16, 16-token pages at random places",
            "record_payload_bytes": self.record_bytes,
            "bytes_per_pair": self.pair_bytes,
            "requests_per_pair": REQUESTS,
            "io_threads": IO_THREADS,
            "huge_pages": huge_pages(),
            "engine_bytes": ENGINE_BYTES,
            "host_capacity_bytes": HOST_BYTES,
            "disk_capacity_bytes": self.capacity,
            "baseline_cpu_s_per_gib": round(raw.cpu_s_per_gib(self.pair_bytes), 4),
        }
        yield Row.of(
            name,
            speeds["kvtier"],
            "GB/s",
            baseline=speeds["raw"],
            baseline_name=raw_name,
            ratio=ratio_of(kvtier.wall_s, raw.wall_s),
            target=target,
            ok_if=SURELY,
            data_checked=True,
            refused_tokens=self.refused_tokens,
            cpu_s_per_gib=kvtier.cpu_s_per_gib(self.pair_bytes),
            config={**config, **more},
        )
        yield Row.of(
            f"{name}.bare",
            speeds["bare"],
            "GB/s",
            baseline=speeds["raw"],
            baseline_name=raw_name,
            ratio=ratio_of(bare.wall_s, raw.wall_s),
            target=target,
            ok_if=SURELY,
            data_checked=True,
            cpu_s_per_gib=bare.cpu_s_per_gib(self.pair_bytes),
            config={
                **config,
                "includes": "gather or scatter and checksums in two threads beside the bare disk, no cache",
            },
        )
        yield itself(
            f"{name}.itself",
            speeds["again"],
            "GB/s",
            baseline=speeds["raw"],
            baseline_name=raw_name,
            ratio=ratio_of(again.wall_s, raw.wall_s),
            cpu_s_per_gib=again.cpu_s_per_gib(self.pair_bytes),
            config=config,
        )
