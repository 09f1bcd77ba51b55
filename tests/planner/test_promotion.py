"""Up again: copies in host memory of what was only on disk."""

from __future__ import annotations

from typing import Any

import pytest

from kvtier.core.plan import PAGE_BYTES, PlanKind, Priority, Reason, Status, Tier
from kvtier.planner import Outcome
from tests.planner.bench import BLOCK, Bench


def on_disk_only(bench: Bench, blocks: int) -> Any:
    keys = bench.keys(blocks)
    bench.stored(keys)
    for block in range(blocks):
        for group in range(len(bench.layout.groups)):
            bench.lose(keys, block, Tier.HOST, group=group)
    return keys


@pytest.mark.parametrize("groups", [1, 2])
def test_a_load_from_disk_keeps_a_copy_in_host_memory_and_the_one_on_disk(groups: int) -> None:
    bench = Bench(segments=6, groups=groups)
    keys = on_disk_only(bench, 3)
    lease = bench.lookup(keys)
    assert lease.tiers.tolist() == [Tier.DISK] * 3
    ticket = bench.load(lease)
    bench.planner.release(lease)
    bench.run()
    assert list(ticket.tiers) == [Tier.DISK] * 3
    assert bench.lookup(keys).tiers.tolist() == [Tier.HOST] * 3
    assert bench.planner.stats()["disk_entries"] == 3 * groups


def test_a_prefetch_does_not_make_room_by_what_is_there_of_its_own_prefix() -> None:
    bench = Bench(segments=8, host_blocks=12)
    keys, plane = bench.keys(12), bench.planes[0]
    bench.stored(keys)
    plane.host_pages //= 2
    plane.restart()
    plane.recover()
    bench.hear()
    lease = bench.lookup(keys)
    bench.load(lease, stop=4 * BLOCK)
    bench.planner.release(lease)
    bench.run()
    ticket = bench.prefetch(keys)
    bench.run()
    assert [ticket.count(one) for one in (Outcome.EXISTING, Outcome.DONE, Outcome.FAILED)] == [4, 2, 6]
    assert bench.lookup(keys).tiers.tolist() == [Tier.HOST] * 6 + [Tier.DISK] * 6


def test_promotion_can_be_switched_off() -> None:
    bench = Bench(segments=6, read={"promote": False})
    keys = on_disk_only(bench, 3)
    bench.loaded(keys)
    assert bench.planner.stats()["host_entries"] == 0


def test_where_there_is_no_room_to_promote_a_load_goes_without() -> None:
    bench = Bench(segments=8, host_blocks=4)
    keys = on_disk_only(bench, 4)
    bench.stored(bench.keys(3, 1))
    held = bench.lookup(bench.keys(3, 1))
    ticket = bench.loaded(keys)
    assert ticket.count(Outcome.DONE) == 4
    assert bench.lookup(keys).tiers.tolist() == [Tier.HOST] + [Tier.DISK] * 3
    assert held.blocks == 3


def test_two_loads_of_the_same_blocks_keep_one_copy() -> None:
    bench = Bench(segments=6)
    keys = on_disk_only(bench, 3)
    first, second = bench.load(bench.lookup(keys)), bench.load(bench.lookup(keys))
    for number in list(bench.planes[0].flights)[::-1]:
        bench.planes[0].finish(number)
        bench.hear()
        bench.check()
    assert first.count(Outcome.DONE) == second.count(Outcome.DONE) == 3
    stats = bench.planner.stats()
    assert stats["host_used_bytes"] == 3 * 2 * PAGE_BYTES


@pytest.mark.parametrize("outcome", [Reason.DAMAGED, Status.QUARANTINED])
def test_a_block_that_could_not_be_read_gives_the_room_for_its_copy_back(outcome: Any) -> None:
    bench = Bench(segments=6, ranks=2)
    keys = on_disk_only(bench, 3)
    ticket = bench.load(bench.lookup(keys))
    bench.run(lambda plan, row: outcome if plan.kind == PlanKind.LOAD and plan.rank == 1 and row == 1 else Status.OK)
    assert list(ticket.outcome) == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
    assert bench.planner.stats()["host_entries"] == 2
    bench.check()


def test_a_prefetch_brings_what_is_only_on_disk() -> None:
    bench = Bench(segments=6, groups=2)
    keys = on_disk_only(bench, 4)
    bench.loaded(bench.keys(2), start=0)
    bench.run()
    ticket = bench.prefetch(keys)
    bench.run()
    assert list(ticket.outcome) == [Outcome.EXISTING] * 2 + [Outcome.DONE] * 2
    (plan,) = bench.plans(PlanKind.FETCH)
    assert plan.priority == Priority.PREFETCH
    assert plan.pages is None
    assert plan.rows["block"].tolist() == [2, 3, 2, 3]
    assert bench.lookup(keys).tiers.tolist() == [Tier.HOST] * 4
    assert bench.planner.stats()["leases"] == 1


def test_of_a_prefetch_that_does_not_fit_the_tail_is_refused() -> None:
    bench = Bench(segments=8, host_blocks=4)
    keys = on_disk_only(bench, 4)
    bench.stored(bench.keys(2, 1))
    held = bench.lookup(bench.keys(2, 1))
    ticket = bench.prefetch(keys)
    bench.run()
    assert list(ticket.outcome) == [Outcome.DONE] * 2 + [Outcome.FAILED] * 2
    assert set(ticket.reason[2:]) == {Reason.REFUSED}
    bench.planner.release(held)
    bench.check_at_rest()


def test_a_prefetch_of_nothing_is_over_at_once() -> None:
    bench = Bench(segments=4)
    assert bench.prefetch(bench.keys(3)).finished
    bench.stored(bench.keys(3))
    ticket = bench.prefetch(bench.keys(3))
    assert ticket.finished
    assert ticket.count(Outcome.EXISTING) == 3
    assert not any(ticket.reason)
    bench.check_at_rest()
