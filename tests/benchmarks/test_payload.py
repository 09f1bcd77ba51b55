"""Prompts, and the bare disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.payload import Prompts
from benchmarks.rawdisk import RawDisk


def test_no_prompt_comes_twice() -> None:
    prompts = Prompts()
    assert not np.array_equal(prompts.take(64), prompts.take(64))


def test_the_bare_disk_moves_every_byte_of_an_area(tmp_path: Path) -> None:
    raw = RawDisk(tmp_path / "raw", areas=2, area_bytes=64 << 10, memory_bytes=192 << 10, threads=2)
    written = [raw.write(area, record).copy() for area, record in ((0, 8 << 10), (1, 24 << 10))]
    assert not np.array_equal(*written)
    for area, record in ((0, 24 << 10), (1, 4 << 10)):
        assert np.array_equal(raw.read(area, record), written[area])
    raw.close()
    assert not (tmp_path / "raw").exists()


def test_the_bare_disk_uses_all_of_its_memory_in_turn(tmp_path: Path) -> None:
    raw = RawDisk(tmp_path / "raw", areas=1, area_bytes=4096, memory_bytes=12 << 10, threads=1)
    assert len({raw.read(0, 4096).ctypes.data for _ in range(6)}) == 3
    raw.close()
