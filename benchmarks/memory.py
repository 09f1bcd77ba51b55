"""Host memory: a store from engine pages and a verified load into them, against torch moving the same bytes at once.

Stores are timed from ``submit_store`` until the engine may use its pages again; checksums, which follow, count as CPU
time. Loads are timed from ``submit_load`` to their result. Every byte of every store is loaded and compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from benchmarks.machine import huge_pages
from benchmarks.pairs import Contestant, Times, alternate, ratio_of
from benchmarks.payload import PAGE_TOKENS, EngineMemory, Ids, Prompts, Request, llama_8b
from benchmarks.rows import AT_LEAST, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import Hit, Job, StoreResult, TieredCache

BLOCK_TOKENS: Final = (64, 256)
ENGINE_BYTES: Final = 2 << 30
REQUEST_BYTES: Final = 512 << 20
KEPT_REQUESTS: Final = 4
STORE_TARGET: Final = 0.75
LOAD_TARGET: Final = 1.0
THREADS: Final = 2


def run(settings: Settings) -> Iterator[Row]:
    """Both directions, for small and for large blocks."""
    torch.set_num_threads(THREADS)
    for block_tokens in BLOCK_TOKENS:
        with _Bench(block_tokens, settings) as bench:
            yield from bench.stores()
            yield from bench.loads()


class _Bench:
    """A full cache: every store evicts an older request, as in a cache that has been running for a while."""

    def __init__(self, block_tokens: int, settings: Settings) -> None:
        layout = llama_8b(block_tokens)
        self.block_tokens = block_tokens
        self.pairs = settings.pairs_of(20, 4)
        pages = ENGINE_BYTES // (layout.groups[0].parts[0].page_bytes * len(layout.groups[0].parts))
        self.engine = EngineMemory(layout, pages // 2, pages // 2)
        self.request_pages = REQUEST_BYTES // self.engine.page_bytes
        self.prompts = Prompts()
        capacity = (KEPT_REQUESTS + 2) * REQUEST_BYTES
        self.cache = TieredCache(
            {"host": {"capacity": capacity, "copy_threads": THREADS, "staging": "64MiB"}}, layout, "memory-benchmark"
        )
        self.buffers = [
            torch.zeros(REQUEST_BYTES // 2, dtype=torch.bfloat16).view(-1, self.engine.rows.shape[1])
            for _ in range(KEPT_REQUESTS)
        ]
        self.config = {
            "layout": "Llama 8B, bfloat16, 16-token pages at random places",
            "block_tokens": block_tokens,
            "bytes_per_pair": REQUEST_BYTES,
            "engine_bytes": ENGINE_BYTES,
            "host_capacity_bytes": capacity,
            "copy_threads": THREADS,
            "torch_threads": THREADS,
            "huge_pages": huge_pages(),
        }
        self.refused_tokens = 0
        self.request: Request | None = None
        self.job: Job[StoreResult] | None = None

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()

    # --- store ------------------------------------------------------------------------------------------------------

    def stores(self) -> Iterator[Row]:
        """Store and ``index_select``."""
        times = alternate(
            [
                Contestant("kvtier", self._store, self._begin_store, self._end_store, self._check_store),
                Contestant("torch", self._select, self._choose_rows),
                Contestant("again", self._select, self._choose_rows),
            ],
            self.pairs,
        )
        includes = "plan, gather; sealing with checksums follows and is in the CPU time"
        yield from self._rows("store", times, "torch.index_select", STORE_TARGET, includes)

    def _begin_store(self, _: int) -> None:
        self.request = self._new_request()

    def _store(self, _: int) -> None:
        assert self.request is not None
        self.job = self.cache.submit_store(self.request.tokens, self.engine.pages(self.request.sources))
        self.job.wait_source_free()

    def _end_store(self, _: int) -> None:
        assert self.job is not None
        result = self.job.result()
        self.refused_tokens += result.refused + result.existing

    def _check_store(self, _: int) -> None:
        assert self.request is not None
        targets = self.engine.targets(self.request_pages)
        self.engine.clear(targets)
        with self._hit(self.request) as hit:
            self._load_into(hit, targets)
        self._compare(self.request, targets)

    def _choose_rows(self, _: int) -> None:
        self.row_numbers = self.engine.row_numbers(self.engine.sources(self.request_pages))
        self.buffers.append(self.buffers.pop(0))

    def _select(self, _: int) -> None:
        torch.index_select(self.engine.rows, 0, self.row_numbers, out=self.buffers[0])

    # --- load -------------------------------------------------------------------------------------------------------

    def loads(self) -> Iterator[Row]:
        """Verified load and ``index_copy_``."""
        self.kept = [self._stored_request() for _ in range(KEPT_REQUESTS)]
        times = alternate(
            [
                Contestant("kvtier", self._load, self._begin_load, check=self._check_load),
                Contestant("torch", self._copy, self._clear_rows),
                Contestant("again", self._copy, self._clear_rows),
            ],
            self.pairs,
        )
        includes = "plan, checksums of every slice, scatter; the lookup before it is not timed"
        yield from self._rows("load", times, "torch.index_copy_", LOAD_TARGET, includes)

    def _stored_request(self) -> Request:
        self._begin_store(0)
        self._store(0)
        self._end_store(0)
        assert self.request is not None
        return self.request

    def _begin_load(self, number: int) -> None:
        self.request = self.kept[number % KEPT_REQUESTS]
        self.targets = self.engine.targets(self.request_pages)
        self.engine.clear(self.targets)
        self.hit = self._hit(self.request)

    def _load(self, _: int) -> None:
        self._load_into(self.hit, self.targets)

    def _check_load(self, _: int) -> None:
        self.hit.release()
        assert self.request is not None
        self._compare(self.request, self.targets)

    def _clear_rows(self, _: int) -> None:
        targets = self.engine.targets(self.request_pages)
        self.engine.clear(targets)
        self.row_numbers = self.engine.row_numbers(targets)
        self.buffers.append(self.buffers.pop(0))

    def _copy(self, _: int) -> None:
        self.engine.rows.index_copy_(0, self.row_numbers, self.buffers[0])

    # --- both -------------------------------------------------------------------------------------------------------

    def _new_request(self) -> Request:
        tokens = self.request_pages * PAGE_TOKENS
        return Request(self.prompts.take(tokens + 1), self.engine.sources(self.request_pages))

    def _hit(self, request: Request) -> Hit:
        hit = self.cache.lookup(request.tokens)
        if hit.num_tokens != len(request.tokens) - 1:
            raise BenchmarkError(f"only {hit.num_tokens} of {len(request.tokens) - 1} stored tokens are there")
        return hit

    def _load_into(self, hit: Hit, targets: Ids) -> None:
        result = self.cache.submit_load(hit, self.engine.pages(targets)).result()
        if result.ok_tokens != hit.num_tokens:
            raise BenchmarkError(f"only {result.ok_tokens} of {hit.num_tokens} tokens were loaded: {result.failed}")

    def _compare(self, request: Request, targets: Ids) -> None:
        if not self.engine.same(request.sources, targets):
            raise BenchmarkError("bytes that were loaded are not those that were stored")

    def _rows(self, verb: str, times: dict[str, Times], torch_name: str, target: float, includes: str) -> Iterator[Row]:
        name = f"memory.{verb}.{self.block_tokens}"
        kvtier, plain, again = (times[side] for side in ("kvtier", "torch", "again"))
        speeds = {side: REQUEST_BYTES / 1e9 / measured.median_s for side, measured in times.items()}
        baseline_cpu = plain.cpu_s_per_gib(REQUEST_BYTES)
        yield Row.of(
            name,
            speeds["kvtier"],
            "GB/s",
            baseline=speeds["torch"],
            baseline_name=torch_name,
            ratio=ratio_of(kvtier.wall_s, plain.wall_s),
            target=target,
            ok_if=AT_LEAST,
            data_checked=True,
            refused_tokens=self.refused_tokens,
            cpu_s_per_gib=kvtier.cpu_s_per_gib(REQUEST_BYTES),
            config={**self.config, "includes": includes, "baseline_cpu_s_per_gib": round(baseline_cpu, 4)},
        )
        yield itself(
            f"{name}.itself",
            speeds["again"],
            "GB/s",
            baseline=speeds["torch"],
            baseline_name=torch_name,
            ratio=ratio_of(again.wall_s, plain.wall_s),
            cpu_s_per_gib=baseline_cpu,
            config=self.config,
        )
