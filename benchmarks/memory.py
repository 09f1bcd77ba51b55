"""Host memory: stores from engine pages and loads into them, against torch moving the same bytes at once.

Stores are timed from ``submit_store`` until the engine may use its pages again, and (``done``) until they are in the
cache with their checksums; where checksums follow, they count as CPU time of the former. Loads are timed from
``submit_load`` to their result, with checksums compared and (``unverified``) without. Every byte of every store is
loaded and compared. ``python`` is what a store takes of CPU time beyond bare threads that copy and sum the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from benchmarks.bare import BareKernels
from benchmarks.kinds import deepseek_v4_flash, deepseek_v32, llama_8b, small_blocks
from benchmarks.moving import THREADS, Moving
from benchmarks.pairs import Contestant, Times, alternate, ratio_of
from benchmarks.rows import AT_MOST, Row
from benchmarks.suite import Settings
from kvtier import KVLayout

ENGINE_BYTES: Final = 2 << 30
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
    *(
        Case(
            f"v4flash.{tokens}",
            "DeepSeek V4 Flash",
            partial(deepseek_v4_flash, tokens),
            torch.int64,
            384 << 20,
            0.7,
            0.7,
            0.7,
            0.7,
            PYTHON_TARGET_US,
        )
        for tokens in (128, 256)
    ),
)


def run(settings: Settings) -> Iterator[Row]:
    """Both directions, for every layout."""
    torch.set_num_threads(THREADS)
    for case in CASES:
        for verifies in (True, False):
            with closing(_Bench(case, settings, verifies=verifies)) as bench:
                if verifies:
                    yield from bench.stores()
                yield from bench.loads()


class _Bench(Moving):
    """Host memory, and bare kernels beside it."""

    def __init__(self, case: Case, settings: Settings, *, verifies: bool) -> None:
        self.case, self.verifies = case, verifies
        self.pairs = settings.pairs_of(20, 4)
        super().__init__(
            case.layout(),
            case.dtype,
            request_bytes=case.request_bytes,
            engine_bytes=ENGINE_BYTES,
            tier="host",
            settings=self._settings,
        )
        self.config["layout"] = f"{case.what}, {self.layout.page_tokens}-token pages at random places"
        self.bare = BareKernels(self.engine, self.request_pages, threads=THREADS)

    def close(self) -> None:
        """End everything."""
        self.bare.close()
        super().close()

    def stores(self) -> Iterator[Row]:
        """Stores and ``index_select``."""
        contestants = [
            Contestant("kvtier", self.store, self.begin_store, self.end_store, self.check_store),
            Contestant("done", self.store_to_the_end, self.begin_store, self.end_store, self.check_store),
            Contestant("torch", self.select, self.choose_rows),
            Contestant("again", self.select, self.choose_rows),
        ]
        if self.case.python_us is not None:
            contestants.append(Contestant("bare", self._gather_bare, self._choose_pages))
        times = alternate(contestants, self.pairs)
        name, torch_name, plain = f"memory.store.{self.case.name}", "torch.index_select", times["torch"]
        includes = "plan, gather, with the keys of an earlier lookup; checksums that follow are in the CPU time"
        yield self.row(name, times["kvtier"], plain, torch_name, self.case.store, includes)
        includes = "plan, gather, checksums, commit, with the keys of an earlier lookup"
        yield self.row(f"{name}.done", times["done"], plain, torch_name, self.case.done, includes)
        if self.case.python_us is not None:
            yield self._python_row(f"{name}.python", times, self.case.python_us)
        yield self.itself(name, times["again"], plain, torch_name)

    def loads(self) -> Iterator[Row]:
        """Loads and ``index_copy_``."""
        self.keep()
        times = alternate(
            [
                Contestant("kvtier", self.load, self.begin_load, check=self.check_load),
                Contestant("torch", self.copy, self.clear_rows),
                Contestant("again", self.copy, self.clear_rows),
            ],
            self.pairs,
        )
        name, torch_name, target = f"memory.load.{self.case.name}", "torch.index_copy_", self.case.load
        includes = "plan, checksums of every slice, scatter; the lookup before it is not timed"
        if not self.verifies:
            name, target = f"{name}.unverified", self.case.unverified
            includes = "plan, scatter; the lookup before it is not timed"
        yield self.row(name, times["kvtier"], times["torch"], torch_name, target, includes)
        yield self.itself(name, times["again"], times["torch"], torch_name)

    def _settings(self, capacity: int) -> dict[str, Any]:
        return {
            "host": {"capacity": capacity, "copy_threads": THREADS, "staging": "64MiB"},
            "read": {"verify_memory": self.verifies},
        }

    def _choose_pages(self, _: int) -> None:
        self.table = self.engine.pages(self.engine.sources(self.request_pages)).table

    def _gather_bare(self, _: int) -> None:
        self.bare.gather(self.table)

    def _python_row(self, name: str, times: dict[str, Times], target_us: float) -> Row:
        """What is left of a store's CPU time, a block, without what the bare kernels take."""
        ours_us, bare_us = (times[side].cpu_s * 1e6 / self.request_blocks for side in ("done", "bare"))
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
