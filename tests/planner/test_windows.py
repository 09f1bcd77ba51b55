"""Sliding windows and states: what is kept of them, where hits end, and in which order they go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtier.config import PolicyConfig
from kvtier.core.keys import Keys
from kvtier.core.plan import Lineage, Plan, PlanKind, Reason, Status, Tier
from kvtier.models import KVGroup, KVLayout, Part, Reuse
from kvtier.planner import Held, StoreWish
from kvtier.planner.tickets import Durability, Outcome
from kvtier.planner.windows import Windows
from tests.planner.bench import BLOCK, PAGES, Bench, windowed_layout

ATTENTION, WINDOW, STATE = range(3)
ENDS: dict[str, Any] = {"checkpoint_tokens": 0}


def bench_of(*, replay_tokens: int = 0, policy: dict[str, Any] = ENDS, **how: Any) -> Bench:
    return Bench(layout=windowed_layout(replay_tokens=replay_tokens), policy=policy, **how)


def kept(bench: Bench, keys: Keys, group: int) -> list[int]:
    """Blocks of ``keys`` that can be read in ``group``."""
    found = [bench.index.table.find_one(key, group) for key in keys.digests]
    return [block for block, entry in enumerate(found) if entry >= 0 and bench.index.readable(np.array([entry]))[0]]


def windows(policy: str = "checkpoint", every: int = 0) -> Windows:
    return Windows(windowed_layout(), PolicyConfig(windows=policy, checkpoint_tokens=every))  # type: ignore[arg-type]


def test_a_store_keeps_of_windows_and_states_what_its_end_needs() -> None:
    bench = bench_of()
    keys = bench.keys(6)
    ticket = bench.stored(keys)
    assert [kept(bench, keys, group) for group in range(3)] == [[0, 1, 2, 3, 4, 5], [4, 5], [5]]
    assert ticket.count(Outcome.DONE) == 6
    bench.check_at_rest()


def test_checkpoints_are_the_ends_of_full_blocks_before_the_tokens_that_are_named() -> None:
    bench = bench_of()
    keys = bench.keys(6)
    bench.stored(keys, checkpoints=(2 * BLOCK + 1, 6 * BLOCK + 1))
    assert [kept(bench, keys, group) for group in (WINDOW, STATE)] == [[0, 1, 4, 5], [1, 5]]


def test_checkpoints_come_every_so_many_tokens_too() -> None:
    bench = bench_of(policy={"checkpoint_tokens": 2 * BLOCK + 1})
    keys = bench.keys(7)
    bench.stored(keys, checkpoints=())
    assert kept(bench, keys, STATE) == [1, 3, 5]


def test_every_block_is_kept_where_the_policy_is_full() -> None:
    bench = bench_of(policy={"windows": "full"}, host_blocks=32)
    keys = bench.keys(6)
    bench.stored(keys)
    assert [kept(bench, keys, group) for group in (WINDOW, STATE)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_what_the_engine_does_not_have_is_not_stored() -> None:
    bench = bench_of()
    keys = bench.keys(4)
    held = {WINDOW: Held(2, np.array([False, True])), STATE: Held(3, np.array([True]))}
    wish = StoreWish.of(
        keys, 4, PAGES, start=0, lineage=Lineage.EXACT, durability=Durability.MEMORY, checkpoints=None, held=held
    )
    bench.plan([wish])
    bench.run()
    assert [kept(bench, keys, group) for group in (WINDOW, STATE)] == [[3], [3]]
    assert bench.match(keys) == 0


def test_a_store_of_what_follows_reaches_back_for_its_window() -> None:
    bench = bench_of()
    keys = bench.keys(4)
    bench.stored(keys, checkpoints=(2 * BLOCK,), start=0)
    more = bench.keys(4)
    bench.stored(more, start=3 * BLOCK)
    assert kept(bench, keys, WINDOW) == [0, 1, 2, 3]
    assert bench.match(keys) == 4


def test_a_hit_ends_where_every_group_can_serve_it() -> None:
    bench = bench_of(host_blocks=32)
    keys = bench.keys(8)
    bench.stored(keys, checkpoints=(3 * BLOCK, 6 * BLOCK))
    lease = bench.lookup(keys)
    assert (lease.blocks, lease.begins, [len(own) for own in lease.groups]) == (6, (0, 4, 5), [6, 2, 1])
    shorter = Keys.from_tokens(keys.root, bench_tokens(8)[: 5 * BLOCK + 1], BLOCK)
    assert bench.match(shorter) == 3
    bench.planner.release(lease)
    bench.check_at_rest()


def bench_tokens(blocks: int) -> Any:
    """Those of ``Bench.keys``."""
    return np.random.default_rng(1).integers(0, 1000, blocks * BLOCK + 1)


def test_what_the_engine_has_itself_no_window_has_to_reach_back_for() -> None:
    """Of blocks 4 to 6 those from 5 on are wanted: the window of the hit's end begins there, too."""
    bench = bench_of()
    keys = bench.keys(6)
    bench.stored(keys)
    lease = bench.lookup(keys, start=5 * BLOCK)
    assert (lease.blocks, lease.begins, [len(own) for own in lease.groups]) == (1, (5, 5, 5), [1, 1, 1])


def test_a_load_brings_of_windows_and_states_what_the_end_needs_and_nothing_else() -> None:
    bench = bench_of()
    keys = bench.keys(6)
    bench.stored(keys)
    bench.loaded(keys)
    (plan,) = bench.plans(PlanKind.LOAD)
    rows = sorted(zip(plan.rows["group"].tolist(), plan.rows["block"].tolist(), strict=True))
    assert rows == [(0, block) for block in range(6)] + [(1, 4), (1, 5), (2, 5)]


@pytest.mark.parametrize("group", [ATTENTION, WINDOW, STATE])
def test_nothing_of_a_load_is_of_use_unless_all_of_it_is(group: int) -> None:
    bench = bench_of()
    keys = bench.keys(6)
    bench.stored(keys)
    lease = bench.lookup(keys)
    ticket = bench.load(lease)

    def outcome(plan: Plan, row: int) -> Any:
        failed = (int(plan.rows["group"][row]), int(plan.rows["block"][row])) == (group, 5)
        return Reason.IO_ERROR if failed else Status.OK

    bench.run(outcome)
    assert ticket.count(Outcome.FAILED) == 6


def test_what_lies_between_checkpoints_goes_first() -> None:
    """Of 24 records there is room for 21: three of five go that the first end does not need, and what they served."""
    bench = bench_of(policy={"windows": "full", **ENDS}, host_blocks=7)
    first, second = bench.keys(4, 1), bench.keys(4, 2)
    bench.stored(first)
    bench.stored(second)
    between = len(set(kept(bench, first, WINDOW)) - {2, 3}) + len(set(kept(bench, first, STATE)) - {3})
    assert between == 0
    assert (bench.match(first), bench.match(second)) == (4, 4)


def test_a_hit_makes_a_checkpoint_of_where_it_ends() -> None:
    bench = bench_of(policy={"windows": "full", **ENDS}, host_blocks=7)
    keys = bench.keys(4, 1)
    bench.stored(keys)
    middle = Keys.from_tokens(keys.root, np.random.default_rng(2).integers(0, 1000, 2 * BLOCK + 1), BLOCK)
    bench.planner.release(bench.lookup(middle))
    bench.stored(bench.keys(3, 2))  # now it is full
    bench.stored(bench.keys(1, 3))
    assert kept(bench, keys, STATE) == [1, 3]


def test_a_checkpoint_that_nobody_used_for_its_time_goes_first() -> None:
    bench = bench_of(policy={**ENDS, "checkpoint_ttl_s": 10.0}, host_blocks=5)
    old, new = bench.keys(4, 1), bench.keys(4, 2)
    bench.stored(old)
    bench.now_s = 11.0
    bench.planner.release(bench.lookup(bench.keys(2, 9)))
    bench.stored(new)
    bench.now_s = 12.0
    bench.planner.release(bench.lookup(new))
    bench.stored(bench.keys(1, 3))
    assert kept(bench, old, ATTENTION) == [], "nothing leads through it any more"
    assert (bench.match(old), bench.match(new)) == (0, 4)


def columns_of(root: object) -> dict[int, np.ndarray[Any, Any]]:
    """Every array that the planner keeps, by where it lies; views count as what they are of."""
    found: dict[int, np.ndarray[Any, Any]] = {}
    seen, stack = set[int](), [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            found[thing.__array_interface__["data"][0]] = thing
        elif isinstance(thing, (dict, list, tuple)):
            stack += thing.values() if isinstance(thing, dict) else thing
        elif type(thing).__module__.startswith("kvtier"):
            names = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
            stack += [getattr(thing, name) for name in names if hasattr(thing, name)]
            stack += getattr(thing, "__dict__", {}).values()
    return found


def test_an_entry_takes_no_more_than_200_bytes_with_all_that_there_is() -> None:
    policy = {**ENDS, "checkpoint_ttl_s": 60.0}
    bench = bench_of(policy=policy, device_blocks=1, segments=1, host={"capacity": "2GiB"})
    capacity = bench.index.table.capacity
    of_entries = [one.nbytes for one in columns_of(bench.planner).values() if len(one) >= capacity]
    assert 150 < sum(of_entries) / capacity <= 200


def test_a_year_of_running_leaves_a_checkpoint_its_time() -> None:
    """The time of use is kept narrow, and counted from the first one."""
    bench = bench_of(policy={**ENDS, "checkpoint_ttl_s": 10.0}, host_blocks=5)
    keys, year_s = bench.keys(2, 1), 3600.0 * 24 * 365
    for start_s, age_s, expired in ((0.0, 0.0, False), (year_s, 5.0, False), (year_s + 100, 15.0, True)):
        bench.now_s = start_s
        bench.planner.release(bench.lookup(keys))
        bench.stored(keys)
        bench.planner.release(bench.lookup(keys))
        bench.now_s += age_s
        bench.planner.release(bench.lookup(bench.keys(2, 9)))
        bench.planner.follow_up()
        checkpoints = bench.planner._state.host.checkpoints
        assert checkpoints is not None
        assert checkpoints.goes_first(bench.entry(keys, 1, STATE)) == expired


def test_with_a_block_that_goes_goes_what_is_of_no_use_without_it() -> None:
    bench = bench_of(host_blocks=4)
    old = bench.keys(4, 1)
    bench.stored(old)
    for seed in range(2, 5):
        bench.stored(bench.keys(3, seed))
    alive = kept(bench, old, ATTENTION)
    assert set(kept(bench, old, WINDOW)) | set(kept(bench, old, STATE)) <= set(alive)
    bench.check_at_rest()


def test_what_somebody_holds_goes_when_it_is_let_go_of() -> None:
    """The window of a hit stays as long as the hit, also where a damaged block made it useless."""
    bench = bench_of()
    keys = bench.keys(4)
    bench.stored(keys)
    lease = bench.lookup(keys)
    bench.lose(keys, 3, Tier.HOST)
    assert kept(bench, keys, STATE) == [3]
    bench.planner.release(lease)
    assert kept(bench, keys, STATE) == []
    bench.check_at_rest()


def test_windows_stay_off_the_disk_where_the_configuration_says_so() -> None:
    bench = bench_of(policy={**ENDS, "spill_windows": False}, segments=8)
    keys = bench.keys(4)
    bench.stored(keys, durability=Durability.DURABLE)
    flush = bench.flush(Durability.DURABLE)
    bench.run()
    assert {int(group) for plan in bench.plans(PlanKind.SPILL) for group in plan.rows["group"]} == {ATTENTION}
    assert flush.count(Outcome.FAILED) == 0
    other = bench.reopen()
    assert kept(other, keys, ATTENTION) == [0, 1, 2, 3]
    assert other.match(keys) == 0


def test_windows_and_states_are_found_again_on_disk() -> None:
    bench = bench_of(segments=8)
    keys = bench.keys(4)
    bench.stored(keys, durability=Durability.DURABLE)
    other = bench.reopen()
    assert other.match(keys) == 4
    other.loaded(keys)
    other.check_at_rest()


class TestReplay:
    """What is not there can be computed again from the rest."""

    def test_zero_keeps_nothing_that_can_be_computed_again(self) -> None:
        bench = bench_of(policy={"windows": "zero", **ENDS}, replay_tokens=3 * BLOCK)
        keys = bench.keys(6)
        bench.stored(keys)
        assert [kept(bench, keys, group) for group in (WINDOW, STATE)] == [[], [5]]
        lease = bench.lookup(keys, exact=True)
        assert (lease.blocks, lease.replay_tokens, lease.lineage) == (6, 3 * BLOCK, Lineage.EXACT)

    def test_a_missing_window_is_one_window_to_be_computed_again_and_approximate(self) -> None:
        bench = bench_of(policy={"windows": "replay", **ENDS}, replay_tokens=30 * BLOCK)
        keys = bench.keys(6)
        bench.stored(keys)
        assert bench.lookup(keys, exact=True).replay_tokens == 0
        bench.lose(keys, 4, Tier.HOST, group=WINDOW)
        lease = bench.lookup(keys)
        assert (lease.blocks, lease.replay_tokens, lease.lineage) == (6, 2 * BLOCK, Lineage.APPROXIMATE)
        assert bench.lookup(keys, exact=True).blocks == 0

    def test_a_hit_is_none_where_all_of_it_would_be_computed_again(self) -> None:
        bench = bench_of(policy={"windows": "zero", **ENDS}, replay_tokens=3 * BLOCK)
        short = bench.keys(3)
        bench.stored(short)
        assert bench.match(short) == 0
        assert bench.lookup(short).replay_tokens == 0

    def test_states_cannot_be_computed_again(self) -> None:
        bench = bench_of(policy={"windows": "zero", **ENDS}, replay_tokens=BLOCK)
        keys = bench.keys(6)
        bench.stored(keys)
        bench.lose(keys, 5, Tier.HOST, group=STATE)
        assert bench.match(keys) == 0


def test_the_blocks_of_a_window_are_those_that_reach_back_far_enough() -> None:
    """Seven tokens in blocks of four need two blocks, nine need three."""
    axes, shape = ("token", "head", "dim"), (BLOCK, 1, 8)
    for tokens, blocks in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        group = KVGroup("window", (Part(0, "kv", "bfloat16", axes, shape),), Reuse("trailing", tokens))
        own = Windows(KVLayout(BLOCK, BLOCK, (group,)), PolicyConfig())
        assert own.needed(0, 0, 10) == range(10 - blocks, 10)
        assert own.needed(0, 9, 10) == range(9, 10)


def test_a_layout_without_a_group_that_needs_the_whole_prefix_is_served() -> None:
    state = KVGroup("state", (Part(0, "state", "float32", ("head", "state"), (2, 8)),), Reuse("last"))
    bench = Bench(layout=KVLayout(BLOCK, BLOCK, (state,)), policy=ENDS)
    keys = bench.keys(6)
    bench.stored(keys)
    lease = bench.lookup(keys)
    assert (lease.blocks, lease.begins) == (6, (5,))
    ticket = bench.load(lease)
    bench.run()
    assert ticket.count(Outcome.DONE) == 6
