"""Eviction of many entries at once against the same entry by entry, over random forests in any order of use."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.core.keys import Keys
from kvtier.core.plan import Tier
from kvtier.planner import Outcome, eviction
from kvtier.planner.state import ControlState
from kvtier.policy import LeafFirstLRU
from tests.planner.bench import BLOCK, ROOT, Bench

LONGEST = 2


@dataclass(frozen=True)
class Block:
    """One entry to be made. ``pages`` is its length in host memory on each rank: 0 where it has no copy there."""

    parent: int
    pages: tuple[int, ...]
    pins: int
    on_disk: bool
    write: str
    superseded: bool


@dataclass(frozen=True)
class Forest:
    """Entries, parents before children, and the sets of entries that came and were used together."""

    blocks: list[Block]
    uses: list[list[int]]
    ranks: int
    disk_usable: bool

    def planted(self) -> ControlState:
        """A planner's state that holds it."""
        bench = Bench(ranks=self.ranks, host_blocks=len(self.blocks), segments=4)
        state = bench.planner._state
        bench.planner.events.listening = True
        for number, block in enumerate(self.blocks):
            self._plant(state, number, block)
        here = [number for number, block in enumerate(self.blocks) if block.pages[0]]
        state.host.admit(np.array(here, np.int32))
        for use in self.uses:
            state.host.touch(np.array([number for number in use if self.blocks[number].pages[0]], np.int32))
        for plane in bench.planes:
            plane.usable = self.disk_usable
            state.disk.ranks[plane.rank].directory_of(0).usable = self.disk_usable
        return state

    def _plant(self, state: ControlState, number: int, block: Block) -> None:
        index = state.index
        depth = index.depth_at[block.parent] + 1 if block.parent >= 0 else 0
        key = bytes([number % 5, 0, 0, 0, 0, 0, 0, 0, number]).ljust(32, b"k")  # few buckets, so that chains are long
        entry = index.add_one(key, block.parent, depth=depth, tokens=4, lineage=0)
        assert entry == number
        one = np.array([entry])
        for rank in range(self.ranks):
            if block.pages[rank]:
                page = state.host.spaces[rank].take(block.pages[rank])
                index.host.add(rank, one, [page], np.array([block.pages[rank]]))
            if block.on_disk:
                index.add_disk(rank, one, np.array([1]), one, one, np.array([1]))
        if block.write == "waiting":
            state.disk.enqueue(entry)
        elif block.write == "refused":
            state.disk.write_ended(entry, written=False)
        for _ in range(block.pins):
            index.pin(one)
        if block.superseded:
            index.unlink(entry)


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """Chains that begin anywhere; most are whole, as requests are, and some blocks are pinned, kept or gone."""
    ranks = draw(st.sampled_from([1, 1, 2]))
    rare = draw(st.sampled_from([0.0, 0.05, 0.3, 0.6]))
    random = draw(st.randoms(use_true_random=False))

    def block(parent: int) -> Block:
        odd = random.random() < rare
        kind = random.choice(["pinned", "ghost", "disk", "waiting", "superseded", "kept", "kept"]) if odd else ""
        pages = tuple(random.choice([LONGEST, LONGEST, 1]) * (kind != "ghost") for _ in range(ranks))
        on_disk = kind == "disk" or (kind != "kept" and random.random() < 0.3)
        write = "waiting" if kind == "waiting" else "" if kind == "kept" or on_disk else "refused"
        return Block(parent, pages, int(kind == "pinned"), on_disk, write, kind == "superseded")

    blocks: list[Block] = []
    uses: list[list[int]] = []
    for _ in range(draw(st.integers(1, 8))):
        parent, chain = random.randint(-1, len(blocks) - 1) if random.random() < 0.5 else -1, []
        for _ in range(random.randint(1, 12)):
            blocks.append(block(parent))
            parent = len(blocks) - 1
            chain.append(parent)
        uses.append(chain)
    for _ in range(draw(st.integers(0, 4))):
        chain = random.choice(uses)
        some = random.sample(chain, random.randint(0, len(chain)))
        uses.append(random.choice([chain, chain[random.randint(0, len(chain)) :], some]))
    return Forest(blocks, uses, ranks, disk_usable=draw(st.booleans()))


def make_room_one_by_one(state: ControlState, pages: int, most: int, patience: int) -> int:
    """What ``MemoryBook.make_room`` has to do, in single steps."""
    gone = 0
    for looked_at, entry in enumerate(leaves_one_by_one(state)):
        if gone == most or looked_at >= patience + 4 * gone or state.host.free_pages >= pages:
            break
        if state.may_go(entry):
            state.host.evicted += 1
            state.host.drop(entry)
            state.tell("removed", np.array([entry]), Tier.HOST)
            if not state.index.on_disk(np.array([entry]))[0]:
                state.disk.forget(np.array([entry]))
                state.index.release(entry)
            gone += 1
    return gone


def leaves_one_by_one(state: ControlState) -> Any:
    """Unpinned entries that no block in host memory extends; after each, the parent that it was in the way of."""
    passed: set[int] = set()
    for candidate in state.host.candidates():
        entry = candidate
        while not state.index.pins[entry] and not state.index.host_children[entry]:
            parent = int(state.index.parent[entry])
            yield entry
            if parent not in passed:
                break
            passed.discard(parent)
            entry = parent
        else:
            passed.add(entry)


def everything_in(state: ControlState, blocks: int) -> dict[str, Any]:
    """All that eviction changes: columns, keys, room, the order of eviction, and events in their order."""
    index, table = state.index, state.index.table
    free = set(table._released[: table._released_count].tolist())
    live = [entry for entry in range(blocks) if entry not in free]
    held = held_in(state)
    names = ("parent", "children", "host_children", "host_ranks", "disk_ranks", "pins", "linked")
    return {
        "free": free,
        "count": index.count,
        "columns": {name: getattr(index, name)[live].tolist() for name in names},
        "found": [table.find_one(table.keys[entry].tobytes(), 0) for entry in range(blocks)],
        "room": {rank: space.free_runs() for rank, space in state.host.spaces.items()},
        "order": [entry for entry in state.host.candidates() if entry not in held],
        "held": sorted(held),
        "length": len(state.host),
        "evicted": state.host.evicted,
        "counts": {name: count for name, count in state.counts.items() if count},
        "refused": state.disk.which_were_refused(np.array(live, np.intp)).tolist(),
        "told": [(event.change, event.key, event.parent) for event in state.events.take()],
    }


def held_in(state: ControlState) -> set[int]:
    """Entries in host memory that are pinned, or that have to stay because those extend them: a pass may move them."""
    held: set[int] = set()
    here = set(state.host.candidates())
    for entry in here:
        if state.index.pins[entry]:
            held.add(entry)
            parent = int(state.index.parent[entry])
            while parent in here and not state.index.pins[parent]:
                held.add(parent)
                parent = int(state.index.parent[parent])
    return held


@settings(max_examples=400, deadline=None)
@given(
    forest=forests(),
    wanted=st.lists(st.tuples(st.integers(0, 120), st.sampled_from([3, 20, 10**9])), min_size=1, max_size=3),
    few=st.sampled_from([1, 8]),
    batch=st.sampled_from([1, 2, 3, 5, 4096]),
    patience=st.sampled_from([1, 2, 3, 4096]),
)
def test_many_at_once_go_as_they_would_one_by_one(
    forest: Forest, wanted: list[tuple[int, int]], few: int, batch: int, patience: int
) -> None:
    at_once, one_by_one = forest.planted(), forest.planted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction, "_FEW", few)
        patch.setattr("kvtier.planner.state._FEW", few)
        patch.setattr(eviction, "_MOST", batch)
        patch.setattr(eviction, "_LOOKED_AT", patience)
        for pages, most in wanted:
            gone = at_once.host.make_room(pages, most)
            assert gone == make_room_one_by_one(one_by_one, pages, most, patience)
            blocks = len(forest.blocks)
            assert everything_in(at_once, blocks) == everything_in(one_by_one, blocks)


def test_chains_that_come_whole_are_never_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is pinned or kept: as soon as one entry is looked at alone, eviction costs ten times as much."""
    bench = Bench(host_blocks=120)
    chains = [bench.keys(20, seed) for seed in range(6)]
    for keys in chains:
        bench.stored(keys)

    def refuse(*_: Any) -> Any:
        raise AssertionError("one by one")

    for name in ("kvtier.planner.eviction.Leaves._one_by_one", "kvtier.index.entries.Index._without_ancestors"):
        monkeypatch.setattr(name, refuse)
    bench.planner._state.host.make_room(2 * 70)
    assert [bench.match(keys) for keys in chains] == [0, 0, 0, 10, 20, 20]
    bench.check_at_rest()


def test_held_blocks_before_a_chain_keep_none_of_it() -> None:
    """The first look takes fewer than are wanted; the next one begins in the middle of the chain."""
    bench = Bench(host_blocks=100)
    held, older, newer = bench.keys(3, 0), bench.keys(57, 1), bench.keys(40, 2)
    bench.stored(held)
    lease = bench.lookup(held)
    bench.stored(older)
    bench.stored(newer)
    assert bench.stored(bench.keys(30, 3)).outcome.count(Outcome.DONE) == 30
    assert [bench.match(keys) for keys in (held, older, newer)] == [3, 27, 40]
    bench.planner.release(lease)
    bench.check_at_rest()


def test_held_blocks_at_the_old_end_are_walked_over_once() -> None:
    """Running requests hold what nobody else uses, and every store that needs room would walk over all of it."""
    bench = Bench(host_blocks=1000)
    held = bench.keys(900, 0)
    bench.stored(held)
    lease = bench.lookup(held)
    for seed in range(1, 101):
        bench.stored(bench.keys(1, seed))
    bench.stored(bench.keys(1, 200))
    oldest = list(islice(bench.planner._state.host.candidates(), 20))
    assert np.count_nonzero(bench.index.pins[oldest]) <= 10
    assert bench.match(held) == 900
    last = bench.keys(200, 201)
    assert bench.stored(last).outcome.count(Outcome.DONE) == 100
    also_held = bench.lookup(last)
    assert bench.planner._state.host.make_room(1) == 0, "a pass over what is all held ends, too"
    bench.planner.release(lease)
    bench.planner.release(also_held)
    bench.check_at_rest()


@pytest.mark.parametrize("way", ["looked up", "stored"])
def test_what_is_extended_is_no_older_than_what_extends_it(way: str) -> None:
    """Else every pass walks over it in vain. Who has the beginning already looks up, and stores, only the rest."""
    bench = Bench(host_blocks=30)
    extended, other = bench.keys(10, 0, shared=10), bench.keys(10, 1)
    bench.stored(extended)
    bench.stored(other)
    if way == "looked up":
        bench.planner.release(bench.lookup(extended, start=9 * 4))
    else:
        bench.stored(bench.keys(12, 0, shared=10), start=10 * 4)
    oldest = list(islice(bench.planner._state.host.candidates(), 10))
    assert oldest == [bench.entry(other, block) for block in reversed(range(10))]


@pytest.mark.parametrize(("sequences", "blocks"), [(1, 900), (9, 100)])
def test_sequences_that_grow_block_by_block_move_their_beginnings_now_and_then(
    monkeypatch: pytest.MonkeyPatch, sequences: int, blocks: int
) -> None:
    """Moved with each block they would cost as much as all that there is, every time."""
    bench = Bench(host_blocks=1000)
    moved = []
    touch = LeafFirstLRU.touch
    monkeypatch.setattr(LeafFirstLRU, "touch", lambda lru, entries: moved.append(len(entries)) or touch(lru, entries))
    growing = [Keys(ROOT, BLOCK) for _ in range(sequences)]
    for block in range(blocks):
        for number, keys in enumerate(growing):
            keys.append([number] * BLOCK)
            bench.stored(keys, start=block * BLOCK)
    assert sum(moved) <= 16 * 900
    assert max(moved) > 0.8 * blocks, "all of it, when it is time"
    order = {entry: at for at, entry in enumerate(bench.planner._state.host.candidates())}
    for keys in growing:
        places = [order[bench.entry(keys, block)] for block in range(blocks)]
        assert sum(after > before for before, after in pairwise(places)) <= blocks // 16, "nearly all are no older"


@pytest.mark.parametrize(("kept", "gone"), [(30, 11), (31, 10)])
def test_looking_at_what_has_to_stay_ends_after_a_while(monkeypatch: pytest.MonkeyPatch, kept: int, gone: int) -> None:
    """Three leaves more for each one that went, however many went at once."""
    monkeypatch.setattr(eviction, "_LOOKED_AT", 1)

    def block(parent: int, write: str) -> Block:
        return Block(parent, (LONGEST,), pins=0, on_disk=False, write=write, superseded=False)

    chain = [block(at - 1, "refused") for at in range(10)]
    blocks = [*chain, *(block(-1, "") for _ in range(kept)), block(-1, "refused")]
    forest = Forest(blocks, [list(range(10)), *([at] for at in range(10, len(blocks)))], ranks=1, disk_usable=True)
    host = forest.planted().host
    leaves = host.leaves()
    at_once = leaves.take(10)
    host.evict(at_once)
    assert len(at_once) + len(leaves.take(100)) == gone


def test_nothing_is_looked_at_once_patience_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "_LOOKED_AT", 1)
    monkeypatch.setattr(eviction, "_FEW", 1)
    blocks = [Block(-1, (LONGEST,), pins=0, on_disk=False, write=write, superseded=False) for write in ("", "refused")]
    host = Forest(blocks, [[0], [1]], ranks=1, disk_usable=True).planted().host
    assert host.leaves().take(1).tolist() == []


def test_room_in_pieces_is_made_whole_by_evicting_more() -> None:
    """Records that were trimmed leave holes between them, of which two are as much as a whole record but not one."""
    block = Block(-1, (1,), pins=0, on_disk=False, write="refused", superseded=False)
    oldest_first = [0, 2, 4, 6, 1, 3, 5, 7]
    bench_room = Forest([block] * 8, [[at] for at in oldest_first], ranks=1, disk_usable=True).planted()
    host = bench_room.host
    for space in host.spaces.values():
        assert space.take_many(1, space.free_pages)
    assert host.reserve(0, 1)[0] == 1
    assert host.reserve(0, 4)[0] == 3
