"""Which benchmarks there are, and what all of them are told. A new one is a module with ``run`` and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from benchmarks.rows import Row

BENCHMARKS: Final = {
    "memory": ("benchmarks.memory", "Store and load between engine pages and host memory, against torch."),
    "device": ("benchmarks.device", "Store and load through the device tier, and on to host memory, against torch."),
    "disk": ("benchmarks.disk", "Store and cold load through the disk tier, against bare direct I/O."),
    "lookup": ("benchmarks.lookup", "Keys and lookup of a million tokens, a miss, and the longest pause."),
    "overhead": (
        "benchmarks.overhead",
        "What a job, a block and a whole request cost beyond their bytes.",
    ),
    "ttft": ("benchmarks.ttft", "Time to first token from a prefix on disk, against computing it."),
}
"""Name -> module, and what the list of commands says of it."""


class BenchmarkError(Exception):
    """A measurement that means nothing: wrong bytes, a read that was not cold, too little room."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line said.

    ``directory`` lies on the disk to measure; ``pairs`` None: as many as needed; ``device`` is where the device tier
    lies: ``cuda``, or ``cpu``, which stands in for it.
    """

    directory: Path
    pairs: int | None = None
    quick: bool = False
    device: str = "cpu"

    def pairs_of(self, usual: int, quick: int) -> int:
        """Pairs to run: what was asked for, else ``usual``, or ``quick`` for a first look."""
        return self.pairs or (quick if self.quick else usual)


class Benchmark(Protocol):
    """What a benchmark's module has."""

    def run(self, settings: Settings) -> Iterator[Row]:
        """Measure, and yield every row as soon as it is known."""
