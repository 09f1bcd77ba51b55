"""I/O engines: the contract on each, and what only threads can get wrong."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from kvtier.errors import ConfigError, TierError
from kvtier.runtime import aiofiles_io, blocking, system_machine, threads_io
from kvtier.runtime.machine import IO_ENGINES
from kvtier.runtime.seam import IORequest, Machine, Op
from kvtier.testing.simulation import Simulation
from tests.interrupts import interrupt_start, once, open_files
from tests.runtime.contract_files import PAGE, aligned
from tests.runtime.contract_io import PATIENCE_S, IOEngineContract, collect, run_one


class TestThreadsIOEngine(IOEngineContract):
    @pytest.fixture
    def machine(self) -> Machine:
        return system_machine("threads")

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return str(tmp_path)


class TestAiofilesIOEngine(IOEngineContract):
    @pytest.fixture
    def machine(self) -> Machine:
        return system_machine("aiofiles")

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return str(tmp_path)


class TestSimIOEngine(IOEngineContract):
    @pytest.fixture
    def machine(self) -> Machine:
        return Simulation(seed=1).machine()

    @pytest.fixture
    def root(self, machine: Machine) -> str:
        machine.files.make_directory("/cache")
        return "/cache"


@pytest.fixture(params=sorted(IO_ENGINES))
def machine(request: pytest.FixtureRequest) -> Machine:
    return system_machine(request.param)


@pytest.fixture
def fd(machine: Machine, tmp_path: Path) -> Iterator[int]:
    fd = machine.files.open(f"{tmp_path}/data", create=True)
    yield fd
    machine.files.close(fd)


def test_a_request_that_hangs_is_counted_by_close_and_still_ends_later(
    machine: Machine, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, released = threading.Event(), threading.Event()
    real = blocking.pwritev

    def hanging(*args: object) -> int:
        entered.set()
        released.wait(PATIENCE_S)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(blocking, "pwritev", hanging)
    engine = machine.io_engine("hang", 1)
    for tag in range(3):
        engine.submit(IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], tag))
    assert entered.wait(PATIENCE_S)
    assert engine.close(0.0) == 1
    while len(cancelled := engine.reap()) < 2:
        assert engine.ready.wait(PATIENCE_S)
        engine.ready.clear()
    assert [(each.request.tag, each.error.errno) for each in cancelled if each.error] == [
        (1, errno.ECANCELED),
        (2, errno.ECANCELED),
    ]
    engine.ready.clear()
    released.set()
    assert engine.close(PATIENCE_S) == 0
    (last,) = engine.reap()
    assert (last.request.tag, last.error) == (0, None)


class HoldingQueue(SimpleQueue[Any]):
    """Whoever took a request off it gets no core for a while."""

    taken: threading.Event
    on_core: threading.Event

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        request = super().get(block, timeout)
        self.taken.set()
        assert self.on_core.wait(PATIENCE_S)
        return request


def test_a_request_that_a_thread_has_taken_and_not_begun_is_counted_by_close(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffers are about to be used: nobody may free them yet."""
    HoldingQueue.taken, HoldingQueue.on_core = threading.Event(), threading.Event()
    monkeypatch.setattr(threads_io, "SimpleQueue", HoldingQueue)
    engine = threads_io.ThreadsIOEngine("io", 1)
    engine.submit(IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], 0))
    assert HoldingQueue.taken.wait(PATIENCE_S)
    running = engine.close(0.0)
    HoldingQueue.on_core.set()
    assert running == 1
    assert engine.close(PATIENCE_S) == 0
    assert [done.error for done in engine.reap()] == [None]


def test_an_error_that_is_no_os_error_still_ends_the_request(machine: Machine, fd: int) -> None:
    engine = machine.io_engine("io", 1)
    run_one(engine, IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], 0))
    frozen = aligned(PAGE)
    frozen.flags.writeable = False
    error = run_one(engine, IORequest(Op.READ, fd, 0, [frozen], 1))
    assert error is not None
    assert error.errno == errno.EIO
    assert isinstance(error.__cause__, (TypeError, ValueError, BufferError))
    assert run_one(engine, IORequest(Op.READ, fd, 0, [aligned(PAGE)], 2)) is None, "the engine goes on"
    assert engine.close(PATIENCE_S) == 0


def test_no_thread_is_left_after_close(machine: Machine) -> None:
    """A process that forks, or ends, right behind it must not meet one."""
    before = set(threading.enumerate())
    engine = machine.io_engine("io", 64)
    assert len(threading.enumerate()) >= len(before) + 64
    assert engine.close(PATIENCE_S) == 0
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("can_start", range(4))
def test_an_engine_that_does_not_get_all_its_threads_leaves_none_behind(
    machine: Machine, fewer_threads: Callable[[int], None], can_start: int
) -> None:
    before = set(threading.enumerate())
    fewer_threads(can_start)
    with pytest.raises(TierError, match=r"'io-\w+', .*: can't start new thread; .*disk\.io_threads"):
        machine.io_engine("io", 4)
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    ("engine", "which"),
    [("threads", "io-0"), ("threads", "io-1"), ("aiofiles", "io-0"), ("aiofiles", "io-1"), ("aiofiles", "io-loop")],
)
def test_ctrl_c_while_an_engine_starts_its_threads_leaves_none_of_them(
    monkeypatch: pytest.MonkeyPatch, engine: str, which: str
) -> None:
    """Nor a descriptor, nor another error in place of Ctrl-C."""
    files, before = open_files(), set(threading.enumerate())
    interrupt_start(monkeypatch, which)
    with pytest.raises(KeyboardInterrupt):
        system_machine(engine).io_engine("io", 2)
    assert set(threading.enumerate()) == before
    assert open_files() == files


@pytest.mark.parametrize(("engine", "step"), [("threads", "_cancel_queued"), ("aiofiles", "_next")])
def test_an_engine_that_ctrl_c_kept_from_being_closed_is_closed_the_next_time(
    monkeypatch: pytest.MonkeyPatch, engine: str, step: str
) -> None:
    before = set(threading.enumerate())
    made = system_machine(engine).io_engine("io", 2)
    monkeypatch.setattr(made, step, once(getattr(made, step), KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        made.close(PATIENCE_S)
    assert made.close(PATIENCE_S) == 0
    assert set(threading.enumerate()) == before
    assert made.close(0.0) == 0


def test_an_engine_that_gets_no_thread_for_its_event_loop_ends_the_others(fewer_threads: Callable[[int], None]) -> None:
    before = set(threading.enumerate())
    fewer_threads(4)
    with pytest.raises(TierError, match="'io-loop', 5 of 5: can't start new thread"):
        system_machine("aiofiles").io_engine("io", 4)
    assert set(threading.enumerate()) == before


def test_an_engine_that_gets_no_descriptors_for_its_event_loop_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    before, threads = os.listdir("/proc/self/fd"), set(threading.enumerate())
    with monkeypatch.context() as patched:
        patched.setattr(aiofiles_io, "socketpair", refuse)
        with pytest.raises(TierError, match=r"'io'.*Too many open files; raise the limit of open files.*io_engine"):
            system_machine("aiofiles").io_engine("io", 4)
    assert os.listdir("/proc/self/fd") == before
    assert set(threading.enumerate()) == threads


@pytest.mark.usefixtures("fast_switching")
def test_several_threads_may_submit_at_once(machine: Machine, fd: int) -> None:
    engine = machine.io_engine("io", 4)
    page = aligned(PAGE, 7)

    def submit_many(first: int) -> None:
        for tag in range(first, first + 100):
            engine.submit(IORequest(Op.WRITE, fd, tag * PAGE, [page], tag))

    submitters = [threading.Thread(target=submit_many, args=(first,)) for first in range(0, 400, 100)]
    for thread in submitters:
        thread.start()
    done = collect(engine, 400)
    for thread in submitters:
        thread.join()
    assert sorted(each.request.tag for each in done) == list(range(400))
    assert all(each.error is None for each in done)
    out = aligned(400 * PAGE)
    assert run_one(engine, IORequest(Op.READ, fd, 0, [out], 0)) is None
    assert np.all(out == 7)
    assert engine.close(PATIENCE_S) == 0


def test_an_unknown_engine_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'thread' is not an I/O engine.*nearest: 'threads'"):
        system_machine("thread")
