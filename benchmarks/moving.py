"""Requests between engine pages and a memory tier, and torch that moves the same bytes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.engine import EngineMemory
from benchmarks.machine import huge_pages
from benchmarks.pairs import Times, ratio_of
from benchmarks.payload import Ids, Prompts, Request
from benchmarks.rows import AT_LEAST, Row, itself
from benchmarks.suite import BenchmarkError
from kvtier import Hit, Job, KVLayout, StoreResult, TieredCache
from kvtier.kernels import compiled

KEPT_REQUESTS: Final = 4
"""That loads take in turn. The tier has room for two more."""
THREADS: Final = 2


class Moving:
    """A tier that is full: every store evicts an older request, as in a cache that has been running for a while.

    The steps of contestants are public; each takes the number of its round. Every request is one of random pages.
    """

    def __init__(
        self,
        layout: KVLayout,
        dtype: torch.dtype,
        *,
        request_bytes: int,
        engine_bytes: int,
        tier: str,
        settings: Callable[[int], dict[str, Any]],
        device: str | None = None,
    ) -> None:
        """``settings`` makes those of the cache from the bytes that ``tier`` has to have room for."""
        self.layout, self.tier = layout, tier
        page_bytes = sum(part.page_bytes for part in layout.groups[0].parts)
        block_pages = layout.block_tokens // layout.page_tokens
        self.request_pages = request_bytes // page_bytes // block_pages * block_pages
        pages = engine_bytes // 2 // page_bytes
        self.engine = EngineMemory(layout, pages, pages, dtype, device)
        self.request_bytes = self.engine.request_bytes(self.request_pages)
        self.request_blocks = self.request_pages // block_pages
        self.prompts = Prompts()
        capacity = (KEPT_REQUESTS + 2) * self.engine.record_bytes(self.request_pages)
        self.cache = TieredCache(settings(capacity), layout, f"{tier}-benchmark")
        self.buffers = [self.engine.buffers(self.request_pages) for _ in range(KEPT_REQUESTS)]
        self.config = {
            "kernels": "numpy" if compiled() is None else "numba",
            "block_tokens": layout.block_tokens,
            "block_bytes": layout.block_bytes[0],
            "bytes_per_pair": self.request_bytes,
            "engine_bytes": engine_bytes,
            f"{tier}_capacity_bytes": capacity,
            "copy_threads": THREADS,
            "torch_threads": THREADS,
            "huge_pages": huge_pages(),
        }
        self.refused_tokens = 0
        self.request = Request(self.prompts.take(0), self.engine.sources(0))
        self.keys = self.cache.keys(self.request.tokens)
        self.job: Job[StoreResult] | None = None

    def close(self) -> None:
        """End everything."""
        self.cache.close()

    def rest(self) -> None:
        """Until what a store left to do in the background is done."""

    # --- store ------------------------------------------------------------------------------------------------------

    def begin_store(self, _: int) -> None:
        """Another prompt, and its keys: whoever stores it has looked it up before."""
        tokens = self.request_pages * self.layout.page_tokens
        self.request = Request(self.prompts.take(tokens + 1), self.engine.sources(self.request_pages))
        self.keys = self.cache.keys(self.request.tokens)
        self.engine.wait()

    def store(self, _: int) -> None:
        """Until the engine may use its pages again."""
        self.job = self.cache.submit_store(self.keys, self.engine.pages(self.request.sources))
        self.job.wait_source_free()

    def store_to_the_end(self, number: int) -> None:
        """Until it is in the cache."""
        self.store(number)
        assert self.job is not None
        self.job.result()

    def end_store(self, _: int) -> None:
        """Until nothing of it is left to do."""
        assert self.job is not None
        result = self.job.result()
        self.refused_tokens += result.refused + result.existing
        self.rest()

    def check_store(self, _: int) -> None:
        """Load and compare it."""
        self.check_request(self.request, self.tier)

    def check_request(self, request: Request, tier: str) -> None:
        """Load ``request`` from ``tier``, and compare every byte."""
        targets = self.engine.targets(self.request_pages)
        self.engine.clear(targets)
        with self._hit(request) as hit:
            self._load_into(hit, targets, tier)
        self._compare(request, targets)

    def choose_rows(self, _: int) -> None:
        """For torch."""
        self.row_numbers = self.engine.row_numbers(self.engine.sources(self.request_pages))
        self.buffers.append(self.buffers.pop(0))
        self.engine.wait()

    def select(self, _: int) -> None:
        """Torch gathers."""
        self.engine.select(self.row_numbers, self.buffers[0])
        self.engine.wait()

    # --- load -------------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Store what is loaded from now on."""
        self.kept = [self._stored_request() for _ in range(KEPT_REQUESTS)]

    def begin_load(self, number: int) -> None:
        """One of those that were kept, to other pages, which are cleared."""
        self.request = self.kept[number % KEPT_REQUESTS]
        self.targets = self.engine.targets(self.request_pages)
        self.engine.clear(self.targets)
        self.hit = self._hit(self.request)
        self.engine.wait()

    def load(self, _: int) -> None:
        """Until it is there."""
        self._load_into(self.hit, self.targets, self.tier)

    def check_load(self, _: int) -> None:
        """Compare it."""
        self.hit.release()
        self._compare(self.request, self.targets)

    def clear_rows(self, _: int) -> None:
        """For torch: other pages, cleared."""
        targets = self.engine.targets(self.request_pages)
        self.engine.clear(targets)
        self.row_numbers = self.engine.row_numbers(targets)
        self.buffers.append(self.buffers.pop(0))
        self.engine.wait()

    def copy(self, _: int) -> None:
        """Torch scatters."""
        self.engine.copy(self.row_numbers, self.buffers[0])
        self.engine.wait()

    # --- rows -------------------------------------------------------------------------------------------------------

    def row(self, name: str, own: Times, plain: Times, torch_name: str, target: float, includes: str) -> Row:
        """``own`` beside ``plain``, which moved as many bytes."""
        baseline_cpu = round(plain.cpu_s_per_gib(self.request_bytes), 4)
        return Row.of(
            name,
            **self._against(own, plain, torch_name),
            target=target,
            ok_if=AT_LEAST,
            data_checked=True,
            refused_tokens=self.refused_tokens,
            config={**self.config, "includes": includes, "baseline_cpu_s_per_gib": baseline_cpu},
        )

    def itself(self, name: str, again: Times, plain: Times, torch_name: str) -> Row:
        """The baseline a second time."""
        return itself(f"{name}.itself", **self._against(again, plain, torch_name), config=self.config)

    def _against(self, own: Times, plain: Times, torch_name: str) -> dict[str, Any]:
        return {
            "value": self.request_bytes / 1e9 / own.median_s,
            "unit": "GB/s",
            "baseline": self.request_bytes / 1e9 / plain.median_s,
            "baseline_name": torch_name,
            "ratio": ratio_of(own.wall_s, plain.wall_s),
            "cpu_s_per_gib": own.cpu_s_per_gib(self.request_bytes),
        }

    # --- both -------------------------------------------------------------------------------------------------------

    def _stored_request(self) -> Request:
        self.begin_store(0)
        self.store(0)
        self.end_store(0)
        return self.request

    def _hit(self, request: Request) -> Hit:
        hit = self.cache.lookup(request.tokens)
        if hit.num_tokens != len(request.tokens) - 1:
            raise BenchmarkError(f"only {hit.num_tokens} of {len(request.tokens) - 1} stored tokens are there")
        return hit

    def _load_into(self, hit: Hit, targets: Ids, tier: str) -> None:
        result = self.cache.submit_load(hit, self.engine.pages(targets)).result()
        if result.by_tier[tier] != hit.num_tokens:
            raise BenchmarkError(f"{hit.num_tokens} tokens should have been loaded from {tier}: {result}")

    def _compare(self, request: Request, targets: Ids) -> None:
        if not self.engine.same(request.sources, targets):
            raise BenchmarkError("bytes that were loaded are not those that were stored")
