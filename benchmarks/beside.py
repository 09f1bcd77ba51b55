"""What stands beside the disk tier and the bare disk, and tells where the time of the former goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from benchmarks.cold import ColdReads
from benchmarks.engine import EngineMemory
from benchmarks.pairs import Contestant, Step, Times, ratio_of
from benchmarks.payload import Ids
from benchmarks.pipeline import BarePipeline
from benchmarks.python import ByteClock, WatchedStep
from benchmarks.rawdisk import RawDisk
from benchmarks.rows import AT_MOST, SURELY, Row
from benchmarks.suite import BenchmarkError
from kvtier.runtime import blocking

REQUESTS: Final = 4
COPY_THREADS: Final = 2
PYTHON_TARGET_US: Final = 15.0


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One direction of one layout: the times of everybody, who moved ``nbytes`` a round."""

    verb: str
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
    """What is looked at in either direction, and the row that comes of it."""

    def watched(self, verb: str, run: Step) -> Step:
        """What kvtier is timed with in the direction ``verb``, looked at from the outside."""

    def stores(self) -> Sequence[Contestant]:
        """Beside stores."""

    def loads(self, cold: ColdReads) -> Sequence[Contestant]:
        """Beside loads."""

    def row(self, measured: Measured) -> Row:
        """What came of it."""

    def close(self) -> None:
        """End what it began."""


class Pipeline:
    """The bare pipeline: it writes and reads a third area every round."""

    def __init__(self, engine: EngineMemory, raw: RawDisk, request_pages: int, areas: int, io_bytes: int) -> None:
        self._engine, self._raw, self._io_bytes = engine, raw, io_bytes
        self._pages, self._areas = REQUESTS * request_pages, areas
        self._pipeline = BarePipeline(engine, raw, threads=COPY_THREADS)
        self._stored: list[Ids] = []

    def watched(self, verb: str, run: Step) -> Step:
        """As it is."""
        del verb
        return run

    def stores(self) -> Sequence[Contestant]:
        """What was gathered is read back."""
        return [Contestant("bare", self._store, self._begin_store, check=self._check_store)]

    def loads(self, cold: ColdReads) -> Sequence[Contestant]:
        """What was loaded is compared with the pages that it was stored from."""

        def begin(number: int) -> None:
            self._targets = self._engine.targets(self._pages)
            self._engine.clear(self._targets)
            cold.begin(number)

        def check(number: int) -> None:
            cold.check("bare")(number)
            if not self._engine.same(self._stored[number], self._targets):
                raise BenchmarkError("the bare pipeline did not load what it had stored")

        def load(number: int) -> None:
            self._pipeline.load(self._area(number), self._targets)

        return [Contestant("bare", load, begin, check=check)]

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


class PythonTime:
    """CPU time a block of stores and loads that is spent outside kernels, checksums, reads and writes."""

    def __init__(self, engine: EngineMemory, request_pages: int) -> None:
        self._blocks = REQUESTS * request_pages * engine.layout.page_tokens // engine.layout.block_tokens
        self._clock = ByteClock()
        self._steps: dict[str, WatchedStep] = {}
        for name in ("gather", "scatter", "gather_records", "scatter_records"):
            self._clock.around(engine.memory, name)
        for name in ("preadv", "pwritev"):
            self._clock.around(blocking, name)

    def watched(self, verb: str, run: Step) -> Step:
        """With an eye on the clocks."""
        self._steps[verb] = WatchedStep(run, self._clock)
        return self._steps[verb]

    def stores(self) -> Sequence[Contestant]:
        """Nobody else."""
        return ()

    def loads(self, cold: ColdReads) -> Sequence[Contestant]:
        """Nobody else."""
        del cold
        return ()

    def row(self, measured: Measured) -> Row:
        """Microseconds a block, beside those inside the calls."""
        own_us, bytes_us = (
            found * 1e6 / self._blocks
            for found in self._steps[measured.verb].last(len(measured.times["kvtier"].wall_s))
        )
        includes = "CPU time of all threads from the first submit to the last result, outside kernels and system calls"
        return Row.of(
            f"{measured.name}.python",
            float(np.median(own_us)),
            "us",
            baseline=float(np.median(bytes_us)),
            baseline_name="CPU time a block in kernels, preadv and pwritev of the same jobs",
            ratio=ratio_of(own_us, bytes_us),
            target=PYTHON_TARGET_US,
            ok_if=AT_MOST,
            data_checked=True,
            refused_tokens=measured.refused_tokens,
            config={**measured.config, "includes": includes},
        )

    def close(self) -> None:
        """Time nothing any more."""
        self._clock.close()
