"""One of two directories hangs, in every operation and for as long as it likes: what does not need it goes on."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtier import TieredCache
from kvtier.runtime import system_machine
from kvtier.runtime.seam import IORequest
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
BLOCKS = 8
PATIENCE_S = 60.0
A_MOMENT_S = 0.02


class Hanging:
    """Files and I/O engines of a machine, of which those of directory 0 hang until they are let go."""

    def __init__(self, directory: Path) -> None:
        self._system = system_machine("threads")
        self._directory = str(directory)
        self._hung_fds: set[int] = set()
        self._held: list[tuple[Any, IORequest]] = []
        self._lock = threading.Lock()
        self.hangs = False
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.machine = replace(self._system, files=self, io_engine=self._io_engine)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._system.files, name)

        def maybe_hung(where: str | int, *arguments: Any, **settings: Any) -> Any:
            ours = where.startswith(self._directory) if isinstance(where, str) else where in self._hung_fds
            if ours and self.hangs:
                self.entered.set()
                assert self.go_on.wait(PATIENCE_S)
            if ours and name == "close":  # the number is the other directory's next
                self._hung_fds.discard(int(where))
            answer = operation(where, *arguments, **settings)
            if ours and name == "open":
                self._hung_fds.add(answer)
            return answer

        return maybe_hung

    def _io_engine(self, name: str, threads: int) -> Any:
        engine = self._system.io_engine(name, threads)
        if name == "disk-0":
            engine.submit = self._held_back(engine.submit)  # type: ignore[method-assign]
        return engine

    def _held_back(self, submit: Any) -> Any:
        def maybe_held(request: IORequest) -> None:
            with self._lock:
                if self.hangs:
                    self._held.append((submit, request))
                    return
            submit(request)

        return maybe_held

    def let_go(self) -> None:
        with self._lock:
            self.hangs, held = False, self._held
        for submit, request in held:
            submit(request)
        self.go_on.set()


class World:
    """A cache over directories a and b, with eight documents on disk and nothing in host memory; a begins to hang."""

    def __init__(self, parent: Path) -> None:
        self.hanging, self.other = Hanging(parent / "a"), parent / "b"
        disk = {"directories": [str(parent / "a"), str(self.other)], "capacity": "16MiB", "segment": "1MiB"}
        self.config: dict[str, Any] = {"host": {"capacity": "1MiB", "staging": "1MiB"}, "disk": disk}
        self.engine = PseudoEngine(LAYOUT, BLOCKS)
        with self.opened() as cache:
            for number in range(8):
                assert self.store(cache, number) == {}
        self.cache = self.opened()
        self.cache.wait_attached(PATIENCE_S)

    def opened(self) -> TieredCache:
        return TieredCache(self.config, LAYOUT, "m", machine=self.hanging.machine)

    def hang(self) -> None:
        self.hanging.hangs = True
        assert self.hanging.entered.wait(PATIENCE_S), "housekeeping looks every second whether its directory is there"

    def store(self, cache: TieredCache, number: int) -> dict[str, int]:
        keys = cache.keys([number] * (SIZE * BLOCKS))
        self.engine.write(keys, range(BLOCKS))
        return cache.submit_store(keys, self.engine.pages, durability="process").result(PATIENCE_S).failed


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.hanging.let_go()
    assert world.cache.close(PATIENCE_S)
    stats = world.cache.stats()
    assert (stats["jobs"], stats["hops"], stats["pinned_entries"]) == (0, 0, 0)
    assert stats["staging_free"] == stats["staging_buffers"]


@pytest.mark.timeout(120)
def test_loads_end_by_their_deadline_and_have_what_the_other_directory_holds(world: World) -> None:
    world.hang()
    loaded = failed = 0
    for number in range(8):
        with world.cache.lookup([number] * (SIZE * BLOCKS + 1)) as hit:
            assert hit.by_tier["disk"] == SIZE * BLOCKS
            result = world.cache.submit_load(hit, world.engine.pages, deadline_s=A_MOMENT_S * 10).result(PATIENCE_S)
            assert world.engine.wrong_blocks(hit.keys, range(result.ok_tokens // SIZE)) == []
        assert set(result.failed) <= {"abandoned"}
        loaded, failed = loaded + result.ok_tokens, failed + sum(result.failed.values())
    assert failed > 0
    assert loaded + failed == 8 * SIZE * BLOCKS


class Heard(logging.Handler):
    """Waits for a line in the log."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._words in record.getMessage():
            self.event.set()


@pytest.mark.timeout(120)
def test_the_other_directory_is_looked_after(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard("was removed")
    monkeypatch.setattr(logging.getLogger("kvtier"), "handlers", [heard])
    world.hang()
    shutil.rmtree(world.other)
    assert heard.event.wait(PATIENCE_S)


@pytest.mark.timeout(120)
def test_closing_takes_no_longer_than_it_may(world: World) -> None:
    world.hang()
    for timeout_s in (A_MOMENT_S, 0.0):
        assert not world.cache.close(timeout_s)
