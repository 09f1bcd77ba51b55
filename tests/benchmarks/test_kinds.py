"""Engine memory of any layout, and what is measured beside it."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from benchmarks.kinds import BareKernels, MixedMemory, deepseek_v32, small_blocks
from benchmarks.payload import llama_8b
from kvtier import KVLayout

LAYOUTS = {"llama": llama_8b(32), "small": small_blocks(), "v32": deepseek_v32()}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> KVLayout:
    return LAYOUTS[request.param]


def test_blocks_have_the_sizes_that_they_are_named_after() -> None:
    assert small_blocks().block_bytes == (64 << 10,)
    sizes = {part.page_bytes for part in deepseek_v32().groups[0].parts}
    assert sizes == {41_984, 8_448}
    assert deepseek_v32().block_bytes == (61 * (41_984 + 8_448),)


def test_torch_moves_every_byte_of_the_pages_there_and_back(layout: KVLayout) -> None:
    engine = MixedMemory(layout, 4, 4, torch.int64)
    sources, targets = np.array([3, 0, 2, 1]), np.array([5, 7, 4, 6])
    buffers = engine.buffers(4)
    engine.select(engine.row_numbers(sources), buffers)
    assert sum(buffer.nbytes for buffer in buffers) == 4 * engine.page_bytes
    assert not engine.same(sources, targets)
    engine.copy(engine.row_numbers(targets), buffers)
    assert engine.same(sources, targets)
    engine.clear(targets[2:])
    assert not engine.same(sources, targets)
    assert engine.same(sources[:2], targets[:2])


def test_bare_kernels_gather_what_the_memory_gathers(layout: KVLayout) -> None:
    engine = MixedMemory(layout, 4, 4, torch.int64)
    table = engine.pages(np.array([2, 1, 3, 0])).table
    with closing(BareKernels(engine, 4, threads=2)) as bare:
        bare.gather(table)
        blocks = len(bare.room)
        wanted = np.empty((blocks, layout.block_bytes[0]), np.uint8)
        engine.memory.gather(table, 0, np.arange(blocks) * layout.block_tokens, bare.shape.parts, wanted)
        if engine.memory.moves_records:
            found = [np.concatenate([room[at : at + size] for at, size in bare.shape.slices]) for room in bare.room]
        else:
            found = list(bare.room.reshape(-1)[: wanted.nbytes].reshape(blocks, -1))
        assert np.array_equal(np.stack(found), wanted)
