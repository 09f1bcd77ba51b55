"""Tensors of one sequence: the same records as paged memory that holds the same pages, whatever the layout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.core.memory import NO_PAGE, GroupPages, PageTable, WindowedMemory
from kvtier.errors import ConfigError
from kvtier.models import KVGroup, KVLayout, Part, Reuse
from kvtier.pages import PagedTensors, SequenceTensors

PAGES = 6
AXES = [("token", "head", "dim"), ("head", "token", "dim"), ("head", "dim", "token"), ("token", "dim")]


@st.composite
def layouts(draw):
    page = draw(st.sampled_from([1, 4, 16]))
    groups = []
    for number, rule in enumerate(draw(st.lists(st.sampled_from(["all", "trailing", "last"]), min_size=1, max_size=3))):
        parts = []
        for layer in range(draw(st.integers(1, 2))):
            if rule == "last":
                parts.append(Part(layer, "state", "float32", ("state", "dim"), (2, 3)))
                continue
            ratio = draw(st.sampled_from([ratio for ratio in (1, 2, 4) if page % ratio == 0]))
            axes = draw(st.sampled_from(AXES))
            sizes = {"token": page // ratio, "head": 2, "dim": 3}
            parts.append(Part(layer, "k", "float16", axes, tuple(sizes[axis] for axis in axes), ratio))
        reuse = Reuse(rule, draw(st.integers(1, 3 * page))) if rule == "trailing" else Reuse(rule)
        groups.append(KVGroup(f"g{number}", tuple(parts), reuse))
    return KVLayout(page * draw(st.integers(1, 2)), page, tuple(groups))


def side_by_side(part, pages):
    """``pages`` ``[pages, *part.shape]`` along the token axis of one tensor."""
    return pages.copy() if part.is_state else np.concatenate(list(pages), axis=part.token_axis)


def both(layout, random):
    """Paged and sequential memory of the same random bytes."""
    paged, sequence = [], []
    for group in layout.groups:
        for part in group.parts:
            pages = random.integers(0, 100, (PAGES, *part.shape)).astype(part.dtype)
            paged.append(pages)
            sequence.append(side_by_side(part, pages))
    return (PagedTensors(layout, paged), paged), (SequenceTensors(layout, sequence), sequence)


@st.composite
def tables(draw, layout):
    per_group = []
    blocks = PAGES * layout.page_tokens // layout.block_tokens
    for group in layout.groups:
        unit = layout.block_tokens if group.reuse.rule == "last" else layout.page_tokens
        ids = draw(st.permutations(range(PAGES)))[: blocks * layout.block_tokens // unit]
        if group.reuse.rule != "all":
            ids = [NO_PAGE if draw(st.integers(0, 3)) == 0 else page for page in ids]
        per_group.append(GroupPages(0, np.array(ids, np.int32)))
    return PageTable(0, tuple(per_group)), blocks


@given(layouts(), st.data())
@settings(deadline=None)
def test_records_are_those_of_paged_memory(layout, data):
    (paged, _), (sequence, _) = both(layout, np.random.default_rng(data.draw(st.integers(0, 9))))
    table, blocks = data.draw(tables(layout))
    assert isinstance(sequence, WindowedMemory)
    for group, described in enumerate(layout.groups):
        held = paged.held(table, group, np.arange(blocks + 1))
        assert sequence.held(table, group, np.arange(blocks + 1)).tolist() == held.tolist()
        firsts = np.flatnonzero(held).astype(np.int64) * layout.block_tokens
        out = [np.zeros((len(firsts), layout.block_bytes[group]), np.uint8) for _ in range(2)]
        for memory, into in zip((paged, sequence), out, strict=True):
            memory.gather(table, group, firsts, range(len(described.parts)), into)
        assert np.array_equal(*out)


@given(layouts(), st.data())
@settings(deadline=None)
def test_what_is_written_of_a_range_is_what_paged_memory_writes(layout, data):
    """Whole blocks, and loads that begin and end inside one."""
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    (paged, pages), (sequence, tensors) = both(layout, random)
    table, blocks = data.draw(tables(layout))
    start = data.draw(st.integers(0, blocks * layout.block_tokens))
    stop = data.draw(st.integers(start, blocks * layout.block_tokens))
    firsts = np.arange(start // layout.block_tokens, -(-stop // layout.block_tokens)) * layout.block_tokens
    parts = [part for group in layout.groups for part in group.parts]
    for group, described in enumerate(layout.groups):
        source = random.integers(0, 100, (len(firsts), layout.block_bytes[group] // 2)).astype(np.float16)
        for memory in (paged, sequence):
            memory.scatter(table, group, firsts, range(len(described.parts)), source.view(np.uint8), start, stop)
    for part, own, tensor in zip(parts, pages, tensors, strict=True):
        assert np.array_equal(side_by_side(part, own).view(np.uint8), tensor.view(np.uint8))


def small(rule="all"):
    part = Part(0, "k", "float16", ("head", "token", "dim"), (2, 4, 3))
    return KVLayout(8, 4, (KVGroup("g", (part,), Reuse(rule, 4) if rule == "trailing" else Reuse(rule)),))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 6, 3), "float16"), ((2, 8, 4), "float16"), ((2, 8, 3), "float32"), ((2, 8), "float16")]
)
def test_a_tensor_that_does_not_fit_is_named_with_what_was_wanted(shape, dtype):
    with pytest.raises(ConfigError, match=r"layer 0 k: got .* want float16 \[2, a multiple of 4, 3\]"):
        SequenceTensors(small(), [np.zeros(shape, dtype)])


@pytest.mark.parametrize(
    ("ids", "first", "message"),
    [
        ([[0, 2]], [0], "ids 0 to 2, the memory has pages 0 to 1"),
        ([[0, 0]], [0], "a page id is there twice"),
        ([[0, 1]], [2], "first_token = 2, want a multiple of 4"),
        ([[0, -1]], [0], "ids lie in"),
        ([[0], [1]], [0], "got 2 lists"),
    ],
)
def test_pages_that_are_not_there_are_refused(ids, first, message):
    memory = SequenceTensors(small(), [np.zeros((2, 8, 3), np.float16)])
    with pytest.raises(ConfigError, match=message):
        memory.pages(ids, first)


def test_a_range_that_is_not_covered_is_refused():
    memory = SequenceTensors(small(), [np.zeros((2, 8, 3), np.float16)])
    pages = memory.pages([[0, 1]], [8])
    with pytest.raises(ConfigError, match=r"hold tokens \[8, 16\), want \[0, 16\)"):
        memory.check(pages.table, 0, 16)


def test_a_block_that_lacks_pages_is_not_read():
    memory = SequenceTensors(small("trailing"), [np.zeros((2, 0, 3), np.float16)])
    pages = memory.pages([[-1, -1]], [0])
    with pytest.raises(ConfigError, match="lacks pages"):
        memory.gather(pages.table, 0, np.zeros(1, np.int64), range(1), np.zeros((1, 48), np.uint8))


def test_pages_in_planes_are_refused():
    part = Part(0, "kv", "uint8", ("page",), (12,), planes=(2, 1))
    with pytest.raises(ConfigError, match="planes"):
        SequenceTensors(KVLayout(4, 4, (KVGroup("g", (part,)),)), [np.zeros((12,), np.uint8)])
