"""The table against a dict: many keys in few buckets, several groups, numbers that are used again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.index.keytable import MISSING, EntryRows, KeyRows, KeyTable

GROUPS = (0, 1, 64, 65535)
"""0 and 64 share their buckets in tables of up to 64."""


def key_of(word: int, number: int) -> bytes:
    """Keys with the same ``word`` share a bucket."""
    return word.to_bytes(8, "little") + number.to_bytes(24, "big")


def rows_of(keys: list[bytes]) -> KeyRows:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


class TableAndDict(RuleBasedStateMachine):
    """Every call is made on both; they must agree."""

    @initialize(capacity=st.sampled_from([1, 2, 15, 16, 17, 40]))
    def make(self, capacity: int) -> None:
        self.table = KeyTable(capacity)
        self.model: dict[tuple[bytes, int], int] = {}
        self.unlinked: list[int] = []
        self.numbers = 0

    def some_keys(self, data: st.DataObject) -> list[bytes]:
        known = [key for key, _ in self.model]
        strange = [key_of(word, 10**6) for word in range(3)]
        return data.draw(st.lists(st.sampled_from(known + strange), max_size=12))

    @rule(data=st.data(), group=st.sampled_from(GROUPS), count=st.integers(0, 20))
    def add(self, data: st.DataObject, group: int, count: int) -> None:
        count = min(count, self.table.free)
        words = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
        keys = [key_of(word, self.numbers + at) for at, word in enumerate(words)]
        self.numbers += count
        entries = self.table.add(rows_of(keys), group)
        assert entries.dtype == np.int32
        taken = set(self.model.values()) | set(self.unlinked)
        assert len(set(entries.tolist())) == count
        assert not taken & set(entries.tolist())
        assert all(0 <= entry < self.table.capacity for entry in entries.tolist())
        self.model.update(zip([(key, group) for key in keys], entries.tolist(), strict=True))

    @rule(data=st.data(), group=st.sampled_from(GROUPS))
    def add_a_key_of_another_group(self, data: st.DataObject, group: int) -> None:
        known = sorted({key for key, g in self.model if (key, group) not in self.model})
        if known and self.table.free:
            key = data.draw(st.sampled_from(known))
            self.model[key, group] = int(self.table.add(rows_of([key]), group)[0])

    @rule(data=st.data(), group=st.sampled_from(GROUPS))
    def find(self, data: st.DataObject, group: int) -> None:
        keys = self.some_keys(data)
        wanted = [self.model.get((key, group), MISSING) for key in keys]
        found: EntryRows = self.table.find(rows_of(keys), group)
        assert found.dtype == np.int32
        assert found.tolist() == wanted
        assert [self.table.find_one(key, group) for key in keys] == wanted

    @precondition(lambda self: self.model)
    @rule(data=st.data(), recycle=st.booleans())
    def remove(self, data: st.DataObject, recycle: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        entry = self.model.pop(name)
        if recycle:
            self.table.remove(entry)
        else:
            self.table.unlink(entry)
            self.unlinked.append(entry)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_many(self, data: st.DataObject) -> None:
        """Of any groups, and several in one bucket."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True))
        entries = np.array([self.model.pop(name) for name in names], np.int32)
        self.table.unlink_many(entries)
        self.table.recycle_many(entries)

    @precondition(lambda self: self.unlinked)
    @rule(data=st.data())
    def recycle(self, data: st.DataObject) -> None:
        self.table.recycle(self.unlinked.pop(data.draw(st.integers(0, len(self.unlinked) - 1))))

    @invariant()
    def everything_is_found(self) -> None:
        if not hasattr(self, "table"):
            return
        assert self.table.free == self.table.capacity - len(self.model) - len(self.unlinked)
        assert self.table.touched <= self.table.capacity
        for group in GROUPS:
            names = [key for key, g in self.model if g == group]
            assert self.table.find(rows_of(names), group).tolist() == [self.model[key, group] for key in names]
        for (key, group), entry in self.model.items():
            assert self.table.keys[entry].tobytes() == key
            assert self.table.groups[entry] == group


TestTableAndDict = TableAndDict.TestCase
TestTableAndDict.settings = settings(max_examples=150, stateful_step_count=40)


def test_more_entries_than_there_is_room_for_are_refused_whole() -> None:
    table = KeyTable(20)
    table.add(rows_of([key_of(0, at) for at in range(18)]), 0)
    with pytest.raises(OverflowError, match="3 entries wanted, 2 free"):
        table.add(rows_of([key_of(1, at) for at in range(3)]), 0)
    assert table.free == 2
    assert table.find_one(key_of(1, 0), 0) == MISSING


def test_a_full_table_finds_everything_in_bulk_and_one_by_one() -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 256, (5000, 32), np.uint8)
    table = KeyTable(5000)
    entries = np.concatenate([table.add(keys[at : at + 700], at % 3) for at in range(0, 5000, 700)])
    assert table.free == 0
    for group in range(3):
        mine = np.concatenate([np.arange(at, min(at + 700, 5000)) for at in range(0, 5000, 700) if at % 3 == group])
        assert np.array_equal(table.find(keys[mine], group), entries[mine])
        assert (table.find(keys[mine], 7) == MISSING).all()
        assert [table.find_one(keys[at].tobytes(), group) for at in mine[:50]] == entries[mine[:50]].tolist()


def test_keys_that_differ_in_one_bit_anywhere_are_other_keys() -> None:
    """Only eight of the 32 bytes choose the bucket; all of them decide."""
    key = bytes(range(32))
    table = KeyTable(300)
    others = []
    for bit in range(256):
        other = bytearray(key)
        other[bit // 8] ^= 1 << (bit % 8)
        others.append(bytes(other))
    entries = table.add(rows_of([*others]), 0)
    assert table.find_one(key, 0) == MISSING
    assert table.find(rows_of([key] * 5), 0).tolist() == [MISSING] * 5
    assert table.find(rows_of(others), 0).tolist() == entries.tolist()
