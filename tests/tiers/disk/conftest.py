"""Fixtures of the disk tier's tests: real files in a temporary directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.runtime import SystemFiles, SystemRuntime
from kvtier.runtime.seam import Clock
from tests.tiers.disk.workbench import Workbench


class HandClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return 1.7e9 + self.now_s


class HandRuntime(SystemRuntime):
    """Threads and locks of the system, time of a test."""

    clock: Clock

    def __init__(self) -> None:
        self.clock = HandClock()


@pytest.fixture
def files() -> SystemFiles:
    return SystemFiles()


@pytest.fixture
def runtime() -> HandRuntime:
    return HandRuntime()


@pytest.fixture
def workbench(tmp_path: Path, files: SystemFiles, runtime: HandRuntime) -> Iterator[Callable[..., Workbench]]:
    """Makes tiers on real files (of one directory unless told); all are closed at the end."""
    made: list[Workbench] = []

    def make(**settings: Any) -> Workbench:
        settings = {"files": files, "runtime": runtime, "directory": str(tmp_path / "kv")} | settings
        made.append(Workbench(**settings))
        return made[-1]

    yield make
    for bench in made:
        bench.tier.close()
