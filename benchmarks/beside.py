"""What stands beside the disk tier and the bare disk, and tells where the time of the former goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from benchmarks.bare import BareKernels
from benchmarks.cold import ColdReads
from benchmarks.engine import EngineMemory
from benchmarks.pairs import Contestant, Times, ratio_of
from benchmarks.payload import Ids
from benchmarks.pipeline import BarePipeline
from benchmarks.rawdisk import RawDisk
from benchmarks.rows import AT_MOST, SURELY, Row
from benchmarks.suite import BenchmarkError

REQUESTS: Final = 4
COPY_THREADS: Final = 2
PYTHON_TARGET_US: Final = 15.0


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One direction of one layout: the times of everybody, who moved ``nbytes`` a round."""

    name: str
    times: dict[str, Times]
    nbytes: int
    raw_name: str
    target: float
    refused_tokens: int
    config: dict[str, Any]

    def speed(self, side: str) -> float:
        """GB/s."""
        return self.nbytes / 1e9 / self.times[side].median_s

    def against_raw(self, side: str) -> dict[str, Any]:
        """Of a row: how fast ``side`` was, and the bare disk."""
        own = self.times[side]
        return {
            "value": self.speed(side),
            "unit": "GB/s",
            "baseline": self.speed("raw"),
            "baseline_name": self.raw_name,
            "ratio": ratio_of(own.wall_s, self.times["raw"].wall_s),
            "cpu_s_per_gib": own.cpu_s_per_gib(self.nbytes),
        }


class Beside(Protocol):
    """One more contestant for either direction, and the row that comes of it."""

    def stores(self) -> Contestant:
        """Beside stores."""

    def loads(self, cold: ColdReads) -> Contestant:
        """Beside loads."""

    def row(self, measured: Measured) -> Row:
        """What came of it."""

    def close(self) -> None:
        """End its threads."""


class Pipeline:
    """The bare pipeline: it writes and reads a third area every round."""

    def __init__(self, engine: EngineMemory, raw: RawDisk, request_pages: int, areas: int, io_bytes: int) -> None:
        self._engine, self._raw, self._io_bytes = engine, raw, io_bytes
        self._pages, self._areas = REQUESTS * request_pages, areas
        self._pipeline = BarePipeline(engine, raw, threads=COPY_THREADS)
        self._stored: list[Ids] = []

    def stores(self) -> Contestant:
        """What was gathered is read back."""
        return Contestant("bare", self._store, self._begin_store, check=self._check_store)

    def loads(self, cold: ColdReads) -> Contestant:
        """What was loaded is compared with the pages that it was stored from."""

        def begin(number: int) -> None:
            self._targets = self._engine.targets(self._pages)
            self._engine.clear(self._targets)
            cold.begin(number)

        def check(number: int) -> None:
            cold.check("bare")(number)
            if not self._engine.same(self._stored[number], self._targets):
                raise BenchmarkError("the bare pipeline did not load what it had stored")

        return Contestant(
            "bare", lambda number: self._pipeline.load(self._area(number), self._targets), begin, check=check
        )

    def row(self, measured: Measured) -> Row:
        """Its speed, held to the same target."""
        includes = "gather or scatter and checksums in two threads beside the bare disk, no cache"
        return Row.of(
            f"{measured.name}.bare",
            **measured.against_raw("bare"),
            target=measured.target,
            ok_if=SURELY,
            data_checked=True,
            config={**measured.config, "includes": includes},
        )

    def close(self) -> None:
        """End its threads."""
        self._pipeline.close()

    def _area(self, number: int) -> int:
        return self._areas * number + self._areas - 1

    def _begin_store(self, _: int) -> None:
        self._sources = self._engine.sources(self._pages)

    def _store(self, number: int) -> None:
        self._buffer = self._pipeline.store(self._area(number), self._sources)

    def _check_store(self, number: int) -> None:
        if not np.array_equal(self._raw.read(self._area(number), self._io_bytes), self._buffer):
            raise BenchmarkError("the bare pipeline did not write what it gathered")
        self._stored.append(self._sources)


class Kernels:
    """Bare kernels without a disk: what CPU time kvtier takes beyond theirs and that of the bare disk is Python's."""

    def __init__(self, engine: EngineMemory, request_pages: int) -> None:
        self._engine, self._pages = engine, request_pages
        self._kernels = BareKernels(engine, request_pages, threads=COPY_THREADS)
        self._blocks = REQUESTS * request_pages * engine.layout.page_tokens // engine.layout.block_tokens

    def stores(self) -> Contestant:
        """Blocks to memory of one's own, and their checksums."""

        def begin(_: int) -> None:
            self._tables = [self._engine.pages(self._engine.sources(self._pages)).table for _ in range(REQUESTS)]

        return Contestant("kernels", lambda _: self._gather(), begin)

    def loads(self, cold: ColdReads) -> Contestant:
        """Blocks from there, once their checksums are compared."""
        del cold

        def begin(_: int) -> None:
            self._source = self._engine.sources(self._pages)
            self._kernels.gather(self._engine.pages(self._source).table)
            self._targets = self._engine.targets_apart(REQUESTS, self._pages)
            self._tables = [self._engine.pages(targets).table for targets in self._targets]

        def check(_: int) -> None:
            if not all(self._engine.same(self._source, targets) for targets in self._targets):
                raise BenchmarkError("bare kernels did not scatter what they had gathered")

        return Contestant("kernels", lambda _: self._scatter(), begin, check=check)

    def row(self, measured: Measured) -> Row:
        """Microseconds a block that are neither copies and checksums nor reading and writing."""
        times = measured.times
        ours_us = times["kvtier"].cpu_s * 1e6 / self._blocks
        bare_us = (times["kernels"].cpu_s + times["raw"].cpu_s) * 1e6 / self._blocks
        includes = "CPU time of all threads beyond the baseline, that of sealing and giving back segments included"
        return Row.of(
            f"{measured.name}.python",
            float(np.median(ours_us - bare_us)),
            "us",
            baseline=float(np.median(bare_us)),
            baseline_name="CPU time a block of bare kernels and of the bare disk",
            ratio=ratio_of(ours_us, bare_us),
            target=PYTHON_TARGET_US,
            ok_if=AT_MOST,
            data_checked=True,
            refused_tokens=measured.refused_tokens,
            config={**measured.config, "includes": includes},
        )

    def close(self) -> None:
        """End its threads."""
        self._kernels.close()

    def _gather(self) -> None:
        for table in self._tables:
            self._kernels.gather(table)

    def _scatter(self) -> None:
        for table in self._tables:
            self._kernels.scatter(table)
