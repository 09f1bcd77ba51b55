"""Keys: equal exactly when the content is equal, however the tokens come."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from hashlib import sha256
from struct import pack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.keys import KEY_BYTES, MAX_TOKEN_ID, Extra, Keys, Root, token_array
from kvtier.errors import ConfigError
from tests.interrupts import once

ROOT = Root("llama", "v1", "lora", "acme")
TOKENS = st.lists(st.integers(0, MAX_TOKEN_ID), max_size=70)
BLOCK = st.integers(1, 9)


def chained(root: bytes, tokens: list[int], block_tokens: int, extra: list[Extra]) -> list[bytes]:
    """What the module's docstring promises, written a second time."""

    def field(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data

    digests, parent = [], root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        stop = start + block_tokens
        ids = b"".join(token.to_bytes(4, "little") for token in tokens[start:stop])
        items = b"".join(
            pack("<qq", a - start, b - start) + field(digest)
            for a, b, digest in sorted(extra)
            if a < stop and b > start
        )
        parent = sha256(field(parent) + field(ids) + field(items)).digest()
        digests.append(parent)
    return digests


@st.composite
def extras(draw: st.DrawFn) -> list[Extra]:
    """Content at spans of at least one token, some of them beyond the sequence."""
    items = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, 80))
        items.append((start, start + draw(st.integers(1, 20)), draw(st.binary(max_size=40))))
    return items


# --- the encoding -----------------------------------------------------------------------------------------------------


@given(TOKENS, BLOCK, extras())
def test_keys_are_what_the_docstring_says(tokens: list[int], block_tokens: int, extra: list[Extra]) -> None:
    keys = Keys.from_tokens(ROOT, tokens, block_tokens, extra)
    assert keys.digests == chained(ROOT.digest(), tokens, block_tokens, extra)
    assert len(keys) == len(tokens) // block_tokens
    assert keys.num_tokens == len(tokens)


def test_keys_stay_the_same_from_version_to_version() -> None:
    """Blocks on disk are found by them: whoever changes this has to change the names ``kvtier-root-1`` and so on."""
    own = Keys.from_tokens(ROOT, range(8), 4, [(3, 5, b"image")])
    assert ROOT.digest().hex() == "16f7d24e687ffb4ea96581cd2d767fca1bdadaf0c63e67b7f19741d2243e0f30"
    assert own.digests[-1].hex() == "334a2f384cbb1b9b1e543082aa76de58c712f426976d2563887e6bf6f5925d04"
    foreign = Keys.foreign(ROOT, [b"raw"], 4, engine="vllm", chained=True)
    assert foreign.digests[0].hex() == "048a50fd66d0e7b8ff72d22e406ec5a1fe3e15f49a2aa6e63d5bb4a543ca2a0a"


@given(TOKENS, BLOCK, extras(), st.data())
def test_appending_piece_by_piece_gives_the_keys_of_all_at_once(
    tokens: list[int], block_tokens: int, extra: list[Extra], data: st.DataObject
) -> None:
    grown = Keys(ROOT, block_tokens, extra)
    at = 0
    while at < len(tokens):
        size = data.draw(st.integers(0, len(tokens) - at))
        grown.append(tokens[at : at + size])
        assert len(grown.rows()) == len(grown) == (at + size) // block_tokens
        at += max(size, 0)
        if size == 0:
            grown.append(tokens[at:])
            at = len(tokens)
    whole = Keys.from_tokens(ROOT, tokens, block_tokens, extra)
    assert grown.digests == whole.digests
    assert grown.num_tokens == whole.num_tokens
    assert np.array_equal(grown.rows(), whole.rows())


def test_a_buffer_that_is_written_to_again_after_append_does_not_change_the_keys() -> None:
    buffer = np.arange(6, dtype=np.int32)
    keys = Keys(ROOT, 4)
    keys.append(buffer)
    buffer[:] = 99
    keys.append(np.array([6, 7], np.int32))
    assert keys.digests == Keys.from_tokens(ROOT, range(8), 4).digests


def test_rows_are_the_digests_as_bytes() -> None:
    keys = Keys.from_tokens(ROOT, range(12), 4)
    assert keys.rows().shape == (3, KEY_BYTES)
    assert keys.rows().dtype == np.uint8
    assert [row.tobytes() for row in keys.rows()] == keys.digests
    assert Keys(ROOT, 4).rows().shape == (0, KEY_BYTES)


# --- every form of tokens ---------------------------------------------------------------------------------------------

INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">i8"]
TORCH_INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_numpy_arrays_of_any_integer_type_give_the_keys_of_the_list(dtype: str) -> None:
    tokens = [5, 0, 127, 3, 64, 90, 1, 2]
    assert Keys.from_tokens(ROOT, np.array(tokens, dtype), 4).digests == Keys.from_tokens(ROOT, tokens, 4).digests


@pytest.mark.parametrize("dtype", TORCH_INTEGERS, ids=str)
def test_torch_tensors_of_any_integer_type_give_the_keys_of_the_list(dtype: torch.dtype) -> None:
    tokens = [5, 0, 127, 3, 64, 90, 1, 2]
    tensor = torch.tensor(tokens).to(dtype)
    assert Keys.from_tokens(ROOT, tensor, 4).digests == Keys.from_tokens(ROOT, tokens, 4).digests


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        range,
        lambda n: array("q", range(len(n))),
        lambda n: [np.int64(i) for i in n],
        lambda n: [torch.tensor(i) for i in n],
        lambda n: np.arange(2 * len(n))[::2] // 2,
        lambda n: torch.arange(2 * len(n))[::2] // 2,
        lambda n: np.arange(len(n))[::-1][::-1],
    ],
    ids=["tuple", "range", "array", "numpy scalars", "torch scalars", "strided", "strided torch", "reversed twice"],
)
def test_other_sequences_of_integers_are_taken_too(form: Callable[[Any], Any]) -> None:
    tokens = range(8) if form is range else list(range(8))
    given_tokens = tokens if form is range else form(tokens)
    assert Keys.from_tokens(ROOT, given_tokens, 4).digests == Keys.from_tokens(ROOT, list(range(8)), 4).digests


def test_the_largest_token_id_is_taken() -> None:
    for tokens in ([MAX_TOKEN_ID], np.array([MAX_TOKEN_ID], np.uint64), torch.tensor([MAX_TOKEN_ID])):
        assert token_array(tokens).tolist() == [MAX_TOKEN_ID]


@pytest.mark.parametrize("empty", [[], (), np.empty(0, np.int64), np.array([]), torch.tensor([]), range(0)], ids=repr)
def test_no_tokens_are_no_keys(empty: Any) -> None:
    keys = Keys.from_tokens(ROOT, empty, 4)
    assert len(keys) == keys.num_tokens == 0
    assert keys.rows().shape == (0, KEY_BYTES)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, MAX_TOKEN_ID + 1, 2**32 + 1, 2**63, -(2**40)])
@pytest.mark.parametrize("position", [0, 3])
def test_a_token_id_out_of_range_is_named_with_its_position(value: int, position: int) -> None:
    tokens = [1] * 5
    tokens[position] = value
    forms: list[Any] = [tokens, tuple(tokens)]
    if value < 2**63:
        forms += [np.array(tokens, np.int64), torch.tensor(tokens)]
    for form in forms:
        with pytest.raises(ConfigError, match=rf"tokens\[{position}\] = {value}\b"):
            Keys.from_tokens(ROOT, form, 4)


@pytest.mark.parametrize(
    ("bad", "position"),
    [
        ([1, 2.0, 3], 1),
        ([1.5], 0),
        ([1, "2"], 1),
        ([None], 0),
        ([[1, 2]], 0),
        ([1, float("nan")], 1),
        ([np.float32(1)], 0),
        ([1, np.bool_(True)], 1),
        ([torch.tensor(1.5)], 0),
        ([torch.tensor([1, 2])], 0),
        ([True, False], 0),
        ((1, True), 1),
    ],
)
def test_what_is_no_integer_is_named_with_its_position(bad: Any, position: int) -> None:
    with pytest.raises(ConfigError, match=rf"tokens\[{position}\] = .*want an integer"):
        Keys.from_tokens(ROOT, bad, 4)


@pytest.mark.parametrize(
    "bad",
    [
        np.array([1.0]),
        np.array([True]),
        np.array([[1, 2]]),
        np.array(3),
        np.array([1], object),
        torch.tensor([1.0]),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.tensor([1.0], dtype=torch.complex64),
        torch.tensor([1, 2], device="meta"),
        torch._neg_view(torch.tensor([1, 2])),
        torch.tensor([True]),
        torch.tensor([[1, 2]]),
        array("d", [1.0]),
        "tokens",
        b"tokens",
        {1, 2},
        None,
        7,
    ],
    ids=repr,
)
def test_arrays_that_are_not_one_dimension_of_integers_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="want one dimension of integers"):
        Keys.from_tokens(ROOT, bad, 4)


def test_a_refused_append_leaves_the_keys_as_they_were() -> None:
    keys = Keys.from_tokens(ROOT, range(6), 4)
    with pytest.raises(ConfigError):
        keys.append([1, -1])
    keys.append([6, 7])
    assert keys.digests == Keys.from_tokens(ROOT, range(8), 4).digests
    assert keys.num_tokens == 8


@pytest.mark.parametrize("hashed", range(3))
def test_an_interrupted_append_leaves_the_keys_as_they_were(monkeypatch: pytest.MonkeyPatch, hashed: int) -> None:
    """Half of it would chain what comes next onto another place than it has."""
    keys = Keys.from_tokens(ROOT, range(6), 4)
    monkeypatch.setattr("kvtier.core.keys.sha256", once(sha256, KeyboardInterrupt(), after=hashed))
    with pytest.raises(KeyboardInterrupt):
        keys.append(range(6, 20))
    assert keys.num_tokens == 6
    keys.append(range(6, 20))
    assert keys.digests == Keys.from_tokens(ROOT, range(20), 4).digests


def test_keys_whose_append_was_interrupted_at_its_end_do_not_grow_any_more() -> None:
    keys = Keys.from_tokens(ROOT, range(6), 4)
    keys.digests.append(bytes(32))  # and the number of tokens was not reached
    with pytest.raises(ConfigError, match="interrupted after 6 tokens; make the keys anew"):
        keys.append(range(6, 20))


@pytest.mark.parametrize("block_tokens", [0, -4])
def test_blocks_of_no_tokens_are_refused(block_tokens: int) -> None:
    with pytest.raises(ConfigError, match="block_tokens"):
        Keys(ROOT, block_tokens)


@pytest.mark.parametrize(
    "bad",
    [(0, 0, b"a"), (5, 3, b"a"), (-1, 3, b"a"), (0, 4, 12), (0, 4, "text"), (0, 4, None), (0, 4), ("a", 4, b"")],
    ids=repr,
)
def test_extra_that_says_nothing_clear_is_refused_by_its_position(bad: Any) -> None:
    """``bytes(12)`` is twelve zero bytes: a number in place of a digest must not become content."""
    with pytest.raises(ConfigError, match=r"extra\[1\]"):
        Keys(ROOT, 4, [(0, 4, b"fine"), bad])


# --- nobody shares keys by accident -----------------------------------------------------------------------------------


def test_models_versions_adapters_and_tenants_never_share_a_key() -> None:
    roots = [
        Root("m"),
        Root("m2"),
        Root("m", weights_version="x"),
        Root("m", adapter="x"),
        Root("m", tenant="x"),
        Root("m", weights_version="xx"),
        Root("m", "x", "x", ""),
        Root("m", "x", "", "x"),
        Root("m", "", "x", "x"),
        Root("mx"),
        Root("", "mx"),
        Root("", "m", "x"),
    ]
    seen = [digest for root in roots for digest in Keys.from_tokens(root, range(8), 4).digests]
    assert len(set(seen)) == len(seen)


@given(st.lists(st.tuples(*[st.text(max_size=3)] * 4), min_size=2, max_size=2, unique=True))
def test_two_roots_are_equal_only_when_every_field_is(fields: list[tuple[str, str, str, str]]) -> None:
    """Fields are length-prefixed: moving a letter from one to the next makes another root."""
    assert Root(*fields[0]).digest() != Root(*fields[1]).digest()


@given(TOKENS, TOKENS, BLOCK)
def test_two_blocks_have_one_key_only_when_all_tokens_up_to_them_are_equal(
    a: list[int], b: list[int], block_tokens: int
) -> None:
    shared = 0
    while (
        (shared + 1) * block_tokens <= min(len(a), len(b))
        and a[: (shared + 1) * block_tokens] == b[: (shared + 1) * block_tokens]
    ):  # fmt: skip
        shared += 1
    keys_a, keys_b = Keys.from_tokens(ROOT, a, block_tokens), Keys.from_tokens(ROOT, b, block_tokens)
    assert keys_a.digests[:shared] == keys_b.digests[:shared]
    assert not set(keys_a.digests[shared:]) & set(keys_b.digests[shared:])


def test_the_same_tokens_in_blocks_of_another_size_are_other_keys() -> None:
    digests = [d for size in (1, 2, 4, 8) for d in Keys.from_tokens(ROOT, range(8), size).digests]
    assert len(set(digests)) == len(digests)


# --- extra ------------------------------------------------------------------------------------------------------------


def differing(extra: list[Extra], other: list[Extra], blocks: int = 4, block_tokens: int = 4) -> int:
    """The first block in which the keys of two sequences with the same tokens differ; ``blocks`` where none does."""
    a = Keys.from_tokens(ROOT, range(blocks * block_tokens), block_tokens, extra).digests
    b = Keys.from_tokens(ROOT, range(blocks * block_tokens), block_tokens, other).digests
    return next((i for i in range(blocks) if a[i] != b[i]), blocks)


def test_extra_changes_keys_from_the_first_block_that_it_overlaps() -> None:
    assert differing([], [(0, 4, b"x")]) == 0
    assert differing([], [(4, 8, b"x")]) == 1
    assert differing([], [(3, 5, b"x")]) == 0
    assert differing([], [(7, 9, b"x")]) == 1
    assert differing([], [(15, 16, b"x")]) == 3
    assert differing([], [(16, 20, b"x")]) == 4, "content behind the last block says nothing about it"


@pytest.mark.parametrize("span", [(0, 4), (4, 8), (3, 4), (4, 5), (3, 5), (0, 12), (7, 8)])
def test_extra_counts_in_the_blocks_that_it_overlaps_and_in_no_other(span: tuple[int, int]) -> None:
    extra = [(*span, b"x")]
    assert Keys.from_tokens(ROOT, range(12), 4, extra).digests == chained(ROOT.digest(), list(range(12)), 4, extra)


def test_extra_differs_by_digest_and_by_where_it_lies() -> None:
    assert differing([(4, 8, b"cat")], [(4, 8, b"dog")]) == 1
    assert differing([(4, 8, b"cat")], [(5, 8, b"cat")]) == 1
    assert differing([(4, 9, b"cat")], [(4, 12, b"cat")]) == 1, "the end of an image is part of what it is"
    assert differing([(4, 6, b"a"), (6, 8, b"b")], [(4, 6, b"b"), (6, 8, b"a")]) == 1
    assert differing([(4, 8, b"ab")], [(4, 8, b"a"), (4, 8, b"b")]) == 1


def test_the_order_in_which_extra_is_given_does_not_matter() -> None:
    items = [(8, 12, b"b"), (0, 4, b"a"), (0, 4, b"0")]
    assert differing(items, sorted(items)) == 4


def test_the_same_image_at_the_same_place_is_shared_before_other_content() -> None:
    assert differing([(0, 6, b"cat"), (9, 11, b"x")], [(0, 6, b"cat"), (9, 11, b"y")]) == 2


# --- foreign keys -----------------------------------------------------------------------------------------------------


def test_foreign_keys_depend_on_root_engine_and_raw_key() -> None:
    def one(root: Root = ROOT, engine: str = "vllm", raw: bytes = b"k") -> bytes:
        return Keys.foreign(root, [raw], 4, engine=engine, chained=True).digests[0]

    seen = [one(), one(root=Root("m")), one(engine="sglang"), one(raw=b"l"), one(engine="vllmk", raw=b"")]
    assert len(set(seen)) == len(seen)
    assert one() == one()


def test_foreign_keys_are_never_equal_to_own_ones() -> None:
    own = Keys.from_tokens(ROOT, range(4), 4)
    raw = np.arange(4, dtype="<i4").tobytes()
    assert Keys.foreign(ROOT, [raw], 4, engine="e", chained=True).digests != own.digests


def test_a_chained_foreign_key_has_the_one_before_it_as_parent() -> None:
    keys = Keys.foreign(ROOT, [b"a", b"b"], 4, engine="e", chained=True)
    assert keys.parent(0) == ROOT.digest()
    assert keys.parent(1) == keys.digests[0]


def test_foreign_keys_without_chain_have_only_the_root_as_parent() -> None:
    keys = Keys.foreign(ROOT, [b"a", b"b"], 4, engine="e", chained=False)
    assert keys.parent(0) == keys.parent(1) == ROOT.digest()


def test_foreign_keys_count_the_tokens_of_the_sequence() -> None:
    raw = [b"a", b"b", b"c"]
    assert Keys.foreign(ROOT, raw, 4, engine="e", chained=True).num_tokens == 13, "every block may hit"
    assert Keys.foreign(ROOT, raw, 4, engine="e", chained=True, num_tokens=12).num_tokens == 12


@pytest.mark.parametrize("bad", [5, "text", None])
def test_a_foreign_key_that_is_no_bytes_is_named(bad: Any) -> None:
    """``bytes(5)`` is five zero bytes: an engine whose hashes are ints must not share keys by their values."""
    with pytest.raises(ConfigError, match=r"raw_keys\[1\]"):
        Keys.foreign(ROOT, [b"a", bad], 4, engine="e", chained=True)


@pytest.mark.parametrize("chained", [False, True])
def test_a_foreign_key_that_comes_twice_is_refused(chained: bool) -> None:
    """One block cannot be at two places of one sequence: the index would link it to itself."""
    with pytest.raises(ConfigError, match=r"raw_keys\[2\]"):
        Keys.foreign(ROOT, [b"a", b"b", b"a"], 4, engine="e", chained=chained)


def test_tokens_are_not_appended_to_foreign_keys() -> None:
    keys = Keys.foreign(ROOT, [b"a"], 4, engine="e", chained=True)
    with pytest.raises(ConfigError, match="foreign"):
        keys.append(range(4))
    assert len(keys) == 1


@pytest.mark.parametrize("bytes_like", [bytearray(b"raw"), memoryview(b"raw"), np.frombuffer(b"raw", np.uint8)])
def test_raw_keys_may_be_any_bytes(bytes_like: Any) -> None:
    assert (
        Keys.foreign(ROOT, [bytes_like], 4, engine="e", chained=True).digests
        == Keys.foreign(ROOT, [b"raw"], 4, engine="e", chained=True).digests
    )


@pytest.mark.parametrize("num_tokens", [-5, 0, 7, 12, 100, 8.0, True, "8"])
def test_the_length_of_a_sequence_of_foreign_keys_is_that_of_so_many_full_blocks(num_tokens):
    with pytest.raises(ConfigError, match=r"^num_tokens = "):
        Keys.foreign(ROOT, [b"a", b"b"], 4, engine="e", chained=True, num_tokens=num_tokens)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"engine": None}, "engine"),
        ({"engine": ""}, "engine"),
        ({"engine": "\ud800"}, "engine"),
        ({"chained": "no"}, "chained"),
    ],
)
def test_foreign_keys_of_no_engine_or_with_odd_flags_are_refused(arguments, name):
    with pytest.raises(ConfigError, match=rf"^{name} = "):
        Keys.foreign(ROOT, [b"a"], 4, **{"engine": "e", "chained": True} | arguments)


@pytest.mark.parametrize("raw_keys", [None, 5, "ab", b"ab", ["a"], [1], [None]])
def test_raw_keys_are_a_list_of_bytes(raw_keys):
    with pytest.raises(ConfigError, match=r"^raw_keys"):
        Keys.foreign(ROOT, raw_keys, 4, engine="e", chained=True)


@pytest.mark.parametrize("extra", [None, 5, "ab", [(True, 2, b"x")], [(0, 10**30, b"x")], [(0, 2**63, b"x")]])
def test_extra_is_a_list_of_positions_that_fit(extra):
    with pytest.raises(ConfigError, match=r"^extra"):
        Keys.from_tokens(ROOT, [1, 2, 3, 4], 4, extra)
