"""What an earlier life left on disk: which copy counts, what extends what, in whatever order it is told."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random
from typing import Any

import numpy as np
import pytest

from kvtier.core.plan import Lineage, PlanKind, Tier
from kvtier.planner import Durability, Outcome
from tests.planner.bench import BLOCK, Bench
from tests.planner.fake_plane import Content, FakePlane, Place

EXACT, APPROXIMATE = Lineage.EXACT, Lineage.APPROXIMATE
ORDERS: dict[str, Callable[[list[Place]], None]] = {
    "as written": list.sort,
    "children first": lambda places: places.sort(reverse=True),
    "shuffled": lambda places: Random(5).shuffle(places),
}


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_everything_that_was_written_hits_again(ranks: int, order: str, batch: int) -> None:
    bench = Bench(ranks=ranks, groups=2, segments=6)
    keys = [bench.keys(5, 0, shared=2), bench.keys(6, 1, shared=2)]
    for one in keys:
        bench.stored(one)
    bench = bench.reopen(batch=batch, order=ORDERS[order])
    bench.check_at_rest()
    assert not bench.planner.recovering
    assert [bench.match(one) for one in keys] == [5, 6]
    for one in keys:
        for block in range(2, len(one)):
            for group in range(2):
                assert bench.index.parent[bench.entry(one, block, group)] == bench.entry(one, block - 1, group)
        assert bench.loaded(one).count(Outcome.DONE) == len(one)
    assert not any(plane.misplaced for plane in bench.planes)


def test_a_lookup_misses_what_has_not_been_told_yet() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(4)
    bench.stored(keys)
    plane = bench.planes[0]
    bench = Bench(attach=False, segments=1)
    bench.planes = [plane]
    plane.restart()
    plane.recover(batch=1)
    bench.say(plane.outbox.pop(0))
    for block in range(4):
        assert bench.planner.recovering
        assert bench.match(keys) == block
        bench.say(plane.outbox.pop(0))
    assert bench.match(keys) == 4
    bench.hear()
    assert not bench.planner.recovering


def test_with_one_rank_of_two_nothing_hits() -> None:
    bench = Bench(ranks=2, segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.planes[1].disk.clear()
    bench = bench.reopen()
    assert bench.match(keys) == 0
    assert bench.stored(keys).count(Outcome.DONE) == 3
    assert bench.match(keys) == 3
    bench.check_at_rest()


def test_an_index_that_is_too_small_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(segments=4)
    keys = bench.keys(6)
    bench.stored(keys)
    monkeypatch.setattr("kvtier.planner.planner.max_entries", lambda config, layout: 4)
    bench = bench.reopen(batch=4)
    assert bench.match(keys) == 4
    bench.check_at_rest()


def test_stores_go_on_while_the_rest_is_being_told() -> None:
    bench = Bench(segments=6)
    old, new = bench.keys(4, 0, shared=2), bench.keys(5, 1, shared=2)
    bench.stored(old)
    plane = bench.planes[0]
    bench = Bench(attach=False, segments=1)
    bench.planes = [plane]
    plane.restart()
    bench.say(plane.outbox.pop(0))
    bench.stored(new)
    assert bench.match(new) == 5
    plane.recover(batch=1, order=ORDERS["children first"])
    bench.run()
    bench.check_at_rest()
    assert bench.match(old) == 4
    assert bench.loaded(old).count(Outcome.DONE) == 4


# --- several copies of one block --------------------------------------------------------------------------------------


def copies(bench: Bench, plane: FakePlane, keys: Any, *kinds: tuple[int, int]) -> list[Place]:
    """Records of block 0 in segments of their own, as (lineage, sequence)."""
    places = []
    for at, (lineage, sequence) in enumerate(kinds):
        place = Place(at, 1, 0)
        plane.segments[at].state, plane.segments[at].used = "sealed", 2
        content = Content(keys.digests[0], keys.root_digest, 0, lineage, 0, 4)
        plane.disk[place] = content, 2, sequence
        places.append(place)
    return places


def open_with(bench: Bench, batches: list[tuple[int, list[Place]]]) -> None:
    """Attach all planes, then tell ``batches``, each of one rank."""
    for plane in bench.planes:
        plane.hello()
    bench.hear()
    for rank, places in batches:
        bench.planes[rank].recovered(places)
        bench.hear()
        bench.check()
    for plane in bench.planes:
        plane.recover(batch=1, order=list.clear)
    bench.hear()
    bench.check_at_rest()


KINDS = [(EXACT, 1), (EXACT, 4), (APPROXIMATE, 2), (APPROXIMATE, 9)]


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "a batch each"])
@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_exact_copies_come_first_and_then_the_highest_sequence(order: tuple[int, ...], together: bool) -> None:
    bench = Bench(attach=False, segments=6)
    keys = bench.keys(1)
    places = copies(bench, bench.planes[0], keys, *KINDS)
    told = [places[at] for at in order]
    open_with(bench, [(0, told)] if together else [(0, [place]) for place in told])
    assert bench.place(keys, 0)[Tier.DISK] == (1, 0, 1), "the exact one with sequence 4"
    assert bench.match(keys, exact=True) == 1
    assert bench.planner.stats()["entries"] == 1


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_of_approximate_copies_the_highest_sequence_counts(order: tuple[int, ...]) -> None:
    bench = Bench(attach=False, segments=6)
    keys = bench.keys(1)
    places = copies(bench, bench.planes[0], keys, (APPROXIMATE, 3), (APPROXIMATE, 8), (APPROXIMATE, 5))
    open_with(bench, [(0, [places[at]]) for at in order])
    assert bench.place(keys, 0)[Tier.DISK][0] == 1
    assert bench.match(keys) == 1
    assert bench.match(keys, exact=True) == 0


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_ranks_never_mix_exact_and_approximate_copies(order: tuple[int, ...]) -> None:
    bench = Bench(attach=False, ranks=2, segments=6)
    keys = bench.keys(1)
    told = []
    for plane in bench.planes:
        told += [(plane.rank, [p]) for p in copies(bench, plane, keys, (APPROXIMATE, 1), (EXACT, 2))]
    open_with(bench, [told[at] for at in order])
    assert bench.match(keys, exact=True) == 1
    assert bench.loaded(keys).count(Outcome.DONE) == 1
    assert {content.lineage for plane in bench.planes for _, _, content in plane.loaded} == {EXACT}


@pytest.mark.parametrize("order", list(permutations(range(2))), ids=str)
def test_exact_on_one_rank_and_approximate_on_the_other_is_no_exact_hit(order: tuple[int, ...]) -> None:
    bench = Bench(attach=False, ranks=2, segments=6)
    keys = bench.keys(1)
    told = [
        (0, copies(bench, bench.planes[0], keys, (EXACT, 2))),
        (1, copies(bench, bench.planes[1], keys, (APPROXIMATE, 1))),
    ]
    open_with(bench, [told[at] for at in order])
    assert bench.match(keys, exact=True) == 0
    bench.stored(keys)
    assert bench.match(keys, exact=True) == 1
    bench.check_at_rest()


@pytest.mark.parametrize("durability", [Durability.MEMORY, Durability.PROCESS])
@pytest.mark.parametrize("stored", list(Lineage))
@pytest.mark.parametrize("found", list(Lineage))
def test_what_is_found_late_never_spoils_what_was_stored_meanwhile(
    found: Lineage, stored: Lineage, durability: Durability
) -> None:
    bench = Bench(attach=False, segments=8)
    keys = bench.keys(1)
    plane = bench.planes[0]
    places = copies(bench, plane, keys, (found, 9))
    plane.hello()
    bench.hear()
    bench.stored(keys, lineage=stored, durability=durability)
    plane.recovered(places)
    bench.hear()
    bench.check()
    assert bench.match(keys) == 1
    assert bench.match(keys, exact=True) == (EXACT in (found, stored))
    bench.loaded(keys)
    best = EXACT if EXACT in (found, stored) else APPROXIMATE
    assert plane.loaded[-1][2].lineage == best
    for tier in bench.place(keys, 0):
        bench.lose(keys, 0, tier)
        bench.check()


def test_what_is_found_while_the_same_is_being_stored_does_not_spoil_it() -> None:
    bench = Bench(attach=False, segments=8)
    keys = bench.keys(1)
    places = copies(bench, bench.planes[0], keys, (APPROXIMATE, 9))
    bench.planes[0].hello()
    bench.hear()
    bench.store(keys)
    bench.planes[0].recovered(places)
    bench.hear()
    bench.check()
    bench.run()
    assert bench.match(keys, exact=True) == 1
    bench.check_at_rest()


def test_what_this_life_wrote_is_newer_than_anything_that_is_found() -> None:
    bench = Bench(attach=False, segments=8)
    keys, plane = bench.keys(1), bench.planes[0]
    first, second = copies(bench, plane, keys, (EXACT, 5), (EXACT, 9))
    plane.hello()
    plane.recovered([first])
    bench.hear()
    bench.prefetch(keys)
    bench.run()
    bench.lose(keys, 0, Tier.DISK)
    bench.stored(keys, durability=Durability.PROCESS)
    own = bench.place(keys, 0)[Tier.DISK]
    plane.recovered([second])
    bench.hear()
    assert bench.place(keys, 0)[Tier.DISK] == own
    bench.check_at_rest()


def test_a_ghost_takes_the_lineage_of_what_is_found_for_it() -> None:
    bench = Bench(segments=8)
    keys = bench.keys(2)
    bench.stored(keys, lineage=EXACT)
    for tier in (Tier.HOST, Tier.DISK):
        bench.lose(keys, 0, tier)
    place = Place(5, 1, 0)
    plane = bench.planes[0]
    plane.segments[5].state, plane.segments[5].used = "sealed", 2
    plane.disk[place] = Content(keys.digests[0], keys.root_digest, 0, APPROXIMATE, 0, 4), 2, 50
    plane.recovered([place])
    bench.hear()
    bench.check()
    assert bench.match(keys) == 2
    assert bench.match(keys, exact=True) == 0


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_parent_that_is_not_there_is_no_trouble() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(4)
    bench.stored(keys)
    plane = bench.planes[0]
    del plane.disk[next(place for place, (content, _, _) in plane.disk.items() if content.depth == 1)]
    bench = bench.reopen()
    assert bench.match(keys) == 1
    bench.stored(keys)
    assert bench.match(keys) == 4
    bench.check_at_rest()


def test_a_number_that_went_to_another_block_is_not_linked_for_the_one_before() -> None:
    """The child was lost before its parent was told; a new block got its number."""
    bench = Bench(attach=False, segments=6)
    keys = bench.keys(2)
    plane = bench.planes[0]
    for at in range(2):
        plane.segments[at].state, plane.segments[at].used = "sealed", 2
        parent = keys.digests[0] if at else keys.root_digest
        plane.disk[Place(at, 1, 0)] = Content(keys.digests[at], parent, 0, EXACT, at, 4), 2, at + 1
    plane.hello()
    plane.recovered([Place(1, 1, 0)])
    bench.hear()
    number = bench.entry(keys, 1)
    bench.lose(keys, 1, Tier.DISK)
    other = bench.keys(2, 7)
    bench.stored(other, start=BLOCK)
    assert bench.entry(other, 1) == number
    plane.recovered([Place(0, 1, 0)])
    plane.recover(order=list.clear)
    bench.hear()
    assert bench.index.parent[number] == -1
    bench.check_at_rest()


def test_records_whose_parents_run_in_a_circle_are_not_linked() -> None:
    """Nothing writes such records; links in a circle would keep their entries for ever."""
    bench = Bench(attach=False, segments=6)
    keys = bench.keys(2)
    plane = bench.planes[0]
    for at, (depth, parent) in enumerate([(1, keys.digests[1]), (1, keys.digests[0])]):
        plane.segments[at].state, plane.segments[at].used = "sealed", 2
        plane.disk[Place(at, 1, 0)] = Content(keys.digests[at], parent, 0, EXACT, depth, 4), 2, at
    plane.hello()
    plane.recover()
    bench.hear()
    bench.check_at_rest()
    for block in range(2):
        bench.lose(keys, block, Tier.DISK)
    assert bench.planner.stats()["entries"] == 0


def test_evicting_after_a_restart_takes_leaves_first() -> None:
    bench = Bench(segments=8, host_blocks=20)
    keys = bench.keys(6)
    bench.stored(keys)
    bench = bench.reopen(order=ORDERS["children first"], batch=2)
    bench.prefetch(keys)
    bench.run()
    assert bench.planner.stats()["host_entries"] == 6
    entries = [bench.entry(keys, block) for block in range(6)]
    assert bench.index.host_children[entries].tolist() == [1] * 5 + [0]
    assert bench.planner._state.host.leaves().take(6).tolist() == entries[::-1]


def test_finding_many_blocks_costs_no_python_object_each() -> None:
    """Children are told before their parents: what waits for a parent waits in arrays."""
    bench = Bench(segments=6, host_blocks=20, segment_blocks=50)
    bench.stored(bench.keys(40))
    plane = bench.planes[0]
    bench = Bench(attach=False, segments=1)
    bench.planes = [plane]
    plane.restart()
    plane.recover(batch=5, order=ORDERS["children first"])
    for _ in range(4):
        bench.say(plane.outbox.pop(0))
    kept = [value for value in vars(bench.planner._recovery).values() if isinstance(value, (dict, list))]
    assert kept
    assert all(len(value) <= 4 for value in kept), "one for each batch at most"
    bench.hear()
    assert bench.match(bench.keys(20)) == 20
    assert bench.plans(PlanKind.LOAD) == []
    assert np.count_nonzero(bench.index.children[: bench.index.table.touched]) == 19


def test_children_of_what_nobody_has_any_more_are_not_remembered_from_life_to_life() -> None:
    bench = Bench(segments=6)
    bench.stored(bench.keys(2))
    plane = bench.planes[0]
    for place in [place for place, (content, _, _) in plane.disk.items() if content.depth == 0]:
        del plane.disk[place]
    for _ in range(3):
        plane.restart()
        plane.recover()
        bench.hear()
        assert not bench.planner._recovery._orphans
