"""Stores: what is kept, what is there already, what is refused, and who waits for whom."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from kvtier.core.keys import Keys, Root
from kvtier.core.plan import NOWHERE, Completion, Lineage, PlanKind, Priority, Reason, Status, Tier
from kvtier.core.wire import decode, encode
from kvtier.errors import ConfigError
from kvtier.planner import Durability, Outcome
from kvtier.planner.memory import MemoryBook
from kvtier.planner.wishes import StoreWish
from tests.interrupts import strike
from tests.planner.bench import BLOCK, PAGES, ROOT, Bench


def test_stored_blocks_hit_and_everything_is_let_go() -> None:
    bench = Bench()
    keys = bench.keys(5)
    ticket = bench.stored(keys)
    assert ticket.count(Outcome.DONE) == 5
    assert ticket.source_free
    assert bench.match(keys) == 5
    bench.check_at_rest()


def test_nothing_hits_before_it_is_whole() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.store(keys)
    assert bench.match(keys) == 0
    bench.planes[0].answer(bench.in_flight(PlanKind.STORE), {0: Status.OK, 1: Status.OK})
    bench.hear()
    assert bench.match(keys) == 0, "blocks are published when all have answered"
    bench.check()
    bench.run()
    assert bench.match(keys) == 3


def test_a_plan_says_all_that_a_record_needs() -> None:
    bench = Bench(groups=2)
    keys = bench.keys(3)
    bench.store(keys)
    (plan,) = bench.sent
    rows = plan.rows
    assert plan.kind == PlanKind.STORE
    assert plan.priority == Priority.SPILL
    assert plan.chains == ("raw",)
    assert rows["group"].tolist() == [0] * 3 + [1] * 3
    assert rows["block"].tolist() == rows["depth"].tolist() == [0, 1, 2] * 2
    assert [row.tobytes() for row in rows["key"][:3]] == keys.digests
    assert [row.tobytes() for row in rows["parent"][3:]] == [ROOT.digest(), *keys.digests[:2]]
    assert (rows["tokens"] == BLOCK).all()
    assert rows["target_pages"].tolist() == [2] * 3 + [3] * 3
    assert (rows["host_page"] == NOWHERE).all()
    assert (rows["disk_segment"] == NOWHERE).all()
    assert plan.pages is not None
    assert plan.pages.groups[0].ids.tolist() == PAGES.groups[0].ids.tolist()


def test_a_partial_last_block_is_neither_stored_nor_counted() -> None:
    bench = Bench()
    keys = bench.keys(2, extra_tokens=BLOCK - 1)
    assert len(bench.stored(keys).outcome) == 2
    short = bench.keys(0, extra_tokens=BLOCK - 1)
    assert len(bench.stored(short).outcome) == 0
    assert bench.plans(PlanKind.STORE)[0].rows["block"].tolist() == [0, 1]
    assert len(bench.plans(PlanKind.STORE)) == 1


def test_what_is_kept_already_is_not_moved_again() -> None:
    bench = Bench()
    bench.stored(bench.keys(3, shared=3))
    ticket = bench.stored(bench.keys(5, shared=3))
    assert list(ticket.outcome) == [Outcome.EXISTING] * 3 + [Outcome.DONE] * 2
    assert bench.plans(PlanKind.STORE)[1].rows["block"].tolist() == [3, 4]
    again = bench.stored(bench.keys(5, shared=3))
    assert again.count(Outcome.EXISTING) == 5
    assert len(bench.plans(PlanKind.STORE)) == 2


def test_a_store_from_start_on_keeps_full_blocks_only() -> None:
    bench = Bench()
    keys = bench.keys(4)
    ticket = bench.stored(keys, start=BLOCK + 1)
    assert ticket.first_block == 2
    assert ticket.count(Outcome.DONE) == 2
    assert bench.match(keys) == 0
    assert bench.match(keys, start=2 * BLOCK) == 4
    bench.stored(keys)
    assert bench.match(keys) == 4


@pytest.mark.parametrize("start", [3 * BLOCK, 3 * BLOCK + 1, 4 * BLOCK])
def test_a_store_that_begins_at_the_end_is_over_at_once(start: int) -> None:
    bench = Bench()
    ticket = bench.store(bench.keys(3), start=start)
    assert ticket.finished
    assert not len(ticket.outcome)
    assert not bench.sent


# --- when there is no room --------------------------------------------------------------------------------------------


def test_of_a_store_that_does_not_fit_the_tail_is_refused_and_the_prefix_kept() -> None:
    bench = Bench(host_blocks=4)
    keys = bench.keys(6)
    ticket = bench.stored(keys)
    assert list(ticket.outcome) == [Outcome.DONE] * 4 + [Outcome.FAILED] * 2
    assert list(ticket.reason) == [Reason.NONE] * 4 + [Reason.REFUSED] * 2
    assert bench.match(keys) == 4
    bench.check_at_rest()


def test_what_a_store_extends_is_not_evicted_to_make_room_for_it() -> None:
    bench = Bench(host_blocks=4)
    bench.stored(bench.keys(3, shared=3))
    longer = bench.keys(6, shared=3)
    ticket = bench.stored(longer)
    assert ticket.count(Outcome.EXISTING) == 3
    assert ticket.count(Outcome.DONE) == 1
    assert bench.match(longer) == 4


@pytest.mark.parametrize("blocks", [1, 3])
def test_what_a_store_from_start_on_extends_is_not_evicted_to_make_room_for_it(blocks: int) -> None:
    """Nobody would find the new blocks without it, and they would keep it out for as long as they are there."""
    bench = Bench(host_blocks=4)
    bench.stored(bench.keys(4, shared=4))
    longer = bench.keys(4 + blocks, shared=4)
    ticket = bench.stored(longer, start=4 * BLOCK)
    assert ticket.count(Outcome.FAILED) == blocks
    assert bench.match(longer) == 4
    bench.check_at_rest()


@pytest.mark.parametrize("start", [0, 4])
def test_an_interrupt_while_room_is_made_leaves_nothing_pinned(start: int) -> None:
    number, struck = 0, True
    while struck:
        bench = Bench(host_blocks=4)
        bench.stored(bench.keys(4, shared=4))
        struck = strike(partial(bench.store, bench.keys(6, shared=4), start=start * BLOCK), MemoryBook._reserve, number)
        assert bench.planner.stats()["pinned_entries"] == 0, f"struck after call {number}"
        number += 1
    assert number >= 3


def test_what_a_store_extends_makes_room_where_the_disk_has_it_too() -> None:
    bench = Bench(host_blocks=4, segments=8)
    bench.stored(bench.keys(4, shared=4))
    longer = bench.keys(7, shared=4)
    assert bench.stored(longer, start=4 * BLOCK).count(Outcome.DONE) == 3
    assert bench.match(longer) == 7
    bench.check_at_rest()


def test_the_least_recently_used_leaves_make_room() -> None:
    bench = Bench(host_blocks=6)
    old, used, new = bench.keys(3, 0), bench.keys(3, 1), bench.keys(2, 2)
    bench.stored(used)
    bench.stored(old)
    bench.planner.release(bench.lookup(used))
    bench.stored(new)
    assert bench.match(new) == 2
    assert bench.match(used) == 3
    assert bench.match(old) == 1
    bench.check_at_rest()


def test_a_parent_that_is_older_than_its_children_goes_right_after_the_last_of_them() -> None:
    """An engine that holds the prefix itself uses only what comes behind it."""
    bench = Bench(host_blocks=3)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.planner.release(bench.lookup(keys, start=BLOCK))
    assert bench.stored(bench.keys(3, 1)).count(Outcome.DONE) == 3
    bench.check_at_rest()


def test_what_is_pinned_stays_and_the_store_is_refused() -> None:
    bench = Bench(host_blocks=4)
    keys = bench.keys(4)
    bench.stored(keys)
    lease = bench.lookup(keys)
    other = bench.keys(2, 1)
    assert bench.stored(other).count(Outcome.FAILED) == 2
    assert bench.match(keys) == 4
    bench.planner.release(lease)
    assert bench.stored(other).count(Outcome.DONE) == 2
    assert bench.match(keys) == 2


def test_what_is_being_loaded_stays_after_its_lease_was_released() -> None:
    bench = Bench(host_blocks=4)
    keys = bench.keys(4)
    bench.stored(keys)
    lease = bench.lookup(keys)
    load = bench.load(lease)
    bench.planner.release(lease)
    assert bench.store(bench.keys(2, 1)).count(Outcome.FAILED) == 2
    bench.run()
    assert load.count(Outcome.DONE) == 4
    bench.check_at_rest()


def test_groups_of_different_sizes_share_one_arena() -> None:
    bench = Bench(groups=2, host_blocks=3)
    keys = bench.keys(5)
    ticket = bench.stored(keys)
    done = ticket.count(Outcome.DONE)
    assert 1 <= done <= 3
    assert bench.match(keys) == done, "a block that only one group kept is not counted as stored"
    bench.check_at_rest()


def test_a_ghost_that_is_stored_again_while_its_last_child_makes_room() -> None:
    """The ghost is in the request, its children are not: they go, and must not take it along."""
    bench = Bench(host_blocks=4)
    old = bench.keys(4, 0, shared=1)
    bench.stored(old)
    bench.lose(old, 0, Tier.HOST)
    assert bench.match(old) == 0
    new = bench.keys(4, 1, shared=1)
    ticket = bench.store(new)
    bench.check()
    bench.run()
    assert ticket.count(Outcome.DONE) == 4
    assert bench.match(new) == 4
    bench.check_at_rest()


def test_a_full_index_refuses_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.planner.planner.max_entries", lambda config, layout: 5)
    bench = Bench()
    keys = bench.keys(7)
    ticket = bench.stored(keys)
    assert ticket.count(Outcome.DONE) == 5
    assert ticket.count(Outcome.FAILED) == 2
    assert bench.match(keys) == 5
    bench.check_at_rest()


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_block_that_could_not_be_gathered_is_no_hit_and_takes_no_room() -> None:
    bench = Bench()
    keys = bench.keys(4)
    ticket = bench.store(keys)
    bench.run(lambda plan, row: Reason.GONE if row == 2 else Status.OK)
    assert list(ticket.outcome) == [Outcome.DONE] * 2 + [Outcome.FAILED, Outcome.DONE]
    assert bench.match(keys) == 2
    assert bench.planner.stats()["host_entries"] == 3
    bench.check_at_rest()
    assert list(bench.stored(keys).outcome) == [Outcome.EXISTING] * 2 + [Outcome.DONE, Outcome.EXISTING]
    assert bench.match(keys) == 4


def test_of_several_reasons_the_first_stands() -> None:
    bench = Bench(ranks=2, groups=2)
    ticket = bench.store(bench.keys(2))
    reasons = iter([Reason.GONE, Reason.IO_ERROR, Reason.DAMAGED, Reason.NO_SPACE])
    bench.run(lambda plan, row: next(reasons) if plan.rows["block"][row] == 1 else Status.OK)
    assert list(ticket.reason) == [Reason.NONE, Reason.GONE]


def test_a_quarantined_extent_is_not_used_again_until_it_is_released() -> None:
    bench = Bench(host_blocks=2)
    keys = bench.keys(2)
    ticket = bench.store(keys)
    number = bench.in_flight(PlanKind.STORE)
    bench.planes[0].answer(number, {0: Status.QUARANTINED, 1: Status.QUARANTINED})
    bench.hear()
    assert ticket.finished, "nobody waits for what may never come back"
    bench.check()
    assert bench.store(bench.keys(2, 1)).count(Outcome.FAILED) == 2
    bench.planes[0].release(number, {0})
    bench.hear()
    assert bench.store(bench.keys(2, 1)).count(Outcome.FAILED) == 1
    bench.planes[0].release(number)
    bench.run()
    bench.check_at_rest()
    assert bench.stored(bench.keys(2, 2)).count(Outcome.DONE) == 2


def test_a_row_that_is_quarantined_and_released_in_one_message_gives_its_room_back() -> None:
    bench = Bench()
    bench.store(bench.keys(2))
    plane, number = bench.planes[0], bench.in_flight(PlanKind.STORE)
    plane.answer(number, {0: Status.QUARANTINED, 1: Status.OK})
    plane.release(number)
    first, second = plane.outbox
    plane.outbox = []
    object.__setattr__(second, "rows", np.concatenate((first.rows, second.rows)))
    bench.say(second)
    bench.check_at_rest()


def test_rows_that_a_data_plane_never_answered_failed_when_it_said_its_last_word() -> None:
    bench = Bench()
    ticket = bench.store(bench.keys(3))
    plane, number = bench.planes[0], bench.in_flight(PlanKind.STORE)
    plane.answer(number, {1: Status.OK})
    object.__setattr__(plane.outbox[0], "final", True)
    bench.hear()
    assert list(ticket.outcome) == [Outcome.FAILED, Outcome.DONE, Outcome.FAILED]
    assert ticket.reason[0] == Reason.GONE
    bench.check_at_rest()


def test_the_pages_of_the_engine_are_free_before_the_store_is_done() -> None:
    bench = Bench(ranks=2)
    ticket = bench.store(bench.keys(2))
    bench.news.clear()
    bench.planes[0].free_source(bench.in_flight(PlanKind.STORE, 0))
    bench.hear()
    assert not ticket.source_free, "the other rank still reads them"
    bench.planes[1].free_source(bench.in_flight(PlanKind.STORE, 1))
    bench.hear()
    assert ticket.source_free
    assert not ticket.finished
    assert bench.news == [ticket]


# --- long stores are several hops ------------------------------------------------------------------------------------


@pytest.fixture
def two_blocks_a_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stores.STORE_HOP_BYTES", "stores.WRITE_HOP_BYTES", "upkeep.WRITE_HOP_BYTES"):
        monkeypatch.setattr(f"kvtier.planner.{name}", 2 * 2 * 4096)


@pytest.mark.usefixtures("two_blocks_a_hop")
def test_the_first_blocks_of_a_long_store_hit_while_the_last_are_gathered() -> None:
    bench = Bench(segments=6)
    keys = bench.keys(5)
    ticket = bench.store(keys)
    assert [plan.rows["block"].tolist() for plan in bench.plans(PlanKind.STORE)] == [[0, 1], [2, 3], [4]]
    first = bench.in_flight(PlanKind.STORE)
    bench.planes[0].finish(first)
    bench.hear()
    bench.check()
    assert bench.match(keys) == 2
    assert bench.lookup(keys).pending_blocks == 3
    assert bench.plans(PlanKind.SPILL), "writing begins at once"
    assert not ticket.source_free
    bench.run()
    assert ticket.count(Outcome.DONE) == 5
    assert bench.match(keys) == 5


@pytest.mark.usefixtures("two_blocks_a_hop")
def test_the_pages_of_a_long_store_are_free_when_every_hop_is_done_with_them() -> None:
    bench = Bench(ranks=2)
    ticket = bench.store(bench.keys(5))
    bench.news.clear()
    for plane in bench.planes:
        for number in list(plane.flights):
            assert not ticket.source_free
            plane.free_source(number)
            plane.free_source(number)
            bench.hear()
    assert ticket.source_free
    assert not ticket.finished
    assert bench.news == [ticket]
    bench.run()
    bench.check_at_rest()


@pytest.mark.usefixtures("two_blocks_a_hop")
def test_of_a_long_store_one_hop_may_fail_alone() -> None:
    bench = Bench()
    keys = bench.keys(5)
    first, second = bench.store(keys), bench.store(keys, durability=Durability.PROCESS)
    bench.run(lambda plan, row: Reason.GONE if plan.rows["block"][row] in (2, 3) else Status.OK)
    for ticket in (first, second):
        assert [at for at, why in enumerate(ticket.reason) if why == Reason.GONE] == [2, 3]
    assert bench.match(keys) == 2
    bench.check_at_rest()


# --- single flight ----------------------------------------------------------------------------------------------------


def test_a_second_store_of_a_pending_block_waits_for_the_first() -> None:
    bench = Bench()
    keys = bench.keys(3)
    first, second = bench.store(keys), bench.store(keys)
    assert len(bench.plans(PlanKind.STORE)) == 1
    assert not second.finished
    bench.run()
    assert first.count(Outcome.DONE) == 3
    assert second.count(Outcome.EXISTING) == 3
    bench.check_at_rest()


def test_a_store_that_only_joins_others_gives_its_pages_back_at_once() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.store(keys)
    bench.news.clear()
    second = bench.store(keys)
    assert second.source_free
    assert bench.news == [second], "whoever waits for the pages must be told"


def test_a_store_may_join_two_others_and_bring_blocks_of_its_own() -> None:
    bench = Bench()
    whole = bench.keys(6, 1, shared=3)
    bench.store(bench.keys(2, shared=2, root=ROOT))
    bench.store(bench.keys(3, shared=3))
    ticket = bench.store(whole)
    assert [plan.rows["block"].tolist() for plan in bench.plans(PlanKind.STORE)] == [[0, 1], [2], [3, 4, 5]]
    for number in list(bench.planes[0].flights)[::-1]:
        assert not ticket.finished
        bench.planes[0].finish(number)
        bench.hear()
    assert list(ticket.outcome) == [Outcome.EXISTING] * 3 + [Outcome.DONE] * 3
    assert bench.match(whole) == 6
    bench.check_at_rest()


def test_whoever_joined_a_store_that_failed_failed_too() -> None:
    bench = Bench(groups=2)
    keys = bench.keys(3)
    first, second = bench.store(keys), bench.store(keys)
    bench.run(lambda plan, row: Reason.IO_ERROR if row == 4 else Status.OK)
    for ticket in (first, second):
        assert ticket.outcome[1] == Outcome.FAILED
        assert ticket.reason[1] == Reason.IO_ERROR
    assert bench.match(keys) == 1
    bench.check_at_rest()


def test_a_failed_block_can_be_stored_again_while_its_first_extent_is_quarantined() -> None:
    bench = Bench()
    keys = bench.keys(2)
    bench.store(keys)
    first = bench.in_flight(PlanKind.STORE)
    bench.planes[0].answer(first, {0: Status.QUARANTINED, 1: Status.OK})
    bench.hear()
    assert list(bench.store(keys).outcome) == [Outcome.WAITING, Outcome.EXISTING]
    bench.planes[0].finish(next(number for number in bench.planes[0].flights if number != first))
    bench.hear()
    assert bench.match(keys) == 2
    bench.check()
    bench.run()
    bench.check_at_rest()


def test_a_second_store_may_ask_for_more_durability_than_the_one_under_way() -> None:
    bench = Bench(segments=4, policy={"write": "write_back"})
    keys = bench.keys(3)
    first = bench.store(keys)
    second = bench.store(keys, durability=Durability.PROCESS)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    assert first.finished
    assert not second.finished
    assert sorted(bench.plans(PlanKind.SPILL)[0].rows["block"].tolist()) == [0, 1, 2]
    bench.run()
    assert second.count(Outcome.EXISTING) == 3
    assert bench.planner.stats()["disk_entries"] == 3
    bench.check_at_rest()


# --- keys that are not the cache's own --------------------------------------------------------------------------------


def test_foreign_keys_with_parents_are_linked() -> None:
    bench = Bench()
    keys = Keys.foreign(ROOT, [b"a", b"b", b"c"], BLOCK, engine="vllm", chained=True)
    bench.stored(keys)
    assert bench.match(keys) == 3
    assert bench.index.children[bench.entry(keys, 0)] == 1


def test_foreign_keys_without_parents_are_plain_lru() -> None:
    bench = Bench(host_blocks=3)
    keys = Keys.foreign(ROOT, [b"a", b"b", b"c"], BLOCK, engine="vllm", chained=False)
    bench.stored(keys)
    assert bench.match(keys) == 3
    assert bench.index.parent[bench.entry(keys, 1)] == -1
    later = Keys.foreign(ROOT, [b"d"], BLOCK, engine="vllm", chained=False)
    bench.stored(later)
    assert bench.match(keys) == 2
    bench.check_at_rest()


def test_keys_in_blocks_of_another_size_are_refused() -> None:
    """Their blocks would be gathered from the wrong tokens: wrong bytes under a good key."""
    bench = Bench()
    keys = Keys.from_tokens(ROOT, range(100), 2 * BLOCK)
    for verb in (bench.store, bench.lookup, bench.match, bench.prefetch):
        with pytest.raises(ConfigError, match=f"{2 * BLOCK} tokens"):
            verb(keys)
    bench.check_at_rest()


def test_tenants_never_hit_each_others_blocks() -> None:
    bench = Bench()
    bench.stored(bench.keys(3, root=Root("model", tenant="acme")))
    assert bench.match(bench.keys(3, root=Root("model", tenant="other"))) == 0
    assert bench.match(bench.keys(3, root=Root("model"))) == 0
    assert bench.match(bench.keys(3, root=Root("model", tenant="acme"))) == 3


def test_the_first_hop_to_an_idle_disk_is_short_and_the_next_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk waits for the first one."""
    block = 2 * 4096
    monkeypatch.setattr("kvtier.planner.stores.FIRST_WRITE_HOP_BYTES", block)
    monkeypatch.setattr("kvtier.planner.stores.WRITE_HOP_BYTES", 3 * block)
    bench = Bench(segments=20, host_blocks=40)
    for seed in range(2):
        bench.store(bench.keys(7, seed), durability=Durability.PROCESS)
    assert [len(plan.rows) for plan in bench.plans(PlanKind.STORE)] == [1, 2, 3, 1, 3, 3, 1]
    bench.store(bench.keys(4, 2))
    assert [len(plan.rows) for plan in bench.plans(PlanKind.STORE)][7:] == [4]


# --- places that nobody reserved -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie", [{"page": -5}, {"page": 0}, {"pages": 0}, {"pages": 2**31 - 1}, {"row": -1}, {"tier": Tier.HOST, "page": 8}],
    ids=str,
)  # fmt: skip
def test_a_completion_that_speaks_of_a_place_it_was_not_given_is_refused_whole(lie: dict[str, int]) -> None:
    """It crossed from another process: what it says would be read, and freed, as if it were so."""
    bench = Bench(host_blocks=8)
    kept, keys = bench.keys(2), bench.keys(3, seed=1)
    bench.stored(kept)
    ticket = bench.store(keys)
    plane = bench.planes[0]
    plane.finish(bench.in_flight(PlanKind.STORE))
    completion = decode(encode(plane.outbox.pop()))
    assert isinstance(completion, Completion)
    rows = completion.rows.copy()
    for name, value in lie.items():
        rows[name][1] = value
    forged = replace(completion, rows=rows)
    with pytest.raises(ValueError, match="reserved") as caught:
        bench.planner.take_in(forged)
    bench.planner.pass_over(forged, caught.value)
    assert ticket.finished
    assert bench.match(keys) == 0
    assert bench.match(kept) == 2


@pytest.mark.parametrize("status", [Status.OK, Status.FAILED, Status.QUARANTINED, Status.RELEASED])
@pytest.mark.parametrize("row", [-1, 3, 2**31 - 1])
def test_an_answer_about_a_row_that_the_plan_does_not_have_is_refused_before_anything_is_noted(
    row: int, status: Status
) -> None:
    """Noted as a failure, it broke every later look at the rows that count: the hop stayed, with its pins and room."""
    bench = Bench(host_blocks=8)
    keys = bench.keys(3)
    bench.store(keys)
    plane = bench.planes[0]
    plane.finish(bench.in_flight(PlanKind.STORE))
    completion = plane.outbox.pop()
    assert isinstance(completion, Completion)
    rows = completion.rows[[0, 1, 2, 2]]
    rows["row"][3], rows["status"][3] = row, status
    with pytest.raises(ValueError, match=rf"^row {row}: places are reserved for rows 0 to 2"):
        bench.planner.take_in(replace(completion, rows=rows))
    bench.planner.take_in(completion)
    assert bench.match(keys) == 3


def test_a_load_that_was_given_no_room_cannot_claim_a_copy() -> None:
    bench = Bench(host_blocks=8)
    keys = bench.keys(2)
    bench.stored(keys)
    ticket = bench.load(bench.lookup(keys))
    plane = bench.planes[0]
    plane.finish(bench.in_flight(PlanKind.LOAD))
    completion = plane.outbox.pop()
    assert isinstance(completion, Completion)
    completion.rows["tier"] = int(Tier.HOST)
    with pytest.raises(ValueError, match="no room was reserved"):
        bench.planner.take_in(completion)
    assert not ticket.finished


def test_parents_without_copies_do_not_take_the_places_of_new_blocks_for_ever() -> None:
    """A conversation whose beginning went long ago, as long as the index has places."""
    bench = Bench(segments=5, host_blocks=16)
    places = bench.index.table.capacity
    keys = bench.keys(places + 100)
    for stop in range(4, places + 100, 4):
        wish = StoreWish.of(
            keys, stop, PAGES, start=(stop - 4) * BLOCK, lineage=Lineage.EXACT, durability=Durability.MEMORY
        )
        bench.plan([wish])
        bench.run()
        assert wish.ticket.count(Outcome.DONE) == 4
        bench.tickets.clear()
        bench.sent.clear()
    bench.check()
    assert bench.stored(bench.keys(1, 5)).count(Outcome.DONE) == 1
    bench.check_at_rest()
