"""Room in host memory above and below the watermarks, and blocks that the disk refused."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvtier.core.plan import DIRECTORY_SHIFT, Lineage, PlanKind, Reason, Status, Tier
from kvtier.planner import Durability, Outcome, StoreWish
from tests.planner.bench import BACK, PAGES, Bench

# --- room in host memory ----------------------------------------------------------------------------------------------


def test_over_the_watermark_blocks_are_spilled_and_freed_the_oldest_first() -> None:
    bench = Bench(segments=4, host_blocks=10, host={"high_watermark": 0.8, "low_watermark": 0.5}, **BACK)
    old, new = bench.keys(5, 0), bench.keys(4, 1)
    bench.stored(old)
    assert not bench.written()
    bench.stored(new)
    stats = bench.planner.stats()
    assert stats["host_used_bytes"] <= 0.5 * stats["host_capacity_bytes"]
    assert set(bench.written()) == set(old.digests[1:])
    assert bench.match(old) == 5
    assert bench.match(new) == 4
    assert bench.lookup(old).tiers.tolist() == [Tier.HOST] + [Tier.DISK] * 4
    bench.check()


def test_many_blocks_can_be_sent_before_what_follows_from_them_is_planned() -> None:
    bench = Bench(segments=9, host_blocks=64, host={"high_watermark": 0.4, "low_watermark": 0.3}, **BACK)
    bench.stored(bench.keys(20, 0))
    few, many = (
        StoreWish.of(
            bench.keys(blocks, blocks), blocks, PAGES, start=0, lineage=Lineage.EXACT, durability=Durability.MEMORY
        )
        for blocks in (2, 40)
    )
    bench.planner.plan([few])
    assert not bench.planner.follows
    bench.planner.plan([many])
    assert {plan.kind for plan in bench.planner.take_plans()} == {PlanKind.STORE}
    assert bench.planner.follows
    assert bench.planner.has_news
    bench.planner.follow_up()
    assert PlanKind.SPILL in {plan.kind for plan in bench.planner.take_plans()}
    assert not bench.planner.has_news


def test_all_that_is_pinned_is_passed_over_in_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full host nothing may happen that would bring another look."""
    monkeypatch.setattr("kvtier.planner.draining._ENTRIES_LOOKED_AT", 4)
    bench = Bench(segments=9, host_blocks=60, host={"high_watermark": 0.8, "low_watermark": 0.5}, **BACK)
    bench.stored(bench.keys(44, 0))
    lease = bench.lookup(bench.keys(44, 0))
    free = bench.keys(16, 1)
    bench.store(free)
    bench.run()
    assert set(bench.written()) & set(free.digests)
    bench.planner.release(lease)
    bench.check()


def test_pinned_blocks_keep_none_behind_them_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.planner.draining._ENTRIES_LOOKED_AT", 4)
    bench = Bench(segments=4, host_blocks=20, host={"high_watermark": 0.8, "low_watermark": 0.5}, **BACK)
    pinned, free = bench.keys(6, 0), bench.keys(8, 1)
    bench.stored(pinned)
    lease = bench.lookup(pinned)
    bench.stored(free)
    bench.stored(bench.keys(4, 2))
    assert set(bench.written()) >= set(free.digests[4:])
    bench.planner.release(lease)
    bench.check()


def test_what_is_on_disk_is_freed_without_being_written_again() -> None:
    bench = Bench(segments=4, host_blocks=10, host={"high_watermark": 0.8, "low_watermark": 0.5})
    bench.stored(bench.keys(5, 0))
    bench.stored(bench.keys(4, 1))
    assert len(bench.written()) == 9
    stats = bench.planner.stats()
    assert stats["host_used_bytes"] <= 0.5 * stats["host_capacity_bytes"]
    assert stats["entries"] == stats["disk_entries"] == 9


def test_dirty_blocks_are_not_evicted_while_the_disk_takes_them() -> None:
    """A store that would cost data which the disk still could keep is refused."""
    bench = Bench(segments=4, host_blocks=4, **BACK)
    keys = bench.keys(4)
    bench.stored(keys)
    assert bench.store(bench.keys(2, 1)).count(Outcome.FAILED) == 2
    assert bench.match(keys) == 4


def test_dirty_blocks_are_evicted_when_the_disk_would_not_take_them() -> None:
    bench = Bench(segments=4, host_blocks=4)
    keys = bench.keys(4)
    bench.store(keys)
    bench.run(lambda plan, row: Reason.NO_SPACE if plan.kind == PlanKind.SPILL else Status.OK)
    assert bench.match(keys) == 4
    assert bench.stored(bench.keys(2, 1)).count(Outcome.DONE) == 2
    assert bench.match(keys) == 2
    bench.check_at_rest()


def test_a_block_that_the_disk_takes_at_last_is_not_given_up_any_more() -> None:
    """A refusal is remembered so that the block may be evicted; once it was written, it counts like any other."""
    bench = Bench(segments=4, host_blocks=4, segment_blocks=1, **BACK)
    keys = bench.keys(1)
    bench.stored(keys)
    bench.flush()
    bench.run(lambda plan, row: Reason.IO_ERROR if plan.kind == PlanKind.SPILL else Status.OK)
    ticket = bench.stored(keys, durability=Durability.PROCESS)
    assert ticket.count(Outcome.EXISTING) == 1
    bench.lose(keys, 0, Tier.DISK)
    bench.store(bench.keys(4, 1))
    assert bench.match(keys) == 1, "it is dirty again, and the disk works"


def test_a_disk_that_is_gone_takes_its_copies_along() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(4)
    bench.stored(keys)
    bench.lose(keys, 3, Tier.HOST)
    bench.planes[0].usable = False
    bench.planes[0].disk_state()
    bench.hear()
    assert bench.match(keys) == 3
    assert bench.planner.stats()["disk_entries"] == 0
    assert bench.planner.stats()["entries"] == 3
    bench.check_at_rest()
    bench.stored(bench.keys(2, 1))
    assert len(bench.written()) == 4, "nothing is sent to a disk that cannot be used"


def test_a_directory_that_is_gone_takes_only_its_own_copies_along() -> None:
    bench = Bench(segments=6, segment_blocks=2, directories=2, host_blocks=20, clean_target=0)
    keys = bench.keys(10)
    bench.stored(keys)
    places = [bench.place(keys, block)[Tier.DISK][0] >> DIRECTORY_SHIFT for block in range(10)]
    assert set(places) == {0, 1}
    bench.planes[0].off = {0}
    bench.planes[0].disk_state()
    bench.hear()
    bench.check()
    left = [Tier.DISK in bench.place(keys, block) for block in range(10)]
    assert left == [place == 1 for place in places]
    more = bench.keys(2, 1)
    bench.stored(more)
    assert {bench.place(more, block)[Tier.DISK][0] >> DIRECTORY_SHIFT for block in range(2)} == {1}, "one is left"
    bench.planes[0].off = {0, 1}
    bench.planes[0].disk_state()
    bench.run()
    assert bench.planner.stats()["disk_entries"] == 0
    bench.check_at_rest()


def test_every_directory_gets_its_own_reclaims() -> None:
    bench = Bench(segments=6, segment_blocks=2, directories=2, host_blocks=20, clean_target=0)
    bench.stored(bench.keys(9))
    plane = bench.planes[0]
    plane.clean_target = 1
    plane.disk_state()
    bench.hear()
    assert [plan.segment >> DIRECTORY_SHIFT for plan in bench.plans(PlanKind.RECLAIM)] == [0]
    bench.run()
    bench.check_at_rest()


def test_a_reclaim_that_waits_for_a_lease_follows_as_soon_as_that_goes() -> None:
    """Whoever waits for a clean segment must not wait for the next store or completion, too."""
    bench = Bench(segments=2, segment_blocks=2, host_blocks=20, clean_target=0)
    keys = bench.keys(4)
    bench.stored(keys)
    lease = bench.lookup(keys)
    assert lease.blocks == 4
    plane = bench.planes[0]
    plane.clean_target = 1
    plane.disk_state()
    bench.hear()
    assert bench.plans(PlanKind.RECLAIM) == []
    bench.planner.release(lease)
    bench.send()
    assert len(bench.plans(PlanKind.RECLAIM)) == 1
    bench.run()
    bench.check_at_rest()


def test_what_waited_for_a_disk_that_is_gone_ends() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=Durability.DURABLE)
    bench.planes[0].usable = False
    bench.planes[0].disk_state()
    bench.run()
    assert ticket.count(Outcome.FAILED) == 3
    assert bench.match(keys) == 3
    bench.check_at_rest()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("part", range(3))
def test_a_loss_counts_only_for_the_copy_that_it_speaks_of(tier: Tier, part: int) -> None:
    """The reader saw an older copy; one that came to another place since is as good as it was."""
    bench = Bench(segments=4)
    keys = bench.keys(1)
    bench.stored(keys)
    place = list(bench.place(keys, 0)[tier])
    place[part] += 1
    if tier == Tier.HOST and part != 1:
        return
    bench.planes[0].lose(keys.digests[0], 0, tier, (place[0], place[1], place[2]))
    bench.planes[0].lose(bench.keys(1, 9).digests[0], 0, tier, (0, 0, 1))
    bench.hear()
    assert set(bench.place(keys, 0)) == {Tier.HOST, Tier.DISK}
    bench.lose(keys, 0, tier)
    assert set(bench.place(keys, 0)) == {Tier.HOST, Tier.DISK} - {tier}
    bench.check_at_rest()


# --- numbers that are used again --------------------------------------------------------------------------------------


def test_a_block_that_was_lost_while_it_waited_for_the_disk_does_not_spoil_the_next_one() -> None:
    """Its number goes to another block; what becomes of the old write is not the new one's fate."""
    bench = Bench(
        segments=8, host_blocks=200, segment_blocks=100, host={"capacity": "8MiB"}, disk={"capacity": "64MiB"}
    )
    many = bench.keys(140)
    bench.store(many)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    assert bench.planner.stats()["write_backlog_entries"] == 140
    for block in range(139, 134, -1):
        bench.lose(many, block, Tier.HOST)
    bench.check()
    other = bench.keys(5, 1)
    bench.store(other)
    spill, store = bench.in_flight(PlanKind.SPILL), bench.in_flight(PlanKind.STORE)
    bench.planes[0].finish(spill)
    bench.hear()
    bench.planes[0].finish(store)
    bench.run()
    bench.check_at_rest()
    assert set(other.digests) <= set(bench.written())
    assert bench.planner.stats()["disk_entries"] == 140


def test_a_block_never_counts_as_refused_for_a_write_of_the_one_before_it() -> None:
    """Refused blocks are evicted without being written: the new block would be gone although the disk works."""
    bench = Bench(
        segments=8, host_blocks=140, segment_blocks=100, host={"capacity": "8MiB"}, disk={"capacity": "64MiB"}, **BACK
    )
    bench.stored(bench.keys(135))
    last = bench.keys(5, 1)
    bench.stored(last)
    bench.flush()
    for block in range(4, -1, -1):
        bench.lose(last, block, Tier.HOST)
    other = bench.keys(5, 2)
    bench.store(other)
    for kind in (PlanKind.SPILL, PlanKind.STORE):
        bench.planes[0].finish(bench.in_flight(kind))
        bench.hear()
    bench.run()
    bench.planner.release(bench.lookup(bench.keys(135)))
    bench.store(bench.keys(140, 3))
    assert bench.match(other) == 5
    bench.run()
    bench.check_at_rest()


def test_a_refusal_goes_with_its_block() -> None:
    bench = Bench(segments=4, host_blocks=4, **BACK)
    bench.stored(bench.keys(4))
    bench.flush()
    bench.run(lambda plan, row: Reason.NO_SPACE if plan.kind == PlanKind.SPILL else Status.OK)
    new = bench.keys(4, 1)
    assert bench.stored(new).count(Outcome.DONE) == 4, "refused blocks may go"
    assert bench.store(bench.keys(4, 2)).count(Outcome.FAILED) == 4, "the new ones, with their numbers, are only dirty"
    assert bench.match(new) == 4


def test_blocks_that_are_tried_again_are_not_evicted_meanwhile() -> None:
    bench = Bench(
        segments=8, host_blocks=140, segment_blocks=100, host={"capacity": "8MiB"}, disk={"capacity": "64MiB"}, **BACK
    )
    for keys in (bench.keys(130), bench.keys(10, 1)):
        bench.stored(keys)
    for attempt in (Reason.NO_SPACE, Status.OK):
        flush = bench.flush()
        if attempt is Status.OK:
            assert bench.store(bench.keys(4, 2)).count(Outcome.FAILED) == 4
        bench.run(lambda plan, row, outcome=attempt: outcome if plan.kind == PlanKind.SPILL else Status.OK)
    assert not flush.count(Outcome.FAILED)
    assert bench.planner.stats()["disk_entries"] == 140


def test_what_somebody_waits_for_is_written_before_what_nobody_does() -> None:
    bench = Bench(
        segments=8, host_blocks=200, segment_blocks=100, host={"capacity": "8MiB"}, disk={"capacity": "64MiB"}
    )
    bench.store(bench.keys(140))
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    waiting = bench.keys(3, 1)
    bench.store(waiting, durability=Durability.PROCESS)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    bench.run()
    order = bench.written()
    assert len(order) == 143
    assert set(order[128:131]) == set(waiting.digests), "128 were on their way already"


def test_whoever_waits_for_a_block_that_was_lost_before_it_was_written_hears_of_it() -> None:
    bench = Bench(
        segments=8, host_blocks=200, segment_blocks=100, host={"capacity": "8MiB"}, disk={"capacity": "64MiB"}
    )
    many = bench.keys(140)
    bench.store(many)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    flush = bench.flush()
    bench.lose(many, 139, Tier.HOST)
    bench.run()
    assert flush.finished
    assert flush.count(Outcome.FAILED) == 1
    bench.check_at_rest()


def test_room_is_made_ahead_in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stores never waits until a tenth of a large tier is freed; the rest goes with what is heard next."""
    monkeypatch.setattr("kvtier.planner.draining._EVICTED_A_TURN", 2)
    bench = Bench(segments=0, host_blocks=20, host={"high_watermark": 0.8, "low_watermark": 0.3})
    bench.stored(bench.keys(18))
    gone = [bench.planner.stats()["evicted_entries"]]
    for _ in range(10):
        bench.planner.hear([])
        gone.append(bench.planner.stats()["evicted_entries"])
    assert gone[-1] == 12
    assert max(after - before for before, after in pairwise(gone)) == 2
    bench.check_at_rest()
