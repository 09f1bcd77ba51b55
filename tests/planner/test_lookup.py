"""Lookups: the longest prefix that can be read, pinned until released, once."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.core.keys import Keys
from kvtier.core.plan import Lineage, PlanKind, Reason, Tier
from kvtier.planner import Outcome
from tests.planner.bench import BLOCK, ROOT, Bench


def test_nothing_is_found_in_an_empty_cache() -> None:
    bench = Bench(groups=2)
    for keys in (bench.keys(0, extra_tokens=0), bench.keys(0), bench.keys(3)):
        assert bench.match(keys) == 0
        lease = bench.lookup(keys)
        assert lease.blocks == 0
        assert [len(entries) for entries in lease.groups] == [0, 0]
        bench.planner.release(lease)
    bench.check_at_rest()


@pytest.mark.parametrize("hole", range(5))
@pytest.mark.parametrize("group", [0, 1])
def test_a_hit_is_the_longest_prefix_that_every_group_has(hole: int, group: int) -> None:
    bench = Bench(groups=2)
    keys = bench.keys(5)
    bench.stored(keys)
    bench.lose(keys, hole, Tier.HOST, group=group)
    assert bench.match(keys) == hole
    lease = bench.lookup(keys)
    assert lease.blocks == hole
    for number, entries in enumerate(lease.groups):
        assert entries.tolist() == [bench.entry(keys, block, number) for block in range(hole)]


@pytest.mark.parametrize("extra_tokens", [0, 1, BLOCK - 1])
def test_one_token_at_least_is_left_to_compute(extra_tokens: int) -> None:
    bench = Bench()
    bench.stored(bench.keys(4))
    keys = bench.keys(3, extra_tokens=extra_tokens)
    tokens = bench.planner.match(keys)
    assert tokens < keys.num_tokens
    assert tokens == (2 if extra_tokens == 0 else 3) * BLOCK
    lease = bench.lookup(keys)
    assert (lease.first_block + lease.blocks) * BLOCK == tokens


def test_a_sequence_hits_as_far_as_it_is_shared() -> None:
    bench = Bench()
    bench.stored(bench.keys(5, 0, shared=3))
    assert bench.match(bench.keys(5, 1, shared=3)) == 3
    assert bench.match(bench.keys(9, 2, shared=2)) == 2
    assert bench.match(bench.keys(5, 3)) == 0


@pytest.mark.parametrize("start", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 4 * BLOCK, 4 * BLOCK + 1])
def test_what_the_engine_has_itself_need_not_be_here(start: int) -> None:
    """Blocks before ``start`` are not asked for; the one that ``start`` lies in is."""
    bench = Bench()
    keys = bench.keys(4)
    bench.stored(keys)
    bench.lose(keys, 0, Tier.HOST)
    lease = bench.lookup(keys, start=start)
    first = start // BLOCK
    wanted = max(0, 4 - first) if first >= 1 else 0
    assert (lease.first_block, lease.blocks) == (first, wanted)
    assert bench.planner.match(keys, start=start) == (first + wanted) * BLOCK
    assert bench.planner.stats().get("hit_tokens", 0) == max(0, (first + wanted) * BLOCK - start)
    assert lease.groups[0].tolist() == [bench.entry(keys, block) for block in range(first, first + wanted)]


def test_a_match_leaves_no_trace() -> None:
    bench = Bench(host_blocks=6)
    old, new = bench.keys(3, 0), bench.keys(3, 1)
    bench.stored(old)
    bench.stored(new)
    before = bench.planner.stats()
    assert bench.match(old) == 3
    assert bench.planner.stats() == before
    bench.stored(bench.keys(2, 2))
    assert bench.match(old) == 1, "it was the least recently used, match or not"
    assert bench.match(new) == 3


def test_a_lookup_counts_as_use() -> None:
    bench = Bench(host_blocks=6)
    old, new = bench.keys(3, 0), bench.keys(3, 1)
    bench.stored(old)
    bench.stored(new)
    bench.planner.release(bench.lookup(old))
    bench.stored(bench.keys(2, 2))
    assert bench.match(old) == 3
    assert bench.match(new) == 1


def test_by_tier_says_the_slowest_of_groups() -> None:
    bench = Bench(groups=2, segments=6)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.lose(keys, 1, Tier.HOST, group=1)
    assert bench.lookup(keys).tiers.tolist() == [Tier.HOST, Tier.DISK, Tier.HOST]


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_is_released_once() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys)
    first, second = bench.lookup(keys), bench.lookup(keys)
    bench.check()
    for _ in range(3):
        bench.planner.release(first)
        bench.check()
    assert bench.planner.stats()["leases"] == 1
    assert bench.planner.stats()["pinned_entries"] == 3
    bench.planner.release(second)
    bench.check_at_rest()


def test_the_same_owner_asking_the_same_gets_the_same_lease() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys)
    lease = bench.lookup(keys, owner="request-1")
    assert bench.lookup(keys, owner="request-1") is lease
    assert bench.lookup(bench.keys(3), owner="request-1") is lease, "equal keys, made anew"
    assert bench.lookup(keys, owner="request-2") is not lease
    assert bench.lookup(keys) is not lease
    assert bench.lookup(keys, start=BLOCK, owner="request-1") is not lease
    bench.check()


def test_after_its_release_an_owner_gets_a_new_lease() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys)
    lease = bench.lookup(keys, owner=1)
    bench.planner.release(lease)
    again = bench.lookup(keys, owner=1)
    assert again is not lease
    bench.planner.release(lease)
    assert bench.lookup(keys, owner=1) is again, "releasing the old one again does not touch the new one"
    bench.planner.release(again)
    bench.check_at_rest()


def test_an_owner_that_asks_for_more_gets_more() -> None:
    """The same Keys object, grown since: the lease that is held does not cover what was appended."""
    bench = Bench()
    whole = bench.keys(4)
    bench.stored(whole)
    tokens = np.random.default_rng(1).integers(0, 1000, 4 * BLOCK + 1)
    keys = Keys.from_tokens(ROOT, tokens[: 2 * BLOCK + 1], BLOCK)
    lease = bench.lookup(keys, owner=1)
    assert lease.blocks == 2
    keys.append(tokens[2 * BLOCK + 1 :])
    grown = bench.lookup(keys, owner=1)
    assert grown.blocks == 4
    for one in (lease, grown):
        bench.planner.release(one)
    bench.check_at_rest()


def test_an_owner_with_one_token_less_does_not_get_all_of_them() -> None:
    """Both sequences have the same full blocks, but of the shorter one the last token must be left to compute."""
    bench = Bench()
    bench.stored(bench.keys(3))
    longer, exactly = bench.keys(3, extra_tokens=1), bench.keys(3, extra_tokens=0)
    assert longer.digests == exactly.digests
    assert bench.lookup(longer, owner=1).blocks == 3
    assert bench.lookup(exactly, owner=1).blocks == 2
    assert bench.lookup(longer, owner=1).blocks == 3


def test_an_owner_that_asks_for_exact_blocks_gets_no_approximate_ones() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys, lineage=Lineage.APPROXIMATE)
    assert bench.lookup(keys, owner=1).blocks == 3
    assert bench.lookup(keys, owner=1, exact=True).blocks == 0


def test_an_owner_gets_nothing_of_a_version_that_is_over() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys)
    lease = bench.lookup(keys, owner=1)
    bench.planner.set_weights_version("2")
    assert bench.lookup(keys, owner=1).blocks == 0
    bench.planner.release(lease)
    bench.check()


# --- pending ----------------------------------------------------------------------------------------------------------


def test_pending_are_the_blocks_behind_the_hit_that_are_being_stored() -> None:
    bench = Bench()
    bench.stored(bench.keys(2, shared=2))
    keys = bench.keys(6, shared=2)
    bench.store(keys)
    lease = bench.lookup(keys)
    assert (lease.blocks, lease.pending_blocks) == (2, 4)
    assert bench.lookup(bench.keys(4, 9, shared=2)).pending_blocks == 0
    assert bench.lookup(keys, start=3 * BLOCK).pending_blocks == 3
    bench.run()
    lease = bench.lookup(keys)
    assert (lease.blocks, lease.pending_blocks) == (6, 0)


def test_nothing_is_pending_behind_a_hole() -> None:
    bench = Bench()
    keys = bench.keys(4)
    bench.store(keys, start=2 * BLOCK)
    assert bench.lookup(keys).pending_blocks == 0


def test_what_failed_is_not_pending_any_more() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.store(keys)
    bench.run(lambda plan, row: Reason.IO_ERROR)
    assert bench.lookup(keys).pending_blocks == 0


def test_nothing_is_pending_for_a_version_that_is_over() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.store(keys)
    bench.planner.set_weights_version("2")
    assert bench.lookup(keys).pending_blocks == 0


# --- loads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop", "blocks"), [(0, 16, [0, 1, 2, 3]), (5, 11, [1, 2]), (4, 8, [1]), (7, 8, [1]), (15, 16, [3])]
)
def test_a_load_takes_the_blocks_that_its_tokens_lie_in(start: int, stop: int, blocks: list[int]) -> None:
    bench = Bench(groups=2)
    keys = bench.keys(4)
    bench.stored(keys)
    ticket = bench.load(bench.lookup(keys), start, stop)
    (plan,) = bench.plans(PlanKind.LOAD)
    assert (plan.start, plan.stop) == (start, stop)
    assert plan.rows["block"].tolist() == blocks * 2
    bench.run()
    assert ticket.count(Outcome.DONE) == len(blocks)
    brought = sorted((block, content.group) for _, block, content in bench.planes[0].loaded)
    assert brought == sorted((block, group) for block in blocks for group in (0, 1))


def test_a_load_of_nothing_is_over_at_once() -> None:
    bench = Bench()
    keys = bench.keys(4)
    bench.stored(keys)
    ticket = bench.load(bench.lookup(keys), 2 * BLOCK, 2 * BLOCK)
    assert ticket.finished
    empty = bench.load(bench.lookup(bench.keys(3, 7)))
    assert empty.finished
    assert not bench.plans(PlanKind.LOAD)
    bench.check()


def test_a_load_of_a_lease_that_was_released_is_a_miss() -> None:
    bench = Bench()
    keys = bench.keys(2)
    bench.stored(keys)
    lease = bench.lookup(keys)
    bench.planner.release(lease)
    ticket = bench.load(lease)
    assert ticket.finished
    assert list(ticket.reason) == [Reason.GONE] * 2
    assert not bench.plans(PlanKind.LOAD)
    bench.check_at_rest()


def test_a_block_that_was_lost_after_the_lookup_fails_alone() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys)
    lease = bench.lookup(keys)
    bench.lose(keys, 1, Tier.HOST)
    bench.check()
    ticket = bench.load(lease)
    bench.run()
    assert list(ticket.outcome) == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
    assert ticket.reason[1] == Reason.GONE
    bench.planner.release(lease)
    bench.check_at_rest()
    assert bench.planner.stats()["host_entries"] == 2


def test_room_of_a_lost_copy_that_is_being_read_is_used_again_only_afterwards() -> None:
    bench = Bench(host_blocks=2)
    keys = bench.keys(2)
    bench.stored(keys)
    lease = bench.lookup(keys)
    bench.load(lease)
    bench.planner.release(lease)
    for block in (1, 0):
        bench.lose(keys, block, Tier.HOST)
    assert bench.store(bench.keys(2, 1)).count(Outcome.FAILED) == 2
    bench.run()
    assert bench.stored(bench.keys(2, 1)).count(Outcome.DONE) == 2
    bench.check_at_rest()
