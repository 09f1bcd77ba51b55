"""Engine memory of any layout, what torch does with it, and bare kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from benchmarks.bare import BareKernels
from benchmarks.engine import EngineMemory
from benchmarks.kinds import deepseek_v4_flash, deepseek_v32, llama_8b, small_blocks
from kvtier import KVLayout, PagedTensors
from kvtier.codecs.checksums import content_sum
from kvtier.core.memory import NO_PAGE
from kvtier.pages import DeviceTensors

LAYOUTS = {"llama": llama_8b(32), "small": small_blocks(), "v32": deepseek_v32(), "v4 flash": deepseek_v4_flash(128)}
DEVICES = {"engine of the CPU": None, "stand-in for a GPU": "cpu"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch wait for each other where tests run side by side: a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> KVLayout:
    return LAYOUTS[request.param]


@pytest.fixture(params=DEVICES)
def engine(layout: KVLayout, request: pytest.FixtureRequest) -> EngineMemory:
    return EngineMemory(layout, 4, 4, device=DEVICES[request.param])


def content(engine: EngineMemory, ids: np.ndarray, group: int) -> np.ndarray:
    """The blocks of a request, as the memory gathers them."""
    layout = engine.layout
    blocks = np.arange(len(ids) * layout.page_tokens // layout.block_tokens)
    own = blocks if layout.groups[group].reuse.rule == "all" else blocks[-1:]
    out = np.empty((len(own), layout.block_bytes[group]), np.uint8)
    parts = range(len(layout.groups[group].parts))
    engine.memory.gather(engine.pages(ids).table, group, own * layout.block_tokens, parts, out)
    return out


def same_blocks(engine: EngineMemory, ids: np.ndarray, others: np.ndarray) -> bool:
    groups = range(len(engine.layout.groups))
    return all(np.array_equal(content(engine, ids, group), content(engine, others, group)) for group in groups)


def test_torch_moves_every_byte_of_a_request_there_and_back(engine: EngineMemory) -> None:
    sources, targets = engine.sources(4), engine.targets(4)
    buffers = engine.buffers(4)
    engine.select(engine.row_numbers(sources), buffers)
    assert sum(buffer.nbytes for buffer in buffers) == engine.request_bytes(4)
    assert not engine.same(sources, targets)
    engine.copy(engine.row_numbers(targets), buffers)
    assert engine.same(sources, targets)
    assert same_blocks(engine, sources, targets)


def test_torch_moves_the_same_bytes_in_the_same_order_as_a_record() -> None:
    engine = EngineMemory(llama_8b(32), 4, 4, torch.bfloat16)
    ids = np.array([3, 0, 2, 1])
    (buffer,) = buffers = engine.buffers(4)
    engine.select(engine.row_numbers(ids), buffers)
    rows = buffer.view(torch.uint8).numpy().reshape(2, -1)
    assert np.array_equal(content(engine, ids, 0), rows)


def test_sources_have_content_and_targets_have_none(engine: EngineMemory) -> None:
    sources, targets = engine.sources(4), engine.targets(4)
    assert (set(sources), set(targets)) == ({0, 1, 2, 3}, {4, 5, 6, 7})
    for group in range(len(engine.layout.groups)):
        assert content(engine, sources, group).any(axis=1).all()
        assert not content(engine, targets, group).any()


def test_requests_that_are_loaded_at_once_share_no_page(layout: KVLayout) -> None:
    engine = EngineMemory(layout, 12, 12)
    tables = [engine.pages(ids).table for ids in engine.targets_apart(3, 4)]
    for group in range(len(layout.groups)):
        ids = np.concatenate([table.groups[group].ids for table in tables])
        used = ids[ids != NO_PAGE]
        assert len(set(used.tolist())) == len(used) >= 3


def test_of_windows_and_states_only_the_end_of_a_request_is_there() -> None:
    engine = EngineMemory(deepseek_v4_flash(128), 4, 4)
    attention, *tails = engine.pages(engine.sources(3)).table.groups
    assert (attention.ids != NO_PAGE).all()
    for tail in tails:
        assert (tail.ids[:-1] == NO_PAGE).all()
        assert tail.ids[-1] != NO_PAGE


def test_one_wrong_bit_is_seen_wherever_it_is(layout: KVLayout) -> None:
    engine = EngineMemory(layout, 4, 4)
    sources, targets = engine.sources(4), engine.targets(4)
    buffers = engine.buffers(4)
    engine.select(engine.row_numbers(sources), buffers)
    for buffer in buffers:
        buffer[-1, -1] ^= 1
        engine.copy(engine.row_numbers(targets), buffers)
        assert not engine.same(sources, targets)
        buffer[-1, -1] ^= 1


def test_pages_in_another_order_are_not_the_same(layout: KVLayout) -> None:
    engine = EngineMemory(layout, 4, 4)
    sources = engine.sources(4)
    assert engine.same(sources, sources)
    assert not engine.same(sources, sources[[1, 0, 2, 3]])


def test_clearing_leaves_other_pages_alone(layout: KVLayout) -> None:
    engine = EngineMemory(layout, 8, 4)
    everything = engine.sources(8)
    cleared, kept = everything[:4], everything[4:]
    before = [content(engine, kept, group) for group in range(len(layout.groups))]
    engine.clear(cleared)
    assert not content(engine, cleared, 0).any()
    assert all(np.array_equal(content(engine, kept, group), own) for group, own in enumerate(before))


@pytest.fixture(params=["compiled kernels", "numpy"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(PagedTensors, "moves_records", False)


@pytest.mark.usefixtures("kernels")
def test_bare_kernels_gather_what_the_memory_gathers(layout: KVLayout) -> None:
    engine = EngineMemory(layout, 4, 4)
    ids = engine.sources(4)
    with closing(BareKernels(engine, 4, threads=2)) as bare:
        bare.gather(engine.pages(ids).table)
        for group, room in enumerate(bare.rooms):
            found = room.content
            if engine.memory.moves_records:
                cuts = [[record[at : at + size] for at, size in room.shape.slices] for record in room.records]
                found = np.stack([np.concatenate(cut) for cut in cuts])
            wanted = content(engine, ids, group)
            assert np.array_equal(found, wanted)
            first = content_sum(wanted[-1, : room.cuts[1]])
            assert room.sums[-1, :16].tobytes() == first


def test_with_a_device_pages_are_moved_by_the_device() -> None:
    assert isinstance(EngineMemory(llama_8b(32), 2, 2, device="cpu").memory, DeviceTensors)
