"""Several ranks: a key hits only when all have it, failures free what others landed, a new life voids the old one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvtier.core.plan import RECOVERED, DiskState, Farewell, PlanKind, Reason, Recovered, Status, Tier
from kvtier.errors import ConfigError
from kvtier.planner import Durability, Outcome
from tests.planner.bench import BLOCK, PAGES, Bench


def test_a_block_hits_only_when_every_rank_has_it() -> None:
    bench = Bench(ranks=2)
    keys = bench.keys(3)
    ticket = bench.store(keys)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE, 0))
    bench.hear()
    assert bench.match(keys) == 0
    assert not ticket.finished
    bench.planes[1].finish(bench.in_flight(PlanKind.STORE, 1))
    bench.hear()
    assert bench.match(keys) == 3
    assert ticket.count(Outcome.DONE) == 3
    bench.check_at_rest()


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_a_row_that_one_rank_failed_gives_its_room_back_on_both(failing: int, first: int) -> None:
    bench = Bench(ranks=2)
    keys = bench.keys(3)
    ticket = bench.store(keys)
    for rank in (first, 1 - first):
        plane = bench.planes[rank]
        plane.finish(
            bench.in_flight(PlanKind.STORE, rank),
            lambda row, bad=rank == failing: Reason.IO_ERROR if bad and row == 1 else Status.OK,
        )
        bench.hear()
        bench.check()
    assert bench.match(keys) == 1
    assert list(ticket.outcome) == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
    assert ticket.reason[1] == Reason.IO_ERROR
    assert bench.planner.stats()["host_entries"] == 2
    bench.check_at_rest()


def test_a_load_fails_where_any_rank_failed() -> None:
    bench = Bench(ranks=2)
    keys = bench.keys(4)
    bench.stored(keys)
    ticket = bench.load(bench.lookup(keys))
    bench.planes[1].finish(bench.in_flight(PlanKind.LOAD, 1), lambda row: Reason.DAMAGED if row == 2 else Status.OK)
    bench.planes[0].finish(bench.in_flight(PlanKind.LOAD, 0))
    bench.hear()
    assert ticket.finished
    assert list(ticket.outcome) == [Outcome.DONE, Outcome.DONE, Outcome.FAILED, Outcome.DONE]


def test_a_copy_lost_on_one_rank_is_a_miss_for_all() -> None:
    bench = Bench(ranks=2)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.lose(keys, 1, Tier.HOST, rank=1)
    assert bench.match(keys) == 1
    bench.stored(keys)
    assert bench.match(keys) == 3
    bench.check_at_rest()


def test_one_rank_may_have_it_in_memory_and_the_other_on_disk() -> None:
    """What counts is that every rank can read it; the slower place is what the hit says."""
    bench = Bench(ranks=2, segments=4)
    keys = bench.keys(2)
    bench.stored(keys)
    bench.lose(keys, 1, Tier.DISK, rank=0)
    bench.lose(keys, 0, Tier.HOST, rank=1)
    lease = bench.lookup(keys)
    assert lease.blocks == 2
    assert lease.tiers.tolist() == [Tier.DISK, Tier.HOST]
    assert set(bench.load(lease).outcome) == {Outcome.WAITING}
    bench.run()
    assert bench.tickets[-1].count(Outcome.DONE) == 2


def test_nothing_is_stored_before_every_rank_is_there() -> None:
    bench = Bench(ranks=2, attach=False)
    bench.planes[0].hello()
    bench.hear()
    assert bench.planner.recovering
    keys = bench.keys(2)
    ticket = bench.store(keys)
    assert ticket.finished
    assert list(ticket.reason) == [Reason.CLOSED] * 2
    bench.planes[1].hello()
    bench.hear()
    assert not bench.planner.recovering
    assert bench.stored(keys).count(Outcome.DONE) == 2


@pytest.mark.parametrize("kind", ["store", "load"])
@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_job_is_not_over_before_every_rank_has_let_go_of_the_engine_whatever_went_wrong(
    kind: str, mistaken: int
) -> None:
    """An answer of one rank could not be taken in; the other one is still reading, or writing, the engine's pages."""
    bench = Bench(ranks=2)
    keys = bench.keys(3)
    if kind == "load":
        bench.stored(keys)
        lease = bench.lookup(keys)
        ticket = bench.load(lease)
        bench.planner.release(lease)
    else:
        ticket = bench.store(keys)
    plane = bench.planes[mistaken]
    plane.finish(bench.in_flight(PlanKind[kind.upper()], mistaken))
    bench.planner.pass_over(plane.outbox.pop(), ValueError("half-way"))
    assert not ticket.finished
    assert not ticket.source_free
    bench.run()
    assert list(ticket.reason) == [Reason.REFUSED] * 3
    assert bench.match(keys) == (3 if kind == "load" else 0)
    assert not bench.planner.stats()["hops"]
    assert not bench.planner.stats()["pinned_entries"]


# --- a rank begins a new life -----------------------------------------------------------------------------------------


def restart(bench: Bench, rank: int) -> None:
    """A new process on ``rank``; it says who it is, and what it has on disk."""
    bench.planes[rank].restart()
    if bench.planes[rank].segments:
        bench.planes[rank].recover()
    bench.hear()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_life_has_nothing_in_memory(rank: int) -> None:
    bench = Bench(ranks=2)
    keys = bench.keys(3)
    bench.stored(keys)
    restart(bench, rank)
    assert bench.match(keys) == 0
    bench.check_at_rest()
    assert bench.planner.stats()["entries"] == 0
    assert bench.stored(keys).count(Outcome.DONE) == 3
    assert bench.match(keys) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_life_still_has_what_is_on_disk(rank: int) -> None:
    bench = Bench(ranks=2, segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    restart(bench, rank)
    assert bench.match(keys) == 3
    assert bench.loaded(keys).count(Outcome.DONE) == 3
    bench.check_at_rest()


def test_room_of_an_old_life_that_somebody_still_holds_is_not_given_back_to_the_new_one() -> None:
    """The new arena is empty: freeing there what lay in the old one would hand out the same pages twice."""
    bench = Bench(ranks=2, host_blocks=8)
    keys = bench.keys(4)
    bench.stored(keys)
    lease = bench.lookup(keys)
    restart(bench, 1)
    others = bench.keys(6, seed=1)
    bench.store(others)
    bench.planner.release(lease)
    bench.check()
    bench.run()
    bench.check_at_rest()
    assert bench.match(others) == 4, "rank 0 had to keep four blocks until the lease was released"


@pytest.mark.parametrize("finished", [0, 1])
def test_what_a_rank_landed_before_its_new_life_is_not_published_after_it(finished: int) -> None:
    """The rank had said its last word on the plan; the other one had not."""
    bench = Bench(ranks=2)
    keys = bench.keys(3)
    ticket = bench.store(keys)
    bench.planes[finished].finish(bench.in_flight(PlanKind.STORE, finished))
    bench.hear()
    restart(bench, finished)
    bench.planes[1 - finished].finish(bench.in_flight(PlanKind.STORE, 1 - finished))
    bench.hear()
    bench.check_at_rest()
    assert bench.match(keys) == 0
    assert list(ticket.reason) == [Reason.GONE] * 3


def die(bench: Bench, rank: int) -> None:
    """The process on ``rank`` is gone, and its channel says so."""
    bench.planes[rank].die()
    bench.hear()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["store", "load", "fetch", "spill", "flush"])
@pytest.mark.parametrize("answered", [(), (0,), (1,)], ids=["nobody", "rank 0", "rank 1"])
@pytest.mark.parametrize("end", [restart, die])
def test_plans_of_an_old_life_end_and_leave_nothing_behind(
    rank: int, kind: str, answered: tuple[int, ...], end: Callable[[Bench, int], None]
) -> None:
    bench = Bench(ranks=2, segments=4, host_blocks=6)
    keys = bench.keys(3)
    bench.stored(keys)
    if kind in ("load", "fetch"):
        for block in range(3):
            bench.lose(keys, block, Tier.HOST)
    if kind == "load":
        lease = bench.lookup(keys)
        bench.load(lease)
        bench.planner.release(lease)
    elif kind == "fetch":
        bench.prefetch(keys)
    elif kind == "flush":
        bench.flush(Durability.DURABLE)
    else:
        bench.store(bench.keys(3, seed=1))
        if kind == "spill":
            for plane in bench.planes:
                plane.finish(bench.in_flight(PlanKind.STORE, plane.rank))
            bench.hear()
    for other in answered:
        bench.planes[other].finish(next(iter(bench.planes[other].flights)))
        bench.hear()
    end(bench, rank)
    bench.check()
    bench.run()
    bench.check_at_rest()
    if end is die:
        assert bench.match(keys) == 0
        restart(bench, rank)
    assert bench.loaded(keys).count(Outcome.DONE) == 3


@pytest.mark.parametrize("end", [restart, die])
def test_nothing_of_an_old_life_becomes_durable_in_the_new_one(end: Callable[[Bench, int], None]) -> None:
    """One block of the store was written and the other one was not: what the new life syncs is not that block."""
    bench = Bench(segments=4)
    bench.stored(bench.keys(1, shared=1))
    keys = bench.keys(2, shared=1)
    ticket = bench.store(keys, durability=Durability.DURABLE)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    assert bench.in_flight(PlanKind.SPILL)
    end(bench, 0)
    assert ticket.finished
    assert list(ticket.outcome) == [Outcome.FAILED] * 2
    assert not bench.plans(PlanKind.SYNC)
    bench.check_at_rest()


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_asked_of_a_rank_that_is_gone(rank: int) -> None:
    """Whoever asks is told at once: no plan would be answered."""
    bench = Bench(ranks=2, segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    lease = bench.lookup(keys)
    die(bench, rank)
    sent = len(bench.sent)
    tickets = [bench.load(lease), bench.store(bench.keys(2, seed=1)), bench.flush(Durability.DURABLE)]
    assert all(ticket.finished for ticket in tickets)
    assert {bytes(ticket.reason[:1]) for ticket in tickets if ticket.outcome} == {bytes((Reason.CLOSED,))}
    assert not bench.prefetch(keys).outcome
    assert len(bench.sent) == sent
    assert bench.planner.recovering
    bench.planner.release(lease)
    bench.check_at_rest()


def test_a_rank_that_dies_while_it_tells_what_it_found_keeps_nobody_waiting() -> None:
    bench = Bench(ranks=2, segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.planes[1].restart()
    bench.hear()
    assert bench.planner.recovered_ranks == 1
    die(bench, 1)
    assert bench.planner.recovered_ranks == 1
    restart(bench, 1)
    assert not bench.planner.recovering
    assert bench.loaded(keys).count(Outcome.DONE) == 3


def test_a_farewell_of_an_earlier_life_is_passed_over() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.say(Farewell(0, 0))
    assert bench.match(keys) == 3


@pytest.mark.parametrize(("block_tokens", "record_pages"), [(2 * BLOCK, (2,)), (BLOCK, (3,)), (BLOCK, (2, 2))])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_blocks_are_of_another_size_is_refused(
    rank: int, block_tokens: int, record_pages: tuple[int, ...]
) -> None:
    """It would write over what lies behind the extents that are reserved for it."""
    bench = Bench(ranks=2, attach=False)
    bench.planes[rank].hello()
    hello = bench.planes[rank].outbox.pop()
    with pytest.raises(ConfigError, match=f"rank {rank} has blocks of {block_tokens} tokens"):
        bench.say(replace(hello, block_tokens=block_tokens, record_pages=record_pages))
    assert bench.planner.recovering


def test_late_words_of_an_old_life_are_passed_over() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.store(keys)
    plane = bench.planes[0]
    plane.finish(bench.in_flight(PlanKind.STORE))
    late = list(plane.outbox)
    late.append(Recovered(0, 1, np.empty(0, RECOVERED), final=True))
    plane.restart()
    bench.hear()
    assert bench.planner.recovering
    for message in (*late, DiskState(0, 1, False, 0, 5, np.array([[0, 1]], np.int64))):
        bench.say(message)
    assert bench.planner.recovering, "only the new life knows what is on disk"
    assert bench.match(keys) == 0
    plane.recover()
    bench.hear()
    assert bench.stored(keys).count(Outcome.DONE) == 3
    assert bench.planner.stats()["disk_entries"] == 3, "an old life cannot switch the new one's directory off"
    bench.check_at_rest()


def test_reports_of_a_rank_that_never_said_hello_are_passed_over() -> None:
    bench = Bench(ranks=2, attach=False, segments=4)
    bench.say(DiskState(1, 1, True, 0, 5))
    bench.planes[1].lose(b"\0" * 32, 0, Tier.DISK, (0, 0, 0))
    bench.hear()
    for plane in bench.planes:
        plane.hello()
        plane.recover()
    bench.hear()
    assert bench.stored(bench.keys(2)).count(Outcome.DONE) == 2


def test_plans_that_were_not_sent_when_a_rank_began_a_new_life_are_not_sent_to_it() -> None:
    """They name places of the old life's memory: the new one would write over what it keeps there by then."""
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.planner.store(keys, PAGES)
    plane = bench.planes[0]
    plane.restart()
    bench.planner.hear([plane.outbox.pop(0)])
    assert [plan.kind for plan in bench.planner.take_plans() if plan.kind == PlanKind.STORE] == []


def test_an_arena_of_another_size_may_come_with_a_new_life() -> None:
    bench = Bench(ranks=2, host_blocks=8)
    bench.stored(bench.keys(8))
    bench.planes[1].host_pages //= 2
    restart(bench, 1)
    ticket = bench.stored(bench.keys(8, seed=1))
    assert ticket.count(Outcome.DONE) == 4
    bench.check_at_rest()


def test_the_smallest_arena_says_how_much_is_freed_over_the_watermark() -> None:
    """A share of the largest may be more than all of the smallest: everything would have to go."""
    bench = Bench(ranks=2, host_blocks=8, attach=False, host={"high_watermark": 0.8, "low_watermark": 0.5})
    bench.planes[1].host_pages *= 4
    for plane in bench.planes:
        plane.hello()
    bench.hear()
    bench.stored(bench.keys(7))
    assert bench.planner.stats()["host_entries"] == 4
    bench.check_at_rest()


def test_what_was_removed_by_a_new_life_is_told_by_tier() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(2)
    bench.stored(keys)
    bench.lose(keys, 1, Tier.HOST)
    bench.planner.events.listening = True
    bench.planner.events.take()
    bench.planes[0].restart()
    bench.hear()
    gone = sorted((event.tier, keys.digests.index(event.key)) for event in bench.planner.events.take())
    assert gone == [("disk", 0), ("disk", 1), ("host", 0)]


def test_a_rank_beyond_those_of_the_cache_is_refused() -> None:
    bench = Bench(ranks=2)
    bench.planes[1].rank = 2
    bench.planes[1].restart()
    with pytest.raises(ConfigError, match="rank 2"):
        bench.say(bench.planes[1].outbox.pop())


def test_every_rank_gets_the_same_rows_and_its_own_places() -> None:
    bench = Bench(ranks=2)
    keys = bench.keys(3)
    bench.store(keys)
    first, second = bench.plans(PlanKind.STORE)
    assert (first.rank, second.rank) == (0, 1)
    assert first.plan_id == second.plan_id
    assert first.rows["key"].tobytes() == second.rows["key"].tobytes() == b"".join(keys.digests)
    assert first.rows["block"].tolist() == [0, 1, 2]
    assert (first.start, first.stop) == (0, 3 * BLOCK)


def test_a_block_that_several_ranks_lose_left_the_disk_once() -> None:
    bench = Bench(ranks=2, segments=6)
    keys = bench.keys(1)
    bench.stored(keys)
    bench.lose(keys, 0, Tier.DISK, rank=0)
    bench.lose(keys, 0, Tier.DISK, rank=1)
    stats = bench.planner.stats()
    assert stats["removed_disk_blocks"] == stats["stored_disk_blocks"] == 1
