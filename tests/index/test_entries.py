"""Links, copies and pins of entries: counts stay true, ghosts go with their last child, no number is free twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.core.plan import Lineage
from kvtier.index import Index
from kvtier.index.entries import MISSING, EntryRows
from kvtier.policy import LeafFirstLRU

GENERATION = np.array([7], np.int64)


def keys(count: int, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


def chain(index: Index, count: int, seed: int = 0, group: int = 0) -> EntryRows:
    """Entries that extend one another, without copies."""
    entries = index.add(keys(count, seed), group, depths=np.arange(count, dtype=np.int32), tokens=4, lineage=0)
    index.link(entries, np.concatenate((np.array([MISSING], np.int32), entries[:-1])))
    return entries


def on_host(index: Index, entries: EntryRows) -> None:
    """Complete copies in host memory, one page each."""
    for rank in range(index.ranks):
        index.host.add(rank, entries, entries, np.ones(len(entries), np.int32))


def on_disk(index: Index, entries: EntryRows, segment: int = 0) -> None:
    """Complete copies on disk, one page each."""
    for rank in range(index.ranks):
        index.add_disk(
            rank, entries, np.full(len(entries), segment, np.int32), entries, np.ones(len(entries), np.int32),
            np.repeat(GENERATION, len(entries)),
        )  # fmt: skip


def one(entry: int) -> EntryRows:
    return np.array([entry], np.int32)


# --- what can be read -------------------------------------------------------------------------------------------------


def test_an_entry_is_readable_when_every_rank_has_a_copy_somewhere() -> None:
    index = Index(16, ranks=3)
    (entry,) = chain(index, 1)
    place = np.array([1], np.int32)
    assert not index.readable(one(entry))[0]
    assert not len(index.host.add(0, one(entry), [5], place))
    index.add_disk(1, one(entry), place, place, place, GENERATION)
    assert not index.readable(one(entry))[0]
    index.add_disk(2, one(entry), place, place, place, GENERATION)
    assert index.readable(one(entry))[0]
    assert not index.on_host(one(entry))[0]
    assert not index.on_disk(one(entry))[0]
    assert len(index.prefix(index.table.keys[one(entry)], 0, exact=False)) == 1


@pytest.mark.parametrize("gap", [0, 1, 2, 63, 64, 65, 66, 67, 299, 300])
def test_a_prefix_ends_at_the_first_block_that_cannot_be_read(gap: int) -> None:
    """Runs are looked up in growing batches: the borders between them must not show."""
    index = Index(512, ranks=1)
    entries = chain(index, 300)
    on_host(index, np.delete(entries, gap) if gap < 300 else entries)
    assert index.prefix(index.table.keys[entries], 0, exact=False).tolist() == entries[:gap].tolist()


def test_a_prefix_ends_at_the_first_key_that_is_not_known() -> None:
    index = Index(64, ranks=1)
    entries = chain(index, 10)
    on_host(index, entries)
    wanted = np.concatenate((index.table.keys[entries[:4]], keys(1, 99), index.table.keys[entries[5:]]))
    assert index.prefix(wanted, 0, exact=False).tolist() == entries[:4].tolist()
    assert not len(index.prefix(wanted, 1, exact=False)), "another group"
    assert not len(index.prefix(wanted[:0], 0, exact=False))


def test_an_exact_prefix_ends_at_the_first_approximate_block() -> None:
    index = Index(64, ranks=1)
    entries = chain(index, 5)
    on_host(index, entries)
    index.lineage[entries[3]] = Lineage.APPROXIMATE
    assert len(index.prefix(index.table.keys[entries], 0, exact=True)) == 3
    assert len(index.prefix(index.table.keys[entries], 0, exact=False)) == 5


# --- how entries go ---------------------------------------------------------------------------------------------------


def test_a_parent_without_copies_stays_as_a_ghost_until_its_last_child_went() -> None:
    index = Index(16, ranks=1)
    root, child = chain(index, 2).tolist()
    twig = int(index.add(keys(1, 5), 0, depths=one(1), tokens=4, lineage=0)[0])
    index.link(one(twig), one(root))
    on_host(index, np.array([child, twig], np.int32))
    index.release(root)
    assert index.count == 3
    index.host.drop(child)
    index.release(child)
    assert index.count == 2
    index.host.drop(twig)
    index.release(twig)
    assert index.count == 0
    assert index.table.free == 16


def test_a_child_that_is_linked_late_counts_wherever_it_lies_by_then() -> None:
    """After a restart children are told, and may be promoted, before their parents are known."""
    index = Index(16, ranks=2)
    parent, resident, spilled = index.add(keys(3), 0, depths=np.zeros(3, np.int32), tokens=4, lineage=0).tolist()
    on_host(index, one(resident))
    on_disk(index, one(spilled))
    index.link(np.array([resident, spilled], np.int32), np.array([parent, parent], np.int32))
    assert index.children[parent] == 2
    assert index.host_children[parent] == 1
    index.host.drop(resident)
    assert index.host_children[parent] == 0


@pytest.mark.parametrize("holder", ["pin", "host", "disk", "child"])
def test_what_is_held_by_anything_is_not_forgotten(holder: str) -> None:
    index = Index(16, ranks=2)
    entry, child = chain(index, 2).tolist()
    if holder == "pin":
        index.pin(one(entry))
    elif holder == "host":
        index.host.add(1, one(entry), [0], one(1))
    elif holder == "disk":
        index.add_disk(1, one(entry), one(0), one(0), one(1), GENERATION)
    if holder != "child":
        index.release(child)
    index.release(entry)
    assert index.table.find_one(index.table.keys[entry].tobytes(), 0) == entry


def test_a_whole_chain_goes_with_its_last_block() -> None:
    index = Index(2048, ranks=1)
    entries = chain(index, 2000)
    for entry in entries[:-1].tolist():
        index.release(entry)
    assert index.count == 2000
    index.release(int(entries[-1]))
    assert index.count == 0
    assert index.table.free == 2048


def test_releasing_what_went_already_is_harmless() -> None:
    """Of many entries that lose their copies at once, one may go as the parent of another before its own turn."""
    index = Index(4, ranks=1)
    root, child = chain(index, 2).tolist()
    index.release(child)
    assert index.count == 0
    index.release(root)
    index.release(child)
    assert index.count == 0
    assert index.table.free == 4
    assert len(set(chain(index, 4, seed=1).tolist())) == 4


def test_a_number_that_is_used_again_remembers_nothing() -> None:
    index = Index(2, ranks=2)
    old = chain(index, 2)
    on_host(index, old)
    on_disk(index, old)
    index.lineage[old] = Lineage.APPROXIMATE
    for entry in old[::-1].tolist():
        index.host.drop(entry)
        for rank in range(2):
            index.drop_disk(rank, one(entry))
        index.release(entry)
    new = index.add(keys(2, 8), 3, depths=np.array([4, 5], np.int32), tokens=9, lineage=Lineage.EXACT)
    assert sorted(new.tolist()) == sorted(old.tolist())
    assert not index.readable(new).any()
    for column, value in [
        (index.parent, MISSING), (index.children, 0), (index.host_children, 0), (index.pins, 0),
        (index.lineage, Lineage.EXACT), (index.linked, True), (index.tokens, 9),
    ]:  # fmt: skip
        assert (column[new] == value).all()


def test_an_unlinked_entry_stays_until_it_is_let_go_while_another_takes_its_key() -> None:
    index = Index(8, ranks=1)
    (old,) = chain(index, 1)
    on_host(index, one(old))
    index.pin(one(old))
    index.unlink(old)
    (new,) = chain(index, 1)
    assert new != old
    assert index.table.find_one(keys(1)[0].tobytes(), 0) == new
    index.host.drop(old)
    index.unpin(one(old))
    index.release(old)
    assert index.count == 1
    assert index.table.find_one(keys(1)[0].tobytes(), 0) == new


def test_unpin_names_those_that_nobody_holds_any_more() -> None:
    index = Index(8, ranks=1)
    entries = chain(index, 3)
    index.pin(entries)
    index.pin(entries[1:])
    assert index.unpin(entries).tolist() == entries[:1].tolist()
    assert index.unpin(entries[1:]).tolist() == entries[1:].tolist()


# --- segments ---------------------------------------------------------------------------------------------------------


def test_a_segment_knows_the_entries_that_lie_in_it_on_its_rank() -> None:
    index = Index(16, ranks=2)
    entries = chain(index, 6)
    for rank, segment in ((0, 3), (1, 4)):
        places = np.full(6, segment, np.int32)
        index.add_disk(rank, entries, places, entries, np.ones(6, np.int32), np.repeat(GENERATION, 6))
    assert index.in_segment(0, 3).tolist() == sorted(entries.tolist())
    assert not len(index.in_segment(1, 3))
    assert not len(index.in_segment(0, 4))
    assert index.generations(0, entries) == [7] * 6
    index.drop_disk(0, entries[:2])
    assert index.in_segment(0, 3).tolist() == sorted(entries[2:].tolist())
    index.add_disk(0, entries[2:3], one(9), one(0), one(1), np.array([2**40]))
    assert index.in_segment(0, 3).tolist() == sorted(entries[3:].tolist())
    assert index.generations(0, entries[2:3]) == [2**40], "generations are 64 bits wide"


def test_a_segment_is_pinned_on_a_rank_while_an_entry_in_it_is() -> None:
    index = Index(16, ranks=2)
    entries = chain(index, 3)
    for rank in range(2):
        places = np.array([5, 6, 7], np.int32) + 10 * rank
        index.add_disk(rank, entries, places, entries, np.ones(3, np.int32), np.repeat(GENERATION, 3))
    index.pin(entries[1:])
    assert [index.pinned_segments(rank) for rank in range(2)] == [{6, 7}, {16, 17}]
    index.drop_disk(0, entries[2:])
    index.unpin(entries[1:2])
    assert [index.pinned_segments(rank) for rank in range(2)] == [set(), {17}]


# --- memory -----------------------------------------------------------------------------------------------------------


def nbytes(*things: object) -> int:
    """Bytes of all arrays that ``things`` own, views not counted."""
    owned = [
        value
        for thing in things
        for value in vars(thing).values()
        if isinstance(value, np.ndarray) and value.base is None
    ]
    return sum(array.nbytes for array in owned)


@pytest.mark.parametrize("capacity", [1 << 16, (1 << 16) + 1])
def test_an_entry_takes_at_most_200_bytes_and_a_further_rank_16_a_tier(capacity: int) -> None:
    """With everything that grows with it: keys, buckets, links, copies, and the policy's order."""
    one_rank, two_ranks = Index(capacity, 1), Index(capacity, 2)
    first = nbytes(one_rank, one_rank.table, LeafFirstLRU(capacity)) / capacity
    further = nbytes(two_ranks, two_ranks.table) / capacity - nbytes(one_rank, one_rank.table) / capacity
    assert first <= 200
    assert further <= 2 * 16
    assert further == Index.RANK_BYTES
    assert first == pytest.approx(Index.ENTRY_BYTES, abs=5), "what the documentation says"


def test_an_index_has_no_python_object_per_entry() -> None:
    index = Index(4096, ranks=1)
    entries = chain(index, 4000)
    on_host(index, entries)
    on_disk(index, entries)
    for thing in (index, index.table):
        for name, value in vars(thing).items():
            if isinstance(value, (dict, list, set, tuple)):
                assert sum(map(len, value)) < 10 if isinstance(value, tuple) else len(value) < 10, name


# --- against a model --------------------------------------------------------------------------------------------------


class Links(RuleBasedStateMachine):
    """Counts of children are computed anew from the links after every step."""

    @initialize(ranks=st.sampled_from([1, 2]), capacity=st.sampled_from([8, 20]))
    def make(self, ranks: int, capacity: int) -> None:
        self.index = Index(capacity, ranks)
        self.live: set[int] = set()
        self.seed = 0

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.live)))

    def sync(self) -> None:
        """Those that ``release`` let go are not live any more; it may have gone up several parents."""
        table = self.index.table
        free = set(table._released[: table._released_count].tolist())
        assert len(free) == table._released_count, "a number is free twice"
        self.live -= free

    @precondition(lambda self: self.index.table.free)
    @rule(data=st.data(), count=st.integers(1, 4), as_chain=st.booleans())
    def add_chain(self, data: st.DataObject, count: int, as_chain: bool) -> None:
        count = min(count, self.index.table.free)
        parent = data.draw(st.sampled_from([MISSING, *sorted(self.live)]))
        self.seed += 1
        depths = np.arange(count, dtype=np.int32)
        entries = self.index.add(keys(count, self.seed), 0, depths=depths, tokens=4, lineage=0)
        assert not self.live & set(entries.tolist())
        if as_chain:
            self.index.link_chain(entries, parent)
        else:
            self.index.link(entries, np.concatenate((one(parent), entries[:-1])))
        assert self.index.parent[entries].tolist() == [parent, *entries[:-1].tolist()]
        self.live |= set(entries.tolist())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def come_to_host(self, data: st.DataObject) -> None:
        entry = self.pick(data)
        if not self.index.host_ranks[entry]:
            on_host(self.index, one(entry))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), then_release=st.booleans())
    def leave_host(self, data: st.DataObject, then_release: bool) -> None:
        entry = self.pick(data)
        had = bool(self.index.host_ranks[entry])
        assert len(self.index.host.drop(entry)) == had * self.index.ranks
        if then_release:
            self.index.release(entry)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def many_leave_host(self, data: st.DataObject) -> None:
        """At once, in any order; then all of them are released."""
        some = np.array(data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True)), np.int32)
        there = some[self.index.on_host(some)]
        assert [len(pages) for pages, _ in self.index.host.leave(there)] == [len(there)] * self.index.ranks
        self.index.release_many(some)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), come=st.booleans())
    def disk(self, data: st.DataObject, come: bool) -> None:
        entry = self.pick(data)
        if come:
            on_disk(self.index, one(entry), segment=entry % 2)
        else:
            for rank in range(self.index.ranks):
                self.index.drop_disk(rank, one(entry))
            self.index.release(entry)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), step=st.sampled_from([-1, 1]))
    def pin(self, data: st.DataObject, step: int) -> None:
        entry = self.pick(data)
        if step == 1:
            self.index.pin(one(entry))
        elif self.index.pins[entry]:
            for free in self.index.unpin(one(entry)).tolist():
                self.index.release(free)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def unlink(self, data: st.DataObject) -> None:
        entry = self.pick(data)
        if self.index.linked[entry]:
            self.index.unlink(entry)
            self.index.release(entry)

    @rule(data=st.data())
    def release_anything(self, data: st.DataObject) -> None:
        if self.index.table.touched:
            self.index.release(data.draw(st.integers(0, self.index.table.touched - 1)))

    @invariant()
    def counts_are_true(self) -> None:
        if not hasattr(self, "index"):
            return
        self.sync()
        index = self.index
        assert index.count == len(self.live)
        live = sorted(self.live)
        children = Counter(int(index.parent[entry]) for entry in live)
        hosted = Counter(int(index.parent[e]) for e in live if index.host_ranks[e] == index.all_ranks)
        for entry in live:
            assert index.children[entry] == children[entry]
            assert index.host_children[entry] == hosted[entry]
            found = index.table.find_one(index.table.keys[entry].tobytes(), 0)
            assert (found == entry) == bool(index.linked[entry])
        assert not set(children) - {MISSING} - self.live, "an entry outlived its parent"


TestLinks = Links.TestCase
TestLinks.settings = settings(max_examples=200, stateful_step_count=50)
