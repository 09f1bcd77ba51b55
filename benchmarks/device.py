"""The device tier: stores from engine pages into its slab and loads from there, against torch moving the same bytes.

``drain`` is a store and what follows it in the background, until all of it lies in host memory with its checksums; the
baseline gathers on the device and copies that to host memory. ``--device cuda`` measures a GPU; ``cpu`` stands in for
one, and says what the code around the copies costs, nothing of copy engines. Every store is loaded from the slab and
compared, and what was drained once more from host memory, after it has left the slab.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from benchmarks.kinds import deepseek_v4_flash, llama_8b, small_blocks
from benchmarks.moving import KEPT_REQUESTS, THREADS, Moving
from benchmarks.pairs import Contestant, alternate
from benchmarks.payload import Request
from benchmarks.rows import Row
from benchmarks.suite import BenchmarkError, Settings
from kvtier import KVLayout
from kvtier.errors import ConfigError
from kvtier.tiers.device.opening import device_of

ENGINE_BYTES: Final = 2 << 30
TARGET: Final = 0.7
HOST_REQUESTS: Final = 16
"""That host memory has room for: so many that those which left the slab are below the low watermark here."""
LEFT_AFTER: Final = (KEPT_REQUESTS + 2) // 2 + 1
"""Rounds of two stores each, after which a request has left the slab."""
POLL_S: Final = 0.0005


@dataclass(frozen=True, slots=True)
class Case:
    """One layout."""

    name: str
    what: str
    layout: Callable[[], KVLayout]
    dtype: torch.dtype
    request_bytes: int


CASES: Final = (
    Case("64", "Llama 8B", partial(llama_8b, 64), torch.bfloat16, 256 << 20),
    Case("64KiB", "8 layers of one head", small_blocks, torch.int64, 128 << 20),
    Case("v4flash.128", "DeepSeek V4 Flash", partial(deepseek_v4_flash, 128), torch.int64, 256 << 20),
)


def run(settings: Settings) -> Iterator[Row]:
    """Both directions and on to host memory, for every layout."""
    torch.set_num_threads(THREADS)
    try:
        device = device_of(settings.device)
    except ConfigError as error:
        raise BenchmarkError(f"--device {settings.device}: {error}") from error
    for case in CASES:
        with closing(_Bench(case, settings, device)) as bench:
            yield from bench.stores()
            yield from bench.loads()


class _Bench(Moving):
    """A slab, and more host memory below it."""

    def __init__(self, case: Case, settings: Settings, device: torch.device) -> None:
        self.pairs = settings.pairs_of(20, LEFT_AFTER + 1)
        self._device = device
        super().__init__(
            case.layout(),
            case.dtype,
            request_bytes=case.request_bytes,
            engine_bytes=ENGINE_BYTES,
            tier="device",
            settings=self._settings,
            device=str(device),
        )
        self.name = f"{device.type}.{{}}.{case.name}"
        self.config["layout"] = f"{case.what}, {self.layout.page_tokens}-token pages at random places"
        self.config["device"] = str(device)
        pinned = device.type == "cuda"
        self.hosts = [[torch.zeros_like(own, device="cpu", pin_memory=pinned) for own in all_] for all_ in self.buffers]
        self.drained: deque[Request] = deque()
        self.drained_checks = 0

    def rest(self) -> None:
        """Until all that was stored is in host memory, too."""
        while (stats := self.cache.stats())["hops"] or stats["landing_backlog_entries"]:
            time.sleep(POLL_S)

    def stores(self) -> Iterator[Row]:
        """Stores, and on to host memory; ``index_select``, and a copy to host memory after it."""
        times = alternate(
            [
                Contestant("kvtier", self.store_to_the_end, self.begin_store, self.end_store, self.check_store),
                Contestant("drain", self._drain, self.begin_store, self.end_store, self._check_drain),
                Contestant("torch", self.select, self.choose_rows),
                Contestant("again", self.select, self.choose_rows),
                Contestant("torch.drain", self._select_and_copy, self._choose_room),
            ],
            self.pairs,
        )
        if not self.drained_checks:
            raise BenchmarkError(f"nothing left the slab, so nothing was loaded from host memory: --pairs {LEFT_AFTER}")
        name, plain = f"device.{self.name.format('store')}", times["torch"]
        includes = "plan, gather into the slab, commit; what follows to host memory is in the CPU time"
        yield self.row(name, times["kvtier"], plain, "torch.index_select", TARGET, includes)
        yield self.itself(name, times["again"], plain, "torch.index_select")
        name, includes = f"device.{self.name.format('drain')}", "store, then copies to host memory, checksums, commit"
        torch_name = "torch.index_select, then copy_ to host memory"
        yield self.row(name, times["drain"], times["torch.drain"], torch_name, TARGET, includes)

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
        name, torch_name = f"device.{self.name.format('load')}", "torch.index_copy_"
        includes = "plan, scatter from the slab; the lookup before it is not timed"
        yield self.row(name, times["kvtier"], times["torch"], torch_name, TARGET, includes)
        yield self.itself(name, times["again"], times["torch"], torch_name)

    # --- drain ------------------------------------------------------------------------------------------------------

    def _drain(self, number: int) -> None:
        self.store_to_the_end(number)
        self.rest()

    def _check_drain(self, number: int) -> None:
        """Of one that was drained long ago only host memory has a copy."""
        self.check_store(number)
        self.drained.append(self.request)
        if len(self.drained) > LEFT_AFTER:
            self.check_request(self.drained.popleft(), "host")
            self.drained_checks += 1

    def _choose_room(self, number: int) -> None:
        self.choose_rows(number)
        self.hosts.append(self.hosts.pop(0))

    def _select_and_copy(self, number: int) -> None:
        self.select(number)
        for host, buffer in zip(self.hosts[0], self.buffers[0], strict=True):
            host.copy_(buffer, non_blocking=True)
        self.engine.wait()

    def _settings(self, capacity: int) -> dict[str, Any]:
        return {
            "device": {"capacity": capacity, "device": str(self._device)},
            "host": {
                "capacity": capacity * HOST_REQUESTS // (KEPT_REQUESTS + 2),
                "copy_threads": THREADS,
                "staging": "64MiB",
            },
        }
