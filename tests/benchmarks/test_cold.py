"""Reads that came from some cache do not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cold
from benchmarks.cold import ColdReads
from benchmarks.suite import BenchmarkError


class Counters:
    """Of a device and of a process that read what they are told."""

    found = (0, 0)

    @classmethod
    def under(cls, _: Path) -> Counters:
        return cls()

    def read_bytes(self) -> tuple[int, int]:
        return Counters.found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> ColdReads:
    monkeypatch.setattr(cold, "DeviceCounters", Counters)
    Counters.found = (1000, 500)
    return ColdReads(Path(), 100)


def test_a_round_that_read_everything_from_the_device_counts(reads: ColdReads) -> None:
    for number, more in enumerate((200, 150)):
        reads.begin(number)
        Counters.found = tuple(count + more for count in Counters.found)
        reads.check("kvtier")(number)
    assert reads.least() == {"kvtier_device_bytes_per_byte": 1.5}


@pytest.mark.parametrize("found", [(1099, 900), (1500, 599)], ids=["not from the device", "not by this process"])
def test_a_round_that_did_not_is_refused(reads: ColdReads, found: tuple[int, int]) -> None:
    reads.begin(0)
    Counters.found = found
    with pytest.raises(BenchmarkError, match=r"raw: only 0\.990 of what was read came from the device"):
        reads.check("raw")(0)
