"""Host memory: stores from engine pages and loads into them, against torch moving the same bytes at once.

Stores are timed from ``submit_store`` until the engine may use its pages again, and (``done``) until they are in the
cache with their checksums; where checksums follow, they count as CPU time of the former. Loads are timed from
``submit_load`` to their result, with checksums compared and (``unverified``) without. Every byte of every store is
loaded and compared. ``python`` is what a store takes of CPU time beyond bare threads that copy and sum the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from benchmarks.kinds import BareKernels, MixedMemory, deepseek_v32, small_blocks
from benchmarks.machine import huge_pages
from benchmarks.pairs import Contestant, Times, alternate, ratio_of
from benchmarks.payload import Ids, Prompts, Request, llama_8b
from benchmarks.rows import AT_LEAST, AT_MOST, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import Hit, Job, KVLayout, StoreResult, TieredCache
from kvtier.kernels import compiled

ENGINE_BYTES: Final = 2 << 30
KEPT_REQUESTS: Final = 4
THREADS: Final = 2
PYTHON_TARGET_US: Final = 15.0


@dataclass(frozen=True, slots=True)
class Case:
    """One layout, and how fast it has to be."""

    name: str
    what: str
    layout: Callable[[], KVLayout]
    dtype: torch.dtype
    request_bytes: int
    store: float
    done: float
    load: float
    unverified: float
    python_us: float | None = None


CASES: Final = (
    Case("64", "Llama 8B", lambda: llama_8b(64), torch.bfloat16, 512 << 20, 1.2, 0.8, 1.4, 1.8),
    Case("256", "Llama 8B", lambda: llama_8b(256), torch.bfloat16, 512 << 20, 1.2, 0.8, 1.4, 1.8),
    Case("64KiB", "8 layers of one head", small_blocks, torch.int64, 128 << 20, 0.7, 0.7, 0.7, 0.7, PYTHON_TARGET_US),
    Case("v32", "DeepSeek V3.2", deepseek_v32, torch.int64, 384 << 20, 0.7, 0.7, 0.7, 0.7, PYTHON_TARGET_US),
)


def run(settings: Settings) -> Iterator[Row]:
    """Both directions, for every layout."""
    torch.set_num_threads(THREADS)
    for case in CASES:
        for verifies in (True, False):
            with _Bench(case, settings, verifies=verifies) as bench:
                if verifies:
                    yield from bench.stores()
                yield from bench.loads()


class _Bench:
    """A full cache: every store evicts an older request, as in a cache that has been running for a while."""

    def __init__(self, case: Case, settings: Settings, *, verifies: bool) -> None:
        layout = case.layout()
        self.case, self.layout, self.verifies = case, layout, verifies
        self.pairs = settings.pairs_of(20, 4)
        page_bytes = sum(part.page_bytes for part in layout.groups[0].parts)
        block_pages = layout.block_tokens // layout.page_tokens
        self.request_pages = case.request_bytes // page_bytes // block_pages * block_pages
        self.request_bytes = self.request_pages * page_bytes
        pages = ENGINE_BYTES // 2 // page_bytes
        self.engine = MixedMemory(layout, pages, pages, case.dtype)
        self.prompts = Prompts()
        capacity = (KEPT_REQUESTS + 2) * case.request_bytes * layout.record_pages[0] * 4096 // layout.block_bytes[0]
        self.cache = TieredCache(
            {
                "host": {"capacity": capacity, "copy_threads": THREADS, "staging": "64MiB"},
                "read": {"verify_memory": verifies},
            },
            layout,
            "memory-benchmark",
        )
        self.bare = BareKernels(self.engine, self.request_pages, threads=THREADS)
        self.buffers = [self.engine.buffers(self.request_pages) for _ in range(KEPT_REQUESTS)]
        self.config = {
            "layout": f"{case.what}, {layout.page_tokens}-token pages at random places",
            "kernels": "numpy" if compiled() is None else "numba",
            "block_tokens": layout.block_tokens,
            "block_bytes": layout.block_bytes[0],
            "bytes_per_pair": self.request_bytes,
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
        self.bare.close()
        self.cache.close()

    # --- store ------------------------------------------------------------------------------------------------------

    def stores(self) -> Iterator[Row]:
        """Stores and ``index_select``."""
        contestants = [
            Contestant("kvtier", self._store, self._begin_store, self._end_store, self._check_store),
            Contestant("done", self._store_to_the_end, self._begin_store, self._end_store, self._check_store),
            Contestant("torch", self._select, self._choose_rows),
            Contestant("again", self._select, self._choose_rows),
        ]
        if self.case.python_us is not None:
            contestants.append(Contestant("bare", self._gather_bare, self._choose_pages))
        times = alternate(contestants, self.pairs)
        name, torch_name = f"memory.store.{self.case.name}", "torch.index_select"
        includes = "plan, gather; checksums that follow are in the CPU time"
        yield self._row(name, times, "kvtier", torch_name, self.case.store, includes)
        includes = "plan, gather, checksums, commit"
        yield self._row(f"{name}.done", times, "done", torch_name, self.case.done, includes)
        if self.case.python_us is not None:
            yield self._python_row(f"{name}.python", times, self.case.python_us)
        yield self._itself(name, times, torch_name)

    def _begin_store(self, _: int) -> None:
        self.request = self._new_request()

    def _store(self, _: int) -> None:
        assert self.request is not None
        self.job = self.cache.submit_store(self.request.tokens, self.engine.pages(self.request.sources))
        self.job.wait_source_free()

    def _store_to_the_end(self, number: int) -> None:
        self._store(number)
        assert self.job is not None
        self.job.result()

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
        self.engine.select(self.row_numbers, self.buffers[0])

    def _choose_pages(self, _: int) -> None:
        self.table = self.engine.pages(self.engine.sources(self.request_pages)).table

    def _gather_bare(self, _: int) -> None:
        self.bare.gather(self.table)

    # --- load -------------------------------------------------------------------------------------------------------

    def loads(self) -> Iterator[Row]:
        """Loads and ``index_copy_``."""
        self.kept = [self._stored_request() for _ in range(KEPT_REQUESTS)]
        times = alternate(
            [
                Contestant("kvtier", self._load, self._begin_load, check=self._check_load),
                Contestant("torch", self._copy, self._clear_rows),
                Contestant("again", self._copy, self._clear_rows),
            ],
            self.pairs,
        )
        name, torch_name, target = f"memory.load.{self.case.name}", "torch.index_copy_", self.case.load
        includes = "plan, checksums of every slice, scatter; the lookup before it is not timed"
        if not self.verifies:
            name, target = f"{name}.unverified", self.case.unverified
            includes = "plan, scatter; the lookup before it is not timed"
        yield self._row(name, times, "kvtier", torch_name, target, includes)
        yield self._itself(name, times, torch_name)

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
        self.engine.copy(self.row_numbers, self.buffers[0])

    # --- both -------------------------------------------------------------------------------------------------------

    def _new_request(self) -> Request:
        tokens = self.request_pages * self.layout.page_tokens
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

    def _row(
        self, name: str, times: dict[str, Times], subject: str, torch_name: str, target: float, includes: str
    ) -> Row:
        kvtier, plain = times[subject], times["torch"]
        baseline_cpu = plain.cpu_s_per_gib(self.request_bytes)
        return Row.of(
            name,
            self._speed(kvtier),
            "GB/s",
            baseline=self._speed(plain),
            baseline_name=torch_name,
            ratio=ratio_of(kvtier.wall_s, plain.wall_s),
            target=target,
            ok_if=AT_LEAST,
            data_checked=True,
            refused_tokens=self.refused_tokens,
            cpu_s_per_gib=kvtier.cpu_s_per_gib(self.request_bytes),
            config={**self.config, "includes": includes, "baseline_cpu_s_per_gib": round(baseline_cpu, 4)},
        )

    def _itself(self, name: str, times: dict[str, Times], torch_name: str) -> Row:
        again, plain = times["again"], times["torch"]
        return itself(
            f"{name}.itself",
            self._speed(again),
            "GB/s",
            baseline=self._speed(plain),
            baseline_name=torch_name,
            ratio=ratio_of(again.wall_s, plain.wall_s),
            cpu_s_per_gib=plain.cpu_s_per_gib(self.request_bytes),
            config=self.config,
        )

    def _python_row(self, name: str, times: dict[str, Times], target_us: float) -> Row:
        """What is left of a store's CPU time, a block, without what the bare kernels take."""
        blocks = self.request_bytes // self.layout.block_bytes[0]
        ours_us, bare_us = (times[side].cpu_s * 1e6 / blocks for side in ("done", "bare"))
        return Row.of(
            name,
            float(np.median(ours_us - bare_us)),
            "us",
            baseline=float(np.median(bare_us)),
            baseline_name="CPU time a block of bare kernels",
            ratio=ratio_of(ours_us, bare_us),
            target=target_us,
            ok_if=AT_MOST,
            data_checked=True,
            refused_tokens=self.refused_tokens,
            config={**self.config, "includes": "CPU time of all threads beyond that of the bare kernels, a block"},
        )

    def _speed(self, times: Times) -> float:
        return self.request_bytes / 1e9 / times.median_s
