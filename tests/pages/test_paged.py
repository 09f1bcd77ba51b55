from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.core.memory import GroupPages, KVMemory, PageTable
from kvtier.errors import ConfigError
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.pages import DenseKV, PagedTensors

PAGES = 24


def _layout(block_pages=4, page_tokens=4, axes=("token", "head", "dim"), dtype="bfloat16", layers=2):
    sizes = {"token": page_tokens, "head": 2, "dim": 3}
    shape = tuple(sizes[axis] for axis in axes)
    parts = tuple(Part(layer, kind, dtype, axes, shape) for layer in range(layers) for kind in ("k", "v"))
    return KVLayout(block_pages * page_tokens, page_tokens, (KVGroup("attention", parts),))


def _tensors(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn((PAGES, *part.shape), generator=generator).to(getattr(torch, part.dtype))
        for group in layout.groups
        for part in group.parts
    ]


def _block(layout, tensors, ids, parts):
    """The bytes of one block, page after page with torch alone."""
    return b"".join(tensors[part][torch.tensor(ids)].contiguous().view(torch.uint8).numpy().tobytes() for part in parts)


def _gather(pages, group, first_tokens, parts, out):
    pages.memory.gather(pages.table, group, np.array(first_tokens), parts, out.reshape(len(first_tokens), -1))


def _scatter(pages, first_tokens, parts, source, start, stop):
    rows = source.reshape(len(first_tokens), -1)
    pages.memory.scatter(pages.table, 0, np.array(first_tokens), parts, rows, start, stop)


cases = st.fixed_dictionaries(
    {
        "block_pages": st.integers(1, 4),
        "page_tokens": st.sampled_from([1, 4, 7]),
        "axes": st.sampled_from([("token", "head", "dim"), ("head", "token", "dim"), ("head", "dim", "token")]),
        "dtype": st.sampled_from(["bfloat16", "float32", "uint8"]),
    }
)


def _draw_parts(data):
    start = data.draw(st.integers(0, 4))
    return range(start, data.draw(st.integers(start, 4)))


@given(cases, st.data())
def test_gather_gives_the_pages_of_each_part_in_token_order(case, data):
    layout = _layout(**case)
    tensors = _tensors(layout)
    size = case["block_pages"]
    ids = data.draw(st.lists(st.integers(0, PAGES - 1), min_size=3 * size, max_size=3 * size, unique=True))
    block = data.draw(st.integers(0, 2))
    before = data.draw(st.integers(0, 2)) * layout.block_tokens
    parts = _draw_parts(data)
    pages = PagedTensors(layout, tensors).pages(ids, first_token=before)
    out = np.zeros(sum(layout.part_bytes(0, layout.groups[0].parts[part]) for part in parts), np.uint8)
    _gather(pages, 0, [before + block * layout.block_tokens], parts, out)
    assert out.tobytes() == _block(layout, tensors, ids[block * size : (block + 1) * size], parts)


@settings(max_examples=300)
@given(cases, st.data())
def test_scatter_writes_the_tokens_in_range_and_nothing_else(case, data):
    """Token by token with torch: inside [start, stop) the source, outside what was there, everywhere."""
    layout = _layout(**case)
    group = layout.groups[0]
    tensors, other = _tensors(layout, 1), _tensors(layout, 2)
    wanted = [tensor.clone() for tensor in tensors]
    size, page_tokens = case["block_pages"], case["page_tokens"]
    neighbours = data.draw(st.booleans())
    ids = list(range(2, 2 + 2 * size)) if neighbours else list(np.random.default_rng(3).permutation(PAGES)[: 2 * size])
    ids = [int(page) for page in ids]
    start = data.draw(st.integers(0, 2 * layout.block_tokens))
    stop = data.draw(st.integers(start, 2 * layout.block_tokens))
    parts = _draw_parts(data)
    source_ids = list(range(2 * size))
    pages = PagedTensors(layout, tensors).pages(ids)
    sources = [
        np.frombuffer(_block(layout, other, source_ids[block * size : (block + 1) * size], parts), np.uint8)
        for block in range(2)
    ]
    if data.draw(st.booleans(), label="one call"):
        _scatter(pages, [0, layout.block_tokens], parts, np.concatenate(sources), start, stop)
    else:
        for block, source in enumerate(sources):
            _scatter(pages, [block * layout.block_tokens], parts, source, start, stop)
    for number in parts:
        axis = group.parts[number].token_axis
        for token in range(start, stop):
            page, cell = divmod(token, page_tokens)
            into = wanted[number][ids[page]].select(axis, cell)
            into.copy_(other[number][source_ids[page]].select(axis, cell))
    for tensor, want in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor.view(torch.uint8), want.view(torch.uint8))


def test_a_table_may_begin_inside_a_block():
    """A load from token 8 on needs no pages for the tokens before it, though its block begins at 0."""
    layout = _layout(block_pages=4, page_tokens=4)
    tensors, other = _tensors(layout, 1), _tensors(layout, 2)
    pages = PagedTensors(layout, tensors).pages([9, 5], first_token=8)
    source = np.frombuffer(_block(layout, other, [0, 1, 2, 3], range(4)), np.uint8)
    pages.memory.check(pages.table, 8, 16)
    _scatter(pages, [0], range(4), source, 8, 16)
    assert torch.equal(tensors[3][9], other[3][2])
    assert torch.equal(tensors[3][5], other[3][3])
    assert torch.equal(tensors[3][8], _tensors(layout, 1)[3][8])


def test_groups_have_their_own_pages():
    layout = _layout()
    parts = tuple(replace(part, layer=part.layer + 2) for part in layout.groups[0].parts)
    layout = replace(layout, groups=(layout.groups[0], KVGroup("window", parts)))
    tensors = _tensors(layout)
    memory = PagedTensors(layout, tensors)
    pages = memory.pages([[0, 1, 2, 3], [7, 6, 5, 4]])
    out = np.zeros(layout.block_bytes[1], np.uint8)
    _gather(pages, 1, [0], range(4), out)
    assert out.tobytes() == _block(layout, tensors, [7, 6, 5, 4], range(4, 8))


def test_a_mapping_names_tensors_by_layer_and_kind():
    layout = _layout()
    tensors = _tensors(layout)
    named = {(layer, kind): tensors[2 * layer + (kind == "v")] for layer in (1, 0) for kind in ("v", "k")}
    out = np.zeros(layout.block_bytes[0], np.uint8)
    pages = PagedTensors(layout, named).pages([3, 2, 1, 0])
    _gather(pages, 0, [0], range(4), out)
    assert out.tobytes() == _block(layout, tensors, [3, 2, 1, 0], range(4))


def test_numpy_arrays_will_do():
    layout = _layout(dtype="float32")
    arrays = [tensor.numpy() for tensor in _tensors(layout)]
    out = np.zeros(layout.block_bytes[0], np.uint8)
    pages = PagedTensors(layout, arrays).pages([1, 2, 3, 4])
    _gather(pages, 0, [0], range(4), out)
    assert out.tobytes() == b"".join(array[1:5].tobytes() for array in arrays)


def test_it_is_the_memory_that_the_core_asks_for():
    layout = _layout()
    memory = PagedTensors(layout, _tensors(layout))
    assert isinstance(memory, KVMemory)
    assert memory.placement == layout.placement
    assert memory.num_pages == (PAGES,)


def test_tensors_that_require_gradients_are_read_without_them():
    layout = _layout(dtype="float32")
    tensors = _tensors(layout)
    memory = PagedTensors(layout, [tensor.clone().requires_grad_() for tensor in tensors])
    out = np.zeros(layout.block_bytes[0], np.uint8)
    _gather(memory.pages([0, 1, 2, 3]), 0, [0], range(4), out)
    assert out.tobytes() == _block(layout, tensors, [0, 1, 2, 3], range(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.half(), r"layer 1 k: got float16 \[24, 4, 2, 3\], want bfloat16 \[num_pages, 4, 2, 3\]"),
        (lambda tensor: tensor[:, :3], r"layer 1 k: got bfloat16 \[24, 3, 2, 3\]"),
        (lambda tensor: tensor.repeat(2, 1, 1, 1)[::2], "layer 1 k: strides .* want a contiguous tensor"),
        (lambda tensor: tensor.transpose(2, 3), "layer 1 k: strides .* side by side"),
        (lambda tensor: tensor[:1].expand(PAGES, -1, -1, -1), "layer 1 k: is an expanded view"),
        (lambda tensor: tensor.to("meta"), "layer 1 k: is on meta, want a tensor in CPU memory"),
        (lambda tensor: tensor.tolist(), "layer 1 k: got a list"),
        (torch._neg_view, r"layer 1 k: is a negated view of other numbers; pass what resolve_neg\(\) returns"),
        (
            lambda tensor: torch.complex(tensor.float(), tensor.float()).conj(),
            r"layer 1 k: is a conjugated .*resolve_conj",
        ),
        (
            lambda tensor: tensor.flatten(1).to_sparse(),
            r"layer 1 k: is a tensor of layout torch.sparse_coo, .*to_dense",
        ),
        (
            lambda tensor: torch.nested.nested_tensor([tensor[0]], layout=torch.jagged),
            "layer 1 k: is a tensor of layout nested",
        ),
        (lambda tensor: tensor.float().numpy().astype(object), "layer 1 k: is an array of Python objects"),
        (lambda tensor: tensor[:0], r"layer 1 k: got \[0, 4, 2, 3\]: it has no pages, want at least one"),
        (lambda tensor: tensor[:5], "layer 0 k has 24 pages, layer 1 k has 5"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_what_was_wanted(change, message):
    layout = _layout()
    tensors = _tensors(layout)
    tensors[2] = change(tensors[2])
    with pytest.raises(ConfigError, match=message):
        PagedTensors(layout, tensors)


def test_arrays_without_pages_are_refused():
    """Their strides are all 0, whatever they were made as."""
    layout = _layout(dtype="float32")
    with pytest.raises(ConfigError, match=r"layer 0 k: got \[0, 4, 2, 3\]: it has no pages, want at least one"):
        PagedTensors(layout, [tensor[:0].numpy() for tensor in _tensors(layout)])


def test_a_read_only_array_is_refused():
    layout = _layout(dtype="float32")
    arrays = [tensor.numpy() for tensor in _tensors(layout)]
    arrays[1].flags.writeable = False
    with pytest.raises(ConfigError, match="layer 0 v: is read-only"):
        PagedTensors(layout, arrays)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda tensors: tensors[:-1], "got 3, the layout has 4 parts"),
        (lambda tensors: {(0, "k"): tensors[0]}, r"missing \[\(0, 'v'\)"),
        (lambda tensors: {(n // 2, "kv"[n % 2]): t for n, t in enumerate(tensors)} | {(9, "k"): 0}, r"\(9, 'k'\)"),
    ],
)
def test_tensors_that_are_too_few_or_too_many_are_refused(choose, message):
    layout = _layout()
    with pytest.raises(ConfigError, match=message):
        PagedTensors(layout, choose(_tensors(layout)))


def _table(*groups):
    return PageTable(0, tuple(GroupPages(first, np.array(ids, np.int32)) for first, ids in groups))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (_table((0, [1, 2, 3, 4])), r"hold tokens \[0, 16\), want \[0, 32\): 8 pages of 4 tokens from token 0"),
        (_table((4, [1, 2, 3, 4, 5, 6, 7])), r"hold tokens \[4, 32\)"),
        (_table((2, [1] * 8)), "first_token = 2"),
        (_table((-4, range(9))), "first_token = -4"),
        (_table((0, [0, 1, 2, 3, 4, 5, 6, PAGES])), "ids 0 to 24, the memory has pages 0 to 23"),
        (_table((0, [0, 1, 2, 3, 4, 5, 6, -1])), "ids -1 to 6"),
        (_table((0, [0, 1, 2, 3, 4, 5, 6, 1])), "there twice"),
        (_table((0, range(8)), (0, range(8))), "has 2 groups, the layout has 1"),
        (PageTable(0, (GroupPages(0, np.arange(8)),)), "ids are int64"),
    ],
)
def test_a_page_table_that_cannot_hold_the_tokens_is_refused(table, message):
    layout = _layout()
    memory = PagedTensors(layout, _tensors(layout))
    with pytest.raises(ConfigError, match=message):
        memory.check(table, 0, 32)


def test_pages_outside_the_asked_tokens_do_not_matter():
    layout = _layout()
    memory = PagedTensors(layout, _tensors(layout))
    memory.check(_table((0, [-1, -1, 5, 6, 7, 8, 99, 99])), 8, 24)


def test_pages_that_do_not_exist_are_refused_when_the_table_is_made():
    layout = _layout()
    memory = PagedTensors(layout, _tensors(layout))
    with pytest.raises(ConfigError, match="ids 0 to 24"):
        memory.pages([0, 24])
    with pytest.raises(ConfigError, match="first_token = 3"):
        memory.pages([0, 1], first_token=3)


def _into_other_memory(tensor):
    tensor.data = tensor.clone()


def _queued(tensor):
    """What a queue of torch.multiprocessing does with it."""
    ForkingPickler.dumps(tensor)


@pytest.mark.parametrize("move", [torch.Tensor.share_memory_, _into_other_memory, _queued])
def test_a_tensor_that_was_moved_is_refused_by_every_later_job_until_memory_is_made_anew(move):
    """Torch frees the place that it leaves: a job would read, or write, what is anybody's by then."""
    layout = _layout()
    tensors = _tensors(layout)
    pages = PagedTensors(layout, tensors).pages([0, 1, 2, 3])
    pages.memory.check(pages.table, 0, 16)
    move(tensors[2])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"layer 1 k: lies at .*share_memory_\(\).*make a new PagedTensors"):
            pages.memory.check(pages.table, 0, 16)
    pages = PagedTensors(layout, tensors).pages([0, 1, 2, 3])
    pages.memory.check(pages.table, 0, 16)


def test_a_view_of_a_pool_that_was_moved_is_refused():
    layout = _layout()
    pool = torch.zeros((4 * PAGES, *layout.groups[0].parts[0].shape), dtype=torch.bfloat16)
    pages = PagedTensors(layout, pool.chunk(4)).pages([0, 1, 2, 3])
    pool.share_memory_()
    with pytest.raises(ConfigError, match="layer 0 k: lies at"):
        pages.memory.check(pages.table, 0, 16)


def test_an_array_of_a_tensor_that_was_moved_is_refused():
    layout = _layout(dtype="float32")
    tensors = _tensors(layout)
    pages = PagedTensors(layout, [tensor.numpy()[1:] for tensor in tensors]).pages([0, 1, 2, 3])
    pages.memory.check(pages.table, 0, 16)
    tensors[1].share_memory_()
    with pytest.raises(ConfigError, match="layer 0 v: lies at"):
        pages.memory.check(pages.table, 0, 16)


def test_parts_that_share_memory_are_refused():
    """What is loaded into one would overwrite the other."""
    layout = _layout()
    tensors = _tensors(layout)
    pool = torch.zeros((PAGES + 1, *layout.groups[0].parts[0].shape), dtype=torch.bfloat16)
    for first, second in ((tensors[0], tensors[0]), (pool[1:], pool[:-1])):
        with pytest.raises(ConfigError, match=r"layer 0 k and .*layer 1 k share memory"):
            PagedTensors(layout, [first, tensors[1], second, tensors[3]])


def test_parts_of_two_groups_that_share_memory_are_refused():
    part = _layout().groups[0].parts[0]
    layout = KVLayout(16, 4, (KVGroup("attention", (part,)), KVGroup("window", (part,))))
    pool = torch.zeros((PAGES + 1, *part.shape), dtype=torch.bfloat16)
    names = r"group 'attention', layer 0 k and .*group 'window', layer 0 k share memory"
    for tensors in ([pool, pool], [pool, pool[:]], [pool[:-1], pool[1:]]):
        with pytest.raises(ConfigError, match=names):
            PagedTensors(layout, tensors)
    assert PagedTensors(layout, [pool[:12], pool[12:]]).num_pages == (12, 13)


def test_parts_may_lie_side_by_side_in_one_allocation():
    layout = _layout()
    pool = torch.zeros((4 * PAGES, *layout.groups[0].parts[0].shape), dtype=torch.bfloat16)
    assert PagedTensors(layout, pool.chunk(4)).num_pages == (PAGES,)


@pytest.mark.parametrize("tensors", [None, 5])
def test_something_else_than_a_list_of_tensors_is_refused(tensors):
    with pytest.raises(ConfigError, match=r"^tensors: got a"):
        PagedTensors(_layout(), tensors)


@pytest.mark.parametrize("first_token", [1.0, True, "0", None])
def test_a_first_token_that_is_no_integer_is_refused(first_token):
    with pytest.raises(ConfigError, match=r"^first_token = "):
        PagedTensors(_layout(), _tensors(_layout())).pages([0, 1, 2, 3], first_token=first_token)


LARGE_PAGES = 120
LARGE = KVLayout(4, 4, (KVGroup("attention", (Part(0, "k", "int8", ("token", "head", "dim"), (4, 1, 1)),)),))
LARGE_MEMORY = PagedTensors(LARGE, [np.zeros((LARGE_PAGES, 4, 1, 1), np.int8)])


@given(
    st.permutations(range(LARGE_PAGES)), st.integers(1, LARGE_PAGES), st.booleans(),
    st.lists(st.tuples(st.integers(0, LARGE_PAGES - 1), st.integers(-2, LARGE_PAGES + 1)), max_size=2),
)  # fmt: skip
def test_a_table_is_refused_exactly_if_a_page_is_there_twice_or_not_at_all(ids, count, is_sorted, changes):
    """Short and long, ascending and not."""
    ids = np.array(sorted(ids[:count]) if is_sorted else ids[:count], np.int32)
    for at, page in changes:
        ids[at % count] = page
    is_good = len(set(ids.tolist())) == count and all(0 <= page < LARGE_PAGES for page in ids.tolist())
    table = PageTable(0, (GroupPages(0, ids),))
    if is_good:
        LARGE_MEMORY.check(table, 0, 4 * count)
    else:
        with pytest.raises(ConfigError, match=r"twice|the memory has pages 0 to 119"):
            LARGE_MEMORY.check(table, 0, 4 * count)


@pytest.mark.parametrize("make", [lambda: PagedTensors(None, []), lambda: DenseKV(None, [], [])])
def test_memory_without_a_layout_is_refused_with_a_way_to_get_one(make):
    with pytest.raises(ConfigError, match=r"layout = None: want a KVLayout; KVLayout\.from_hf_config"):
        make()
