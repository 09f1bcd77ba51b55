"""Time, events, locks and worker loops of the real machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from kvtier.runtime.seam import Event, Lock, Worker
from kvtier.runtime.threads import MORE_THREADS, start_all

log = logging.getLogger(__name__)


class SystemClock:
    """``CLOCK_MONOTONIC`` and ``CLOCK_REALTIME``."""

    def monotonic(self) -> float:
        """Seconds that only go forward; the same origin in every process of the machine."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since 1970."""
        return time.time()


class SystemEvent:
    """Level-triggered event on one lock: locked means not set.

    ``threading.Event`` takes a condition for every ``set`` and makes a lock for every ``wait``; here a ``set`` of a set
    event is one look, any other a single release. It may wake once more than it was set, never once less.
    """

    __slots__ = ("_gate", "_is_set")

    def __init__(self) -> None:
        self._is_set = False  # only asked where Ctrl-C left the lock in an unknown state
        self._gate = threading.Lock()
        self._gate.acquire()

    def set(self) -> None:
        """Wake whoever waits."""
        self._is_set = True
        if self._gate.locked():
            self._open()

    def clear(self) -> None:
        """Take the wake-up back; clear first, then drain."""
        self._is_set = False
        self._gate.acquire(blocking=False)

    def wait(self, timeout_s: float | None) -> bool:
        """Block until set or timed out; True when set."""
        timeout = -1.0 if timeout_s is None else min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)
        try:
            if not self._gate.acquire(timeout=timeout):
                return False
            self._open()
        except BaseException:  # Ctrl-C, and we may have taken the lock: whoever waits next must not wait for ever
            if self._is_set:
                self._open()
            raise
        return True

    def _open(self) -> None:
        with suppress(RuntimeError):  # another thread opened it between our look and our release: it is set
            self._gate.release()


class SystemWorker:
    """A daemon thread that runs one step loop; made by ``SystemRuntime.spawn``."""

    def __init__(self, name: str, step: Callable[[], bool], wake: Event, idle_s: float | None) -> None:
        self._step = step
        self._wake = wake
        self._idle_s = idle_s
        self._stopping = self._is_over = False
        self._stepping = True  # as if: the first step may begin at any moment
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        start_all([self._thread], self._tell_to_end, MORE_THREADS)

    def stop(self, timeout_s: float) -> bool:
        """Ask the loop to end and wait; True when it has ended. Raises what ended the loop, the first time only.

        One that rests has ended, also before its thread gets a core to wake up on: no step begins any more.
        """
        self._stopping = True
        # The loop says that it steps, then looks whether to stop. Here it is the other way round: one sees the other.
        self._is_over = self._is_over or not self._stepping
        self._wake.set()
        if self._thread is threading.current_thread():
            return False
        self._thread.join(max(timeout_s, 0.0))
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._is_over or not self._thread.is_alive()

    def _tell_to_end(self) -> None:
        self._stopping = True
        self._wake.set()

    def _loop(self) -> None:
        try:
            while not self._stopping:
                if self._step():
                    continue
                self._stepping = False
                self._wake.wait(self._idle_s)
                self._wake.clear()
                self._stepping = True
        except BaseException as error:
            log.exception("the loop of worker %r ended: its step raised", self._thread.name)
            self._error = error


class SystemRuntime:
    """Threads, locks and events of the real machine."""

    def __init__(self) -> None:
        self.clock = SystemClock()

    def event(self) -> Event:
        """A new event, not set."""
        return SystemEvent()

    def lock(self) -> Lock:
        """A new lock, not held."""
        return threading.Lock()

    def spawn(self, name: str, step: Callable[[], bool], wake: Event, idle_s: float | None = None) -> Worker:
        """Run ``step`` in a daemon thread of its own; see ``seam.Runtime.spawn``. TierError: there is no thread.

        What raises leaves none behind, unless its first step takes longer than Ctrl-C can be kept waiting.
        """
        return SystemWorker(name, step, wake, idle_s)
