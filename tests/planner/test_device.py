"""The device tier: stores land on it, are copied to host memory behind the caller's back, and leave it without loss."""

from __future__ import annotations

from typing import Any

import pytest

from kvtier.core.plan import Lineage, PlanKind, Reason, Status, Tier
from kvtier.planner import Durability, Outcome
from tests.planner.bench import BACK, Bench


def tiers(bench: Bench, keys: Any) -> list[Tier]:
    """Where each block of ``keys`` would be read from."""
    lease = bench.lookup(keys)
    bench.planner.release(lease)
    return [Tier(tier) for tier in lease.tiers.tolist()]


def places(bench: Bench, keys: Any, block: int = 0) -> set[Tier]:
    return set(bench.place(keys, block))


def only(kind: PlanKind) -> Any:
    """All plans do as they are told, but those of ``kind``."""
    return lambda plan, row: Reason.IO_ERROR if plan.kind == kind else Status.OK


class TestStoring:
    def test_the_engine_has_its_pages_back_before_host_memory_has_the_block(self) -> None:
        bench = Bench(device_blocks=4)
        ticket = bench.store(bench.keys(2))
        bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
        bench.hear()
        assert ticket.finished
        assert ticket.source_free
        assert tiers(bench, bench.keys(2)) == [Tier.DEVICE] * 2
        assert places(bench, bench.keys(2)) == {Tier.DEVICE}
        bench.run()
        assert places(bench, bench.keys(2)) == {Tier.DEVICE, Tier.HOST}
        bench.check_at_rest()

    def test_it_goes_on_to_the_disk_once_it_has_landed(self) -> None:
        bench = Bench(device_blocks=4, segments=4)
        bench.stored(bench.keys(2))
        assert places(bench, bench.keys(2)) == {Tier.DEVICE, Tier.HOST, Tier.DISK}
        kinds = [plan.kind for plan in bench.sent if plan.kind in (PlanKind.STORE, PlanKind.LAND, PlanKind.SPILL)]
        assert kinds == [PlanKind.STORE, PlanKind.LAND, PlanKind.SPILL]

    def test_what_is_waited_for_on_disk_takes_the_short_way(self) -> None:
        bench = Bench(device_blocks=4, segments=4)
        bench.stored(bench.keys(2), durability=Durability.PROCESS)
        assert places(bench, bench.keys(2)) == {Tier.HOST, Tier.DISK}

    def test_more_than_the_device_holds_goes_to_host_memory_as_a_whole(self) -> None:
        bench = Bench(device_blocks=4)
        bench.stored(bench.keys(6))
        assert tiers(bench, bench.keys(6)) == [Tier.HOST] * 6

    def test_a_device_full_of_what_has_not_landed_holds_nobody_up(self) -> None:
        bench = Bench(device_blocks=4)
        bench.store(bench.keys(4))
        bench.store(bench.keys(3, seed=1))
        assert [plan.target for plan in bench.plans(PlanKind.STORE)] == [Tier.DEVICE, Tier.HOST]
        bench.run()
        bench.check_at_rest()

    def test_a_parent_is_written_down_with_its_landing(self) -> None:
        bench = Bench(device_blocks=8)
        bench.stored(bench.keys(3))
        (plan,) = bench.plans(PlanKind.LAND)
        assert [row["parent"].tobytes() for row in plan.rows[1:]] == list(bench.keys(3).digests[:2])

    def test_without_a_capacity_there_is_none_of_it(self) -> None:
        bench = Bench()
        bench.stored(bench.keys(2))
        assert bench.index.device is None
        assert not bench.plans(PlanKind.LAND)
        assert not [name for name in bench.planner.stats() if "device" in name]


class TestLeaving:
    def test_what_has_landed_makes_room_for_what_comes(self) -> None:
        bench = Bench(device_blocks=4)
        bench.stored(bench.keys(4))
        bench.stored(bench.keys(3, seed=1))
        assert tiers(bench, bench.keys(3, seed=1)) == [Tier.DEVICE] * 3
        assert tiers(bench, bench.keys(4)) == [Tier.DEVICE] + [Tier.HOST] * 3, "leaves go first"

    def test_down_the_whole_stair_and_read_from_each_step(self) -> None:
        bench = Bench(device_blocks=2, host_blocks=4, segments=8)
        for seed in range(4):
            bench.stored(bench.keys(2, seed=seed))
        assert [tiers(bench, bench.keys(2, seed=seed))[0] for seed in (3, 2, 0)] == [Tier.DEVICE, Tier.HOST, Tier.DISK]
        for seed in (3, 2, 0):
            assert set(bench.loaded(bench.keys(2, seed=seed)).outcome) == {Outcome.DONE}
        bench.check_at_rest()

    def test_what_host_memory_has_lost_lands_again_before_it_leaves(self) -> None:
        bench = Bench(device_blocks=4, host={"high_watermark": 0.7, "low_watermark": 0.4})
        keys = bench.keys(2)
        bench.stored(keys)
        for block in range(2):
            bench.lose(keys, block, Tier.HOST)
        assert places(bench, keys) == {Tier.DEVICE}
        bench.stored(bench.keys(1, seed=1))
        bench.run()
        assert Tier.HOST in places(bench, keys, 1), "the leaf is the next to go"

    def test_a_landing_that_fails_is_not_tried_again_and_keeps_no_room(self) -> None:
        bench = Bench(device_blocks=2)
        bench.store(bench.keys(2))
        bench.run(only(PlanKind.LAND))
        assert places(bench, bench.keys(2)) == {Tier.DEVICE}
        bench.stored(bench.keys(2, seed=1))
        assert bench.match(bench.keys(2)) == 0
        bench.check_at_rest()

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_landing_waits_for_room_in_host_memory_and_then_comes(self, groups: int) -> None:
        bench = Bench(device_blocks=8, host_blocks=4, groups=groups)
        bench.store(bench.keys(4, seed=1), durability=Durability.MEMORY)
        bench.run()
        lease = bench.lookup(bench.keys(4, seed=1, extra_tokens=2))
        bench.stored(bench.keys(4))
        assert places(bench, bench.keys(4)) == {Tier.DEVICE}
        bench.planner.release(lease)
        bench.run()
        bench.planner.follow_up()
        bench.run()
        assert places(bench, bench.keys(4)) == {Tier.DEVICE, Tier.HOST}
        bench.check_at_rest()


class TestLandingInAllGroups:
    """What a block has in one group is of no use without the rest: nothing of it goes so that other parts can land."""

    def test_a_store_that_fitted_is_there_after_it_has_landed(self) -> None:
        """Group 0 fits the device, group 1 does not: it lies in host memory, where group 0 is to land."""
        bench = Bench(device_blocks=2, host_blocks=3, groups=2)
        ticket = bench.stored(bench.keys(4))
        assert {plan.target for plan in bench.plans(PlanKind.STORE)} == {Tier.DEVICE, Tier.HOST}
        assert ticket.count(Outcome.DONE) == bench.match(bench.keys(4)) == 4
        assert not bench.planner.counters().get("dropped_dead_blocks")
        bench.check_at_rest()

    def test_a_block_lands_in_all_its_groups_or_in_none(self) -> None:
        bench = Bench(device_blocks=5, host_blocks=3, groups=2)
        keys = bench.keys(5)
        bench.stored(keys)
        here = [{tier for tier in (Tier.DEVICE, Tier.HOST) if tier in bench.place(keys, 0, group=g)} for g in (0, 1)]
        assert here == [{Tier.DEVICE, Tier.HOST}] * 2
        landed = [{block for block in range(5) if Tier.HOST in bench.place(keys, block, group=g)} for g in (0, 1)]
        assert landed[0] == landed[1] == {0, 1, 2}
        assert bench.match(keys) == 5
        bench.check_at_rest()

    @pytest.mark.parametrize("blocks", [(2, 1), (1, 3), (3, 3)])
    def test_no_plan_speaks_of_what_was_released(self, blocks: tuple[int, int]) -> None:
        bench = Bench(device_blocks=2, host_blocks=2, groups=2)
        for seed, count in enumerate((*blocks, 3, 2)):
            bench.store(bench.keys(count, seed, shared=1))
            bench.run()
            bench.check_at_rest()
        for plan in bench.plans(PlanKind.LAND):
            assert (plan.rows["device_page"] >= 0).all()


class TestWhatLandsLate:
    """A block that comes down because it leaves the device is older than much of what host memory has."""

    def come_down(self, bench: Bench, blocks: int) -> None:
        """The first ``blocks`` of the oldest sequence, which host memory has lost, are to leave the device."""
        for block in range(blocks):
            bench.planner._state.landing.enqueue(bench.entry(bench.keys(2, seed=1), block))
        bench.planner.follow_up()
        bench.run()

    def crowded(self, **how: Any) -> Bench:
        """Two old blocks that the device alone has, and four newer ones that fill host memory."""
        bench = Bench(device_blocks=2, host_blocks=4, **how)
        bench.stored(bench.keys(2, seed=1))
        bench.stored(bench.keys(4, seed=2))
        return bench

    def test_it_pushes_out_nothing_that_was_used_more_recently(self) -> None:
        bench = self.crowded()
        self.come_down(bench, 2)
        assert places(bench, bench.keys(2, seed=1)) == {Tier.DEVICE}
        assert bench.match(bench.keys(4, seed=2)) == 4
        bench.stored(bench.keys(1, seed=4))
        assert tiers(bench, bench.keys(1, seed=4)) == [Tier.DEVICE], "what cannot land may go"
        bench.check_at_rest()

    def test_it_goes_before_what_was_used_more_recently(self) -> None:
        bench = Bench(device_blocks=2, host_blocks=5)
        old = bench.keys(2, seed=1)
        bench.stored(old)
        for block in range(2):
            bench.lose(old, block, Tier.HOST)
        bench.stored(bench.keys(3, seed=2))  # too many for the device
        self.come_down(bench, 2)
        assert places(bench, old) == {Tier.DEVICE, Tier.HOST}
        bench.stored(bench.keys(3, seed=3))
        assert places(bench, old) == {Tier.DEVICE}
        assert bench.match(bench.keys(3, seed=2)) == 2
        bench.check_at_rest()

    def test_it_goes_on_to_the_disk_through_host_memory_whatever_its_age(self) -> None:
        bench = self.crowded(segments=8)
        self.come_down(bench, 2)
        for seed, blocks in ((1, 2), (2, 4)):
            assert bench.match(bench.keys(blocks, seed=seed)) == blocks
        bench.stored(bench.keys(2, seed=3))
        assert bench.match(bench.keys(2, seed=1)) == 2
        bench.check_at_rest()


class TestWaiting:
    def test_a_flush_takes_what_is_on_the_device_alone_down_to_the_disk(self) -> None:
        bench = Bench(device_blocks=4, segments=4, **BACK)
        keys = bench.keys(2)
        bench.stored(keys)
        for block in range(2):
            bench.lose(keys, block, Tier.HOST)
        ticket = bench.flush(Durability.DURABLE)
        bench.run()
        assert ticket.finished
        assert set(ticket.outcome) == {Outcome.DONE}
        assert places(bench, keys) == {Tier.DEVICE, Tier.HOST, Tier.DISK}
        bench.check_at_rest()

    def test_a_store_that_finds_its_blocks_on_the_device_waits_for_them_to_reach_the_disk(self) -> None:
        bench = Bench(device_blocks=4, segments=4, **BACK)
        bench.store(bench.keys(2))
        bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
        bench.hear()
        ticket = bench.stored(bench.keys(2), durability=Durability.PROCESS)
        assert set(ticket.outcome) == {Outcome.EXISTING}
        assert Tier.DISK in places(bench, bench.keys(2))

    def test_whoever_waits_for_a_landing_that_fails_is_told(self) -> None:
        bench = Bench(device_blocks=4, segments=4, **BACK)
        bench.store(bench.keys(2))
        bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
        bench.hear()
        ticket = bench.store(bench.keys(2), durability=Durability.PROCESS)
        bench.run(only(PlanKind.LAND))
        assert ticket.finished
        assert set(ticket.outcome) == {Outcome.FAILED}
        bench.check_at_rest()


class TestComingBack:
    def test_a_load_from_host_memory_keeps_a_copy_on_the_device(self) -> None:
        bench = Bench(device_blocks=2)
        bench.stored(bench.keys(2))
        bench.stored(bench.keys(2, seed=1))
        ticket = bench.loaded(bench.keys(2))
        assert list(ticket.tiers) == [Tier.HOST, Tier.HOST][: len(ticket.tiers)]
        assert tiers(bench, bench.keys(2)) == [Tier.DEVICE] * len(ticket.tiers)

    def test_unless_policy_says_no(self) -> None:
        bench = Bench(device_blocks=2, device={"capacity": "1MiB", "promote": False})
        bench.stored(bench.keys(2))
        bench.stored(bench.keys(2, seed=1))
        bench.loaded(bench.keys(2))
        assert tiers(bench, bench.keys(2)) == [Tier.HOST] * 2

    def test_one_from_disk_comes_to_host_memory_first(self) -> None:
        bench = Bench(device_blocks=4, segments=4)
        bench.stored(bench.keys(2), durability=Durability.PROCESS)
        for block in range(2):
            bench.lose(bench.keys(2), block, Tier.HOST)
        seen = []
        for _ in range(3):
            seen.append(tiers(bench, bench.keys(2))[0])
            bench.loaded(bench.keys(2))
        assert seen == [Tier.DISK, Tier.HOST, Tier.DEVICE]

    def test_a_prefetch_to_the_device_comes_from_the_disk_by_way_of_host_memory(self) -> None:
        bench = Bench(device_blocks=4, segments=4)
        bench.stored(bench.keys(2), durability=Durability.PROCESS)
        for block in range(2):
            bench.lose(bench.keys(2), block, Tier.HOST)
        ticket = bench.prefetch(bench.keys(2), to_device=True)
        bench.run()
        assert set(ticket.outcome) == {Outcome.DONE}
        assert tiers(bench, bench.keys(2)) == [Tier.DEVICE] * 2
        bench.check_at_rest()

    def test_a_prefetch_to_the_device_that_finds_no_room_there_is_refused(self) -> None:
        bench = Bench(device_blocks=2)
        bench.stored(bench.keys(2))
        lease = bench.lookup(bench.keys(2, extra_tokens=2))
        bench.stored(bench.keys(1, seed=1))
        ticket = bench.prefetch(bench.keys(1, seed=1), to_device=True)
        bench.run()
        assert list(ticket.outcome) == [Outcome.FAILED]
        assert list(ticket.reason) == [Reason.REFUSED]
        bench.planner.release(lease)


class TestGoing:
    def test_a_new_life_of_a_rank_has_nothing_on_its_device(self) -> None:
        bench = Bench(device_blocks=4, segments=4, ranks=2)
        bench.stored(bench.keys(2))
        bench.planes[1].restart()
        bench.planes[1].recover()
        bench.hear()
        assert tiers(bench, bench.keys(2)) == [Tier.DISK] * 2
        bench.run()
        bench.check_at_rest()

    def test_a_lost_copy_is_forgotten_and_the_next_one_read(self) -> None:
        bench = Bench(device_blocks=4)
        bench.stored(bench.keys(2))
        bench.lose(bench.keys(2), 1, Tier.DEVICE)
        assert tiers(bench, bench.keys(2)) == [Tier.DEVICE, Tier.HOST]

    def test_another_weights_version_hits_nothing(self) -> None:
        bench = Bench(device_blocks=4)
        bench.stored(bench.keys(2))
        bench.planner.set_weights_version("step-2")
        assert bench.match(bench.keys(2)) == 0

    def test_exact_content_takes_the_place_of_approximate_content_on_the_device(self) -> None:
        bench = Bench(device_blocks=4)
        bench.stored(bench.keys(1), lineage=Lineage.APPROXIMATE)
        bench.stored(bench.keys(1))
        assert bench.match(bench.keys(1), exact=True) == 1
        bench.check_at_rest()

    def test_whoever_listens_hears_of_every_tier(self) -> None:
        bench = Bench(device_blocks=1)
        bench.planner.events.listening = True
        bench.stored(bench.keys(1))
        bench.stored(bench.keys(1, seed=1))
        heard = [(event.change, event.tier) for event in bench.planner.events.take()]
        assert heard == [
            ("stored", "device"), ("stored", "host"), ("removed", "device"), ("stored", "device"), ("stored", "host"),
        ]  # fmt: skip


def test_a_hit_of_two_groups_is_as_slow_as_the_slower_one() -> None:
    bench = Bench(device_blocks=4, groups=2)
    bench.stored(bench.keys(2))
    bench.lose(bench.keys(2), 0, Tier.DEVICE, group=1)
    assert tiers(bench, bench.keys(2)) == [Tier.HOST, Tier.DEVICE]
