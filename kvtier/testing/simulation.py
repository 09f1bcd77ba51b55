"""A machine in one thread: virtual time, step loops picked by a seeded generator, simulated disks.

The code under test is the code that ships: it gets a ``Machine`` of the simulation in place of the real one. The same
seed makes the same choices in the same order, and ``trace_digest`` proves it.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import TracebackType

import numpy as np

from kvtier.runtime.seam import Buffer, Event, Lock, Machine, Worker
from kvtier.testing.simdisk import SimDisk

STEP_S = 1e-6
"""Virtual time that one step costs, so that a loop which polls until a deadline gets there."""
LIMIT_STEPS = 1_000_000
PAGE_BYTES = 4096


class SimulationError(AssertionError):
    """The code under test did what it must never do, or nothing at all; the message ends with the last decisions."""


class VirtualClock:
    """Time that moves only when the simulation moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        """Virtual seconds; begins at 1000."""
        return self.now_s

    def wall(self) -> float:
        """Virtual seconds since 1970."""
        return 1.7e9 + self.now_s


class SimEvent:
    """``seam.Event``; waiting for it runs the simulation."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.is_set = False

    def set(self) -> None:
        """Wake whoever waits."""
        self.is_set = True

    def clear(self) -> None:
        """Take the wake-up back."""
        self.is_set = False

    def wait(self, timeout_s: float | None) -> bool:
        """Run everything else until set, or until ``timeout_s`` of virtual time has passed; True when set."""
        return self._simulation.run_until(lambda: self.is_set, timeout_s=timeout_s)


class SimLock:
    """``seam.Lock``. In one thread, a lock taken twice, or held while others run, is a deadlock in waiting."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def acquire(self, blocking: bool = True) -> bool:
        """Acquire; when held SimulationError, or False without ``blocking``."""
        if self in self._simulation.held_locks:
            if blocking:
                raise SimulationError("a lock is taken that is held already")
            return False
        self._simulation.held_locks.append(self)
        return True

    def release(self) -> None:
        """Let the next one have it."""
        self._simulation.held_locks.remove(self)

    def __enter__(self) -> SimLock:
        """Acquire; SimulationError when held."""
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Release."""
        self.release()


@dataclass(slots=True, eq=False)
class SimWorker:
    """One step loop of the simulation."""

    simulation: Simulation
    name: str
    step: Callable[[], bool]
    wake: Event
    idle_s: float | None
    waits: bool = False
    wait_until_s: float = math.inf
    error: BaseException | None = None

    def stop(self, timeout_s: float) -> bool:
        """End the loop; True unless asked from its own step. Raises what ended the loop, the first time only."""
        inside = self.simulation.stepping is self
        self.simulation.remove_worker(self)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return not inside

    def is_runnable(self, now_s: float) -> bool:
        """Whether a thread in its place would be running."""
        return not self.waits or self.wake.wait(0.0) or now_s >= self.wait_until_s

    def run_step(self) -> None:
        """One turn of the loop."""
        if self.waits:
            self.wake.clear()
        self.waits = not self.step()
        if self.waits:
            now_s = self.simulation.clock.now_s
            self.wait_until_s = math.inf if self.idle_s is None else now_s + self.idle_s


class SimArena:
    """``seam.Arena`` on plain memory; closing it spoils the bytes, so that a view used afterwards shows."""

    data: Buffer

    def __init__(self, nbytes: int) -> None:
        whole = np.zeros(nbytes + PAGE_BYTES, np.uint8)
        start = -whole.ctypes.data % PAGE_BYTES
        self.data = whole[start : start + nbytes]

    def view(self, page: int, pages: int) -> Buffer:
        """4 KiB pages ``[page, page + pages)``."""
        return self.data[page * PAGE_BYTES : (page + pages) * PAGE_BYTES]

    def close(self) -> None:
        """Spoil the bytes and drop them; idempotent."""
        self.data[:] = 0xDD
        self.data = self.data[:0]


@dataclass(order=True, slots=True)
class _Timer:
    at_s: float
    sequence: int
    name: str = field(compare=False)
    action: Callable[[], None] = field(compare=False)


class Simulation:
    """``seam.Runtime`` in one thread, and the machine around it.

    Nothing runs until a ``run_*`` method, or ``Event.wait``, is called from outside of all steps.
    """

    clock: VirtualClock

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.clock = VirtualClock()
        self.disk = SimDisk(self)
        self.held_locks: list[SimLock] = []
        self.stepping: SimWorker | None = None
        self._disks: list[SimDisk] = []
        self._choices = self.rng("choices")
        self._workers: list[SimWorker] = []
        self._timers: list[_Timer] = []
        self._sequence = 0
        self._running = False
        self._trace = hashlib.blake2b(digest_size=16)
        self._recent: deque[str] = deque(maxlen=32)

    def machine(self, disk: SimDisk | None = None) -> Machine:
        """The seam's machine on this simulation, with ``disk`` or the simulation's own."""
        files = disk or self.disk
        if files not in self._disks:
            self._disks.append(files)
        return Machine(self, files, lambda name, nbytes: SimArena(nbytes), files.io_engine)

    # -- seam.Runtime

    def event(self) -> Event:
        """A new event, not set."""
        return SimEvent(self)

    def lock(self) -> Lock:
        """A new lock, not held."""
        return SimLock(self)

    def spawn(self, name: str, step: Callable[[], bool], wake: Event, idle_s: float | None = None) -> Worker:
        """Register a step loop; see ``seam.Runtime.spawn``. An exception of a step comes out of ``run_*``, too."""
        worker = SimWorker(self, name, step, wake, idle_s)
        self._workers.append(worker)
        return worker

    # -- driving it

    def run_until(
        self, predicate: Callable[[], bool], *, limit_steps: int = LIMIT_STEPS, timeout_s: float | None = None
    ) -> bool:
        """Run until ``predicate()`` holds: True. False when ``timeout_s`` of virtual time has passed first.

        Raises:
            SimulationError: called from a step or under a lock, ``limit_steps`` are used up, or nothing is left that
                could ever run and there is no timeout.
        """
        if predicate():
            return True
        until_s = math.inf if timeout_s is None else self.clock.now_s + timeout_s
        if self.clock.now_s >= until_s:
            return False
        self._begin_running()
        try:
            for _ in range(limit_steps):
                if not self._turn(until_s):
                    raise self.failure("nothing is left to run")
                if predicate():
                    return True
                if self.clock.now_s >= until_s:
                    return False
        finally:
            self._running = False
        raise self.failure(f"not there after {limit_steps} steps")

    def run_idle(self, limit_steps: int = LIMIT_STEPS) -> None:
        """Run until nothing is left to do but idle timeouts."""
        self.run_until(self._is_idle, limit_steps=limit_steps)

    def run_for(self, seconds: float, limit_steps: int = LIMIT_STEPS) -> None:
        """Run for ``seconds`` of virtual time."""
        self.run_until(lambda: False, timeout_s=seconds, limit_steps=limit_steps)

    def kill(self) -> None:
        """``kill -9``: every loop ends where it is; what the operating system had of the files stays."""
        self._workers.clear()
        for disk in self._disks:
            disk.kill()
        self._timers.clear()
        self.held_locks.clear()

    def power_cut(self) -> None:
        """Every loop ends where it is, and the disks keep what was synced and a random part of what was not."""
        self._workers.clear()
        for disk in self._disks:
            disk.crash()
        self._timers.clear()
        self.held_locks.clear()

    def trace_digest(self) -> str:
        """Digest of every decision so far: equal for equal seeds and equal code."""
        return self._trace.hexdigest()

    # -- for the simulated devices

    def after(self, delay_s: float, name: str, action: Callable[[], None]) -> None:
        """Call ``action`` when ``delay_s`` of virtual time have passed; never when that is infinite."""
        if delay_s < math.inf:
            self._sequence += 1
            heapq.heappush(self._timers, _Timer(self.clock.now_s + delay_s, self._sequence, name, action))

    def rng(self, name: str) -> Random:
        """A generator of its own for ``name``, so that one device's draws do not shift another's."""
        return Random(f"{self.seed}/{name}")

    def remove_worker(self, worker: SimWorker) -> None:
        """Run it no more."""
        if worker in self._workers:
            self._workers.remove(worker)

    def failure(self, message: str) -> SimulationError:
        """An error that tells how to get here again."""
        return SimulationError(f"{message} (seed {self.seed}, t={self.clock.now_s:.6f}); last: {list(self._recent)}")

    # -- the turns

    def _begin_running(self) -> None:
        if self._running:
            name = self.stepping.name if self.stepping else "a timer"
            raise self.failure(f"{name} blocks inside its step")
        if self.held_locks:
            raise self.failure("a lock is held while others run")
        self._running = True

    def _turn(self, until_s: float) -> bool:
        """Run one step, or let time pass up to ``until_s``; False when nothing could ever run again."""
        now_s = self.clock.now_s
        if self._timers and self._timers[0].at_s <= now_s:
            timer = heapq.heappop(self._timers)
            self._note(timer.name)
            timer.action()
            return True
        runnable = [worker for worker in self._workers if worker.is_runnable(now_s)]
        if runnable:
            self._run(self._choices.choice(runnable))
            return True
        next_s = min(self._next_timer_s(), *(worker.wait_until_s for worker in self._workers), until_s)
        self.clock.now_s = max(now_s, min(next_s, until_s))
        return next_s < math.inf

    def _run(self, worker: SimWorker) -> None:
        self._note(worker.name)
        self.clock.now_s += STEP_S
        self.stepping = worker
        try:
            worker.run_step()
        except BaseException as error:
            worker.error = error
            self.remove_worker(worker)
            raise
        finally:
            self.stepping = None
        if self.held_locks:
            raise self.failure(f"{worker.name} left a lock held")

    def _is_idle(self) -> bool:
        now_s = self.clock.now_s
        return not self._timers and not any(worker.is_runnable(now_s) for worker in self._workers)

    def _next_timer_s(self) -> float:
        return self._timers[0].at_s if self._timers else math.inf

    def _note(self, name: str) -> None:
        decision = f"{name}@{self.clock.now_s:.9f}"
        self._recent.append(decision)
        self._trace.update(decision.encode() + b"\n")
