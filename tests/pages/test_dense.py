import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.core.memory import GroupPages, KVMemory, PageTable
from kvtier.errors import ConfigError
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.pages import DenseKV

HEADS, DIM, TOKENS, BATCH = 2, 3, 40, 2


def _layout(block_pages=2, page_tokens=4, axes=("head", "token", "dim"), dtype="bfloat16", layers=2):
    sizes = {"token": page_tokens, "head": HEADS, "dim": DIM}
    shape = tuple(sizes[axis] for axis in axes)
    parts = tuple(Part(layer, kind, dtype, axes, shape) for layer in range(layers) for kind in ("k", "v"))
    return KVLayout(block_pages * page_tokens, page_tokens, (KVGroup("attention", parts),))


def _tensor(seed, dtype, tokens_outside_heads):
    """``[batch, heads, tokens, dim]``, in memory either so or with tokens before heads (a transposed view)."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn((BATCH, HEADS, TOKENS, DIM), generator=generator).to(getattr(torch, dtype))
    return dense.transpose(1, 2).contiguous().transpose(1, 2) if tokens_outside_heads else dense


def _keys_values(layout, seed=0, tokens_outside_heads=False):
    dtype = layout.groups[0].parts[0].dtype
    layers = len(layout.groups[0].parts) // 2
    return tuple(
        [_tensor(seed + 2 * layer + side, dtype, tokens_outside_heads) for layer in range(layers)] for side in (0, 1)
    )


def _in_order(keys, values):
    return [side[layer] for layer in range(len(keys)) for side in (keys, values)]


def _block(layout, tensors, row, first, parts):
    """The bytes of the block whose first token is at position ``first`` of the tensors, with torch alone."""
    found = []
    for number in parts:
        axes = layout.groups[0].parts[number].axes
        for at in range(first, first + layout.block_tokens, layout.page_tokens):
            page = tensors[number][row, :, at : at + layout.page_tokens]
            page = page if axes[0] == "head" else page.transpose(0, 1)
            found.append(page.contiguous().view(torch.uint8).numpy().tobytes())
    return b"".join(found)


cases = st.fixed_dictionaries(
    {
        "block_pages": st.integers(1, 3),
        "page_tokens": st.sampled_from([1, 4, 5]),
        "axes": st.sampled_from([("token", "head", "dim"), ("head", "token", "dim")]),
        "dtype": st.sampled_from(["bfloat16", "float32", "uint8"]),
    }
)


@given(cases, st.booleans(), st.integers(0, BATCH - 1), st.integers(0, 1), st.data())
def test_gather_gives_a_block_in_the_order_of_the_layout(case, outside, row, block, data):
    layout = _layout(**case)
    keys, values = _keys_values(layout, tokens_outside_heads=outside)
    start = data.draw(st.integers(0, 4))
    parts = range(start, data.draw(st.integers(start, 4)))
    pages = DenseKV(layout, keys, values).row(row, first_token=block * layout.block_tokens)
    out = np.zeros(sum(layout.part_bytes(0, layout.groups[0].parts[part]) for part in parts), np.uint8)
    first_token = (block + 1) * layout.block_tokens
    pages.memory.gather(pages.table, 0, np.array([first_token]), parts, out[None])
    assert out.tobytes() == _block(layout, _in_order(keys, values), row, layout.block_tokens, parts)


@settings(max_examples=300)
@given(cases, st.booleans(), st.integers(0, BATCH - 1), st.data())
def test_scatter_writes_the_tokens_in_range_and_nothing_else(case, outside, row, data):
    layout = _layout(**case)
    keys, values = _keys_values(layout, 10, tokens_outside_heads=outside)
    tensors, other = _in_order(keys, values), _in_order(*_keys_values(layout, 20))
    wanted = [tensor.clone() for tensor in tensors]
    start = data.draw(st.integers(0, 2 * layout.block_tokens))
    stop = data.draw(st.integers(start, 2 * layout.block_tokens))
    lowest = data.draw(st.integers(0, start))
    first = data.draw(st.integers(0, 4))
    parts = range(first, data.draw(st.integers(first, 4)))
    pages = DenseKV(layout, keys, values).row(row, first_token=lowest)
    for at in (0, layout.block_tokens):
        source = np.frombuffer(_block(layout, other, 0, at, parts), np.uint8)
        pages.memory.scatter(pages.table, 0, np.array([at]), parts, source[None], start, stop)
    for number in parts:
        wanted[number][row, :, start - lowest : stop - lowest] = other[number][0, :, start:stop]
    for tensor, want in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def test_it_is_the_memory_that_the_core_asks_for():
    layout = _layout()
    memory = DenseKV(layout, *_keys_values(layout))
    assert isinstance(memory, KVMemory)
    assert memory.placement == layout.placement
    assert (memory.batch_size, memory.num_tokens) == (BATCH, TOKENS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensor: tensor.half(),
            r"layer 1 k: got float16 \[2, 2, 40, 3\], want bfloat16 \[batch, 2, tokens, 3\]",
        ),
        (lambda tensor: tensor[:, :1], r"layer 1 k: got bfloat16 \[2, 1, 40, 3\]"),
        (lambda tensor: tensor[0], "layer 1 k: got bfloat16"),
        (lambda tensor: tensor[:, :1].expand(-1, 2, -1, -1), "layer 1 k: is an expanded view"),
        (
            lambda tensor: tensor.as_strided((2, 2, 40, 3), (240, 12, 3, 1)),  # head 1 begins 4 tokens into head 0
            r"layer 1 k: strides \(240, 12, 3, 1\) of shape \[2, 2, 40, 3\]: elements overlap",
        ),
        (lambda tensor: tensor.as_strided((2, 2, 40, 3), (239, 120, 3, 1)), "layer 1 k: .* elements overlap"),
        (lambda tensor: tensor.as_strided((2, 2, 40, 3), (240, 120, 2, 1)), "layer 1 k: .* elements overlap"),
        (lambda tensor: tensor[:, :, :39], "differ in"),
        (lambda tensor: tensor[:1], "differ in"),
        (lambda tensor: tensor.to("meta"), "layer 1 k: is on meta"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_what_was_wanted(change, message):
    layout = _layout()
    keys, values = _keys_values(layout)
    keys[1] = change(keys[1])
    with pytest.raises(ConfigError, match=message):
        DenseKV(layout, keys, values)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_an_array_whose_elements_overlap_is_refused(dtype):
    layout = _layout(dtype=dtype)
    keys, values = ([tensor.numpy() for tensor in side] for side in _keys_values(layout))
    size = keys[0].itemsize
    keys[0] = np.lib.stride_tricks.as_strided(keys[0], (2, 2, 40, 3), (240 * size, 12 * size, 3 * size, size))
    with pytest.raises(ConfigError, match=r"layer 0 k: .* elements overlap"):
        DenseKV(layout, keys, values)


@given(st.permutations(range(3)), st.lists(st.integers(1, 4), min_size=4, max_size=4), st.data())
def test_a_slice_of_any_dense_tensor_whose_elements_lie_apart_is_taken(order, sizes, data):
    """Whatever comes first in memory, with gaps or a step between, of one or no token."""
    shape = [sizes[0], HEADS, sizes[1], DIM]
    dense = torch.zeros([shape[axis] * sizes[2] for axis in order] + [DIM + sizes[3]], dtype=torch.bfloat16)
    tensor = dense.permute(*(order.index(axis) for axis in range(3)), 3)
    step = data.draw(st.integers(1, sizes[2]))
    taken = tensor[:: sizes[2], :: sizes[2], : shape[2] * step : step, sizes[3] :]
    cut = taken[:, :, : data.draw(st.integers(0, shape[2]))]
    other = torch.zeros(cut.shape, dtype=torch.bfloat16)
    assert DenseKV(_layout(layers=1), [cut], [other]).num_tokens == cut.shape[2]


def test_too_few_layers_are_refused():
    layout = _layout()
    keys, values = _keys_values(layout)
    with pytest.raises(ConfigError, match="values: got 1 tensors, the layout has 2 layers"):
        DenseKV(layout, keys, values[:1])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(0, "k", "uint8", ("head", "dim", "token"), (2, 3, 8)), "with dim last"),
        (Part(0, "kv", "uint8", ("head", "token", "dim"), (2, 8, 3)), "keys and values only"),
    ],
)
def test_a_layout_that_dense_tensors_cannot_have_is_refused(part, message):
    layout = KVLayout(8, 8, (KVGroup("attention", (part,)),))
    tensor = torch.zeros((1, 2, 8, 3), dtype=torch.uint8)
    with pytest.raises(ConfigError, match=message):
        DenseKV(layout, [tensor], [tensor])


def _table(first_token, ids):
    return PageTable(0, (GroupPages(first_token, np.array(ids, np.int32)),))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (_table(0, [2]), "want one row of the batch, 0 to 1"),
        (_table(0, [0, 1]), "want one row of the batch"),
        (_table(0, [-1]), "want one row of the batch"),
        (_table(16, [0]), r"hold tokens \[16, 56\), want \[8, 41\): 33 along their token dimension"),
        (_table(0, [0]), r"hold tokens \[0, 40\), want \[8, 41\)"),
    ],
)
def test_a_page_table_that_cannot_hold_the_tokens_is_refused(table, message):
    layout = _layout()
    memory = DenseKV(layout, *_keys_values(layout))
    with pytest.raises(ConfigError, match=message):
        memory.check(table, 8, 41)


def test_a_tensor_that_was_moved_is_refused_until_memory_is_made_anew():
    layout = _layout()
    keys, values = _keys_values(layout)
    memory = DenseKV(layout, keys, values)
    values[1].share_memory_()
    with pytest.raises(ConfigError, match=r"layer 1 v: lies at .*make a new DenseKV"):
        memory.check(_table(0, [0]), 8, 16)
    DenseKV(layout, keys, values).check(_table(0, [0]), 8, 16)


def test_a_row_that_is_not_in_the_batch_is_refused_at_once():
    layout = _layout()
    with pytest.raises(ConfigError, match="one row of the batch"):
        DenseKV(layout, *_keys_values(layout)).row(2)


@pytest.mark.parametrize(
    ("choose", "names"),
    [
        (lambda keys, values: (keys, [keys[0], values[1]]), ("layer 0 k", "layer 0 v")),
        (lambda keys, values: ([keys[0]] * 2, values), ("layer 0 k", "layer 1 k")),
        (lambda keys, values: (keys, [values[0], keys[0][:]]), ("layer 0 k", "layer 1 v")),
        (lambda keys, values: (keys, [keys[1].numpy().view(), values[1]]), ("layer 0 v", "layer 1 k")),
    ],
)
def test_two_parts_in_one_memory_are_refused_by_name(choose, names):
    """Two views of it are two objects; what is loaded into one would overwrite the other all the same."""
    layout = _layout(dtype="float32")
    with pytest.raises(ConfigError, match=r"{}.* and .*{} share memory".format(*names)):
        DenseKV(layout, *choose(*_keys_values(layout)))


def _of_one_storage(shape, strides, offsets):
    storage = torch.zeros(20_000, dtype=torch.bfloat16)
    return [torch.as_strided(storage, shape, strides, offset) for offset in offsets]


def test_keys_and_values_may_lie_between_each_other_in_one_storage():
    """As a model with one projection for both leaves them: ``[batch, tokens, layer, side, heads, dim]``."""
    layout = _layout()
    both = torch.zeros((BATCH, TOKENS, 2, 2, HEADS, DIM), dtype=torch.bfloat16)
    keys, values = ([both[:, :, layer, side].transpose(1, 2) for layer in range(2)] for side in range(2))
    assert DenseKV(layout, keys, values).num_tokens == TOKENS


def test_parts_that_lie_between_each_other_and_meet_in_one_element_are_refused():
    """A row of ``k`` has room for two more elements behind its DIM; ``v`` begins in its last one."""
    layout = _layout(layers=1)
    shape, strides = (BATCH, HEADS, TOKENS, DIM), (HEADS * TOKENS * 2 * DIM, TOKENS * 2 * DIM, 2 * DIM, 1)
    keys, apart, met = _of_one_storage(shape, strides, (0, DIM, DIM - 1))
    assert DenseKV(layout, [keys], [apart]).num_tokens == TOKENS
    with pytest.raises(ConfigError, match=r"layer 0 k and .*layer 0 v share memory"):
        DenseKV(layout, [keys], [met])


def test_a_tensor_without_tokens_shares_nothing():
    """An empty cache of transformers: torch gives all empty tensors the same address."""
    layout = _layout()
    keys, values = ([torch.zeros((1, HEADS, 0, DIM), dtype=torch.bfloat16)] * 2 for _ in range(2))
    assert DenseKV(layout, keys, values).num_tokens == 0


def test_a_part_that_two_groups_have_is_refused_as_both_would_be_loaded_into_one_tensor():
    group = _layout(layers=1).groups[0]
    layout = KVLayout(8, 4, (group, KVGroup("window", group.parts)))
    with pytest.raises(ConfigError, match=r"group 'attention', layer 0 (.) and .*group 'window', layer 0 \1 share"):
        DenseKV(layout, *_keys_values(_layout(layers=1)))


@pytest.mark.parametrize("batch_index", [1.0, True, "0", None, [0], 2**40])
def test_a_row_that_is_no_number_is_refused(batch_index):
    layout = _layout()
    with pytest.raises(ConfigError, match="batch_index"):
        DenseKV(layout, *_keys_values(layout)).row(batch_index)


@pytest.mark.parametrize("first_token", [1.5, True, "0", None])
def test_a_first_token_that_is_no_integer_is_refused(first_token):
    layout = _layout()
    with pytest.raises(ConfigError, match="first_token"):
        DenseKV(layout, *_keys_values(layout)).row(0, first_token)
