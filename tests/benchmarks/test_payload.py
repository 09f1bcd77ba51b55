"""What is moved, and what it is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.payload import EngineMemory, Prompts, llama_8b
from benchmarks.rawdisk import RawDisk


@pytest.fixture
def engine() -> EngineMemory:
    return EngineMemory(llama_8b(32), source_pages=4, target_pages=4)


def test_the_layout_is_that_of_llama_8b() -> None:
    layout = llama_8b(64)
    assert layout.bytes_per_token == 128 << 10
    assert layout.groups[0].parts[0].shape == (16, 8, 128)
    assert len(layout.groups[0].parts) == 64


def test_torch_moves_the_same_bytes_in_the_same_order_as_a_record(engine: EngineMemory) -> None:
    ids = np.array([3, 0, 2, 1])
    rows = torch.index_select(engine.rows, 0, engine.row_numbers(ids)).view(torch.uint8).numpy().reshape(2, -1)
    table = engine.pages(ids).table
    for block, plain in enumerate(rows):
        record = np.empty(engine.layout.block_bytes[0], np.uint8)
        engine.memory.gather(table, 0, np.array([block * 32]), range(64), record[None])
        assert np.array_equal(record, plain)


def test_sources_have_content_and_targets_have_none(engine: EngineMemory) -> None:
    assert set(engine.sources(4)) == {0, 1, 2, 3}
    assert set(engine.targets(4)) == {4, 5, 6, 7}
    halves = engine.tensor.view(torch.int16)
    assert all(bool(part[:4].any()) and not bool(part[4:].any()) for part in halves)


def test_pages_with_one_wrong_bit_are_not_the_same(engine: EngineMemory) -> None:
    sources, targets = engine.sources(4), engine.targets(4)
    engine.tensor[:, torch.from_numpy(targets)] = engine.tensor[:, torch.from_numpy(sources)]
    assert engine.same(sources, targets)
    engine.tensor.view(torch.int16)[63, targets[2], 15, 7, 127] ^= 1
    assert not engine.same(sources, targets)


def test_pages_in_another_order_are_not_the_same(engine: EngineMemory) -> None:
    engine.tensor[:, 4:] = engine.tensor[:, :4]
    assert engine.same(np.array([0, 1]), np.array([4, 5]))
    assert not engine.same(np.array([0, 1]), np.array([5, 4]))


def test_clearing_leaves_other_pages_alone(engine: EngineMemory) -> None:
    before = engine.tensor[:, :3].clone()
    engine.clear(np.array([3]))
    assert not bool(engine.tensor[:, 3].view(torch.int16).any())
    assert torch.equal(engine.tensor[:, :3].view(torch.int16), before.view(torch.int16))


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
