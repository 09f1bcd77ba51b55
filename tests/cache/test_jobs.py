"""Jobs as callers see them: waiting, giving up waiting, and the parts of a load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from kvtier import CacheManager, ConfigError, TieredCache
from kvtier.channel import LocalChannel
from kvtier.core.plan import Plan, Reason
from kvtier.jobs import Client, Job, JobControl, tell
from kvtier.manager import AsyncJob
from kvtier.planner import Ticket
from kvtier.planner.tickets import TicketKind
from kvtier.runtime import SystemEvent, SystemRuntime
from kvtier.runtime.seam import Event
from kvtier.testing import SimDisk, Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
BLOCK = LAYOUT.block_tokens
PARTS = sum(len(group.parts) for group in LAYOUT.groups)
SETTINGS: dict[str, Any] = {"host": {"capacity": "1MiB", "staging": "1MiB"}}
TOKENS = list(range(4 * BLOCK + 1))


class CountingRuntime(SystemRuntime):
    """Counts how often somebody who waits is woken."""

    def __init__(self) -> None:
        super().__init__()
        self.woken = 0

    def event(self) -> Event:
        runtime = self

        class Counting(SystemEvent):
            def set(self) -> None:
                runtime.woken += 1
                super().set()

        return Counting()


@pytest.fixture
def runtime() -> CountingRuntime:
    return CountingRuntime()


@pytest.fixture
def job(runtime: CountingRuntime) -> Job[Any]:
    """A store of one block that is under way."""
    ticket = Ticket.of(TicketKind.STORE, 0, 1)
    return Job(ticket, range(0), BLOCK, JobControl(runtime, lambda _: None, lambda: None, 1), None)


def end(job: Job[Any]) -> None:
    job.ticket.succeed()
    job.ticket.source_free = job.ticket.finished = True
    tell([job])


def test_who_gave_up_waiting_is_not_told_of_the_end(job: Job[Any], runtime: CountingRuntime) -> None:
    """Else every look of a poller stays on the job for as long as that goes on."""
    for _ in range(50):
        with pytest.raises(TimeoutError):
            job.result(0)
        with pytest.raises(TimeoutError):
            job.wait_source_free(0)
    end(job)
    assert runtime.woken == 0
    assert job.result(0).stored == BLOCK


async def test_an_await_that_was_cancelled_is_not_told_of_the_end(
    job: Job[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    waiting = AsyncJob(job, loop)
    for _ in range(50):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting, 0.0001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting.wait_source_free(), 0.0001)
    told: list[Any] = []
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *arguments: told.append(arguments))
    end(job)
    assert told == []


def test_who_still_waits_is_told_though_others_gave_up(job: Job[Any]) -> None:
    told: list[Job[Any]] = []
    job.call_on_news(told.append, unless=lambda: False)
    with pytest.raises(TimeoutError):
        job.result(0)
    end(job)
    assert told == [job]


def test_to_take_a_callback_back_after_it_was_called_is_harmless(job: Job[Any]) -> None:
    called: list[Job[Any]] = []
    job.call_on_news(called.append, unless=lambda: False)
    tell([job])
    job.call_no_more(called.append)
    job.call_no_more(called.append)
    assert called == [job]


def test_an_interrupt_in_a_callback_keeps_the_end_from_nobody_else(runtime: CountingRuntime) -> None:
    control, told = JobControl(runtime, lambda _: None, lambda: None, 1), []

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with Client() as client:
        jobs = [Job[Any](Ticket.of(TicketKind.STORE, 0, 1), range(0), BLOCK, control, client) for _ in range(2)]
        for job in jobs:
            job.call_on_news(told.append, unless=lambda: False)
            job.call_on_news(interrupted, unless=lambda: False)
            job.call_on_news(told.append, unless=lambda: False)
            job.ticket.finished = True
        with pytest.raises(KeyboardInterrupt):
            tell(jobs)
        assert told == [jobs[0]] * 2 + [jobs[1]] * 2
        assert set(client.poll()) == set(jobs)


# --- the parts of a load ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [-1, PARTS, 999, 0.0, "0", None, True])
async def test_a_part_that_the_layout_does_not_have_is_refused(part: Any) -> None:
    async with CacheManager(SETTINGS, LAYOUT, "m") as cache:
        engine = PseudoEngine(LAYOUT, 4)
        await cache.store(TOKENS, engine.pages)
        with cache.lookup(TOKENS) as hit:
            load = cache.load(hit, engine.pages)
        for wait in (load.job.wait_part, load.job.part_ready):
            with pytest.raises(ConfigError, match="part = "):
                wait(part)
        with pytest.raises(ConfigError, match="part = "):
            await load.wait_part(part)
        assert await load.wait_part(PARTS - 1) == load.job.wait_part(0) == 4 * BLOCK


async def test_a_store_has_no_parts_and_says_so_at_once(job: Job[Any]) -> None:
    """Not when it has ended: whoever waits for a part of it waits for the wrong thing."""
    with pytest.raises(ConfigError, match="part = 0: only loads have parts; wait for the result of this store"):
        job.wait_part(0, 0)
    with pytest.raises(ConfigError, match="only loads have parts"):
        await AsyncJob(job, asyncio.get_running_loop()).wait_part(0)


async def test_no_part_has_fewer_tokens_than_one_before_it(runtime: CountingRuntime) -> None:
    """Of a load whose third block was damaged: what was consumed stays so."""
    ticket = Ticket.of(TicketKind.LOAD, 0, 4)
    load: Job[Any] = Job(ticket, range(4 * BLOCK), BLOCK, JobControl(runtime, lambda _: None, lambda: None, 3), None)
    assert not load.part_ready(0)
    ticket.fail_from(2, Reason.DAMAGED)
    end(load)
    asynchronous = AsyncJob(load, asyncio.get_running_loop())
    found = [load.wait_part(part, 0) for part in range(3)] + [await asynchronous.wait_part(part) for part in range(3)]
    assert found == [2 * BLOCK] * 6


def test_a_hit_that_nobody_holds_any_more_is_let_go() -> None:
    with TieredCache(SETTINGS, LAYOUT, "m") as cache:
        assert cache.submit_store(TOKENS, PseudoEngine(LAYOUT, 4).pages).result(60).refused == 0
        assert cache.lookup(TOKENS).num_tokens == 4 * BLOCK
        cache.lookup([0] * len(TOKENS)).release()
        assert (cache.stats()["leases"], cache.stats()["pinned_entries"]) == (0, 0)


def test_a_hit_of_an_owner_stays_until_it_is_released() -> None:
    with TieredCache(SETTINGS, LAYOUT, "m") as cache:
        assert cache.submit_store(TOKENS, PseudoEngine(LAYOUT, 4).pages).result(60).refused == 0
        assert cache.lookup(TOKENS, owner="request 1").num_tokens == 4 * BLOCK
        cache.lookup([0] * len(TOKENS)).release()
        assert cache.stats()["leases"] == 1
        cache.lookup(TOKENS, owner="request 1").release()
        assert cache.stats()["leases"] == 0


def test_a_load_is_planned_before_its_hit_is_let_go() -> None:
    world, engine = Simulation(1), PseudoEngine(LAYOUT, 4)
    cache = TieredCache(SETTINGS, LAYOUT, "m", machine=world.machine())
    assert cache.submit_store(TOKENS, engine.pages).result(60).refused == 0
    job = cache.submit_load(cache.lookup(TOKENS), engine.pages)  # dropped here, before anybody plans the load
    assert (cache.stats()["leases"], cache.stats()["pinned_entries"]) == (0, 4)
    assert job.result(60).ok_tokens == 4 * BLOCK
    assert cache.stats()["pinned_entries"] == 0
    assert cache.close(60)


def test_garbage_collection_lets_go_of_a_hit_in_the_middle_of_a_decision() -> None:
    """As of an abandoned coroutine, whose ``with`` ends on whichever thread collects it."""
    with TieredCache(SETTINGS, LAYOUT, "m") as cache:
        assert cache.submit_store(TOKENS, PseudoEngine(LAYOUT, 4).pages).result(60).refused == 0
        hit = cache.lookup(TOKENS)
        with cache._lock:
            hit.release()
            assert not hit.lease.released
        cache.lookup(TOKENS).release()
        assert hit.lease.released
        assert (cache.stats()["leases"], cache.stats()["pinned_entries"]) == (0, 0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cancel_counts_also_while_the_plans_are_on_their_way(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """One thread sends what it planned while another gives it up, before there is anything to give up, or after."""
    world, engine = Simulation(1), PseudoEngine(LAYOUT, 4)
    disk = SimDisk(world)
    settings = SETTINGS | {"disk": {"directories": ["/kv"], "capacity": "8MiB", "segment": "1MiB"}}
    with TieredCache(settings, LAYOUT, "m", machine=world.machine(disk)) as cache:
        assert cache.submit_store(TOKENS, engine.pages, durability="process").result(60).refused == 0
    cache = TieredCache(settings, LAYOUT, "m", machine=world.machine(disk))
    cache.wait_attached(60)
    disk.latency_s = 1.0
    send = LocalChannel.send

    def cancelling(channel: LocalChannel, plans: Sequence[Plan]) -> None:
        if when == "before":
            job.cancel()
        send(channel, plans)
        if when == "after":
            job.cancel()

    with cache.lookup(TOKENS) as hit:
        job = cache.submit_load(hit, engine.pages)
        monkeypatch.setattr(LocalChannel, "send", cancelling)
        assert job.result(60).failed == {"abandoned": 4 * BLOCK}
    assert cache._dispatch._cancelled == set()
    assert cache.close(60)
