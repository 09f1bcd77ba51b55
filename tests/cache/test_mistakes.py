"""What raises where nobody expects it: the jobs that it concerns end, all others go on, and so does every thread."""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from kvtier import ConfigError, PagedTensors, TieredCache, load_config
from kvtier.channel import LocalChannel
from kvtier.core.memory import GroupPages, KVPages, PageTable
from kvtier.core.plan import Hello, Plan, PlanKind
from kvtier.dispatch import Dispatch
from kvtier.planner import state, stores
from kvtier.planner.commits import Commits
from kvtier.planner.memory import MemoryBook
from kvtier.planner.planner import Planner
from kvtier.planner.recovery import Recovery
from kvtier.testing import SimDisk, Simulation
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.transfer import DataPlane, spilling
from kvtier.transfer.gathering import StoreRun
from kvtier.transfer.lanes import Lane
from kvtier.transfer.spilling import WriteMove

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
ENGINE = PseudoEngine(LAYOUT, 2)
WITH_DISK = {
    "host": {"capacity": "1MiB", "staging": "1MiB"},
    "disk": {"directories": ["/disk"], "capacity": "8MiB", "segment": "1MiB"},
    "policy": {"write": "write_back"},
}


@pytest.fixture
def cache() -> TieredCache:
    """On a simulated machine nothing happens before somebody waits."""
    return TieredCache({"host": {"capacity": "1MiB", "staging": "1MiB"}}, LAYOUT, "m", machine=Simulation(1).machine())


def store(cache: TieredCache, token: int, engine: PseudoEngine = ENGINE) -> Any:
    return cache.submit_store([token] * (2 * SIZE), engine.pages)


class Mistake(Exception):
    pass


def once(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: type[BaseException] = Mistake,
    when: Callable[..., bool] = lambda *_: True,
) -> None:
    """The next call of that method, for which ``when`` holds, raises before it has done anything."""
    original = getattr(owner, name)

    def failing(*arguments: Any, **more: Any) -> Any:
        if not when(*arguments):
            return original(*arguments, **more)
        monkeypatch.setattr(owner, name, original)
        raise error

    monkeypatch.setattr(owner, name, failing)


def test_a_lookup_that_raises_takes_no_job_of_others_with_it(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks up plans what was wished for before, and so has others' plans in hand."""
    jobs = [store(cache, number) for number in range(3)]
    once(monkeypatch, Planner, "lookup")
    with pytest.raises(Mistake):
        cache.lookup([9] * SIZE)
    assert [job.result(60).stored for job in jobs] == [2 * SIZE] * 3


def test_an_interrupt_while_others_wishes_are_planned_ends_them(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store(cache, 1)
    once(monkeypatch, MemoryBook, "reserve", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.lookup([9] * SIZE)
    assert job.result(60).failed == {"refused": 2 * SIZE}
    assert store(cache, 2).result(60).stored == 2 * SIZE


@pytest.mark.parametrize("step", ["complete", "_land", "_pass_on"])
def test_a_completion_that_cannot_be_taken_in_refuses_those_who_wait_for_it(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    jobs = [store(cache, number, PseudoEngine(LAYOUT, 2)) for number in range(2)]  # of two memories: two plans
    once(monkeypatch, Commits, step)
    ended = sorted(job.result(60).stored for job in jobs)
    assert ended == [0, 2 * SIZE]
    assert store(cache, 5).result(60).stored == 2 * SIZE
    assert cache.stats()["failed_messages"] == 1
    assert cache.close()


@pytest.mark.parametrize("step", ["complete", "_fail_overtaken"])
def test_a_write_whose_completion_cannot_be_taken_in_refuses_those_who_wait_for_the_disk(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    cache = TieredCache(WITH_DISK, LAYOUT, "m", machine=Simulation(1).machine())
    assert cache.submit_store([1] * SIZE, ENGINE.pages).result(60).stored == SIZE
    once(monkeypatch, Commits, step)
    job = cache.submit_flush("process")
    assert not job.result(60).ok
    assert cache.submit_store([2] * SIZE, ENGINE.pages, durability="process").result(60).stored == SIZE


def test_those_who_share_a_plan_or_joined_it_are_refused_together(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [store(cache, number) for number in (1, 2, 1)]
    once(monkeypatch, Commits, "complete")
    assert [job.result(60).failed for job in jobs] == [{"refused": 2 * SIZE}] * 3
    assert all(job.source_free for job in jobs)


def test_a_refused_store_frees_its_pages_no_sooner_than_its_last_plan_has_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of eight plans cannot be taken in; the engine writes other tokens as soon as it may."""
    monkeypatch.setattr(stores, "FIRST_WRITE_HOP_BYTES", 1)
    monkeypatch.setattr(stores, "WRITE_HOP_BYTES", 1)
    world, engine, target = Simulation(1), PseudoEngine(LAYOUT, 8), PseudoEngine(LAYOUT, 8)
    cache = TieredCache(WITH_DISK, LAYOUT, "m", machine=world.machine())
    world.run_for(1)
    keys, others = (cache.keys([token] * (8 * SIZE + 1)) for token in (7, 9))
    engine.write(keys, range(8))
    once(monkeypatch, Commits, "complete")
    job = cache.submit_store(keys, engine.pages, durability="process")
    job.wait_source_free(60)
    engine.write(others, range(8))
    assert job.result(60).failed == {"refused": SIZE}
    with cache.lookup(keys, start=SIZE) as hit:
        assert hit.num_tokens == 8 * SIZE
        assert cache.submit_load(hit, target.pages).result(60).ok_tokens == 8 * SIZE
    assert target.wrong_blocks(keys, range(1, 8)) == []


@pytest.mark.parametrize("kind", [PlanKind.STORE, PlanKind.LOAD, PlanKind.SPILL, PlanKind.SYNC])
def test_a_plan_that_cannot_be_made_refuses_its_job_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: PlanKind
) -> None:
    cache = TieredCache(WITH_DISK, LAYOUT, "m", machine=Simulation(1).machine())
    assert store(cache, 1).result(60).stored == 2 * SIZE
    once(monkeypatch, state, "plan_rows", when=lambda _, hop, *__: hop.kind == kind)
    with cache.lookup([1] * (2 * SIZE + 1)) as hit:
        job = (
            cache.submit_load(hit, ENGINE.pages)
            if kind == PlanKind.LOAD
            else cache.submit_store([2] * (2 * SIZE), ENGINE.pages, durability="durable")
        )
        assert job.result(60).failed == {"refused": 2 * SIZE}
    assert store(cache, 3).result(60).stored == 2 * SIZE
    assert cache.submit_flush("durable").result(60).ok
    stats = cache.stats()
    assert (stats["hops"], stats["pinned_entries"], stats["write_backlog_entries"], stats["jobs"]) == (0, 0, 0, 0)


def answered(cache: TieredCache, world: Simulation, jobs: int) -> list[Any]:
    """Stores that have been planned and moved, and of which nobody has heard yet."""
    plane = cache._dispatch.channels[0]._plane  # type: ignore[attr-defined]
    plane._on_news, news = lambda: None, plane._on_news
    waiting = [store(cache, number, PseudoEngine(LAYOUT, 2)) for number in range(jobs)]
    cache.pump()
    world.run_for(1)
    plane._on_news = news
    assert not any(job.done for job in waiting)
    return waiting


def test_an_interrupt_while_one_answer_is_taken_in_loses_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulation(1)
    cache = TieredCache({"host": {"capacity": "1MiB", "staging": "1MiB"}}, LAYOUT, "m", machine=world.machine())
    jobs = answered(cache, world, 3)
    once(monkeypatch, Planner, "take_in", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.pump()
    assert sorted(job.result(60).stored for job in jobs) == [0, 2 * SIZE, 2 * SIZE]


def test_an_interrupt_during_a_turn_hands_on_what_others_asked_for_meanwhile(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []

    def submit_and_stop(dispatch: Dispatch) -> bool:
        del dispatch
        jobs.append(store(cache, 1))
        cache.pump()  # what a copy thread does: it leaves word and goes to sleep
        cache._dispatch.channels[0]._plane._called_back = False  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Dispatch, "_take_in", submit_and_stop)
        with pytest.raises(KeyboardInterrupt):
            cache.pump()
    assert jobs[0].result(60).stored == 2 * SIZE


def test_engine_memory_that_only_a_job_holds_is_let_go_with_no_lock_held(cache: TieredCache) -> None:
    """Its finalizer may call any verb."""
    freed = []

    class Mine(PagedTensors):
        def __del__(self) -> None:
            freed.append(cache.stats()["jobs"])

    def pages() -> KVPages:
        parts = [np.zeros((2, *part.shape), part.dtype) for part in LAYOUT.groups[0].parts]
        return Mine(LAYOUT, parts).pages([0, 1])

    job = cache.submit_store([1] * (2 * SIZE), pages())
    assert freed == []
    assert job.result(60).stored == 2 * SIZE
    assert freed == [0]


def test_what_a_mistake_says_in_the_log_is_said_with_no_lock_held(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler may ask the cache how it is."""
    asked = []

    class Asking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            asked.append(cache.stats()["jobs"])

    monkeypatch.setattr(logging.getLogger("kvtier"), "handlers", [Asking()])
    for owner, name in ((MemoryBook, "reserve"), (Commits, "complete")):
        once(monkeypatch, owner, name)
        assert store(cache, len(asked)).result(60).failed == {"refused": 2 * SIZE}
    assert len(asked) == 2


def test_what_a_mistake_of_the_data_plane_says_in_the_log_is_said_with_no_lock_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of plans that cannot be begun, and of segments that cannot be written."""
    world = Simulation(1)
    cache = TieredCache(WITH_DISK, LAYOUT, "m", machine=world.machine())
    world.run_for(1)
    asked: list[str] = []

    class Asking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            asked.append(record.getMessage())
            cache.stats()

    monkeypatch.setattr(logging.getLogger("kvtier"), "handlers", [Asking()])
    once(monkeypatch, StoreRun, "begin")
    assert store(cache, 1).result(60).failed == {"refused": 2 * SIZE}
    monkeypatch.setattr(world.disk, "finish", Mock(side_effect=OSError(errno.EIO, "broken")))
    job = cache.submit_store([2] * SIZE, ENGINE.pages, durability="process")
    assert job.result(60).failed == {"io_error": SIZE}
    assert [message.partition(";")[0] for message in asked] == [
        "a plan to store could not be begun",
        "segment 0 is not written any more: a write failed: [Errno 5] broken",
    ]


def test_what_was_found_counts_also_where_the_end_of_it_cannot_be_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulation(1)
    disk = SimDisk(world)
    with TieredCache(WITH_DISK, LAYOUT, "m", machine=world.machine(disk)) as cache:
        assert cache.submit_store([1] * (SIZE + 1), ENGINE.pages, durability="durable").result(60).stored == SIZE
    once(monkeypatch, Recovery, "_end")
    cache = TieredCache(WITH_DISK, LAYOUT, "m", machine=world.machine(disk))
    cache.wait_attached(60)
    assert cache.match([1] * (SIZE + 1)) == SIZE


def test_closing_takes_in_what_has_come_before_it_ends_what_has_not() -> None:
    world = Simulation(1)
    cache = TieredCache({"host": {"capacity": "1MiB", "staging": "1MiB"}}, LAYOUT, "m", machine=world.machine())
    jobs = answered(cache, world, 2)
    assert cache._dispatch._turn.ask(), "another thread has the turn, and is slow"
    assert cache.close(60)
    assert [job.result(0).stored for job in jobs] == [2 * SIZE] * 2


def test_a_job_that_is_submitted_while_the_cache_is_closed_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    channel: Any = Silent(Hello(0, 1, LAYOUT.placement, SIZE, LAYOUT.record_pages, 64, 0, 0))
    cache = TieredCache({"host": {"capacity": "1MiB"}}, LAYOUT, "m", channels=[channel])
    cache.register(ENGINE.memory)

    def close_first(*_: object) -> bool:
        assert cache.close(1)
        return False

    once(monkeypatch, cache._dispatch, "submit", when=close_first)
    job = cache.submit_store([1] * SIZE, ENGINE.pages)
    assert job.result(0).failed == {"closed": SIZE}


class Broken(LocalChannel):
    """A channel that does not take the next plans of some kind."""

    breaks_on: PlanKind | None = None
    always = False
    error: BaseException = BrokenPipeError("nobody reads")
    meanwhile: Callable[[], object] = bool

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.took: list[PlanKind] = []

    def send(self, plans: Sequence[Plan]) -> None:
        if self.breaks_on is not None and any(plan.kind == self.breaks_on for plan in plans):
            self.breaks_on = self.breaks_on if self.always else None
            self.meanwhile()
            raise type(self.error)(*self.error.args)  # one that was raised keeps the frames alive
        self.took += [plan.kind for plan in plans]
        super().send(plans)


def over_a_broken_channel() -> tuple[TieredCache, Broken]:
    config, machine = load_config(WITH_DISK), Simulation(1).machine()
    news: list[TieredCache] = []
    channel = Broken(
        lambda on_news: DataPlane(config, LAYOUT, machine, on_news=on_news, tables_are_checked=True),
        lambda: [one.pump() for one in news],
    )
    cache = TieredCache(config, LAYOUT, "m", machine=machine, channels=[channel])
    news.append(cache)
    cache.register(ENGINE.memory)
    cache.wait_attached(60)
    return cache, channel


@pytest.mark.parametrize(("kind", "durability"), [(PlanKind.STORE, "memory"), (PlanKind.SPILL, "process")])
def test_plans_that_a_channel_does_not_take_are_refused_and_all_others_go_on(kind: PlanKind, durability: str) -> None:
    cache, channel = over_a_broken_channel()
    assert store(cache, 1).result(60).stored == 2 * SIZE
    channel.breaks_on = kind
    jobs = [cache.submit_store([number] * SIZE, ENGINE.pages, durability=durability) for number in (2, 3)]
    assert {"refused": SIZE} in [job.result(60).failed for job in jobs]
    assert cache.match([3] * (SIZE + 1)) + cache.match([2] * (SIZE + 1)) <= 2 * SIZE
    again = [cache.submit_store([number] * SIZE, ENGINE.pages) for number in (2, 3, 4)]
    assert [job.result(60).failed for job in again] == [{}, {}, {}]
    assert all(job.done for job in jobs)
    assert cache.stats()["failed_plans"] == 1
    assert cache.close(60)


def test_what_follows_from_plans_that_a_channel_does_not_take_is_done_at_once() -> None:
    """Whoever joined such a store goes on to the disk with what there is; nobody else may ever come to see to it."""
    cache, channel = over_a_broken_channel()
    tokens = [5] * (4 * SIZE)
    assert cache.submit_store(tokens[: 2 * SIZE], ENGINE.pages).result(60).stored == 2 * SIZE
    engine, joined = PseudoEngine(LAYOUT, 4), list[Any]()

    def join() -> None:
        joined.append(cache.submit_store(tokens, engine.pages, durability="process"))
        cache.lookup(tokens).release()  # what was asked for before is planned by then

    channel.breaks_on, channel.meanwhile = PlanKind.STORE, join
    job = cache.submit_store(tokens, engine.pages)
    cache.pump()
    assert job.done
    assert channel.took[-1] == PlanKind.SPILL
    assert joined[0].result(60).failed == {"refused": 2 * SIZE}
    assert joined[0].result(60).existing == 2 * SIZE
    assert cache.close(60)


def test_engine_memory_of_jobs_that_end_one_after_the_other_is_let_go_with_no_lock_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its finalizer may use the cache, also where a rank takes none of the plans that follow from each other."""
    cache, channel = over_a_broken_channel()
    cache._dispatch.planner._state.disk.write_budget_bytes = 1  # a block at a time
    for number in (1, 2):
        assert cache.submit_store([number] * SIZE, ENGINE.pages).result(60).stored == SIZE
    monkeypatch.setattr(logging.getLogger("kvtier.dispatch"), "disabled", True)  # a record keeps the frames alive
    engine, free = PseudoEngine(LAYOUT, 2), list[bool]()

    def use() -> None:
        free.append(cache._dispatch.lock.acquire(blocking=False))
        if free[-1]:
            cache._dispatch.lock.release()

    weakref.finalize(engine.memory, use)
    channel.always = True
    channel.breaks_on = PlanKind.SPILL
    cache.submit_store([1] * SIZE, engine.pages, durability="process")
    last = cache.submit_store([2] * SIZE, ENGINE.pages, durability="process")
    del engine
    cache.pump()
    assert last.done
    assert free == [True]
    assert cache.close(60)


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_an_interrupt_while_plans_are_begun_refuses_the_others_and_no_more(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    """What was begun reads and writes: its pages and its room are in use until it has ended."""
    jobs = [store(cache, number, PseudoEngine(LAYOUT, 2)) for number in range(3)]  # of three memories: three plans
    left = iter(range(begun))
    once(monkeypatch, DataPlane, "_begin", KeyboardInterrupt, when=lambda *_: next(left, None) is None)
    with pytest.raises(KeyboardInterrupt):
        cache.pump()
    assert not any(job.done for job in jobs[:begun])
    assert [job.result(60).stored for job in jobs] == [2 * SIZE] * begun + [0] * (3 - begun)
    assert [job.result(60).failed for job in jobs[begun:]] == [{"refused": 2 * SIZE}] * (3 - begun)
    assert cache.close(60)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_plan_whose_run_cannot_be_made_is_refused_and_the_others_go_on(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """For want of memory, say. What was begun reads and writes: nobody may be told that it is over."""
    jobs = [store(cache, number, PseudoEngine(LAYOUT, 2)) for number in range(3)]  # of three memories: three plans
    left = iter(range(taken))
    once(monkeypatch, StoreRun, "__init__", MemoryError, when=lambda *_: next(left, None) is None)
    cache.pump()
    assert [job.done for job in jobs].count(True) <= 1
    expected = [2 * SIZE] * 3
    expected[taken] = 0
    assert [job.result(60).stored for job in jobs] == expected
    assert "failed_plans" not in cache.stats()
    assert cache.close(60)


def test_an_interrupt_in_a_channel_leaves_it_all_that_it_may_have_begun() -> None:
    cache, channel = over_a_broken_channel()
    channel.breaks_on, channel.error = PlanKind.STORE, KeyboardInterrupt()
    job = store(cache, 1)
    with pytest.raises(KeyboardInterrupt):
        cache.pump()
    assert not job.done
    assert store(cache, 2, PseudoEngine(LAYOUT, 2)).done is False
    assert cache.close(60)
    assert job.result(0).failed == {"closed": 2 * SIZE}


def test_a_plan_that_cannot_be_begun_is_refused_and_the_next_ones_go_on(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [store(cache, number, PseudoEngine(LAYOUT, 2)) for number in range(3)]
    once(monkeypatch, StoreRun, "begin")
    assert sorted(job.result(60).stored for job in jobs) == [0, 2 * SIZE, 2 * SIZE]
    assert cache.close()


def test_plans_that_were_begun_are_not_taken_for_refused_whatever_fails_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their pages are being read: the engine must not be told that it may write to them."""
    cache = TieredCache(WITH_DISK, LAYOUT, "m", machine=Simulation(1).machine())
    job = store(cache, 1)
    once(monkeypatch, Lane, "submit")
    cache._dispatch.decide(lambda: None)
    assert not job.source_free
    assert job.result(60).stored == 2 * SIZE


def test_page_ids_of_memory_that_only_a_rank_knows_are_the_jobs_own_from_submit_on() -> None:
    """The engine fills the same array again for its next request, before any other thread has looked at it."""
    config, machine = load_config({"host": {"capacity": "1MiB", "staging": "1MiB"}}), Simulation(1).machine()
    news: list[TieredCache] = []
    channel = LocalChannel(
        lambda on_news: DataPlane(config, LAYOUT, machine, on_news=on_news), lambda: [one.pump() for one in news]
    )
    engine, ids = PseudoEngine(LAYOUT, 4), np.arange(2, dtype=np.int32)
    number = channel.register(engine.memory)
    cache = TieredCache(config, LAYOUT, "m", machine=machine, channels=[channel])
    news.append(cache)
    keys = cache.keys([1] * (2 * SIZE + 1))
    engine.write(keys, range(2))
    job = cache.submit_store(keys, PageTable(number, (GroupPages(0, ids),)))
    ids += 2
    assert job.result(60).stored == 2 * SIZE
    with cache.lookup(keys) as hit:
        engine.wipe()
        ids -= 2
        load = cache.submit_load(hit, PageTable(number, (GroupPages(0, ids),)))
        ids += 2
        assert load.result(60).ok_tokens == 2 * SIZE
    assert engine.wrong_blocks(keys, range(2)) == []
    with pytest.raises(ConfigError, match="has 0 groups"):
        cache.submit_store(keys, PageTable(number, ()))


@pytest.mark.parametrize("step", ["prepare", "finish"])
def test_a_write_that_fails_by_a_mistake_leaves_its_lane_and_its_thread_to_the_others(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    world = Simulation(1)
    cache = TieredCache(WITH_DISK, LAYOUT, "m", machine=world.machine())
    world.run_for(1)
    once(monkeypatch, WriteMove, step)
    cache.submit_store([1] * SIZE, ENGINE.pages, durability="process")
    world.run_for(1)
    for number in range(2, 12):
        assert cache.submit_store([number] * SIZE, ENGINE.pages, durability="process").result(60).stored == SIZE
    assert cache.stats()["failed_pieces{error=Mistake}"] == 1


def test_a_write_that_cannot_be_prepared_is_refused_and_gives_back_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulation(1)
    cache = TieredCache(WITH_DISK, LAYOUT, "m", machine=world.machine())
    world.run_for(1)
    once(monkeypatch, spilling, "stamp", MemoryError)
    assert cache.submit_store([1] * SIZE, ENGINE.pages, durability="process").result(60).failed == {"io_error": SIZE}
    stats = cache.stats()
    assert (stats["hops"], stats["pinned_entries"], stats["lane_queued_bytes{lane=disk-0}"]) == (0, 0, 0)
    headers = cache._dispatch.channels[0]._plane._equipment.headers  # type: ignore[attr-defined]
    assert headers.free == headers.count
    assert cache.submit_store([2] * SIZE, ENGINE.pages, durability="durable").result(60).stored == SIZE
    assert cache.close(60)


def test_a_piece_of_work_whose_end_fails_leaves_its_thread_to_the_others(
    cache: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(cache, 1)
    once(monkeypatch, StoreRun, "settle")
    assert store(cache, 2, PseudoEngine(LAYOUT, 2)).result(60).stored == 2 * SIZE
    assert cache.stats()["failed_pieces{error=Mistake}"] == 1


def test_closing_does_not_wait_for_what_only_a_mistake_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulation(1)
    cache = TieredCache({"host": {"capacity": "1MiB", "staging": "1MiB"}}, LAYOUT, "m", machine=world.machine())
    job = store(cache, 1)
    cache.pump()
    once(monkeypatch, StoreRun, "settle")
    started_s = world.clock.monotonic()
    assert cache.close(600)
    assert world.clock.monotonic() - started_s < 1
    assert job.result(0).stored == 2 * SIZE, "it was copied before"


class Silent:
    """Leads to a rank that says hello, if at all, and then nothing ever again."""

    def __init__(self, *hellos: Hello) -> None:
        self.hellos = list(hellos)
        self.closed = False

    def poll(self) -> list[Hello]:
        said, self.hellos = self.hellos, []
        return said

    def send(self, plans: object) -> None:
        pass

    def call_back(self) -> bool:
        return False

    def register(self, memory: object) -> int:
        return 0

    def unregister(self, memory_id: int) -> None:
        pass

    def close(self, timeout_s: float) -> bool:
        self.closed = True
        return True


def test_an_opening_that_fails_at_the_first_news_closes_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    channels: Any = [Silent(), Silent()]
    once(monkeypatch, Silent, "poll")
    with pytest.raises(Mistake):
        TieredCache({"host": {"capacity": "1MiB"}}, LAYOUT, "m", channels=channels)
    assert all(channel.closed for channel in channels)


def test_jobs_of_a_rank_that_went_without_a_word_end_when_the_cache_is_closed() -> None:
    channel: Any = Silent(Hello(0, 1, LAYOUT.placement, SIZE, LAYOUT.record_pages, 64, 0, 0))
    cache = TieredCache({"host": {"capacity": "1MiB"}}, LAYOUT, "m", channels=[channel])
    cache.register(ENGINE.memory)
    job = store(cache, 1)
    assert not job.done
    assert cache.close(1)
    assert job.result(0).failed == {"closed": 2 * SIZE}


@pytest.mark.parametrize("durability", ["memory", "process", "durable"])
def test_before_every_rank_is_there_nothing_is_stored_and_no_flush_says_so(durability: str) -> None:
    there, missing = Silent(Hello(0, 1, LAYOUT.placement, SIZE, LAYOUT.record_pages, 64, 1 << 20, 1 << 20)), Silent()
    channels: Any = [there, missing]
    cache = TieredCache({"host": {"capacity": "1MiB"}}, LAYOUT, "m", channels=channels)
    job = cache.submit_store([1] * SIZE, ENGINE.pages, durability=durability)
    assert job.result(0).failed == {"closed": SIZE}
    flushed = cache.submit_flush(durability).result(0)
    assert (flushed.ok, flushed.reason) == (False, "closed")


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (
            Hello(7, 1, LAYOUT.placement, SIZE, LAYOUT.record_pages, 1, 0, 0),
            "rank 7: this cache was opened for 1 ranks",
        ),
        (Hello(0, 2, "f" * 64, SIZE, LAYOUT.record_pages, 1, 0, 0), "rank 0 has placement ffffffffffff"),
    ],
)
def test_a_hello_of_a_rank_too_many_or_of_another_layout_is_logged_and_passed_over(
    cache: TieredCache, caplog: pytest.LogCaptureFixture, hello: Hello, why: str
) -> None:
    cache._dispatch._heard.append(hello)
    cache.pump()
    assert why in caplog.text
    assert cache.stats()["failed_messages"] == 1
    assert store(cache, 1).result(60).stored == 2 * SIZE


def test_unregistering_memory_that_was_never_registered_takes_it_from_no_job(cache: TieredCache) -> None:
    job = store(cache, 1)
    cache.unregister(ENGINE.memory)
    assert job.result(60).stored == 2 * SIZE
    assert cache.stats()["memories"] == 0


def test_memory_that_was_registered_twice_is_known_until_it_is_unregistered_twice(cache: TieredCache) -> None:
    numbers = {cache.register(ENGINE.memory) for _ in range(2)}
    for left in (1, 0, 0):
        cache.unregister(ENGINE.memory)
        assert cache.stats()["memories"] == left
    assert len(numbers) == 1
