"""Runtimes: the contract, and the races that only threads have."""

import threading
from collections import deque
from collections.abc import Callable

import pytest

from kvtier.errors import TierError
from kvtier.runtime import SystemEvent, SystemRuntime
from kvtier.runtime.seam import Runtime
from kvtier.testing.simulation import Simulation
from tests.interrupts import interrupt_start, once
from tests.runtime.contract_runtime import PATIENCE_S, RuntimeContract


class TestSystemRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self) -> Runtime:
        return SystemRuntime()


class TestSimulationAsRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self) -> Runtime:
        return Simulation(seed=1)


@pytest.mark.usefixtures("fast_switching")
def test_no_wake_up_is_lost_between_threads() -> None:
    """Four producers append and set; one consumer clears and drains. A lost set would leave items and time out."""
    event, items, seen = SystemEvent(), deque[int](), 0

    def produce() -> None:
        for item in range(5000):
            items.append(item)
            event.set()

    producers = [threading.Thread(target=produce) for _ in range(4)]
    for thread in producers:
        thread.start()
    while seen < 20000:
        assert event.wait(PATIENCE_S), f"{seen} items seen, {len(items)} left behind"
        event.clear()
        while items:
            items.popleft()
            seen += 1
    for thread in producers:
        thread.join()


@pytest.mark.usefixtures("fast_switching")
def test_a_set_event_wakes_every_waiter() -> None:
    event, woken = SystemEvent(), deque[bool]()
    waiters = [threading.Thread(target=lambda: woken.append(event.wait(PATIENCE_S))) for _ in range(8)]
    for thread in waiters:
        thread.start()
    event.set()
    for thread in waiters:
        thread.join()
    assert list(woken) == [True] * 8
    assert event.wait(0.0)


class Gate:
    """The lock of an event, out of whose next ``acquire`` comes Ctrl-C, once it has been acquired or timed out."""

    def __init__(self, event: SystemEvent) -> None:
        gate = event._gate
        self.locked, self.release, self.acquire = gate.locked, gate.release, once(gate.acquire, KeyboardInterrupt())


@pytest.mark.parametrize("is_set", [True, False])
def test_a_wait_that_ctrl_c_ended_leaves_the_event_as_it_was(is_set: bool) -> None:
    """Whoever waits a second time must not wait for ever for what had come by the first."""
    event = SystemEvent()
    if is_set:
        event.set()
    event._gate = Gate(event)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        event.wait(0.0)
    assert event.wait(0.0) is is_set
    event.clear()
    assert not event.wait(0.0)


class Unwakeable(SystemEvent):
    """The event of a loop whose thread gets no core to wake up on."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.on_core = threading.Event(), threading.Event()

    def wait(self, timeout_s: float | None) -> bool:
        self.waiting.set()
        return self.on_core.wait(PATIENCE_S)


def test_a_loop_that_only_has_to_wake_up_to_end_has_ended() -> None:
    """It runs no step any more: whoever has no time to wait need not wait for it to be given a core."""
    turns: list[None] = []
    wake = Unwakeable()
    worker = SystemRuntime().spawn("resting", lambda: bool(turns.append(None)), wake)
    assert wake.waiting.wait(PATIENCE_S)
    assert worker.stop(0.0)
    wake.on_core.set()
    assert worker.stop(PATIENCE_S)
    assert len(turns) == 1


def test_stop_gives_up_on_a_step_that_blocks_and_sees_its_end_later() -> None:
    runtime, entered, released = SystemRuntime(), threading.Event(), threading.Event()

    def step() -> bool:
        entered.set()
        released.wait(PATIENCE_S)
        return False

    worker = runtime.spawn("stuck", step, runtime.event())
    assert entered.wait(PATIENCE_S)
    assert not worker.stop(0.0)
    released.set()
    assert worker.stop(PATIENCE_S)


def test_a_loop_that_gets_no_thread_is_an_error_of_the_project(fewer_threads: Callable[[int], None]) -> None:
    runtime = SystemRuntime()
    fewer_threads(0)
    with pytest.raises(TierError, match=r"'copy-0', .*: can't start new thread; "):
        runtime.spawn("copy-0", lambda: False, runtime.event())


def test_a_loop_that_ctrl_c_kept_from_being_known_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, before = SystemRuntime(), set(threading.enumerate())
    interrupt_start(monkeypatch, "copy-0")
    with pytest.raises(KeyboardInterrupt):
        runtime.spawn("copy-0", lambda: False, runtime.event())
    assert set(threading.enumerate()) == before


def test_the_defect_that_ended_a_loop_is_logged_when_it_happens(caplog: pytest.LogCaptureFixture) -> None:
    runtime = SystemRuntime()

    def step() -> bool:
        raise ZeroDivisionError

    worker = runtime.spawn("lane-7", step, runtime.event())
    with pytest.raises(ZeroDivisionError):
        worker.stop(PATIENCE_S)
    assert "'lane-7'" in caplog.text
