"""Exact and approximate content: what inherits, what takes whose place, what ``exact=True`` may find."""

from __future__ import annotations

import pytest

from kvtier.core.plan import Lineage, PlanKind, Tier
from kvtier.planner import Durability, Outcome
from tests.planner.bench import BACK, Bench

EXACT, APPROXIMATE = Lineage.EXACT, Lineage.APPROXIMATE


def test_only_exact_lookups_pass_approximate_blocks_over() -> None:
    bench = Bench()
    keys = bench.keys(4, shared=2)
    bench.stored(bench.keys(2, shared=2))
    bench.stored(keys, lineage=APPROXIMATE)
    assert bench.match(keys) == 4
    assert bench.match(keys, exact=True) == 2
    assert bench.lookup(keys).lineage == APPROXIMATE
    assert bench.lookup(keys, exact=True).lineage == EXACT


def test_a_hit_is_exact_only_if_it_is_in_every_group() -> None:
    bench = Bench(groups=2)
    keys = bench.keys(2)
    bench.stored(keys)
    assert bench.lookup(keys).lineage == EXACT
    bench.lose(keys, 1, Tier.HOST, group=1)
    bench.stored(keys, lineage=APPROXIMATE)
    assert bench.lookup(keys).lineage == APPROXIMATE
    assert bench.match(keys, exact=True) == 1


def test_what_is_stored_on_top_of_an_approximate_hit_says_so_in_its_record() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.stored(keys, lineage=APPROXIMATE)
    assert bench.plans(PlanKind.STORE)[0].rows["lineage"].tolist() == [APPROXIMATE] * 3
    assert {content.lineage for content, _, _ in bench.planes[0].disk.values()} == {APPROXIMATE}


def test_an_approximate_store_over_exact_content_is_existing() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys)
    assert bench.stored(keys, lineage=APPROXIMATE).count(Outcome.EXISTING) == 3
    assert bench.match(keys, exact=True) == 3


def test_among_equals_the_first_content_stays() -> None:
    for lineage in Lineage:
        bench = Bench()
        keys = bench.keys(3)
        bench.stored(keys, lineage=lineage)
        assert bench.stored(keys, lineage=lineage).count(Outcome.EXISTING) == 3


@pytest.mark.parametrize("segments", [0, 6])
def test_exact_content_takes_the_place_of_approximate(segments: int) -> None:
    bench = Bench(segments=segments)
    keys = bench.keys(3)
    bench.stored(keys, lineage=APPROXIMATE)
    ticket = bench.stored(keys)
    assert ticket.count(Outcome.DONE) == 3
    assert bench.match(keys, exact=True) == 3
    assert bench.planner.stats()["entries"] == 3
    assert bench.planner.stats()["host_entries"] == 3
    bench.check_at_rest()


def test_in_a_full_tier_exact_content_takes_the_room_of_the_approximate() -> None:
    bench = Bench(host_blocks=4)
    keys = bench.keys(4)
    bench.stored(keys, lineage=APPROXIMATE)
    assert bench.stored(keys).count(Outcome.DONE) == 4
    assert bench.match(keys, exact=True) == 4


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_whoever_holds_the_approximate_content_may_still_load_it(tier: Tier) -> None:
    """New generation, old pins drain: a lease keeps its promise although its blocks were superseded."""
    bench = Bench(segments=8)
    keys = bench.keys(3)
    bench.stored(keys, lineage=APPROXIMATE)
    if tier == Tier.DISK:
        for block in range(3):
            bench.lose(keys, block, Tier.HOST)
    lease = bench.lookup(keys)
    bench.stored(keys)
    bench.check()
    ticket = bench.load(lease)
    bench.run()
    assert ticket.count(Outcome.DONE) == 3
    assert {content.lineage for _, _, content in bench.planes[0].loaded} == {APPROXIMATE}
    assert bench.match(keys, exact=True) == 3
    bench.planner.release(lease)
    bench.check_at_rest()
    assert bench.planner.stats()["entries"] == 3
    assert bench.planner.stats()["host_entries"] == 3


def test_what_was_superseded_goes_with_its_last_pin() -> None:
    bench = Bench(host_blocks=8)
    keys = bench.keys(4)
    bench.stored(keys, lineage=APPROXIMATE)
    lease = bench.lookup(keys)
    load = bench.load(lease)
    bench.planner.release(lease)
    bench.store(keys)
    assert bench.planner.stats()["host_used_bytes"] == bench.planner.stats()["host_capacity_bytes"]
    bench.run()
    assert load.count(Outcome.DONE) == 4
    assert 2 * bench.planner.stats()["host_used_bytes"] == bench.planner.stats()["host_capacity_bytes"]
    bench.check_at_rest()


@pytest.mark.parametrize("kind", [PlanKind.SPILL, PlanKind.FETCH])
def test_content_that_is_superseded_on_its_way_is_not_kept(kind: PlanKind) -> None:
    bench = Bench(segments=8, policy={"write": "write_back"})
    keys = bench.keys(3)
    bench.stored(keys, lineage=APPROXIMATE)
    bench.flush(Durability.PROCESS)
    if kind == PlanKind.FETCH:
        bench.run()
        for block in range(3):
            bench.lose(keys, block, Tier.HOST)
        bench.prefetch(keys)
    assert bench.in_flight(kind)
    bench.store(keys)
    bench.check()
    bench.run()
    bench.check_at_rest()
    assert bench.match(keys, exact=True) == 3
    assert bench.planner.stats()["entries"] == 3


def test_a_ghost_in_the_request_outlives_the_superseded_block_that_extended_it() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys, lineage=APPROXIMATE)
    bench.lose(keys, 1, Tier.HOST)
    bench.lose(keys, 0, Tier.HOST)
    ticket = bench.store(keys)
    bench.check()
    bench.run()
    assert ticket.count(Outcome.DONE) == 3
    assert bench.match(keys, exact=True) == 3
    bench.check_at_rest()


def test_a_block_that_is_stored_again_does_not_keep_copies_of_another_lineage() -> None:
    """One rank lost its copy on disk, so it was no hit; the other rank's old copy must not pass as the new content."""
    bench = Bench(ranks=2, segments=6, policy={"write": "write_back"})
    keys = bench.keys(2)
    bench.stored(keys, lineage=APPROXIMATE, durability=Durability.PROCESS)
    for block in (1, 0):
        bench.lose(keys, block, Tier.DISK, rank=0)
        bench.lose(keys, block, Tier.HOST)
    assert bench.match(keys) == 0
    bench.stored(keys)
    bench.check()
    assert bench.match(keys, exact=True) == 2
    for block in (1, 0):
        bench.lose(keys, block, Tier.HOST)
    bench.check()


def test_an_exact_store_does_not_join_a_pending_approximate_one() -> None:
    """Joining it would say that the exact content is kept, and ``exact=True`` would miss it."""
    bench = Bench()
    keys = bench.keys(3)
    first = bench.store(keys, lineage=APPROXIMATE)
    second = bench.store(keys)
    bench.check()
    bench.run()
    assert first.count(Outcome.DONE) == 3
    assert second.count(Outcome.DONE) == 3
    assert bench.match(keys, exact=True) == 3
    assert bench.planner.stats()["entries"] == 3
    bench.check_at_rest()


def test_an_approximate_store_joins_a_pending_exact_one() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.store(keys)
    assert bench.stored(keys, lineage=APPROXIMATE).count(Outcome.EXISTING) == 3
    assert bench.match(keys, exact=True) == 3


def test_an_approximate_write_that_ends_after_the_block_was_lost_and_stored_exactly_is_not_its_copy() -> None:
    bench = Bench(segments=6)
    keys = bench.keys(1)
    bench.store(keys, lineage=APPROXIMATE)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    assert bench.in_flight(PlanKind.SPILL)
    bench.lose(keys, 0, Tier.HOST)
    bench.store(keys)
    bench.run()
    bench.check_at_rest()
    assert bench.match(keys, exact=True) == 1


def test_an_exact_hit_that_lost_its_copies_is_not_filled_with_approximate_content() -> None:
    bench = Bench()
    keys = bench.keys(2)
    bench.stored(keys)
    lease = bench.lookup(keys, exact=True)
    bench.lose(keys, 0, Tier.HOST)
    bench.stored(keys, lineage=APPROXIMATE)
    ticket = bench.load(lease)
    bench.run()
    assert ticket.count(Outcome.DONE) == 1
    assert {content.lineage for _, _, content in bench.planes[0].loaded} == {EXACT}
    assert bench.match(keys) == 2
    assert bench.match(keys, exact=True) == 0
    bench.planner.release(lease)
    bench.check_at_rest()


def test_nor_with_approximate_content_that_an_earlier_life_left() -> None:
    bench = Bench(segments=3, **BACK)
    keys = bench.keys(1)
    bench.stored(keys, lineage=APPROXIMATE, durability=Durability.PROCESS)
    bench.stored(keys)
    lease = bench.lookup(keys, exact=True)
    bench.planes[0].restart()
    bench.planes[0].recover()
    bench.hear()
    ticket = bench.load(lease)
    bench.run()
    assert ticket.count(Outcome.FAILED) == 1
    assert not bench.planes[0].loaded
    assert bench.match(keys) == 1
    bench.planner.release(lease)
    bench.check_at_rest()
