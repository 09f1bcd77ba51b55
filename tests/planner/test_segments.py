"""How segments of the disk come free, and what goes with them."""

from __future__ import annotations

from typing import Any

import pytest

from kvtier.core.plan import PlanKind, Status, Tier
from kvtier.planner import Durability, Outcome, planner
from tests.planner.bench import Bench


def fill(bench: Bench, sequences: int, blocks: int = 2) -> list[Any]:
    """Sequences one after the other, each written before the next."""
    all_keys = [bench.keys(blocks, seed) for seed in range(sequences)]
    for keys in all_keys:
        bench.stored(keys)
    return all_keys


def test_the_oldest_segment_is_reclaimed_when_clean_ones_run_out() -> None:
    bench = Bench(segments=3, segment_blocks=2, host_blocks=2)
    sequences = fill(bench, 6)
    assert [plan.segment for plan in bench.plans(PlanKind.RECLAIM)][:2] == [0, 1]
    assert [bench.match(keys) for keys in sequences[-2:]] == [2, 2]
    assert [bench.match(keys) for keys in sequences[:3]] == [0, 0, 0]
    assert bench.planner.stats()["entries"] == sum(bench.match(keys) for keys in sequences)
    bench.check_at_rest()


def test_what_is_also_in_host_memory_survives_the_reclaim_of_its_segment() -> None:
    bench = Bench(segments=3, segment_blocks=2, host_blocks=100)
    sequences = fill(bench, 6)
    assert bench.plans(PlanKind.RECLAIM)
    assert all(bench.match(keys) == 2 for keys in sequences)
    bench.check_at_rest()


def test_a_segment_that_somebody_reads_is_passed_over() -> None:
    bench = Bench(segments=4, segment_blocks=2, host_blocks=2)
    keys, other = bench.keys(2, 0), bench.keys(2, 1)
    bench.stored(keys)
    lease = bench.lookup(keys)
    assert bench.store(other).count(Outcome.FAILED) == 2, "the lease pins all of host memory"
    for block in range(2):
        bench.lose(keys, block, Tier.HOST)
    bench.planner.release(lease)
    lease = bench.lookup(keys)
    assert lease.tiers.tolist() == [Tier.DISK] * 2
    fill(bench, 8)
    reclaimed = [plan.segment for plan in bench.plans(PlanKind.RECLAIM)]
    assert reclaimed
    assert 0 not in reclaimed
    ticket = bench.load(lease)
    bench.run()
    assert ticket.count(Outcome.DONE) == 2
    bench.planner.release(lease)
    for seed in range(20, 24):
        bench.stored(bench.keys(2, seed))
    assert 0 in [plan.segment for plan in bench.plans(PlanKind.RECLAIM)]
    bench.check_at_rest()


def test_a_child_whose_parent_was_reclaimed_is_dead_until_the_parent_comes_back() -> None:
    bench = Bench(segments=3, segment_blocks=2, host_blocks=4, clean_target=0)
    keys = bench.keys(4)
    bench.stored(keys)
    for block in range(4):
        bench.lose(keys, block, Tier.HOST)
    bench.planes[0].clean_target = 3
    bench.planes[0].disk_state()
    bench.hear()
    assert bench.plans(PlanKind.RECLAIM)[0].segment == 0
    bench.check()
    assert bench.match(keys) == 0
    assert bench.planner.stats()["entries"] >= 2, "links hold while children have copies"
    bench.run()
    bench.planes[0].clean_target = 0
    bench.stored(keys)
    assert bench.match(keys) == 4
    bench.check_at_rest()


def test_children_that_are_reclaimed_before_their_parents_leave_nothing_behind() -> None:
    """After a restart children may have lower numbers than parents: recovery reads segments, not chains."""
    bench = Bench(segments=3, segment_blocks=4)
    keys = bench.keys(4)
    bench.stored(keys)
    bench = bench.reopen(order=lambda places: places.sort(reverse=True))
    assert bench.entry(keys, 3) < bench.entry(keys, 0)
    assert bench.match(keys) == 4
    bench.planes[0].usable = False
    bench.planes[0].disk_state()
    bench.hear()
    bench.check_at_rest()
    assert bench.planner.stats()["entries"] == 0


def test_a_record_that_was_written_into_a_segment_reclaimed_since_is_not_published() -> None:
    """One plan may fill several segments; the first may be sealed and reclaimed before the last row is written."""
    bench = Bench(segments=2, segment_blocks=2, host_blocks=20, clean_target=0)
    keys = bench.keys(3)
    bench.store(keys)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    plane, spill = bench.planes[0], bench.in_flight(PlanKind.SPILL)
    plane.answer(spill, {0: Status.OK, 1: Status.OK})
    plane.segments[0].state = "sealed"
    plane.clean_target = 2
    plane.disk_state(newly=(0,))
    bench.hear()
    plane.finish(bench.in_flight(PlanKind.RECLAIM))
    bench.hear()
    plane.answer(spill, {2: Status.OK})
    bench.hear()
    bench.check()
    bench.run()
    assert bench.loaded(keys).count(Outcome.DONE) == 3
    assert not plane.misplaced
    bench.check_at_rest()


def test_no_more_segments_are_reclaimed_than_are_wanted() -> None:
    bench = Bench(segments=6, segment_blocks=1, host_blocks=10, clean_target=0)
    bench.stored(bench.keys(5))
    plane = bench.planes[0]
    plane.clean_target = 3
    plane.disk_state()
    plane.disk_state()
    bench.hear()
    assert len(bench.plans(PlanKind.RECLAIM)) == 2, "one is clean"
    bench.run()
    assert sum(segment.state == "clean" for segment in plane.segments.values()) == 3


def test_where_the_disk_holds_more_blocks_than_there_are_entries_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that compress well: no segment is wanted back before the disk is full, which it never would be."""
    monkeypatch.setattr(planner, "max_entries", lambda config, layout: 16)
    bench = Bench(segments=16, segment_blocks=4, host_blocks=6, clean_target=0)
    for number in range(40):
        assert bench.stored(bench.keys(1, number), durability=Durability.PROCESS).count(Outcome.DONE) == 1
        assert bench.match(bench.keys(1, number)) == 1
    assert len(bench.plans(PlanKind.RECLAIM)) >= 5
    bench.check_at_rest()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_prompts_longer_than_a_segment_get_the_entries_of_several(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every rank alike: a block is found as long as all of them have it."""
    monkeypatch.setattr(planner, "max_entries", lambda config, layout: 64)
    bench = Bench(segments=64, segment_blocks=2, host_blocks=12, clean_target=0, ranks=ranks)
    done = [bench.stored(bench.keys(10, seed), durability=Durability.PROCESS).count(Outcome.DONE) for seed in range(30)]
    assert sum(done) > 250
    assert sum(bench.match(bench.keys(10, seed)) for seed in range(27, 30)) >= 20
    bench.check_at_rest()


def test_storing_what_exists_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few entries are free."""
    monkeypatch.setattr(planner, "max_entries", lambda config, layout: 64)
    bench = Bench(segments=64, segment_blocks=2, host_blocks=40, clean_target=0)
    keys = bench.keys(30)
    bench.stored(keys, durability=Durability.PROCESS)
    for seed in range(25):
        bench.stored(bench.keys(1, 1 + seed), durability=Durability.PROCESS)
    for _ in range(5):
        assert bench.stored(keys).count(Outcome.EXISTING) == 30
    assert bench.plans(PlanKind.RECLAIM) == []
