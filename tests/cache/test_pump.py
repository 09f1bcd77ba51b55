"""What the cache does between its planner and a data plane, seen from a channel that answers when it is told."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from select import select
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from kvtier import CacheManager, ClosedError, ConfigError, TieredCache
from kvtier.core.memory import GroupPages, KVMemory, PageTable
from kvtier.core.plan import COMPLETED, Completion, Hello, Message, Plan, Status, Tier
from kvtier.dispatch import Dispatch
from kvtier.hits import Hit
from kvtier.jobs import Client
from kvtier.memories import Memories
from kvtier.metrics import Sample
from kvtier.planner import Lease
from kvtier.testing.contents import PseudoEngine, tiny_layout
from tests.interrupts import strike

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
CONFIG: dict[str, Any] = {"host": {"capacity": "256KiB", "staging": "1MiB"}}
TABLE = PageTable(0, tuple(GroupPages(0, np.arange(8, dtype=np.int32)) for _ in LAYOUT.groups))


class AnsweringChannel:
    """Keeps plans until ``answer``; ``on_poll`` runs at every poll."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.outbox: list[Message] = [Hello(0, 1, LAYOUT.placement, SIZE, LAYOUT.record_pages, 64, 0, 0)]
        self.plans: list[Plan] = []
        self.registered: list[KVMemory] = []
        self.forgotten: list[int] = []
        self.on_poll: Any = lambda: None

    def answer(self) -> None:
        """All stores are in host memory."""
        for plan in self.plans:
            rows = np.zeros(len(plan.rows), COMPLETED)
            rows["row"], rows["status"], rows["tier"] = np.arange(len(rows)), Status.OK, Tier.HOST
            rows["page"], rows["pages"] = plan.rows["target_page"], plan.rows["target_pages"]
            self.outbox.append(Completion(plan.plan_id, 0, 1, rows, source_free=True, final=True))
        self.plans.clear()

    def send(self, plans: Sequence[Plan]) -> None:
        self.plans += plans

    def call_back(self) -> bool:
        return False

    def cancel(self, plan_id: int) -> None:
        pass

    def poll(self) -> list[Message]:
        messages, self.outbox = self.outbox, []
        self.on_poll()
        return messages

    def register(self, memory: KVMemory) -> int:
        self.registered.append(memory)
        return self.number

    def unregister(self, memory_id: int) -> None:
        self.forgotten.append(memory_id)

    def samples(self) -> list[Sample]:
        return []

    def close(self, timeout_s: float) -> bool:
        return True


@pytest.fixture
def channel() -> AnsweringChannel:
    return AnsweringChannel()


@pytest.fixture
def cache(channel: AnsweringChannel) -> TieredCache:
    return TieredCache(CONFIG, LAYOUT, "pump", channels=[channel])


def tokens(number: int) -> list[int]:
    return [number] * SIZE


def is_readable(client: Client) -> bool:
    return bool(select([client.fileno()], [], [], 0)[0])


def test_a_client_is_woken_once_for_many_jobs_and_again_after_it_polled(
    cache: TieredCache, channel: AnsweringChannel
) -> None:
    client = cache.client()
    jobs = [cache.submit_store(tokens(number), TABLE, client=client) for number in range(3)]
    assert not is_readable(client)
    for _ in range(2):
        channel.answer()
        cache.pump()
        assert is_readable(client)
        assert client.poll() == jobs
        assert not is_readable(client)
        assert client.poll() == []
        jobs = [cache.submit_store(tokens(9), TABLE, client=client)]
    client.close()


def test_a_client_outlives_its_cache_and_ends_with_its_block(cache: TieredCache, channel: AnsweringChannel) -> None:
    with cache.client() as client:
        job = cache.submit_store(tokens(1), TABLE, client=client)
        channel.answer()
        assert cache.close()
        assert is_readable(client)
        assert client.poll() == [job]
    assert client.fileno() == -1
    client.close()


def test_a_client_that_was_dropped_gives_its_descriptor_back_after_its_last_job(
    cache: TieredCache, channel: AnsweringChannel
) -> None:
    """Not before: the end of the job is told on a thread that knows nothing of who is left."""
    client = cache.client()
    fd = client.fileno()
    job = cache.submit_store(tokens(1), TABLE, client=client)
    del client
    gc.collect()
    os.fstat(fd)
    channel.answer()
    cache.pump()
    assert job.result(0).stored == SIZE
    del job
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_client_of_another_cache_does_as_well(cache: TieredCache, channel: AnsweringChannel) -> None:
    other = TieredCache(CONFIG, LAYOUT, "pump", channels=[AnsweringChannel()])
    with other.client() as client:
        job = cache.submit_store(tokens(1), TABLE, client=client)
        channel.answer()
        cache.pump()
        assert client.poll() == [job]


def test_news_that_comes_while_somebody_pumps_is_taken_in_by_the_one_who_pumps(
    cache: TieredCache, channel: AnsweringChannel
) -> None:
    """A data plane may report from within, and from other threads: the call returns at once, and nothing is lost."""
    job = cache.submit_store(tokens(1), TABLE)

    def more() -> None:
        channel.on_poll = lambda: None
        channel.answer()
        cache.pump()
        assert not job.done, "whoever pumps already does it"

    channel.on_poll = more
    cache.pump()
    assert job.done
    assert job.result(0).stored == SIZE


def test_a_pump_that_failed_leaves_its_turn_to_the_next(cache: TieredCache, channel: AnsweringChannel) -> None:
    job = cache.submit_store(tokens(1), TABLE)

    def fail() -> None:
        channel.on_poll = lambda: None
        raise OSError("the wire broke")

    channel.on_poll = fail
    with pytest.raises(OSError, match="wire"):
        cache.pump()
    channel.answer()
    cache.pump()
    assert job.done


def test_memory_is_registered_once_and_forgotten_after_the_last_job(
    cache: TieredCache, channel: AnsweringChannel
) -> None:
    engine = PseudoEngine(LAYOUT, 8)
    for number in range(2):
        cache.submit_store(tokens(number), engine.pages)
    assert channel.registered == [engine.pages.memory]
    assert cache.stats()["memories"] == 1
    assert channel.forgotten == []
    channel.answer()
    cache.pump()
    assert channel.forgotten == [0]
    assert cache.stats()["memories"] == 0


def test_ranks_that_disagree_on_a_number_are_refused() -> None:
    memories = Memories([AnsweringChannel(0), AnsweringChannel(1)])
    with pytest.raises(ConfigError, match="same order"):
        memories.use(PseudoEngine(LAYOUT, 8).pages.memory)
    assert len(memories) == 0


class BrokenPipe(AnsweringChannel):
    """One to which a memory cannot be told, or told to be forgotten."""

    broken = False

    def register(self, memory: KVMemory) -> int:
        self._check()
        return super().register(memory)

    def unregister(self, memory_id: int) -> None:
        self._check()
        super().unregister(memory_id)

    def _check(self) -> None:
        if self.broken:
            raise BrokenPipeError("nobody reads")


def test_a_memory_that_one_rank_does_not_take_is_forgotten_by_the_others() -> None:
    channels = [AnsweringChannel(), BrokenPipe(), AnsweringChannel()]
    memories, memory = Memories(channels), PseudoEngine(LAYOUT, 8).pages.memory
    channels[1].broken = True  # type: ignore[attr-defined]
    with pytest.raises(BrokenPipeError):
        memories.use(memory)
    assert [channel.forgotten for channel in channels] == [[0], [], []]
    assert len(memories) == 0


def test_a_rank_that_cannot_be_told_to_forget_keeps_the_end_from_no_job() -> None:
    channels = [BrokenPipe(), AnsweringChannel()]
    channels[1].outbox = [Hello(1, 1, LAYOUT.placement, SIZE, LAYOUT.record_pages, 64, 0, 0)]
    cache = TieredCache(CONFIG, LAYOUT, "pump", channels=channels)
    engine = PseudoEngine(LAYOUT, 8)
    jobs = [cache.submit_store(tokens(number), engine.pages) for number in range(3)]
    channels[0].broken = True
    for rank, channel in enumerate(channels):
        channel.answer()
        for message in channel.outbox:
            message.rank = rank  # type: ignore[misc]
    cache.pump()
    assert [job.result(0).stored for job in jobs] == [SIZE] * 3
    assert [channel.forgotten for channel in channels] == [[], [0]]


def test_messages_that_an_interrupt_left_lying_are_taken_in_by_a_copy_thread() -> None:
    channel, asked = AnsweringChannel(), []
    cache = TieredCache(CONFIG, LAYOUT, "pump", channels=[channel])
    channel.call_back = lambda: asked.append(1) or True  # type: ignore[method-assign, func-returns-value]
    job = cache.submit_store(tokens(1), TABLE)
    cache.pump()
    channel.answer()
    polled = channel.poll
    with pytest.MonkeyPatch.context() as interrupted:
        interrupted.setattr(cache._dispatch, "_hear", Mock(side_effect=KeyboardInterrupt))
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            cache.pump()
    assert polled() == []
    assert asked
    cache.pump()
    assert job.result(0).stored == SIZE


def test_waiting_for_ranks_ends_when_the_cache_is_closed(cache: TieredCache) -> None:
    assert cache.close()
    with pytest.raises(ClosedError):
        cache.wait_attached(600)


def test_an_interrupt_while_a_hit_is_released_never_leaves_the_lock_taken(cache: TieredCache) -> None:
    dispatch, number = cache._dispatch, 0
    while strike(cache.lookup(tokens(1)).release, Dispatch.let_go, number):
        assert dispatch.lock.acquire(blocking=False), f"struck after call {number}"
        dispatch.lock.release()
        number += 1
    assert number >= 3


def test_an_interrupt_while_a_hit_is_made_leaves_no_lease(cache: TieredCache) -> None:
    number = 0
    while strike(lambda: cache.lookup(tokens(1)), Dispatch.decide, number):
        gc.collect()
        cache.pump()
        assert cache.stats()["leases"] == 0, f"struck after call {number}"
        number += 1
    assert number >= 2


class Origin:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def release(self, lease: Lease) -> None:
        self.asked.append("release")
        lease.released = True

    def let_go(self, lease: Lease) -> None:
        self.asked.append("let_go")
        lease.released = True


def test_a_hit_that_garbage_collection_ends_sends_and_tells_nothing(cache: TieredCache) -> None:
    """It comes in the middle of anything, also of what is done under the locks that telling takes."""
    origin = Origin()

    def hit() -> Hit:
        with cache.lookup(tokens(1)) as found:
            return Hit(replace(found.lease, released=False), 0, origin)

    def holding() -> Iterator[None]:
        with hit():
            yield

    with hit():
        pass
    hit().release()
    assert origin.asked == ["release"] * 2
    hit()
    held = holding()
    next(held)
    del held
    gc.collect()
    assert origin.asked == ["release"] * 2 + ["let_go"] * 2


def test_a_result_is_made_once(cache: TieredCache, channel: AnsweringChannel) -> None:
    job = cache.submit_store(tokens(1), TABLE)
    channel.answer()
    cache.pump()
    assert job.result(0) is job.result(0)


def test_the_asyncio_face_registers_forgets_and_counts_like_the_cache() -> None:
    manager = CacheManager(CONFIG, LAYOUT, "pump")
    memory = PseudoEngine(LAYOUT, 8).pages.memory
    manager.register(memory)
    assert manager.stats()["memories"] == 1
    manager.unregister(memory)
    assert {sample.name: sample.value for sample in manager.samples()}["memories"] == 0
    assert manager.core.close()


def test_a_mistake_in_planning_ends_the_wishes_and_nothing_else(
    cache: TieredCache, channel: AnsweringChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them was planned already; it ends as it would have."""

    def fail(*_: object) -> None:
        raise OverflowError("a mistake")

    good = cache.submit_store(tokens(1), TABLE)
    with monkeypatch.context() as broken:
        broken.setattr("kvtier.planner.planner.Planner._plan_one", fail)
        bad = cache.submit_store(tokens(2), TABLE)
    assert bad.result(0).failed == {"refused": SIZE}
    assert cache.stats()["failed_wishes"] == 1
    channel.answer()
    cache.pump()
    assert good.result(0).stored == SIZE
    assert cache.stats()["jobs"] == 0
