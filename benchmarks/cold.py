"""Proof that what was read came from the device, and not from some cache."""

from __future__ import annotations

from pathlib import Path

from benchmarks.machine import DeviceCounters
from benchmarks.pairs import Step
from benchmarks.suite import BenchmarkError


class ColdReads:
    """Counters of the device under ``directory``, read before and after every round of ``nbytes``."""

    def __init__(self, directory: Path, nbytes: int) -> None:
        self._device = DeviceCounters.under(directory)
        self._nbytes = nbytes
        self._before = self._device.read_bytes()
        self._shares: dict[str, list[float]] = {}

    def begin(self, _: int) -> None:
        """What is read from now on counts."""
        self._before = self._device.read_bytes()

    def check(self, side: str) -> Step:
        """A step that refuses a round of ``side`` that did not read all of it from the device.

        Raises:
            BenchmarkError: when it is called, and less was read.
        """

        def check(_: int) -> None:
            pairs = zip(self._device.read_bytes(), self._before, strict=True)
            share = min((now - before) / self._nbytes for now, before in pairs)
            if share < 1.0:
                raise BenchmarkError(f"{side}: only {share:.3f} of what was read came from the device: it was not cold")
            self._shares.setdefault(side, []).append(share)

        return check

    def least(self) -> dict[str, float]:
        """For the config of a row: of every side, the least that its rounds read of what they had to."""
        return {f"{side}_device_bytes_per_byte": round(min(shares), 4) for side, shares in self._shares.items()}
