"""When blocks are written to disk, what an acknowledgement means, what a flush promises."""

from __future__ import annotations

from functools import partial
from types import FunctionType

import pytest

from kvtier.core.plan import PAGE_BYTES, DiskState, Lineage, Plan, PlanKind, Priority, Reason, Status, Tier
from kvtier.planner import Durability, Outcome, Ticket
from kvtier.planner.disk import DiskBook
from kvtier.planner.memory import MemoryBook
from kvtier.planner.planner import Planner
from kvtier.planner.upkeep import Upkeep
from tests.interrupts import once, strike
from tests.planner.bench import BACK, BLOCK, Bench

LEVELS = [Durability.PROCESS, Durability.DURABLE]


# --- when blocks are written ------------------------------------------------------------------------------------------


def test_write_through_writes_every_block_when_it_is_stored_once() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.stored(keys)
    bench.loaded(keys)
    assert bench.written() == keys.digests
    assert bench.planner.stats()["disk_entries"] == 3
    bench.check_at_rest()


@pytest.mark.parametrize("write", ["write_back", "write_through_selective"])
def test_the_other_policies_write_nothing_while_there_is_room(write: str) -> None:
    bench = Bench(segments=4, policy={"write": write})
    bench.stored(bench.keys(3))
    assert not bench.written()


def test_selective_writes_a_block_when_it_is_used_again() -> None:
    bench = Bench(segments=4, policy={"write": "write_through_selective"})
    keys = bench.keys(4)
    bench.stored(keys)
    bench.loaded(bench.keys(4), start=2 * BLOCK)
    assert set(bench.written()) == set(keys.digests[2:])
    bench.loaded(keys)
    bench.loaded(keys)
    assert sorted(bench.written()) == sorted(keys.digests)
    bench.check_at_rest()


def test_selective_does_not_ask_again_for_what_the_disk_refused() -> None:
    bench = Bench(segments=4, policy={"write": "write_through_selective"})
    keys = bench.keys(2)
    bench.stored(keys)
    for _ in range(3):
        bench.planner.release(bench.lookup(keys))
        bench.send()
        bench.run(lambda plan, row: Reason.IO_ERROR)
    assert len(bench.written()) == 2


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


@pytest.mark.parametrize("durability", LEVELS)
def test_a_disk_that_is_only_read_is_sent_no_writes_and_keeps_its_copies(durability: Durability) -> None:
    bench = Bench(segments=4)
    old, new = bench.keys(3), bench.keys(3, 1)
    bench.stored(old, durability=Durability.PROCESS)
    for block in range(3):
        bench.lose(old, block, Tier.HOST)
    bench.say(DiskState(0, 1, True, 0, 0, reason="made by a newer version", writable=False))
    ticket = bench.stored(new, durability=durability)
    assert [Reason(reason) for reason in ticket.reason] == 3 * [Reason.NO_DISK]
    assert set(bench.written()) == set(old.digests)
    assert bench.match(old) == bench.loaded(old).count(Outcome.DONE) == 3
    bench.check_at_rest()


def test_a_block_that_came_from_disk_is_not_written_again() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    for block in range(3):
        bench.lose(keys, block, Tier.HOST)
    bench.loaded(keys)
    bench.flush()
    bench.run()
    assert bench.written() == keys.digests


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
    assert len(bench.written()) == 300
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
    assert len(bench.written()) == 2


@pytest.mark.parametrize("level", LEVELS)
def test_a_block_that_the_disk_would_not_take_is_refused_but_still_hits(level: Durability) -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=level)
    middle = keys.digests[1]
    bench.run(lambda plan, row: _no_space(plan, row, middle))
    assert list(ticket.outcome) == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
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
    assert set(ticket.reason) == {Reason.IO_ERROR}
    assert bench.match(keys) == 3
    bench.check_at_rest()


@pytest.mark.parametrize("level", LEVELS)
def test_without_a_disk_nothing_more_than_memory_is_acknowledged(level: Durability) -> None:
    bench = Bench()
    keys = bench.keys(3)
    ticket = bench.store(keys, durability=level)
    bench.run()
    assert ticket.count(Outcome.FAILED) == 3
    assert set(ticket.reason) == {Reason.NO_DISK}
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
    assert list(ticket.outcome) == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
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
    assert len(bench.written()) == 3 * (level > Durability.MEMORY)
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
    assert len(bench.written()) == 3


def test_a_flush_that_could_not_write_everything_says_so() -> None:
    bench = Bench(segments=4, **BACK)
    keys = bench.keys(3)
    bench.stored(keys)
    flush = bench.flush()
    bench.run(lambda plan, row: Reason.IO_ERROR if plan.kind == PlanKind.SPILL and row == 0 else Status.OK)
    assert flush.finished
    assert list(flush.reason) == [Reason.IO_ERROR]


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
    for level in LEVELS:
        ticket = bench.flush(level)
        assert not finished_well(ticket)
        assert set(ticket.reason) == {Reason.NO_DISK}
    assert finished_well(bench.flush(Durability.MEMORY))


# --- what went while it waited for the disk ---------------------------------------------------------------------------


def test_a_write_into_a_directory_that_is_gone_by_now_is_not_acknowledged() -> None:
    bench = Bench(segments=3, **BACK)
    ticket = bench.store(bench.keys(1), durability=Durability.PROCESS)
    plane = bench.planes[0]
    plane.finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    plane.answer(bench.in_flight(PlanKind.SPILL), {0: Status.OK})
    late = plane.outbox.pop()
    plane.usable = False
    plane.disk_state()
    bench.hear()
    bench.say(late)
    bench.run()
    assert list(ticket.reason) == [Reason.NO_DISK]
    bench.check_at_rest()


def test_a_flush_is_not_told_of_the_write_of_another_block_with_the_same_number() -> None:
    bench = Bench(segments=6, **BACK)
    bench.planner._state.disk.write_budget_bytes = 2 * PAGE_BYTES
    lost, other = bench.keys(1, 2), bench.keys(1, 3)
    bench.stored(bench.keys(1, 1))
    bench.stored(lost)
    flush = bench.flush(Durability.PROCESS)
    number = bench.entry(lost, 0)
    bench.lose(lost, 0, Tier.HOST)
    bench.store(other)
    assert bench.entry(other, 0) == number
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    bench.run()
    assert flush.outcome[0] == Outcome.FAILED
    bench.check_at_rest()


def test_that_the_disk_refused_a_block_is_forgotten_with_it() -> None:
    bench = Bench(segments=6, **BACK)
    keys, other = bench.keys(1, 1), bench.keys(1, 2)
    bench.stored(keys, lineage=Lineage.APPROXIMATE)
    number = bench.entry(keys, 0)
    bench.flush()
    bench.run(lambda plan, row: Reason.IO_ERROR if plan.kind == PlanKind.SPILL else Status.OK)
    bench.stored(keys)  # exact content takes its place
    bench.stored(other)
    assert number in (bench.entry(keys, 0), bench.entry(other, 0))
    assert not bench.planner._state.disk.was_refused(number)


def test_a_block_that_was_lost_while_it_was_written_was_not_refused() -> None:
    bench = Bench(segments=6, host_blocks=4, **BACK)
    lost, next_one = bench.keys(1, 1), bench.keys(1, 2)
    bench.stored(lost)
    number = bench.entry(lost, 0)
    bench.flush()
    bench.lose(lost, 0, Tier.HOST)
    bench.run(lambda plan, row: Reason.DAMAGED if plan.kind == PlanKind.SPILL else Status.OK)
    bench.stored(next_one)
    assert bench.entry(next_one, 0) == number
    for seed in range(3, 12):
        bench.stored(bench.keys(1, seed))
    assert bench.match(next_one) == 1, "it was evicted, and the disk never had it"


def test_a_host_tier_that_cannot_be_drained_is_not_looked_through_again_before_something_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(segments=6, host_blocks=16, host={"high_watermark": 0.5, "low_watermark": 0.25}, **BACK)
    bench.store(bench.keys(12))
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    looked = []
    make_room = MemoryBook.make_room
    monkeypatch.setattr(MemoryBook, "make_room", lambda self, *how: looked.append(how) or make_room(self, *how))
    for _ in range(5):
        bench.prefetch(bench.keys(1, 9))
    assert len(looked) <= 1
    bench.run()
    assert looked
    assert bench.planner.stats()["host_entries"] == 4
    bench.check_at_rest()


@pytest.mark.parametrize("within", [Upkeep._write_those, DiskBook.next_writes])
def test_an_interrupt_while_writes_are_planned_keeps_nobody_waiting(within: FunctionType) -> None:
    """What was taken out of the queue and not sent is let go of: any later flush would wait for it for ever."""
    number, struck = 0, True
    while struck:
        bench = Bench(segments=8, **BACK)
        keys = bench.keys(4)
        bench.stored(keys)
        wanted = partial(bench.store, keys, durability=Durability.PROCESS)
        struck = strike(wanted, within, number)
        flush, again = bench.flush(), wanted()
        bench.run()
        assert flush.finished, f"struck after call {number}"
        assert again.finished
        assert set(again.outcome) == {Outcome.EXISTING}, "the disk has refused nothing"
        bench.check_at_rest()
        number += 1
    assert number >= 4


def test_an_interrupt_while_a_job_ends_leaves_it_to_be_ended_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(segments=8, **BACK)
    keys = bench.keys(4)
    bench.stored(keys)
    ticket = bench.store(keys, durability=Durability.PROCESS)
    stages, state = bench.planner._stages, bench.planner._state
    monkeypatch.setattr(state, "unpinned", once(state.unpinned, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        stages.give_up(ticket, Reason.REFUSED)
    bench.planner.take_finished()
    stages.give_up(ticket, Reason.REFUSED)
    assert bench.planner.take_finished() == [ticket]
    bench.run()
    assert bench.planner.stats()["pinned_entries"] == 0


@pytest.mark.parametrize("segments", [0, 8])
def test_a_flush_does_not_say_that_all_is_on_disk_when_it_left_host_memory_and_the_disk_was_gone(segments: int) -> None:
    bench = Bench(segments=segments, host_blocks=4)
    if segments:
        bench.planes[0].usable = False
        bench.planes[0].disk_state()
        bench.hear()
    assert not bench.flush().count(Outcome.FAILED), "nothing was stored"
    bench.stored(bench.keys(4))
    for seed in range(1, 3):
        bench.stored(bench.keys(4, seed))
    bench.planner._state.host.make_room(8)
    assert bench.planner.stats()["host_entries"] == 0
    flush = bench.flush()
    assert list(flush.reason) == [Reason.NO_DISK]


def test_a_flush_of_what_is_all_on_disk_is_done_while_the_disk_takes_nothing() -> None:
    bench = Bench(segments=8)
    bench.stored(bench.keys(4), durability=Durability.PROCESS)
    bench.planner._state.host.make_room(16)
    for directory in bench.planner._state.disk.ranks[0].directories.values():
        directory.writable = False
    assert not bench.planner._state.disk.usable
    assert not bench.flush().count(Outcome.FAILED)


@pytest.mark.parametrize("loss", ["directory", "refused", "rank"])
def test_a_flush_is_not_done_where_blocks_were_lost_and_no_disk_works(loss: str) -> None:
    bench = Bench(segments=8)
    plane = bench.planes[0]
    bench.store(bench.keys(4))
    bench.run(lambda plan, _: Status.FAILED if loss == "refused" and plan.kind == PlanKind.SPILL else Status.OK)
    if loss != "rank":
        bench.planner._state.host.make_room(32)
        assert bench.planner.stats()["host_entries"] == 0
    plane.usable = False
    if loss == "rank":
        plane.restart()
        plane.recover()
    plane.disk_state()
    bench.hear()
    assert bench.match(bench.keys(4)) == 0
    assert list(bench.flush().reason) == [Reason.NO_DISK]


def test_an_interrupt_while_a_lookup_admits_to_the_disk_leaves_no_lease() -> None:
    number, struck = 0, True
    while struck:
        bench = Bench(segments=8, policy={"write": "write_through_selective"})
        keys = bench.keys(4)
        bench.stored(keys)
        struck = strike(partial(bench.lookup, keys), Planner._admit_to_disk, number)
        if struck:
            assert bench.planner.stats()["leases"] == 0, f"struck after call {number}"
        number += 1
    assert number >= 2
