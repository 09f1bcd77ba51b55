"""The device tier beside torch, and on to host memory: every byte of it compared, at a size that takes no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import device
from benchmarks.device import LEFT_AFTER, Case
from benchmarks.kinds import deepseek_v4_flash, small_blocks
from benchmarks.suite import BenchmarkError, Settings

SMALL = Case("small", "small blocks", small_blocks, torch.int64, 1 << 20)
WINDOWED = Case("windowed", "windows", lambda: deepseek_v4_flash(128), torch.int64, 5 << 20)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "ENGINE_BYTES", 16 << 20)
    monkeypatch.setattr(device, "THREADS", 1)
    monkeypatch.setattr("benchmarks.moving.THREADS", 1)
    monkeypatch.setattr(device, "CASES", (SMALL,))


@pytest.mark.parametrize("case", [SMALL, WINDOWED], ids=lambda case: case.name)
def test_what_is_stored_comes_back_from_the_slab_and_from_host_memory(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CASES", (case,))
    rows = list(device.run(Settings(Path(), pairs=LEFT_AFTER)))
    assert [row.bench for row in rows] == [
        f"device.cpu.{verb}.{case.name}{what}"
        for verb, what in (("store", ""), ("store", ".itself"), ("drain", ""), ("load", ""), ("load", ".itself"))
    ]
    assert all(row.data_checked and not row.config["refused_tokens"] for row in rows)


def test_too_few_rounds_to_see_anything_leave_the_slab_are_refused() -> None:
    with pytest.raises(BenchmarkError, match=f"nothing left the slab.*--pairs {LEFT_AFTER}"):
        list(device.run(Settings(Path(), pairs=LEFT_AFTER - 1)))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"--device cuda:99: .*torch sees"):
        list(device.run(Settings(Path(), device="cuda:99")))
