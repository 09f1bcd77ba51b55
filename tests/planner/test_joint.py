"""Small wishes that come together share one plan, and each ends as if it had been planned alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtier.config import load_config
from kvtier.core.keys import Keys, Root
from kvtier.core.memory import GroupPages, PageTable
from kvtier.core.plan import PAGE_BYTES, Lineage, PlanKind, Priority, Reason, Status, Tier
from kvtier.index.cells import Cells
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.planner import Durability, Lease, LoadWish, Outcome, StoreWish
from kvtier.planner.joint import JOINT_BYTES, SMALL_BYTES, JointPlans
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState
from kvtier.planner.stores import Stores
from tests.planner.bench import BACK, BLOCK, Bench

ROOM = {"host_blocks": 32}


def table(*ids: int, memory_id: int = 0) -> PageTable:
    """Pages of four tokens each, from token 0 on."""
    return PageTable(memory_id, (GroupPages(0, np.array(ids, np.int32)),))


def store(keys: Keys, pages: PageTable, **how: Any) -> StoreWish:
    wanted = {"start": 0, "lineage": Lineage.EXACT, "durability": Durability.MEMORY, "is_paged": True} | how
    return StoreWish.of(keys, len(keys), pages, **wanted)


def load(lease: Lease, pages: PageTable, **how: Any) -> LoadWish:
    last = (lease.first_block + lease.blocks) * BLOCK
    wanted = {"start": 0, "stop": last, "priority": Priority.DEMAND, "deadline_s": None, "is_paged": True} | how
    return LoadWish.of(lease, pages, **wanted)


def stored_one_by_one(bench: Bench, *blocks: int) -> list[Keys]:
    """Sequences of that many blocks, all in host memory."""
    all_keys = [bench.keys(count, seed) for seed, count in enumerate(blocks)]
    for keys in all_keys:
        bench.stored(keys)
    return all_keys


def test_stores_share_a_plan_that_names_the_pages_and_parents_of_each() -> None:
    bench = Bench(**ROOM)
    stored_before = bench.keys(3, 7)
    bench.stored(stored_before)
    one, two, tail = bench.keys(1, 0), bench.keys(2, 1), bench.keys(3, 7)
    tail.append(np.arange(BLOCK, dtype=np.int32))
    bench.sent.clear()
    bench.plan([store(one, table(9)), store(two, table(5, 4)), store(tail, table(0, 1, 2, 8), start=3 * BLOCK)])
    (plan,) = bench.plans(PlanKind.STORE)
    assert plan.pages is not None
    assert plan.pages.groups[0].ids.tolist() == [9, 5, 4, 8]
    assert (plan.pages.groups[0].first_token, plan.start, plan.stop) == (0, 0, 4 * BLOCK)
    assert plan.rows["block"].tolist() == [0, 1, 2, 3]
    assert plan.rows["depth"].tolist() == [0, 0, 1, 3]
    parents = [row.tobytes() for row in plan.rows["parent"]]
    assert parents == [one.root_digest, two.root_digest, two.digests[0], tail.digests[2]]
    bench.run()
    bench.check()
    assert [bench.match(keys) for keys in (one, two, tail)] == [1, 2, 4]


def test_every_ticket_ends_with_its_own_blocks_and_bytes() -> None:
    bench = Bench(**ROOM)
    wishes = [store(bench.keys(count, count), table(*range(count))) for count in (1, 3, 2)]
    bench.plan(wishes)
    assert not any(wish.ticket.finished for wish in wishes)
    bench.run()
    for wish, count in zip(wishes, (1, 3, 2), strict=True):
        ticket = wish.ticket
        assert (ticket.finished, ticket.source_free, ticket.count(Outcome.DONE)) == (True, True, count)
        assert ticket.moved_bytes == wishes[0].ticket.moved_bytes * count > 0
    bench.check_at_rest()


def test_rows_that_fail_are_told_to_those_who_wished_for_them() -> None:
    bench = Bench(**ROOM)
    wishes = [store(bench.keys(2, seed), table(0, 1)) for seed in range(3)]
    bench.plan(wishes)
    bench.run(lambda plan, row: Reason.IO_ERROR if row == 3 else Status.OK)
    assert [bytes(wish.ticket.outcome) for wish in wishes] == [
        bytes((Outcome.DONE, Outcome.DONE)), bytes((Outcome.DONE, Outcome.FAILED)), bytes((Outcome.DONE, Outcome.DONE)),
    ]  # fmt: skip
    assert bytes(wishes[1].ticket.reason) == bytes((Reason.NONE, Reason.IO_ERROR))
    bench.check_at_rest()


def test_a_block_that_two_wish_to_store_moves_once() -> None:
    bench = Bench(**ROOM)
    same, other = bench.keys(1, 5), bench.keys(1, 6)
    wishes = [store(same, table(0)), store(other, table(1)), store(same, table(2))]
    bench.plan(wishes)
    assert sum(len(plan.rows) for plan in bench.plans(PlanKind.STORE)) == 2
    bench.run()
    assert [wish.ticket.outcome[0] for wish in wishes] == [Outcome.DONE, Outcome.DONE, Outcome.EXISTING]
    bench.check_at_rest()


def test_known_blocks_are_existing_and_do_not_move() -> None:
    bench = Bench(**ROOM)
    (known,) = stored_one_by_one(bench, 2)
    bench.sent.clear()
    wishes = [store(keys, table(0, 1)) for keys in (bench.keys(1, 8), known, bench.keys(1, 9))]
    bench.plan(wishes)
    bench.run()
    assert [len(plan.rows) for plan in bench.plans(PlanKind.STORE)] == [2]
    assert wishes[1].ticket.count(Outcome.EXISTING) == 2


def test_where_there_is_too_little_room_each_gets_what_it_would_have_got_alone() -> None:
    together, alone = Bench(host_blocks=4), Bench(host_blocks=4)
    for bench in (together, alone):
        bench.store(bench.keys(2, 99))  # under way, so that nothing of it can make room
    wishes = [store(together.keys(1, seed), table(seed)) for seed in range(4)]
    together.plan(wishes)
    tickets = [alone.store(alone.keys(1, seed)) for seed in range(4)]
    assert [bytes(wish.ticket.outcome) for wish in wishes] == [bytes(ticket.outcome) for ticket in tickets]
    assert wishes[3].ticket.reason[0] == Reason.REFUSED
    for bench in (together, alone):
        bench.run()
        bench.check_at_rest()


def test_a_child_in_the_same_batch_is_linked_to_its_parent() -> None:
    bench = Bench(**ROOM)
    long = bench.keys(3, 4)
    short = Keys(long.root, BLOCK)
    short.digests, short.num_tokens = long.digests[:1], BLOCK + 1
    bench.plan([store(short, table(0)), store(long, table(0, 1, 2), start=BLOCK)])
    bench.run()
    entries = [bench.index.table.find_one(key, 0) for key in long.digests]
    assert bench.index.parent[entries].tolist() == [-1, *entries[:-1]]
    bench.check()


def test_loads_share_a_plan_over_the_pages_of_each() -> None:
    bench = Bench(**ROOM)
    leases = [bench.lookup(keys) for keys in stored_one_by_one(bench, 1, 3)]
    wishes = [load(leases[0], table(6)), load(leases[1], table(0, 7, 3), start=BLOCK)]
    bench.plan(wishes)
    (plan,) = bench.plans(PlanKind.LOAD)
    assert plan.pages is not None
    assert plan.pages.groups[0].ids.tolist() == [6, 7, 3]
    assert (plan.start, plan.stop) == (0, 3 * BLOCK)
    keys = [leases[0].keys.digests[0], *leases[1].keys.digests[1:]]
    assert [row.tobytes() for row in plan.rows["key"]] == keys
    for lease in leases:
        bench.planner.release(lease)
    bench.run()
    assert [wish.ticket.count(Outcome.DONE) for wish in wishes] == [1, 2]
    bench.check_at_rest()


def test_nobody_can_cancel_what_others_share() -> None:
    bench = Bench(**ROOM)
    leases = [bench.lookup(keys) for keys in stored_one_by_one(bench, 1, 1)]
    wishes = [load(lease, table(at)) for at, lease in enumerate(leases)]
    bench.plan(wishes)
    assert [wish.ticket.plan_ids for wish in wishes] == [[], []]


def test_the_first_deadline_of_a_hundredth_of_a_second_counts() -> None:
    bench = Bench(**ROOM)
    leases = [bench.lookup(keys) for keys in stored_one_by_one(bench, 1, 1, 1)]
    wishes = [load(lease, table(0), deadline_s=due) for lease, due in zip(leases, (5.004, 5.001, 5.02), strict=True)]
    bench.plan(wishes)
    assert [(len(plan.rows), plan.deadline_s) for plan in bench.plans(PlanKind.LOAD)] == [(2, 5.001), (1, 5.02)]


@pytest.mark.parametrize("odd", ["inside a block", "on disk", "released", "the same block again"])
def test_loads_out_of_the_ordinary_are_planned_alone(odd: str) -> None:
    bench = Bench(host_blocks=32, segments=8, **BACK)
    leases = [bench.lookup(keys) for keys in stored_one_by_one(bench, 1, 1, 1)]
    wishes = [load(lease, table(at)) for at, lease in enumerate(leases)]
    if odd == "inside a block":
        wishes[1] = load(leases[1], table(1), start=1)
    elif odd == "on disk":
        bench.flush()
        bench.run()
        bench.planner._state.host.drop(int(leases[1].groups[0][0]))
    elif odd == "released":
        bench.planner.release(leases[1])
    else:
        wishes[1] = load(leases[0], table(1))
    bench.sent.clear()
    bench.plan(wishes)
    plans = bench.plans(PlanKind.LOAD)
    joint = [len(plan.rows) for plan in plans]
    expected = {"inside a block": [1, 1, 1], "on disk": [2, 1], "released": [2], "the same block again": [2, 1]}
    assert joint == expected[odd]
    bench.run()
    assert all(wish.ticket.finished for wish in wishes)
    outcomes = [wish.ticket.outcome[0] for wish in wishes]
    assert outcomes == [Outcome.DONE, Outcome.FAILED if odd == "released" else Outcome.DONE, Outcome.DONE]
    for lease in leases:
        bench.planner.release(lease)
    bench.run()
    bench.check_at_rest()


def test_what_differs_in_memory_lineage_version_or_durability_has_plans_of_its_own() -> None:
    bench = Bench(segments=8, **ROOM)
    keys = [bench.keys(1, seed) for seed in range(7)]
    bench.plan(
        [
            store(keys[0], table(0)), store(keys[1], table(1)),
            store(keys[2], table(0, memory_id=1)), store(keys[3], table(1, memory_id=1)),
            store(keys[4], table(1, memory_id=1), lineage=Lineage.APPROXIMATE),
            store(keys[5], table(0), durability=Durability.PROCESS), store(keys[6], table(0)),
        ]
    )  # fmt: skip
    plans = bench.plans(PlanKind.STORE)
    assert [(len(plan.rows), plan.pages.memory_id if plan.pages else -1, plan.durable) for plan in plans] == [
        (2, 0, False), (2, 1, False), (1, 1, False), (1, 0, True), (1, 0, False),
    ]  # fmt: skip


def test_large_wishes_and_wishes_of_several_ranks_or_groups_are_never_joined() -> None:
    large = Bench(host_blocks=200)
    most = SMALL_BYTES // (PAGE_BYTES * large.layout.record_pages[0])
    for bench, blocks in ((large, most + 1), (Bench(ranks=2, **ROOM), 1), (Bench(groups=2, **ROOM), 1)):
        bench.plan([store(bench.keys(blocks, seed), _for_all_groups(bench, blocks)) for seed in range(2)])
        assert {len(plan.rows) for plan in bench.plans(PlanKind.STORE)} == {blocks * len(bench.layout.groups)}


@pytest.mark.parametrize(("payload_bytes", "are_joined"), [(124 << 10, True), (128 << 10, False)])
def test_wishes_share_a_plan_where_a_record_is_not_longer_than_128_kib(payload_bytes: int, are_joined: bool) -> None:
    """Header page and payload; what is longer would be sealed only after all of the engine's pages were copied."""
    part = Part(0, "kv", "uint8", ("token", "head", "dim"), (BLOCK, 1, payload_bytes // BLOCK))
    layout = KVLayout(BLOCK, BLOCK, (KVGroup("attention", (part,)),))
    state = ControlState(load_config({"host": {"capacity": "1MiB"}}), layout, Cells(64, 1))
    joint = JointPlans(state, Stores(state, Stages(state)))
    one, two = (store(Keys.from_tokens(Root("model"), [seed] * BLOCK, BLOCK), table(0)) for seed in range(2))
    assert (joint.likeness(one) == joint.likeness(two)) is are_joined


def test_no_more_wishes_share_a_plan_than_all_of_them_may_wait_for() -> None:
    bench = Bench(host_blocks=1200)
    record_bytes = PAGE_BYTES * bench.layout.record_pages[0]
    each, together = SMALL_BYTES // record_bytes, JOINT_BYTES // record_bytes
    count = together // each + 2
    wishes = [store(bench.keys(each, seed), table(*range(each))) for seed in range(count)]
    bench.plan(wishes)
    assert [len(plan.rows) for plan in bench.plans(PlanKind.STORE)] == [together, 2 * each]
    bench.run()
    assert all(wish.ticket.count(Outcome.DONE) == each for wish in wishes)
    leases = [bench.lookup(bench.keys(each, seed, extra_tokens=1)) for seed in range(count)]
    bench.plan([load(lease, table(*range(each))) for lease in leases])
    assert [len(plan.rows) for plan in bench.plans(PlanKind.LOAD)] == [together, 2 * each]


def test_tables_of_memory_that_is_not_in_pages_are_never_put_together() -> None:
    bench = Bench(**ROOM)
    bench.plan([store(bench.keys(1, seed), table(seed), is_paged=False) for seed in range(2)])
    bench.run()
    leases = [bench.lookup(bench.keys(1, seed, extra_tokens=1)) for seed in range(2)]
    bench.plan([load(lease, table(at), is_paged=False) for at, lease in enumerate(leases)])
    assert [len(plan.rows) for plan in bench.sent] == [1, 1, 1, 1]


def test_what_an_earlier_wish_has_does_not_make_room_for_a_later_one() -> None:
    bench = Bench(host_blocks=4)
    known = bench.keys(2, 50)
    bench.stored(known)
    bench.stored(bench.keys(2, 51))
    wishes = [store(known, table(0, 1)), *(store(bench.keys(1, seed), table(seed)) for seed in range(2))]
    bench.plan(wishes)
    bench.run()
    assert wishes[0].ticket.count(Outcome.EXISTING) == 2
    assert bench.match(known) == 2


def test_what_wishes_extend_does_not_make_room_for_them() -> None:
    bench = Bench(host_blocks=8)
    bench.stored(bench.keys(4, shared=4))
    bench.stored(bench.keys(4, 50))
    bench.plan([store(bench.keys(5, seed, shared=4), table(seed), start=4 * BLOCK) for seed in range(3)])
    bench.run()
    assert bench.match(bench.keys(5, 2, shared=4)) == 5


def test_wishes_of_a_version_that_was_retired_are_misses() -> None:
    bench = Bench(**ROOM)
    old = Root("model", "old")
    wishes = [store(bench.keys(1, seed, root=old), table(seed)) for seed in range(2)]
    bench.plan(wishes)
    assert [wish.ticket.reason[0] for wish in wishes] == [Reason.RETIRED] * 2


def _for_all_groups(bench: Bench, blocks: int) -> PageTable:
    one = table(*range(blocks))
    return replace(one, groups=one.groups * len(bench.layout.groups))


def test_a_load_from_beyond_what_the_engine_holds_finds_its_own_entries_and_pages() -> None:
    """Both the hit and the table begin behind the first block, and not at the same one."""
    bench = Bench(**ROOM)
    all_keys = stored_one_by_one(bench, 4, 4)
    leases = [bench.lookup(keys, start=BLOCK) for keys in all_keys]
    late = PageTable(0, (GroupPages(2 * BLOCK, np.array([11, 12], np.int32)),))
    last = 4 * BLOCK
    bench.plan([load(leases[0], late, start=2 * BLOCK, stop=last), load(leases[1], late, start=3 * BLOCK, stop=last)])
    (plan,) = bench.plans(PlanKind.LOAD)
    assert plan.pages is not None
    assert plan.pages.groups[0].ids.tolist() == [11, 12, 12]
    wanted = [*all_keys[0].digests[2:4], all_keys[1].digests[3]]
    assert [row.tobytes() for row in plan.rows["key"]] == wanted


def test_loads_of_another_memory_or_class_of_service_have_plans_of_their_own() -> None:
    bench = Bench(**ROOM)
    leases = [bench.lookup(keys) for keys in stored_one_by_one(bench, 1, 1, 1, 1)]
    kinds: list[dict[str, Any]] = [{}, {"priority": Priority.PREFETCH}, {"priority": Priority.PREFETCH}, {}]
    memories = [0, 0, 0, 1]
    bench.plan(
        [
            load(lease, table(0, memory_id=memory), **how)
            for lease, memory, how in zip(leases, memories, kinds, strict=True)
        ]
    )
    found = [
        (len(plan.rows), plan.priority, plan.pages and plan.pages.memory_id) for plan in bench.plans(PlanKind.LOAD)
    ]
    assert found == [(1, Priority.DEMAND, 0), (2, Priority.PREFETCH, 0), (1, Priority.DEMAND, 1)]


def test_a_load_that_ends_inside_a_block_is_planned_alone() -> None:
    bench = Bench(**ROOM)
    leases = [bench.lookup(keys) for keys in stored_one_by_one(bench, 1, 2, 1)]
    wishes = [load(leases[0], table(0)), load(leases[1], table(1, 2), stop=BLOCK + 1), load(leases[2], table(3))]
    bench.plan(wishes)
    assert [(len(plan.rows), plan.stop) for plan in bench.plans(PlanKind.LOAD)] == [
        (1, BLOCK), (2, BLOCK + 1), (1, BLOCK),
    ]  # fmt: skip


def test_a_load_of_two_blocks_one_of_which_is_only_on_disk_is_planned_alone() -> None:
    bench = Bench(host_blocks=32, segments=8, **BACK)
    leases = [bench.lookup(keys) for keys in stored_one_by_one(bench, 1, 2, 1)]
    bench.flush()
    bench.run()
    bench.planner._state.host.drop(int(leases[1].groups[0][1]))
    bench.sent.clear()
    bench.plan([load(lease, table(0, 1)) for lease in leases])
    assert [len(plan.rows) for plan in bench.plans(PlanKind.LOAD)] == [2, 2]


def test_approximate_stores_stay_approximate_and_tickets_of_loads_tell_the_tier() -> None:
    bench = Bench(**ROOM)
    keys = [bench.keys(1, seed) for seed in range(2)]
    bench.plan([store(own, table(at), lineage=Lineage.APPROXIMATE) for at, own in enumerate(keys)])
    bench.run()
    assert [bench.match(own, exact=True) for own in keys] == [0, 0]
    wishes = [load(bench.lookup(own), table(at)) for at, own in enumerate(keys)]
    bench.plan(wishes)
    assert [bytes(wish.ticket.tiers) for wish in wishes] == [bytes((Tier.HOST,))] * 2


def test_joint_plans_count_against_the_budgets_of_stores_and_loads() -> None:
    """What does not fit together is planned alone, as far as it fits."""
    block_bytes = Bench().layout.block_bytes[0]
    bench = Bench(host={"store_queue": 3 * block_bytes, "load_queue": 3 * block_bytes}, **ROOM)
    wishes = [store(bench.keys(1, seed), table(seed)) for seed in range(4)]
    bench.plan(wishes)
    assert [wish.ticket.reason[0] for wish in wishes] == [Reason.NONE] * 3 + [Reason.REFUSED]
    bench.run()
    bench.stored(bench.keys(1, 3))
    loads = [load(bench.lookup(bench.keys(1, seed)), table(seed)) for seed in range(4)]
    bench.plan(loads)
    assert [wish.ticket.reason[0] for wish in loads] == [Reason.NONE] * 3 + [Reason.REFUSED]
    bench.run()
    first = [load(bench.lookup(bench.keys(1, seed)), table(seed)) for seed in range(3)]
    bench.plan(first)
    (last,) = [load(bench.lookup(bench.keys(1, 3)), table(3))]
    bench.plan([last])
    assert last.ticket.reason[0] == Reason.REFUSED


def test_foreign_keys_without_a_chain_are_planned_alone() -> None:
    bench = Bench(**ROOM)
    loose = [Keys.foreign(Root("model"), [bytes([at])], BLOCK, engine="e", chained=False) for at in range(2)]
    bench.plan([store(keys, table(at)) for at, keys in enumerate(loose)])
    assert [len(plan.rows) for plan in bench.plans(PlanKind.STORE)] == [1, 1]


def test_wishes_before_anybody_is_attached_are_refused() -> None:
    bench = Bench(attach=False)
    wishes = [store(bench.keys(1, seed), table(seed)) for seed in range(2)]
    bench.plan(wishes)
    assert [wish.ticket.reason[0] for wish in wishes] == [Reason.CLOSED] * 2


def test_stores_of_which_only_the_second_block_is_known_are_planned_alone() -> None:
    bench = Bench(**ROOM)
    long = bench.keys(2, 3)
    bench.stored(long, start=BLOCK)
    wishes = [store(bench.keys(1, 8), table(0)), store(long, table(1, 2)), store(bench.keys(1, 9), table(3))]
    bench.plan(wishes)
    bench.run()
    assert bytes(wishes[1].ticket.outcome) == bytes((Outcome.DONE, Outcome.EXISTING))
    bench.check_at_rest()
