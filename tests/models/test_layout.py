import json
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.models import KVGroup, KVLayout, Part, Reuse
from kvtier.models.layout import MAX_SLICES, MIN_SLICE_BYTES
from tests.models import configs

AXES = ("head", "token", "dim")


@st.composite
def layouts(draw):
    page_tokens = draw(st.sampled_from([1, 4, 16, 64]))
    block_tokens = page_tokens * draw(st.integers(1, 8))
    groups = []
    for number in range(draw(st.integers(1, 2))):
        heads, dim = draw(st.integers(1, 16)), draw(st.sampled_from([1, 3, 64, 128]))
        small = draw(st.integers(1, 200))
        layers = draw(st.integers(1, 90))
        parts = []
        for layer in range(layers):
            parts.append(Part(layer, "k", "bfloat16", AXES, (heads, page_tokens, dim)))
            parts.append(Part(layer, "v", "uint8", AXES, (1, page_tokens, small)))
        groups.append(KVGroup(f"g{number}", tuple(parts)))
    return KVLayout(block_tokens, page_tokens, tuple(groups))


@given(layouts())
def test_slices_cover_every_part_once_and_in_order(layout):
    for group, spans in zip(layout.groups, layout.slices, strict=True):
        assert [number for span in spans for number in span.parts] == list(range(len(group.parts)))
        for span in spans:
            assert span.nbytes == sum(layout.part_bytes(0, group.parts[number]) for number in span.parts)


@given(layouts())
def test_slices_are_at_least_256_kib_or_the_only_one_and_at_most_64(layout):
    for spans in layout.slices:
        assert 1 <= len(spans) <= MAX_SLICES
        assert len(spans) == 1 or min(span.nbytes for span in spans) >= MIN_SLICE_BYTES


@given(layouts())
def test_a_slice_takes_no_more_parts_than_it_must(layout):
    """Cutting the last part off any slice but the last leaves it too small for its place, or makes too many slices."""
    wanted = [256 << 10, 256 << 10, 512 << 10, 1 << 20]
    for group, spans in zip(layout.groups, layout.slices, strict=True):
        fair = ceil(len(group.parts) / MAX_SLICES)
        for number, span in enumerate(spans[:-1]):
            last = layout.part_bytes(0, group.parts[span.parts[-1]])
            size = wanted[number] if number < len(wanted) else 2 << 20
            assert span.nbytes >= size
            assert len(span.parts) <= fair or span.nbytes - last < size


@given(layouts())
def test_a_record_is_a_header_page_and_slices_rounded_up_to_pages(layout):
    for nbytes, pages, spans in zip(layout.block_bytes, layout.record_pages, layout.slices, strict=True):
        assert nbytes == sum(span.nbytes for span in spans)
        assert pages == 1 + sum(-(-span.nbytes // 4096) for span in spans)


def test_the_geometry_of_an_8b_model():
    """Llama 3 8B: 32 layers of 8 heads of 128, 2 bytes: 128 KiB a token; one layer a slice at first, eight later."""
    parts = tuple(Part(layer, kind, "bfloat16", AXES, (8, 64, 128)) for layer in range(32) for kind in ("k", "v"))
    layout = KVLayout(64, 64, (KVGroup("attention", parts),))
    assert layout.block_bytes == (8 << 20,)
    assert layout.bytes_per_token == 128 << 10
    assert [span.nbytes >> 10 for span in layout.slices[0]] == [256, 256, 512, 1024, 2048, 2048, 2048]
    assert layout.record_pages == (2049,)


def test_a_small_rest_joins_the_slice_before_it():
    sizes = [(1, 64, 4096), (1, 64, 4096), (1, 64, 16)]
    parts = tuple(Part(layer, "k", "uint8", AXES, shape) for layer, shape in enumerate(sizes))
    layout = KVLayout(64, 64, (KVGroup("attention", parts),))
    assert [(span.parts, span.nbytes) for span in layout.slices[0]] == [
        (range(1), 262144),
        (range(1, 3), 262144 + 1024),
    ]


BASE = KVLayout(64, 16, (KVGroup("a", (Part(0, "k", "bfloat16", AXES, (4, 16, 8)),)),))


def _flat(*sizes, layers=1):
    """One group, whose parts have so many bytes a token."""
    parts = [Part(layer, "k", "uint8", ("token", "dim"), (1, size)) for layer, size in enumerate(sizes * layers)]
    return (KVGroup("flat", tuple(parts)),)


def _with_part(**changes):
    group = BASE.groups[0]
    return replace(BASE, groups=(replace(group, parts=(replace(group.parts[0], **changes),)),))


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, block_tokens=128),
        replace(BASE, tp_size=2),
        replace(BASE, tp_size=2, tp_rank=1),
        replace(BASE, pp_size=2),
        replace(BASE, pp_size=2, pp_rank=1),
        replace(BASE, groups=(replace(BASE.groups[0], name="b"),)),
        replace(BASE, groups=(replace(BASE.groups[0], reuse=Reuse("trailing", 128)),)),
        replace(BASE, groups=(replace(BASE.groups[0], reuse=Reuse("trailing", 256)),)),
        replace(BASE, groups=BASE.groups * 2),
        _with_part(layer=1),
        _with_part(kind="v"),
        _with_part(dtype="float16"),
        _with_part(axes=("dim", "token", "head")),
        _with_part(shape=(8, 16, 8)),
        KVLayout(64, 32, (KVGroup("a", (Part(0, "k", "bfloat16", AXES, (4, 32, 8)),)),)),
    ],
)
def test_the_placement_changes_when_anything_does(other):
    assert other.placement != BASE.placement
    assert len(other.placement) == 64


def test_the_placement_is_the_same_in_every_process():
    """A changed digest strands every directory that is in use: change the number of the format when it must."""
    assert BASE.placement == "72ec3c765d2ca92e1629636ab9d07d32af8d15e671da00482bdffd1778856826"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(BASE, block_tokens=40), "block_tokens = 40"),
        (lambda: replace(BASE, block_tokens=0), "block_tokens = 0"),
        (lambda: replace(BASE, groups=()), "groups"),
        (lambda: replace(BASE, groups=(KVGroup("a", ()),)), "groups"),
        (lambda: _with_part(dtype="float64"), "layer 0 k: dtype = 'float64'"),
        (lambda: _with_part(axes=("head", "dim")), "layer 0 k: axes"),
        (lambda: _with_part(axes=("head", "head", "dim")), "axes"),
        (lambda: _with_part(shape=(16, 4, 8)), "16 tokens along its token axis"),
        (lambda: _with_part(shape=(0, 16, 8)), "shape"),
        (lambda: replace(BASE, groups=(KVGroup("a", BASE.groups[0].parts * 2),)), "there twice"),
    ],
)
def test_a_layout_that_cannot_be_stored_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(BASE, block_tokens=64.0), "^block_tokens = 64.0"),
        (lambda: replace(BASE, block_tokens="64"), "^block_tokens = '64'"),
        (lambda: replace(BASE, block_tokens=None), "^block_tokens = None"),
        (lambda: replace(BASE, page_tokens=True), "^page_tokens = True"),
        (lambda: KVLayout(1 << 31, 1, _flat(1)), "^block_tokens = 2147483648: a block has at most 2147483647 tokens"),
        (lambda: KVLayout(1, 1, _flat(1) * 65537), "^groups: got 65537, want at most 65536"),
        (
            lambda: KVLayout(1, 1, _flat(1 << 32)),
            "^group 'flat', layer 0 k: 4294967296 bytes of one block in one slice .* at most 4294967295; use fewer",
        ),
        (lambda: KVLayout(16, 1, _flat(1 << 28)), "layer 0 k: 4294967296 bytes"),
        (lambda: KVLayout(1, 1, _flat(1 << 31, layers=65)), "layer 0 k to layer 1 k: 4294967296 bytes"),
        (lambda: KVLayout(1, 1, _flat((1 << 32) - 1, 1)), "layer 0 k to layer 1 k: 4294967296 bytes"),
        (lambda: replace(BASE, tp_rank=5, tp_size=2), "^tp_rank = 5: must be below tp_size = 2"),
        (lambda: replace(BASE, tp_rank=1), "^tp_rank = 1"),
        (lambda: replace(BASE, tp_size=0), "^tp_size = 0"),
        (lambda: replace(BASE, tp_size=2.0), "^tp_size = 2.0"),
        (lambda: replace(BASE, pp_rank=-1), "^pp_rank = -1"),
        (lambda: replace(BASE, pp_size=True), "^pp_size = True"),
        (lambda: replace(BASE, groups=None), "^groups = None"),
        (lambda: replace(BASE, groups=BASE.groups[0]), "^groups = KVGroup"),
        (lambda: replace(BASE, groups=BASE.groups[0].parts), "^groups.* is a Part, want a KVGroup"),
        (lambda: KVGroup("", BASE.groups[0].parts), "^name = ''"),
        (lambda: KVGroup("a\n", BASE.groups[0].parts), r"^name = 'a\\n'"),
        (lambda: KVGroup(7, BASE.groups[0].parts), "^name = 7"),
        (lambda: KVGroup("a", None), "^group 'a': parts = None"),
        (lambda: KVGroup("a", BASE.groups[0].parts[0]), r"^group 'a': parts = Part\("),
        (lambda: KVGroup("a", ("k",)), r"^group 'a': parts\[0\] is a str, want a Part"),
        (lambda: KVGroup("a", BASE.groups[0].parts, "all"), "^group 'a': reuse = 'all'"),
        (lambda: KVGroup("a", BASE.groups[0].parts, None), "^group 'a': reuse = None"),
        (lambda: Reuse("zzz", -4), "^rule = 'zzz': one of 'all', 'trailing', 'last'"),
        (lambda: Reuse(None), "^rule = None"),
        (lambda: Reuse("trailing", 0), "^window_tokens = 0"),
        (lambda: Reuse("trailing", -4), "^window_tokens = -4"),
        (lambda: Reuse("trailing", 128.0), "^window_tokens = 128.0"),
        (lambda: Reuse("all", 128), "^window_tokens = 128: rule 'all' has no window"),
        (lambda: Reuse("last", False), "^window_tokens = False"),
        (lambda: _with_part(layer="x"), "^layer = 'x'"),
        (lambda: _with_part(layer=-1), "^layer = -1"),
        (lambda: _with_part(layer=0.0), "^layer = 0.0"),
        (lambda: _with_part(kind="zzz"), "^kind = 'zzz': one of 'k', 'v', 'kv'"),
        (lambda: _with_part(kind=["k"]), "^kind = "),
        (lambda: _with_part(dtype=None), "^layer 0 k: dtype = None"),
        (lambda: _with_part(dtype=[]), "^layer 0 k: dtype = "),
        (lambda: _with_part(axes=None), "^layer 0 k: axes = None"),
        (lambda: _with_part(axes=("foo", "token", "dim")), r"^layer 0 k: axes\[0\] = 'foo': one of 'token', 'head'"),
        (lambda: _with_part(axes=(), shape=()), "^layer 0 k: axes"),
        (lambda: _with_part(shape=None), "^layer 0 k: shape = None"),
        (lambda: _with_part(shape=(4, 16.0, 8)), r"^layer 0 k: shape\[1\] = 16.0"),
        (lambda: _with_part(shape=(4, 16, "8")), r"^layer 0 k: shape\[2\] = '8'"),
        (lambda: _with_part(shape=(4, 16, -8)), r"^layer 0 k: shape\[2\] = -8"),
    ],
)
def test_what_is_no_layout_is_refused_by_the_piece_that_it_is_in(make, message):
    """64.0 equals 64, and would be another directory."""
    with pytest.raises(ConfigError, match=message):
        make()


def test_numbers_of_numpy_and_lists_are_described_like_those_of_python():
    """What an engine reports of its tensors is a layout as it is."""
    part = Part(np.int64(0), "k", "bfloat16", list(AXES), [np.int32(4), np.int64(16), 8])
    layout = KVLayout(np.int64(64), np.int16(16), [KVGroup("a", [part])], np.int64(0), np.int64(1), pp_size=np.uint8(1))
    assert layout == BASE
    assert hash(layout) == hash(BASE)
    assert layout.placement == BASE.placement
    assert Reuse("trailing", np.int64(128)) == Reuse("trailing", 128)
    assert type(Reuse("trailing", np.int64(128)).window_tokens) is int


ROWS = ("token", "dim")


@pytest.mark.parametrize(
    ("window", "kept", "blocks"),
    [(1, 16, 1), (16, 16, 1), (17, 32, 1), (64, 64, 1), (65, 64, 2), (128, 64, 2), (129, 64, 3)],
)
def test_records_of_a_window_hold_its_last_pages_and_a_hit_needs_its_last_blocks(window, kept, blocks):
    layout = replace(BASE, groups=(replace(BASE.groups[0], reuse=Reuse("trailing", window)),))
    assert layout.kept_tokens == (kept,)
    assert layout.block_pages == (kept // 16,)
    assert layout.block_bytes == (BASE.groups[0].parts[0].page_bytes * kept // 16,)
    assert layout.window_blocks == (blocks,)


def test_a_record_of_a_state_is_one_page_whatever_the_block():
    state = KVGroup("state", (Part(0, "state", "float32", ("head", "state", "dim"), (2, 3, 4)),), Reuse("last"))
    layout = KVLayout(64, 16, (*BASE.groups, state))
    assert layout.kept_tokens == (64, 0)
    assert layout.block_pages == (4, 1)
    assert layout.window_blocks == (0, 1)
    assert layout.block_bytes[1] == layout.part_bytes(1, state.parts[0]) == 2 * 3 * 4 * 4


@pytest.mark.parametrize("config", [configs.LLAMA_8B, configs.V32, configs.V4_PRO, configs.QWEN3_NEXT])
@pytest.mark.parametrize("index_dtype", [None, "mxfp4"])
def test_a_description_is_all_of_a_layout(config, index_dtype):
    """As plain values that JSON keeps, a part's in the order of its fields."""
    layout = KVLayout.from_hf_config(config, 128, index_dtype=index_dtype)
    said = json.loads(json.dumps(layout.describe()))
    groups = tuple(
        KVGroup(group["name"], tuple(Part(*part) for part in group["parts"]), Reuse(*group["reuse"]))
        for group in said["groups"]
    )
    assert KVLayout(said["block_tokens"], said["page_tokens"], groups, *said["ranks"]) == layout


def test_what_a_part_has_beside_its_shape_is_described_only_where_it_has_it():
    """So that directories of plain layouts keep their names."""
    plain, entries, planes, named = (
        KVLayout(64, 16, (KVGroup("a", (part,)),)).describe()["groups"][0]["parts"][0]
        for part in (
            Part(0, "kv", "uint8", ROWS, (16, 8)),
            Part(0, "kv", "uint8", ROWS, (4, 8), 4),
            Part(0, "kv", "uint8", ("page",), (64,), 4, planes=(12, 2)),
            Part(0, "kv", "uint8", ROWS, (16, 8), name="window"),
        )
    )
    assert plain == [0, "kv", "uint8", ["token", "dim"], [16, 8]]
    assert entries == [0, "kv", "uint8", ["token", "dim"], [4, 8], 4, ""]
    assert planes == [0, "kv", "uint8", ["page"], [64], 4, "", [12, 2]]
    assert named == [0, "kv", "uint8", ["token", "dim"], [16, 8], 1, "window"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Part(0, "kv", "uint8", ("page",), (64,)), r"layer 0 kv: axes \('page',\) with planes \(\): a page in"),
        (lambda: Part(0, "kv", "uint8", ROWS, (4, 8), planes=(6, 2)), r"axes \('token', 'dim'\) with planes \(6, 2\)"),
        (lambda: Part(0, "kv", "float16", ("page",), (64,), planes=(6, 2)), r"want uint8 and \('page',\)"),
        (lambda: Part(0, "kv", "uint8", ("page", "dim"), (4, 8), planes=(6, 2)), r"want uint8 and \('page',\)"),
        (lambda: Part(0, "kv", "uint8", ("page",), (64,), planes=(6, 0)), r"^layer 0 kv: planes\[1\] = 0"),
        (lambda: Part(0, "kv", "uint8", ("page",), (64,), planes=6), "^layer 0 kv: planes = 6"),
        (
            lambda: KVLayout(64, 16, (KVGroup("a", (Part(0, "kv", "uint8", ("page",), (31,), 4, planes=(6, 2)),)),)),
            "group 'a', layer 0 kv: a page of 31 bytes has no room for 4 entries of 4 tokens of 8 bytes",
        ),
        (
            lambda: KVLayout(64, 16, (KVGroup("a", (Part(0, "kv", "uint8", ROWS, (1, 8), 32),)),)),
            "tokens_per_entry = 32: page_tokens = 16 must be a multiple of it",
        ),
        (
            lambda: KVLayout(64, 16, (KVGroup("a", (Part(0, "kv", "uint8", ROWS, (16, 8), 4),)),)),
            "does not have 4 entries of 4 tokens along its token axis",
        ),
        (lambda: Part(0, "state", "uint8", ("dim",), (8,), 4), "tokens_per_entry = 4, but its axes"),
        (lambda: Part(0, "kv", "uint8", ROWS, (4, 8), 0), "^layer 0 kv: tokens_per_entry = 0"),
        (lambda: Part(0, "kv", "uint8", ROWS, (4, 8), name="a\n"), "^layer 0 kv.*: name = 'a"),
        (
            lambda: KVGroup("a", (Part(0, "state", "uint8", ("dim",), (8,)),)),
            "states, which have no token axis, belong",
        ),
        (lambda: KVGroup("a", (Part(0, "kv", "uint8", ROWS, (4, 8)),), Reuse("last")), "under rule 'last'"),
    ],
)
def test_entries_planes_and_states_that_do_not_fit_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
