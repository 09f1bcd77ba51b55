"""Weights versions: older KV cannot hit any more, in any tier, at once; what is under way ends as a miss."""

from __future__ import annotations

from typing import Any

import pytest

from kvtier.core.keys import Keys, Root
from kvtier.core.plan import PlanKind, Reason, Status, Tier
from kvtier.planner import Durability, Outcome
from tests.planner.bench import Bench


def of(bench: Bench, version: str, blocks: int = 3) -> Keys:
    return bench.keys(blocks, root=Root("model", version))


def test_versions_never_hit_each_others_blocks() -> None:
    bench = Bench()
    old, new = of(bench, ""), of(bench, "2")
    bench.stored(old)
    bench.planner.set_weights_version("2")
    assert bench.planner.weights_version == "2"
    assert bench.match(old) == bench.match(new) == 0
    bench.stored(new)
    assert bench.match(new) == 3
    assert bench.match(old) == 0


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_every_verb_on_an_old_version_is_a_miss(tier: Tier) -> None:
    bench = Bench(segments=4)
    keys = of(bench, "")
    bench.stored(keys)
    if tier == Tier.DISK:
        for block in range(3):
            bench.lose(keys, block, Tier.HOST)
    lease = bench.lookup(keys)
    bench.planner.set_weights_version("2")
    sent = len(bench.sent)
    assert bench.match(keys) == 0
    assert bench.lookup(keys).blocks == 0
    for ticket in (bench.load(lease), bench.store(keys), bench.store(bench.keys(5))):
        assert ticket.finished
        assert set(ticket.reason) == {Reason.RETIRED}
    assert bench.prefetch(keys).finished
    assert len(bench.sent) == sent
    bench.planner.release(lease)
    bench.check()


@pytest.mark.parametrize("answered", range(4))
@pytest.mark.parametrize("kind", ["load", "promoting load", "prefetch", "store", "joined store"])
def test_what_is_under_way_when_the_version_changes_ends_as_a_miss(kind: str, answered: int) -> None:
    """After any number of its rows were answered."""
    bench = Bench(segments=4)
    keys = of(bench, "")
    if "store" not in kind:
        bench.stored(keys)
    if kind in ("promoting load", "prefetch"):
        for block in range(3):
            bench.lose(keys, block, Tier.HOST)
    lease = bench.lookup(keys)
    tickets = {
        "load": lambda: [bench.load(lease)],
        "promoting load": lambda: [bench.load(lease)],
        "prefetch": lambda: [bench.prefetch(keys)],
        "store": lambda: [bench.store(keys)],
        "joined store": lambda: [bench.store(keys), bench.store(keys, durability=Durability.DURABLE)],
    }[kind]()
    bench.planner.release(lease)
    before = bench.planner.stats()["host_entries"]
    number = next(iter(bench.planes[0].flights))
    bench.planes[0].answer(number, dict.fromkeys(range(min(answered, 2)), Status.OK))
    bench.hear()
    bench.planner.set_weights_version("2")
    bench.check()
    bench.run()
    for ticket in tickets:
        assert ticket.finished
        assert ticket.count(Outcome.FAILED) == 3
        assert set(ticket.reason) == {Reason.RETIRED}
    assert bench.planner.stats()["host_entries"] == before, "nothing of it is published"
    bench.check_at_rest()


def test_a_version_that_comes_back_hits_again() -> None:
    bench = Bench()
    keys = of(bench, "")
    bench.stored(keys)
    bench.planner.set_weights_version("2")
    bench.planner.set_weights_version("")
    assert bench.match(keys) == 3
    assert bench.loaded(keys).count(Outcome.DONE) == 3


def test_setting_the_same_version_again_changes_nothing() -> None:
    bench = Bench()
    keys = of(bench, "")
    ticket = bench.store(keys)
    bench.planner.set_weights_version("")
    bench.run()
    assert ticket.count(Outcome.DONE) == 3


def test_old_versions_make_room_like_anything_that_is_not_used() -> None:
    bench = Bench(host_blocks=4)
    bench.stored(of(bench, "", 4))
    bench.planner.set_weights_version("2")
    new = of(bench, "2", 4)
    assert bench.stored(new).count(Outcome.DONE) == 4
    assert bench.match(new) == 4
    bench.check_at_rest()


def test_blocks_of_the_version_are_found_after_a_restart_and_others_are_not() -> None:
    bench = Bench(segments=6)
    keys: dict[str, Any] = {version: of(bench, version) for version in ("", "2")}
    for version, one in keys.items():
        bench.planner.set_weights_version(version)
        bench.stored(one)
    bench = bench.reopen()
    bench.planner.set_weights_version("2")
    assert bench.match(keys["2"]) == 3
    assert bench.match(keys[""]) == 0


def test_writes_of_an_old_version_that_are_under_way_go_on() -> None:
    """They are whole blocks under their own keys; only a caller that waits is told what it asked for."""
    bench = Bench(segments=4)
    keys = of(bench, "")
    ticket = bench.store(keys, durability=Durability.PROCESS)
    bench.planes[0].finish(bench.in_flight(PlanKind.STORE))
    bench.hear()
    bench.planner.set_weights_version("2")
    bench.run()
    assert ticket.count(Outcome.DONE) == 3
    bench.check_at_rest()
