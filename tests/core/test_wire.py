"""Messages as bytes: what goes in comes out, and damage is ``CorruptBlockError``, nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from struct import pack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays, from_dtype

from kvtier.core.memory import GroupPages, PageTable
from kvtier.core.plan import (
    COMPLETED,
    LOST,
    RECOVERED,
    ROW,
    Completion,
    DiskState,
    Farewell,
    Hello,
    LaneRate,
    Lost,
    Message,
    Plan,
    PlanKind,
    Priority,
    Recovered,
)
from kvtier.core.wire import decode, encode
from kvtier.errors import CorruptBlockError

INT = st.integers(-(2**31), 2**31 - 1)
LONG = st.integers(-(2**63), 2**63 - 1)
FLOAT = st.floats(allow_nan=False)
WORD = st.text(max_size=12)


def table(dtype: np.dtype[Any]) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """Up to three rows of any values."""
    return st.integers(0, 3).flatmap(
        lambda n: st.binary(min_size=n * dtype.itemsize, max_size=n * dtype.itemsize).map(
            lambda data: np.frombuffer(data, dtype)
        )
    )


GROUP_PAGES = st.builds(
    GroupPages, st.integers(0, 2**40), st.lists(st.integers(0, 2**31 - 1), max_size=5).map(lambda i: np.array(i, "i4"))
)
PAGES = st.builds(PageTable, INT, st.lists(GROUP_PAGES, max_size=3).map(tuple))
WORDS = st.lists(WORD, max_size=3).map(tuple)
MESSAGES: st.SearchStrategy[Plan | Message] = st.one_of(
    st.builds(
        Plan,
        plan_id=LONG,
        rank=INT,
        kind=st.sampled_from(PlanKind),
        priority=st.sampled_from(Priority),
        rows=table(ROW),
        chains=WORDS,
        pages=st.none() | PAGES,
        start=LONG,
        stop=LONG,
        durable=st.booleans(),
        deadline_s=st.none() | FLOAT,
        segment=INT,
        generation=LONG,
        incarnation=LONG,
    ),
    st.builds(
        Completion,
        plan_id=LONG,
        rank=INT,
        incarnation=LONG,
        rows=table(COMPLETED),
        chains=WORDS,
        source_free=st.booleans(),
        final=st.booleans(),
    ),
    st.builds(
        Hello,
        rank=INT,
        incarnation=LONG,
        placement=WORD,
        block_tokens=INT,
        record_pages=st.lists(INT, max_size=3).map(tuple),
        host_pages=LONG,
        disk_bytes=LONG,
        segment_bytes=LONG,
        directories=WORDS,
    ),
    st.builds(Farewell, rank=INT, incarnation=LONG),
    st.builds(Recovered, rank=INT, incarnation=LONG, rows=table(RECOVERED), final=st.booleans()),
    st.builds(Lost, rank=INT, incarnation=LONG, rows=table(LOST)),
    st.builds(
        DiskState,
        rank=INT,
        incarnation=LONG,
        usable=st.booleans(),
        clean_segments=INT,
        reclaims_wanted=INT,
        sealed=arrays(np.int64, st.tuples(st.integers(0, 3), st.just(2)), elements=from_dtype(np.dtype(np.int64))),
        reason=WORD,
        writable=st.booleans(),
    ),
    st.builds(LaneRate, rank=INT, incarnation=LONG, lane=WORD, bytes_per_s=FLOAT, queued_bytes=LONG),
)


def assert_same(a: Any, b: Any) -> None:
    """Equal in kind and in every field, tables byte for byte."""
    assert type(a) is type(b)
    for item in fields(a):
        left, right = getattr(a, item.name), getattr(b, item.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.tobytes() == right.tobytes()
        elif isinstance(left, PageTable):
            assert left.memory_id == right.memory_id
            for mine, theirs in zip(left.groups, right.groups, strict=True):
                assert mine.first_token == theirs.first_token
                assert mine.ids.tolist() == theirs.ids.tolist()
        else:
            assert type(left) is type(right)
            assert left == right


EXAMPLE = Plan(
    plan_id=7,
    rank=1,
    kind=PlanKind.LOAD,
    priority=Priority.PREFETCH,
    rows=np.ones(2, ROW),
    chains=("raw+lz4", "raw"),
    pages=PageTable(3, (GroupPages(16, np.arange(4, dtype=np.int32)), GroupPages(0, np.empty(0, np.int32)))),
    start=16,
    stop=80,
    deadline_s=1.5,
)
EXAMPLES: list[Plan | Message] = [
    EXAMPLE,
    Completion(7, 1, 2, np.ones(2, COMPLETED), source_free=True),
    Hello(0, 1, "ab", 16, (3, 5), 10, 20, 30, ("/a", "/b")),
    Farewell(0, 1),
    Recovered(0, 1, np.ones(1, RECOVERED), final=True),
    Lost(0, 1, np.ones(1, LOST)),
    DiskState(0, 1, True, 2, 1, np.array([[1, 2]], np.int64), "why"),
    LaneRate(0, 1, "disk-0", 1e9, 5),
]
KINDS = [type(message).__name__ for message in EXAMPLES]


@given(MESSAGES)
def test_every_message_comes_back_as_it_was(message: Plan | Message) -> None:
    assert_same(decode(encode(message)), message)


def test_numbers_that_json_has_no_word_for_come_back_too() -> None:
    for rate in (math.inf, -math.inf):
        assert_same(decode(encode(LaneRate(0, 1, "disk", rate, 0))), LaneRate(0, 1, "disk", rate, 0))


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_what_arrived_may_lie_in_a_buffer_of_its_own(kind: type[bytearray]) -> None:
    for message in EXAMPLES:
        assert_same(decode(kind(encode(message))), message)


def test_scalars_of_numpy_are_sent_as_plain_numbers() -> None:
    """Engines compute positions in numpy; what works in one process must work across two."""
    plan = replace(EXAMPLE, start=np.int64(16), stop=np.int32(80), deadline_s=np.float64(1.5))
    assert_same(decode(encode(plan)), EXAMPLE)


def test_a_strided_table_crosses_whole() -> None:
    rows = np.zeros(6, ROW)
    rows["depth"] = np.arange(6)
    plan = replace(EXAMPLE, rows=rows[::2])
    assert decode(encode(plan)).rows["depth"].tolist() == [0, 2, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("message", EXAMPLES, ids=KINDS)
def test_every_truncation_is_damage(message: Plan | Message) -> None:
    data = encode(message)
    for size in range(len(data)):
        with pytest.raises(CorruptBlockError):
            decode(data[:size])


@pytest.mark.parametrize("message", EXAMPLES, ids=KINDS)
def test_bytes_behind_the_end_are_damage(message: Plan | Message) -> None:
    with pytest.raises(CorruptBlockError):
        decode(encode(message) + b"\0")


def decode_damaged(data: bytes) -> None:
    """Damage is a ``CorruptBlockError``, or a message of the right types: lengths and values may be lies."""
    try:
        message = decode(data)
    except CorruptBlockError:
        return
    encode(message)
    for item in fields(message):
        value = getattr(message, item.name)
        if isinstance(value, PageTable):
            assert all(group.ids.dtype == np.int32 and group.ids.ndim == 1 for group in value.groups)


@pytest.mark.parametrize("message", EXAMPLES, ids=KINDS)
def test_every_changed_byte_is_damage_or_another_message(message: Plan | Message) -> None:
    data = encode(message)
    for at in range(len(data)):
        for value in (0, 0x2D, 0x30, 0x5B, 0x7B, 0x65, 0xFF, data[at] ^ 1, data[at] ^ 0x80):
            decode_damaged(data[:at] + bytes((value,)) + data[at + 1 :])


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=500)
def test_random_damage_raises_nothing_else(message: Plan | Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        stop = data.draw(st.integers(at, min(at + 8, len(damaged))))
        damaged[at:stop] = data.draw(st.binary(max_size=8))
    decode_damaged(bytes(damaged))


@given(st.binary(max_size=200))
def test_noise_is_damage(data: bytes) -> None:
    with pytest.raises(CorruptBlockError):
        decode(data)
    with pytest.raises(CorruptBlockError):
        decode(b"KVTW" + data)


# --- heads that somebody made up --------------------------------------------------------------------------------------


def forged(head: Any, tail: bytes = b"") -> bytes:
    """A message with a head of one's own."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return b"KVTW" + pack("<I", len(text)) + text + tail


def head_of(message: Plan | Message) -> tuple[dict[str, Any], bytes]:
    data = encode(message)
    size = int.from_bytes(data[4:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(JSON)
def test_any_json_as_head_is_damage(head: Any) -> None:
    with pytest.raises(CorruptBlockError):
        decode(forged(head))


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=500)
def test_any_json_in_place_of_a_scalar_is_damage_or_a_message_of_the_right_types(
    message: Plan | Message, data: st.DataObject
) -> None:
    head, tail = head_of(message)
    name = data.draw(st.sampled_from(sorted(head["scalars"])))
    head["scalars"][name] = data.draw(JSON)
    decode_damaged(forged(head, tail))


@given(st.sampled_from(EXAMPLES), st.sampled_from(["kind", "scalars", "tables"]), JSON)
@settings(max_examples=300)
def test_any_json_in_place_of_a_part_of_the_head_is_damage(message: Plan | Message, part: str, value: Any) -> None:
    head, tail = head_of(message)
    if head[part] == value:
        return
    head[part] = value
    with pytest.raises(CorruptBlockError):
        decode(forged(head, tail))


@pytest.mark.parametrize("message", EXAMPLES, ids=KINDS)
def test_a_scalar_of_another_type_is_damage(message: Plan | Message) -> None:
    head, tail = head_of(message)
    for name, value in head["scalars"].items():
        others = [["x"], {"x": 1}, "x", 1.5, None, True, [1], [["x"]]]
        allowed = {"deadline_s": [1.5, None], "pages": []}.get(name, [other for other in others if _fits(value, other)])
        for other in others:
            if other in allowed:
                continue
            forged_head = {**head, "scalars": {**head["scalars"], name: other}}
            with pytest.raises(CorruptBlockError):
                decode(forged(forged_head, tail))


def _fits(value: Any, other: Any) -> bool:
    if isinstance(value, list):
        return isinstance(other, list) and type(other[0]) is type(value[0])
    return type(value) is type(other)


def test_a_missing_scalar_is_damage() -> None:
    for message in EXAMPLES:
        head, tail = head_of(message)
        for name in head["scalars"]:
            left = {key: value for key, value in head["scalars"].items() if key != name}
            with pytest.raises(CorruptBlockError):
                decode(forged({**head, "scalars": left}, tail))


@pytest.mark.parametrize(
    "sizes",
    [[], [1], [2], [ROW.itemsize], [2 * ROW.itemsize, 15], [-16, 2 * ROW.itemsize + 32], [2 * ROW.itemsize, 16, 0],
     [float(2 * ROW.itemsize), 16], [2 * ROW.itemsize + 1, 15], [True, 2 * ROW.itemsize + 15], [10**30, -(10**30)]],
    ids=str,
)  # fmt: skip
def test_tables_whose_lengths_lie_are_damage(sizes: list[Any]) -> None:
    head, tail = head_of(EXAMPLE)
    assert head["tables"] == [2 * ROW.itemsize, 16]
    with pytest.raises(CorruptBlockError):
        decode(forged({**head, "tables": sizes}, tail))


@pytest.mark.parametrize(
    "shape",
    [[3, [[0, 5], [0, -1]]], [3, [[0, 2]]], [3, [[0, 4.0]]], [3, [[0, True], [0, 3]]], [3, [["x", 4]]], [3, []], [3],
     [3.5, [[0, 4]]], [3, [[float("inf"), 4]]], [float("inf"), [[0, 4]]], 3, "x", [3, [0, 4]], [3, [[0, 4, 1]]]],
    ids=str,
)  # fmt: skip
def test_page_tables_whose_shape_lies_are_damage(shape: Any) -> None:
    head, tail = head_of(EXAMPLE)
    with pytest.raises(CorruptBlockError):
        decode(forged({**head, "scalars": {**head["scalars"], "pages": shape}}, tail))


def test_a_head_nested_without_end_is_damage() -> None:
    with pytest.raises(CorruptBlockError):
        decode(forged(b"[" * 200_000))


def test_a_number_of_a_million_digits_is_damage() -> None:
    with pytest.raises(CorruptBlockError):
        decode(forged(b'{"kind": ' + b"9" * 1_000_000 + b"}"))


def test_decoding_runs_nothing_from_the_bytes() -> None:
    """A pickle, the usual way to be taken over, is only bytes that are not a message."""
    with pytest.raises(CorruptBlockError):
        decode(b"cos\nsystem\n(S'exit 1'\ntR.")


def test_the_tables_of_a_decoded_message_cannot_be_written_to() -> None:
    """They share the message's bytes, which belong to the channel."""
    message = decode(encode(EXAMPLE))
    assert isinstance(message, Plan)
    with pytest.raises(ValueError):
        message.rows["depth"] = 1
