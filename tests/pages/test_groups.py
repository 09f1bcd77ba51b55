"""Groups of every rule, entries of several tokens, planes, states: against a model that looks at each entry."""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.core.memory import NO_PAGE, GroupPages, PageTable, WindowedMemory
from kvtier.errors import ConfigError
from kvtier.models import KVGroup, KVLayout, Part, Reuse
from kvtier.pages import DenseKV, DeviceTensors, PagedTensors

PAGES = 40
KINDS = pytest.mark.parametrize("kind", [PagedTensors, DeviceTensors])
ORDERS = [("token", "head", "dim"), ("head", "token", "dim"), ("head", "dim", "token"), ("token", "dim")]


@st.composite
def token_parts(draw, layer, page_tokens):
    ratio = draw(st.sampled_from([ratio for ratio in (1, 2, 4, 16) if page_tokens % ratio == 0]))
    entries = page_tokens // ratio
    if draw(st.integers(0, 3)) == 0:
        planes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
        nbytes = entries * sum(planes) + draw(st.integers(0, 3))
        return Part(layer, "kv", "uint8", ("page",), (nbytes,), ratio, planes=planes)
    axes = draw(st.sampled_from(ORDERS))
    sizes = {"token": entries, "head": 2, "dim": 3}
    dtype = draw(st.sampled_from(["float16", "uint8"]))
    return Part(layer, "k", dtype, axes, tuple(sizes[axis] for axis in axes), ratio)


@st.composite
def groups(draw, name, rule, page_tokens, block_tokens):
    layers = range(draw(st.integers(1, 3)))
    if rule == "last":
        shapes = [draw(st.sampled_from([(3,), (2, 4)])) for _ in layers]
        parts = [
            Part(layer, "state", "float32", ("state", "dim")[-len(shape) :], shape)
            for layer, shape in zip(layers, shapes, strict=True)
        ]
    else:
        parts = [draw(token_parts(layer, page_tokens)) for layer in layers]
    reuse = Reuse(rule, draw(st.integers(1, 3 * block_tokens))) if rule == "trailing" else Reuse(rule)
    return KVGroup(name, tuple(parts), reuse)


@st.composite
def layouts(draw):
    page_tokens = draw(st.sampled_from([1, 4, 16]))
    block_tokens = page_tokens * draw(st.integers(1, 4))
    rules = draw(st.lists(st.sampled_from(["all", "trailing", "last"]), min_size=1, max_size=3))
    parts = (draw(groups(f"g{at}", rule, page_tokens, block_tokens)) for at, rule in enumerate(rules))
    return KVLayout(block_tokens, page_tokens, tuple(parts))


@dataclass
class Case:
    """Engine memory, and a table of a few blocks; windows and states lack pages here and there."""

    layout: KVLayout
    tensors: list[list[np.ndarray]]  # [group][part]
    table: PageTable
    blocks: int

    def memory(self, kind):
        tensors = [tensor for group in self.tensors for tensor in group]
        return kind(self.layout, tensors if kind is PagedTensors else [torch.from_numpy(tensor) for tensor in tensors])

    def pages_of(self, group, block):
        """(id, the token behind it) of each page that a record of ``block`` holds."""
        layout, own = self.layout, self.table.groups[group]
        end = (block + 1) * layout.block_tokens
        if layout.groups[group].reuse.rule == "last":
            ends, unit = [end], layout.block_tokens
        else:
            unit = layout.page_tokens
            ends = range(end - layout.kept_tokens[group] + unit, end + 1, unit)
        numbers = [(end - own.first_token) // unit - 1 for end in ends]
        ids = [int(own.ids[at]) if 0 <= at < len(own.ids) else NO_PAGE for at in numbers]
        return list(zip(ids, ends, strict=True))


def bytes_at_random(layout, seed):
    random = np.random.default_rng(seed)
    return [
        [
            random.integers(0, 256, (PAGES, part.page_bytes), np.uint8).view(part.dtype).reshape(PAGES, *part.shape)
            for part in group.parts
        ]
        for group in layout.groups
    ]


@st.composite
def cases(draw):
    layout = draw(layouts())
    blocks = draw(st.integers(1, 3))
    page_blocks = draw(st.integers(0, blocks - 1))
    tables = []
    for group in layout.groups:
        unit = layout.block_tokens if group.reuse.rule == "last" else layout.page_tokens
        first = page_blocks * layout.block_tokens
        if group.reuse.rule != "last":
            first += unit * draw(st.integers(0, layout.block_tokens // unit - 1))
        count = blocks * layout.block_tokens // unit - first // unit
        ids = draw(st.permutations(range(PAGES)))[:count]
        if group.reuse.rule != "all":
            ids = [NO_PAGE if draw(st.integers(0, 4)) == 0 else page for page in ids]
            ids = ids[: draw(st.integers(0, count))] if draw(st.booleans()) else ids
        tables.append(GroupPages(first, np.array(ids, np.int32)))
    return Case(layout, bytes_at_random(layout, draw(st.integers(0, 99))), PageTable(0, tuple(tables)), blocks)


def draw_parts(data, group):
    start = data.draw(st.integers(0, len(group.parts) - 1), label="first part")
    return range(start, data.draw(st.integers(start + 1, len(group.parts)), label="last part"))


def is_held(case, group, block):
    return all(page != NO_PAGE for page, _ in case.pages_of(group, block))


@KINDS
@given(case=cases())
def test_blocks_are_held_whose_record_has_all_its_pages(kind, case):
    blocks = np.arange(case.blocks + 1)
    for group in range(len(case.layout.groups)):
        held = case.memory(kind).held(case.table, group, blocks)
        assert held.tolist() == [is_held(case, group, block) for block in blocks]


@KINDS
@given(case=cases(), data=st.data())
def test_a_record_is_the_kept_pages_of_each_part_in_token_order(kind, case, data):
    memory = case.memory(kind)
    for group, described in enumerate(case.layout.groups):
        held = [block for block in range(case.blocks) if is_held(case, group, block)]
        parts = draw_parts(data, described)
        want = [
            b"".join(
                case.tensors[group][part][page].tobytes() for part in parts for page, _ in case.pages_of(group, block)
            )
            for block in held
        ]
        nbytes = sum(case.layout.part_bytes(group, described.parts[part]) for part in parts)
        out = np.zeros((len(held), nbytes), np.uint8)
        memory.gather(case.table, group, np.array(held, np.int64) * case.layout.block_tokens, parts, out)
        assert [row.tobytes() for row in out] == want


def copy_entries(part, page_tokens, into, source, end, start, stop):
    """Write what of one page is finished by a token in [start, stop); ``end`` is the token behind the page."""
    if part.is_state:
        if start < end <= stop:
            into[...] = source
        return
    begin = end - page_tokens
    if start <= begin and end <= stop:
        into[...] = source  # a whole page, padding and all
        return
    count = page_tokens // part.tokens_per_entry
    for entry in range(count):
        last = begin + (entry + 1) * part.tokens_per_entry
        if not start < last <= stop:
            continue
        if not part.planes:
            at = (slice(None),) * part.token_axis + (entry,)
            into[at] = source[at]
            continue
        for plane, width in zip(accumulate((count * w for w in part.planes), initial=0), part.planes, strict=False):
            at = slice(plane + entry * width, plane + (entry + 1) * width)
            into[at] = source[at]


@KINDS
@settings(max_examples=300)
@given(case=cases(), data=st.data())
def test_scatter_writes_what_is_finished_in_range_where_there_are_pages_and_nothing_else(kind, case, data):
    layout = case.layout
    memory = case.memory(kind)
    total = case.blocks * layout.block_tokens
    whole = zip(layout.groups, case.table.groups, strict=True)
    least = max((own.first_token for group, own in whole if group.reuse.rule == "all"), default=0)
    start = data.draw(st.integers(least, total), label="start")
    stop = data.draw(st.integers(start, total), label="stop")
    memory.check(case.table, start, stop)
    for group, described in enumerate(layout.groups):
        want = [tensor.copy() for tensor in case.tensors[group]]
        parts = draw_parts(data, described)
        count = layout.block_pages[group]
        sources = np.random.default_rng(7).integers(
            0, 256, (case.blocks, sum(described.parts[part].page_bytes for part in parts) * count), np.uint8
        )
        for block in range(case.blocks):
            at = 0
            for part in parts:
                described_part = described.parts[part]
                for page, end in case.pages_of(group, block):
                    source = sources[block, at : at + described_part.page_bytes]
                    at += described_part.page_bytes
                    if page != NO_PAGE:
                        copy_entries(
                            described_part, layout.page_tokens, want[part][page],
                            source.view(described_part.dtype).reshape(described_part.shape), end, start, stop,
                        )  # fmt: skip
        firsts = np.arange(case.blocks, dtype=np.int64) * layout.block_tokens
        memory.scatter(case.table, group, firsts, parts, sources, start, stop)
        for tensor, wanted in zip(case.tensors[group], want, strict=True):
            assert tensor.tobytes() == wanted.tobytes()


ROWS = ("token", "dim")
WINDOW = Part(0, "kv", "uint8", ROWS, (4, 2), name="window")
STATE = Part(0, "state", "uint8", ("dim",), (8,))
LAYOUT = KVLayout(
    8, 4,
    (
        KVGroup("attention", (Part(0, "kv", "uint8", ROWS, (1, 6), 4),)),
        KVGroup("window", (WINDOW,), Reuse("trailing", 3)),
        KVGroup("state", (STATE,), Reuse("last")),
    ),
)  # fmt: skip


def memory():
    return PagedTensors(
        LAYOUT, bytes_at_random(LAYOUT, 0)[0] + [t for own in bytes_at_random(LAYOUT, 1)[1:] for t in own]
    )


def test_a_mapping_names_parts_of_one_kind_in_one_layer_by_their_names():
    tensors = [np.zeros((PAGES, *part.shape), np.uint8) for group in LAYOUT.groups for part in group.parts]
    named = PagedTensors(LAYOUT, {(0, "state"): tensors[2], (0, "window"): tensors[1], (0, "kv"): tensors[0]})
    assert isinstance(named, WindowedMemory)
    assert named.num_pages == (PAGES,) * 3
    twice = KVLayout(8, 4, (KVGroup("a", (WINDOW,)), KVGroup("b", (WINDOW,))))
    with pytest.raises(ConfigError, match="two groups have a part of the same layer and kind; pass a list"):
        PagedTensors(twice, {(0, "window"): tensors[1]})


def test_windows_and_states_may_lack_pages_and_whole_prefixes_may_not():
    pages = memory().pages([[4, 7], [NO_PAGE, 3], [NO_PAGE]], first_token=8)
    assert [own.ids.tolist() for own in pages.table.groups] == [[4, 7], [-1, 3], [-1]]
    with pytest.raises(ConfigError, match=r"^page ids of group 'attention': ids lie in \[0"):
        memory().pages([[4, NO_PAGE], [0, 1], [0]])
    with pytest.raises(ConfigError, match=r"^page ids of group 'window': ids lie in \[-1"):
        memory().pages([[4, 5], [0, -2], [0]])


@pytest.mark.parametrize(
    ("ids", "first_token", "message"),
    [
        ([[0, 1]], 0, "page ids: got 1 lists, the layout has 3 groups"),
        ([[0, 1], [0, 1], [0]], 4, "group 'state': first_token = 4, want a multiple of block_tokens = 8"),
        ([[0, 1], [0, 1], [0]], 2, "group 'attention': first_token = 2, want a multiple of page_tokens = 4"),
        ([[0, 1], [1, 1], [0]], 0, "group 'window': a page id is there twice"),
        ([[0, 1], [0, 1], [PAGES]], 0, "group 'state': ids 40 to 40, the memory has pages 0 to 39"),
    ],
)
def test_a_table_of_several_groups_that_cannot_be_is_refused_by_group(ids, first_token, message):
    with pytest.raises(ConfigError, match=message):
        memory().pages(ids, first_token)


@pytest.mark.parametrize(("group", "ids"), [(1, [0, 1, 2, NO_PAGE]), (1, [0, 1]), (2, [5, NO_PAGE]), (2, [])])
def test_a_block_that_is_not_held_is_not_gathered(group, ids):
    """Page -1 would be somebody else's memory."""
    tables = [[0, 1, 2, 3], [NO_PAGE] * 4, [NO_PAGE] * 2]
    tables[group] = ids
    pages = memory().pages(tables)
    out = np.zeros((1, LAYOUT.block_bytes[group]), np.uint8)
    name = LAYOUT.groups[group].name
    with pytest.raises(ConfigError, match=rf"group '{name}': the block of tokens \[8, 16\).*held\(\) tells"):
        pages.memory.gather(pages.table, group, np.array([8]), range(1), out)


def test_dense_memory_takes_whole_prefixes_only():
    layout = KVLayout(4, 4, (KVGroup("window", (Part(0, "k", "uint8", ORDERS[0], (4, 1, 1)),), Reuse("trailing", 4)),))
    with pytest.raises(ConfigError, match=r"group 'window': reuse rule 'trailing': DenseKV holds .* windows=False"):
        DenseKV(layout, [], [])


def test_dense_memory_has_something_for_each_token():
    layout = KVLayout(4, 4, (KVGroup("a", (Part(0, "k", "uint8", ORDERS[0], (1, 1, 1), 4),)),))
    with pytest.raises(ConfigError, match="layer 0 k: an entry of the layout is 4 tokens, want one for each token"):
        DenseKV(layout, [np.zeros((1, 1, 4, 1), np.uint8)], [np.zeros((1, 1, 4, 1), np.uint8)])
