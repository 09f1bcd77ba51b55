"""Down to disk and up again: who is written when, what an acknowledgement means, how segments come free."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtier.core.plan import DIRECTORY_SHIFT, PAGE_BYTES, Plan, PlanKind, Priority, Reason, Status, Tier
from kvtier.planner import Durability, Outcome, Ticket
from tests.planner.bench import BLOCK, Bench

LEVELS = [Durability.PROCESS, Durability.DURABLE]
BACK: dict[str, Any] = {"policy": {"write": "write_back"}}


def written(bench: Bench) -> list[bytes]:
    """Keys of all rows that were ever sent to disk, in order."""
    return [row.tobytes() for plan in bench.plans(PlanKind.SPILL) for row in plan.rows["key"]]


# --- when blocks are written ------------------------------------------------------------------------------------------


def test_write_through_writes_every_block_when_it_is_stored_once() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.stored(keys)
    bench.loaded(keys)
    assert written(bench) == keys.digests
    assert bench.planner.stats()["disk_entries"] == 3
    bench.check_at_rest()


@pytest.mark.parametrize("write", ["write_back", "write_through_selective"])
def test_the_other_policies_write_nothing_while_there_is_room(write: str) -> None:
    bench = Bench(segments=4, policy={"write": write})
    bench.stored(bench.keys(3))
    assert not written(bench)


def test_selective_writes_a_block_when_it_is_used_again() -> None:
    bench = Bench(segments=4, policy={"write": "write_through_selective"})
    keys = bench.keys(4)
    bench.stored(keys)
    bench.loaded(bench.keys(4), start=2 * BLOCK)
    assert set(written(bench)) == set(keys.digests[2:])
    bench.loaded(keys)
    bench.loaded(keys)
    assert sorted(written(bench)) == sorted(keys.digests)
    bench.check_at_rest()


def test_selective_does_not_ask_again_for_what_the_disk_refused() -> None:
    bench = Bench(segments=4, policy={"write": "write_through_selective"})
    keys = bench.keys(2)
    bench.stored(keys)
    for _ in range(3):
        bench.planner.release(bench.lookup(keys))
        bench.send()
        bench.run(lambda plan, row: Reason.IO_ERROR)
    assert len(written(bench)) == 2


def test_selective_does_not_free_the_blocks_that_it_was_asked_for() -> None:
    """Queueing writes may free blocks over the watermark: those just found must be pinned by then."""
    watermarks = {"high_watermark": 0.8, "low_watermark": 0.1}
    bench = Bench(segments=8, host_blocks=10, host=watermarks, policy={"write": "write_through_selective"})
    keys = bench.keys(5)
    bench.stored(keys, durability=Durability.PROCESS)
    lease = bench.lookup(keys)
    bench.store(bench.keys(5, 1))
    bench.planner.release(lease)
    lease = bench.lookup(keys)
    bench.send()
    bench.check()
    assert bench.planner.stats()["host_entries"] == lease.blocks == 5


def test_a_block_that_came_from_disk_is_not_written_again() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    for block in range(3):
        bench.lose(keys, block, Tier.HOST)
    bench.loaded(keys)
    bench.flush()
    bench.run()
    assert written(bench) == keys.digests


def test_a_spill_says_where_it_lies_and_how_it_is_wanted() -> None:
    bench = Bench(segments=4, groups=2, disk={"codec": "raw+lz4"})
    keys = bench.keys(2)
    bench.stored(keys)
    (plan,) = bench.plans(PlanKind.SPILL)
    assert plan.chains == ("raw+lz4", "raw")
    assert plan.priority == Priority.SPILL
    assert plan.pages is None
    assert sorted(plan.rows["group"].tolist()) == [0, 0, 1, 1]
    assert (plan.rows["host_page"] >= 0).all()
    assert sorted(plan.rows["host_pages"].tolist()) == [2, 2, 3, 3]
    assert sorted(plan.rows["depth"].tolist()) == [0, 0, 1, 1]


def test_no_more_is_on_its_way_to_disk_than_staging_allows() -> None:
    """The budget is one MiB: 128 blocks of 8 KiB."""
    bench = Bench(
        segments=4, host_blocks=400, segment_blocks=400, host={"capacity": "8MiB"}, disk={"capacity": "64MiB"}
    )
    bench.store(bench.keys(300))
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    assert sum(len(plan.rows) for plan in bench.plans(PlanKind.SPILL)) == (1 << 20) // (2 * PAGE_BYTES)
    bench.run()
    assert len(written(bench)) == 300
    bench.check_at_rest()


# --- durability -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["write_through", "write_back", "write_through_selective"])
@pytest.mark.parametrize("level", LEVELS)
def test_an_acknowledgement_waits_for_what_it_promises(level: Durability, write: str) -> None:
    bench = Bench(ranks=2, segments=4, policy={"write": write})
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=level)
    kinds = [PlanKind.STORE, PlanKind.SPILL] + [PlanKind.SYNC] * (level == Durability.DURABLE)
    for kind in kinds:
        for rank in (1, 0):
            assert not ticket.finished
            bench.planes[rank].finish(bench.in_flight(kind, rank))
            bench.hear()
            bench.check()
    assert ticket.count(Outcome.DONE) == 3
    assert ticket.finished
    bench.run()
    bench.check_at_rest()


@pytest.mark.parametrize("level", LEVELS)
def test_blocks_that_are_there_already_are_written_for_whoever_asks(level: Durability) -> None:
    bench = Bench(segments=4, **BACK)
    keys = bench.keys(3)
    bench.stored(keys)
    ticket = bench.store(keys, durability=level)
    assert not ticket.finished
    assert not bench.plans(PlanKind.SYNC)
    bench.run()
    assert ticket.count(Outcome.EXISTING) == 3
    assert len(bench.plans(PlanKind.SYNC)) == (level == Durability.DURABLE)
    assert bench.planner.stats()["disk_entries"] == 3
    again = bench.store(keys, durability=Durability.PROCESS)
    assert again.finished, "nothing is left to be written"


def test_what_is_written_already_is_synced_for_whoever_asks() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(2)
    bench.stored(keys)
    ticket = bench.store(keys, durability=Durability.DURABLE)
    assert not ticket.finished
    bench.run()
    assert ticket.count(Outcome.EXISTING) == 2
    assert len(written(bench)) == 2


@pytest.mark.parametrize("level", LEVELS)
def test_a_block_that_the_disk_would_not_take_is_refused_but_still_hits(level: Durability) -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=level)
    middle = keys.digests[1]
    bench.run(lambda plan, row: _no_space(plan, row, middle))
    assert ticket.outcome.tolist() == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
    assert ticket.reason[1] == Reason.NO_SPACE
    assert bench.match(keys) == 3
    assert bench.planner.stats()["disk_entries"] == 2
    bench.check_at_rest()


def _no_space(plan: Plan, row: int, key: bytes) -> Status | Reason:
    refused = plan.kind == PlanKind.SPILL and plan.rows["key"][row].tobytes() == key
    return Reason.NO_SPACE if refused else Status.OK


def test_a_sync_that_failed_acknowledges_nothing() -> None:
    bench = Bench(ranks=2, segments=4)
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=Durability.DURABLE)
    bench.run(lambda plan, row: Reason.IO_ERROR if plan.kind == PlanKind.SYNC and plan.rank == 1 else Status.OK)
    assert ticket.count(Outcome.FAILED) == 3
    assert (ticket.reason == Reason.IO_ERROR).all()
    assert bench.match(keys) == 3
    bench.check_at_rest()


@pytest.mark.parametrize("level", LEVELS)
def test_without_a_disk_nothing_more_than_memory_is_acknowledged(level: Durability) -> None:
    bench = Bench()
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=level)
    bench.run()
    assert ticket.count(Outcome.FAILED) == 3
    assert bench.match(keys) == 3
    bench.check_at_rest()


def test_what_waits_for_an_acknowledgement_is_not_evicted() -> None:
    bench = Bench(segments=4, host_blocks=4)
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=Durability.DURABLE)
    for kind in (PlanKind.STORE, PlanKind.SPILL):
        bench.planes[0].finish(bench.in_flight(kind))
        bench.hear()
    bench.check()
    assert bench.store(bench.keys(3, 1)).count(Outcome.FAILED) == 2
    bench.run()
    assert ticket.count(Outcome.DONE) == 3
    bench.check_at_rest()


def test_a_block_that_failed_in_memory_is_not_waited_for_on_disk() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=Durability.PROCESS)
    bench.run(lambda plan, row: Reason.GONE if plan.kind == PlanKind.STORE and row == 1 else Status.OK)
    assert ticket.outcome.tolist() == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
    assert ticket.reason[1] == Reason.GONE
    bench.check_at_rest()


# --- flush ------------------------------------------------------------------------------------------------------------


def finished_well(ticket: Ticket) -> bool:
    return ticket.finished and not ticket.count(Outcome.FAILED)


@pytest.mark.parametrize("level", list(Durability))
def test_a_flush_waits_for_stores_under_way_and_then_for_its_level(level: Durability) -> None:
    bench = Bench(segments=4, **BACK)
    keys = bench.keys(3)
    bench.store(keys)
    flush = bench.flush(level)
    assert not flush.finished
    bench.run()
    assert finished_well(flush)
    assert len(written(bench)) == 3 * (level > Durability.MEMORY)
    assert len(bench.plans(PlanKind.SYNC)) == (level == Durability.DURABLE)
    bench.check_at_rest()


def test_a_flush_of_nothing_is_over_at_once() -> None:
    bench = Bench(segments=4)
    assert finished_well(bench.flush(Durability.PROCESS))


def test_a_flush_waits_for_writes_that_are_on_their_way_already() -> None:
    bench = Bench(segments=4)
    bench.store(bench.keys(3))
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    flush = bench.flush()
    assert not flush.finished
    bench.run()
    assert finished_well(flush)
    assert len(written(bench)) == 3


def test_a_flush_that_could_not_write_everything_says_so() -> None:
    bench = Bench(segments=4, **BACK)
    keys = bench.keys(3)
    bench.stored(keys)
    flush = bench.flush()
    bench.run(lambda plan, row: Reason.IO_ERROR if plan.kind == PlanKind.SPILL and row == 0 else Status.OK)
    assert flush.finished
    assert flush.reason.tolist() == [Reason.IO_ERROR]


def test_a_flush_is_not_well_while_blocks_that_the_disk_refused_before_are_not_on_it() -> None:
    """Everything stored so far reaches the disk, or the flush says that it did not."""
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.store(keys)
    bench.run(lambda plan, row: Reason.IO_ERROR if plan.kind == PlanKind.SPILL else Status.OK)
    flush = bench.flush(Durability.DURABLE)
    bench.run()
    assert finished_well(flush) == (bench.planner.stats()["disk_entries"] == 3)
    bench.check_at_rest()


def test_without_a_disk_a_flush_of_blocks_fails() -> None:
    bench = Bench()
    bench.stored(bench.keys(2))
    assert not finished_well(bench.flush(Durability.PROCESS))
    assert finished_well(bench.flush(Durability.MEMORY))


# --- room in host memory ----------------------------------------------------------------------------------------------


def test_over_the_watermark_blocks_are_spilled_and_freed_the_oldest_first() -> None:
    bench = Bench(segments=4, host_blocks=10, host={"high_watermark": 0.8, "low_watermark": 0.5}, **BACK)
    old, new = bench.keys(5, 0), bench.keys(4, 1)
    bench.stored(old)
    assert not written(bench)
    bench.stored(new)
    stats = bench.planner.stats()
    assert stats["host_used_bytes"] <= 0.5 * stats["host_capacity_bytes"]
    assert set(written(bench)) == set(old.digests[1:])
    assert bench.match(old) == 5
    assert bench.match(new) == 4
    assert bench.lookup(old).tiers.tolist() == [Tier.HOST] + [Tier.DISK] * 4
    bench.check()


def test_what_is_on_disk_is_freed_without_being_written_again() -> None:
    bench = Bench(segments=4, host_blocks=10, host={"high_watermark": 0.8, "low_watermark": 0.5})
    bench.stored(bench.keys(5, 0))
    bench.stored(bench.keys(4, 1))
    assert len(written(bench)) == 9
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
    assert len(written(bench)) == 4, "nothing is sent to a disk that cannot be used"


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
    assert set(other.digests) <= set(written(bench))
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
    keys = bench.keys(140)
    bench.stored(keys)
    for attempt in (Reason.NO_SPACE, Status.OK):
        flush = bench.flush()
        if attempt is Status.OK:
            assert bench.store(bench.keys(4, 1)).count(Outcome.FAILED) == 4
        bench.run(lambda plan, row, outcome=attempt: outcome if plan.kind == PlanKind.SPILL else Status.OK)
    assert finished_well(flush)
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
    order = written(bench)
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


# --- segments ---------------------------------------------------------------------------------------------------------


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


# --- up again ---------------------------------------------------------------------------------------------------------


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
    assert ticket.tiers.tolist() == [Tier.DISK] * 3
    assert bench.lookup(keys).tiers.tolist() == [Tier.HOST] * 3
    assert bench.planner.stats()["disk_entries"] == 3 * groups


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
    assert ticket.outcome.tolist() == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
    assert bench.planner.stats()["host_entries"] == 2
    bench.check()


def test_a_prefetch_brings_what_is_only_on_disk() -> None:
    bench = Bench(segments=6, groups=2)
    keys = on_disk_only(bench, 4)
    bench.loaded(bench.keys(2), start=0)
    bench.run()
    ticket = bench.prefetch(keys)
    bench.run()
    assert ticket.outcome.tolist() == [Outcome.EXISTING] * 2 + [Outcome.DONE] * 2
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
    assert ticket.outcome.tolist() == [Outcome.DONE] * 2 + [Outcome.FAILED] * 2
    assert (ticket.reason[2:] == Reason.REFUSED).all()
    bench.planner.release(held)
    bench.check_at_rest()


def test_a_prefetch_of_nothing_is_over_at_once() -> None:
    bench = Bench(segments=4)
    assert bench.prefetch(bench.keys(3)).finished
    bench.stored(bench.keys(3))
    ticket = bench.prefetch(bench.keys(3))
    assert ticket.finished
    assert ticket.count(Outcome.EXISTING) == 3
    assert not np.any(ticket.reason)
    bench.check_at_rest()
