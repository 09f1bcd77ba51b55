"""The asyncio face: it opens once and in a thread, and nothing stays open that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtier import CacheManager, ClosedError, TieredCache
from kvtier.dispatch import Dispatch
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


class Gate:
    """A machine on which opening comes to a stop, with a part of it done, until ``opens`` is set."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opens = threading.Event()
        self.openings = 0
        self._machine = system_machine("threads")

    @property
    def machine(self) -> Machine:
        return replace(self._machine, arena=self._arena)

    def _arena(self, name: str, nbytes: int) -> Arena:
        self.openings += name == "host"
        self.reached.set()
        assert self.opens.wait(30)
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


async def test_an_opening_that_had_just_ended_when_it_was_cancelled_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop has not heard of it yet: it is this very thread that waits for the end."""
    opened = threading.Event()

    class Telling(TieredCache):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.set()

    monkeypatch.setattr("kvtier.manager.TieredCache", Telling)
    before = threads_of_caches()
    manager = CacheManager(settings(tmp_path), LAYOUT, "m")
    entering = asyncio.create_task(manager.__aenter__())
    await asyncio.sleep(0)
    assert opened.wait(30)
    await give_up(entering)
    assert await manager.close() is True
    assert not threads_of_caches() - before


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
