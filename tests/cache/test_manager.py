"""The asyncio face: it opens once and in a thread, and nothing stays open that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtier import CacheManager, ClosedError, TieredCache, TierError
from kvtier.dispatch import Dispatch
from kvtier.manager import CLOSE_S
from kvtier.runtime import system_machine
from kvtier.runtime.seam import Arena, Machine
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
TOKENS = list(range(LAYOUT.block_tokens + 1))
OTHER_TOKENS = [7] * LAYOUT.block_tokens


def settings(directory: Path) -> dict[str, Any]:
    disk = {"directories": [str(directory)], "capacity": "8MiB", "segment": "1MiB"}
    return {"host": {"capacity": "1MiB", "staging": "1MiB"}, "disk": disk}


def threads_of_caches() -> set[threading.Thread]:
    """Those that are not of the loop's executor or of a test."""
    return {thread for thread in threading.enumerate() if thread.daemon}


class OneThread:
    """The executor of a loop, in which calls run one after the other."""

    def __init__(self) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))

    async def is_idle(self) -> None:
        """All that was asked for before has been done."""
        await asyncio.to_thread(bool)


class Gate:
    """A machine on which opening comes to a stop, with a part of it done, until ``opens`` is set."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opens = threading.Event()
        self.openings = 0
        self.fails = False
        self._machine = system_machine("threads")

    @property
    def machine(self) -> Machine:
        return replace(self._machine, arena=self._arena)

    def _arena(self, name: str, nbytes: int) -> Arena:
        self.openings += name == "host"
        self.reached.set()
        assert self.opens.wait(30)
        if self.fails:
            raise TierError("no memory")
        return self._machine.arena(name, nbytes)

    async def is_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def manager(tmp_path: Path, gate: Gate) -> CacheManager:
    return CacheManager(settings(tmp_path), LAYOUT, "m", machine=gate.machine)


async def give_up(entering: asyncio.Task[CacheManager]) -> None:
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering


async def test_an_opening_that_was_cancelled_is_closed_when_it_ends(
    tmp_path: Path, gate: Gate, manager: CacheManager
) -> None:
    """The await ends at once; whoever wants to open the directory anew can wait for ``close``."""
    before = threads_of_caches()
    entering = asyncio.create_task(manager.__aenter__())
    await gate.is_reached()
    await give_up(entering)
    gate.opens.set()
    assert await manager.close() is True
    assert not threads_of_caches() - before
    async with CacheManager(settings(tmp_path), LAYOUT, "m") as again:
        assert again.match(TOKENS) == 0


def test_a_program_that_ends_while_it_opens_leaves_nothing_open(tmp_path: Path, gate: Gate) -> None:
    before = threads_of_caches()

    async def enter() -> None:
        manager = CacheManager(settings(tmp_path), LAYOUT, "m", machine=gate.machine)
        try:
            async with asyncio.timeout(30) as limit:
                entering = asyncio.create_task(manager.__aenter__())
                await gate.is_reached()
                limit.reschedule(0.0)
                await entering
        finally:
            gate.opens.set()

    with pytest.raises(TimeoutError):
        asyncio.run(enter())
    assert not threads_of_caches() - before
    with TieredCache(settings(tmp_path), LAYOUT, "m"):
        pass


async def test_a_manager_whose_opening_was_cancelled_can_be_entered_again(gate: Gate, manager: CacheManager) -> None:
    entering = asyncio.create_task(manager.__aenter__())
    await gate.is_reached()
    await give_up(entering)
    gate.opens.set()
    async with manager:
        assert manager.match(TOKENS) == 0


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a cache has been opened; the thread of a loop that waits for it keeps the loop from hearing of it."""
    opened = threading.Event()

    class Telling(TieredCache):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.set()

    monkeypatch.setattr("kvtier.manager.TieredCache", Telling)
    return opened


async def test_an_opening_that_had_just_ended_when_it_was_cancelled_is_closed(
    tmp_path: Path, opened: threading.Event
) -> None:
    thread, before = OneThread(), threads_of_caches()
    manager = CacheManager(settings(tmp_path), LAYOUT, "m")
    entering = asyncio.create_task(manager.__aenter__())
    await asyncio.sleep(0)
    assert opened.wait(30)
    await give_up(entering)
    await thread.is_idle()
    assert not threads_of_caches() - before
    core = await asyncio.to_thread(lambda: manager.core)
    assert core.match(TOKENS) == 0, "it opens again"
    assert await manager.close() is True


async def test_one_that_gives_up_does_not_close_it_under_another_who_entered_meanwhile(
    tmp_path: Path, opened: threading.Event
) -> None:
    thread, manager = OneThread(), CacheManager(settings(tmp_path), LAYOUT, "m")
    entering = asyncio.create_task(manager.__aenter__())
    await asyncio.sleep(0)
    assert opened.wait(30)
    entering.cancel()
    async with manager:
        with pytest.raises(asyncio.CancelledError):
            await entering
        await thread.is_idle()
        assert manager.match(TOKENS) == 0
    with pytest.raises(ClosedError):
        manager.match(TOKENS)


async def test_who_gives_up_while_another_opens_opens_nothing_afterwards(gate: Gate, manager: CacheManager) -> None:
    """Its thread has begun and waits for the other one, whose opening fails."""
    gate.fails, begun = True, threading.Semaphore(0)

    class Telling(ThreadPoolExecutor):
        def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
            def begin() -> Any:
                begun.release()
                return call(*arguments, **options)

            return super().submit(begin)

    pool = Telling(4)
    asyncio.get_running_loop().set_default_executor(pool)
    both = [asyncio.create_task(manager.__aenter__()) for _ in range(2)]
    await asyncio.sleep(0)
    assert begun.acquire(timeout=30)
    assert begun.acquire(timeout=30)
    for entering in both:
        await give_up(entering)
    gate.opens.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert gate.openings == 1


def test_an_opening_whose_loop_was_closed_is_closed_when_it_ends(gate: Gate, manager: CacheManager) -> None:
    before, pool, loop = threads_of_caches(), ThreadPoolExecutor(1), asyncio.new_event_loop()
    loop.set_default_executor(pool)
    entering = manager.__aenter__()

    async def begin() -> None:
        entering.send(None)

    loop.run_until_complete(begin())
    assert gate.reached.wait(30)
    loop.close()
    entering.close()
    gate.opens.set()
    pool.shutdown()
    assert gate.openings == 1
    assert not threads_of_caches() - before


async def test_an_opening_that_failed_in_synchronous_code_keeps_nothing_open_later(
    tmp_path: Path, opened: threading.Event
) -> None:
    thread, before, directory = OneThread(), threads_of_caches(), tmp_path / "cache"
    directory.touch()
    manager = CacheManager(settings(directory), LAYOUT, "m")
    with pytest.raises(TierError):
        await asyncio.to_thread(lambda: manager.core)
    directory.unlink()
    entering = asyncio.create_task(manager.__aenter__())
    await asyncio.sleep(0)
    assert opened.wait(30)
    await give_up(entering)
    await thread.is_idle()
    assert not threads_of_caches() - before


async def test_what_synchronous_code_opened_stays_open_when_somebody_else_gives_up(tmp_path: Path) -> None:
    thread, manager = OneThread(), CacheManager(settings(tmp_path), LAYOUT, "m")
    await asyncio.to_thread(lambda: manager.core)
    entering = asyncio.create_task(manager.__aenter__())
    await asyncio.sleep(0)
    await give_up(entering)
    await thread.is_idle()
    assert manager.match(TOKENS) == 0
    assert await manager.close() is True


async def test_the_last_of_several_tasks_to_leave_closes_it(tmp_path: Path) -> None:
    manager = CacheManager(settings(tmp_path), LAYOUT, "m")
    async with manager:
        async with manager:
            pass
        assert manager.match(TOKENS) == 0
    with pytest.raises(ClosedError):
        manager.match(TOKENS)


async def test_whoever_leaves_last_closes_also_what_synchronous_code_opened(tmp_path: Path) -> None:
    manager = CacheManager(settings(tmp_path), LAYOUT, "m")
    core = await asyncio.to_thread(lambda: manager.core)
    async with manager:
        assert manager.core is core
    with pytest.raises(ClosedError):
        core.match(TOKENS)


class Doorway:
    """A lock behind which, when it is given up for the first time, somebody else passes through."""

    def __init__(self, lock: Any, passing: Callable[[], None]) -> None:
        self._lock = lock
        self._passing = [passing]

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._passing:
            self._passing.pop()()


async def test_whoever_enters_while_the_last_one_leaves_finds_it_open(tmp_path: Path) -> None:
    manager, inside, left = CacheManager(settings(tmp_path), LAYOUT, "m"), threading.Event(), threading.Event()

    async def visit() -> int:
        async with manager:
            inside.set()
            assert await asyncio.to_thread(left.wait, 30)
            return manager.match(TOKENS)

    def pass_through() -> None:
        visitors.append(pool.submit(asyncio.run, visit()))
        assert inside.wait(30)

    visitors: list[Future[int]] = []
    with ThreadPoolExecutor(1) as pool:
        await manager.__aenter__()
        manager._lock = Doorway(manager._lock, pass_through)  # type: ignore[assignment]
        await manager.__aexit__(None, None, None)
        left.set()
        assert await asyncio.to_thread(visitors[0].result, 30) == 0


async def test_close_is_for_all_who_are_inside(tmp_path: Path) -> None:
    """And nobody is, afterwards: who entered without `async with` leaves by it."""
    manager = CacheManager(settings(tmp_path), LAYOUT, "m")
    await manager.__aenter__()
    assert await manager.close() is True
    async with manager:
        assert manager.match(TOKENS) == 0
    with pytest.raises(ClosedError):
        manager.match(TOKENS)


@pytest.mark.parametrize("closed_by", ["async with", "core"])
async def test_a_manager_that_was_closed_opens_anew_when_it_is_entered_again(tmp_path: Path, closed_by: str) -> None:
    manager, engine = CacheManager(settings(tmp_path), LAYOUT, "m"), PseudoEngine(LAYOUT, 4)
    async with manager:
        assert (await manager.store(TOKENS, engine.pages, durability="process")).stored == LAYOUT.block_tokens
        if closed_by == "core":
            assert await asyncio.to_thread(manager.core.close)
            await manager.__aenter__()
            assert manager.match(TOKENS) == LAYOUT.block_tokens
    async with manager:
        assert manager.match(TOKENS) == LAYOUT.block_tokens


async def test_a_manager_that_was_closed_still_says_what_it_counted(tmp_path: Path) -> None:
    manager = CacheManager(settings(tmp_path), LAYOUT, "m")
    async with manager:
        manager.lookup(TOKENS).release()
    assert manager.stats()["lookup_tokens"] == len(TOKENS)


async def test_a_manager_whose_closing_does_not_end_says_so_when_it_is_entered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CacheManager(settings(tmp_path), LAYOUT, "m")
    with monkeypatch.context() as patch:
        patch.setattr(TieredCache, "close", lambda *_: False)
        async with manager:
            pass
        with pytest.raises(ClosedError, match=r"call close\(\) until it says True"):
            await manager.__aenter__()
    assert await manager.close() is True
    async with manager:
        assert manager.match(TOKENS) == 0


async def test_close_waits_no_longer_than_it_is_told_for_a_closing_that_somebody_else_began(
    gate: Gate, manager: CacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, ended = (threading.Event() for _ in range(3))
    close = TieredCache.close

    def slow_close(cache: TieredCache, timeout_s: float = CLOSE_S) -> bool:
        if not timeout_s:
            return False
        begun.set()
        may_end.wait(10)
        ended.set()
        return close(cache, timeout_s)

    monkeypatch.setattr(TieredCache, "close", slow_close)
    entering = asyncio.create_task(manager.__aenter__())
    await gate.is_reached()
    await give_up(entering)
    gate.opens.set()
    assert await asyncio.to_thread(begun.wait, 30)
    assert await manager.close(0) is False
    assert not ended.is_set()
    may_end.set()
    assert await manager.close() is True


async def test_one_of_two_that_enter_may_give_up(gate: Gate, manager: CacheManager) -> None:
    first, second = (asyncio.create_task(manager.__aenter__()) for _ in range(2))
    await gate.is_reached()
    await give_up(first)
    gate.opens.set()
    assert await second is manager
    assert manager.match(TOKENS) == 0
    assert await manager.close() is True


def test_threads_that_use_the_core_at_once_get_the_same_one(gate: Gate, manager: CacheManager) -> None:
    together = threading.Barrier(5)

    def core() -> TieredCache:
        together.wait(30)
        return manager.core

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(core) for _ in range(4)]
        together.wait(30)
        gate.opens.set()
        cores = {future.result(30) for future in found}
    assert len(cores) == gate.openings == 1
    assert cores.pop().close() is True


async def test_a_manager_that_was_not_entered_does_not_open_in_the_loop(gate: Gate, manager: CacheManager) -> None:
    for use in (lambda: manager.core, lambda: manager.match(TOKENS), manager.flush):
        with pytest.raises(ClosedError, match="async with"):
            use()
    assert gate.openings == 0
    assert await manager.close() is True


@pytest.mark.parametrize("verb", ["load", "store", "prefetch", "flush"])
def test_without_a_running_loop_nothing_is_submitted(verb: str) -> None:
    """A job that had begun would use pages, and nobody could wait for it."""
    manager = CacheManager({"host": {"capacity": "1MiB", "staging": "1MiB"}}, LAYOUT, "m")
    with manager.core as cache:
        engine = PseudoEngine(LAYOUT, 4)
        cache.submit_store(TOKENS, engine.pages).result(30)
        hit = cache.lookup(TOKENS)
        uses: dict[str, Callable[[], object]] = {
            "load": lambda: manager.load(hit, engine.pages),
            "store": lambda: manager.store(OTHER_TOKENS, engine.pages),
            "prefetch": lambda: manager.prefetch(TOKENS),
            "flush": manager.flush,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dispatch, "submit", _no_job)
            with pytest.raises(RuntimeError, match=rf"{verb}\(\): no running event loop.*core.submit_{verb}\(\)"):
                uses[verb]()


def _no_job(*_: object) -> None:
    raise AssertionError("submitted")
