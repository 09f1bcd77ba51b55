"""The default I/O engine: a fixed number of threads, each in one system call at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from queue import Empty, SimpleQueue

from kvtier.errors import ClosedError
from kvtier.runtime.blocking import cancelled, perform
from kvtier.runtime.seam import Event, IODone, IORequest
from kvtier.runtime.system import SystemEvent
from kvtier.runtime.threads import FEWER_IO_THREADS, start_all


class ThreadsIOEngine:
    """``seam.IOEngine`` on ``threads`` daemon threads with preadv, pwritev and fdatasync.

    The queue is as long as its owner lets it grow: a lane bounds its bytes in flight.
    """

    ready: Event

    def __init__(self, name: str, threads: int) -> None:
        """Start the threads.

        Raises:
            TierError: there are not so many; none is left.
        """
        self.ready = SystemEvent()
        self._queue: SimpleQueue[IORequest | None] = SimpleQueue()
        self._done: deque[IODone] = deque()
        self._open: set[IORequest] = set()
        self._intake = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._loop, name=f"{name}-{slot}", daemon=True) for slot in range(threads)
        ]
        start_all(self._threads, self._stop_threads, FEWER_IO_THREADS)

    def submit(self, request: IORequest) -> None:
        """Queue one request, from any thread; never blocks. Raises ClosedError after ``close``."""
        with self._intake:
            if self._closed:
                raise ClosedError("the I/O engine is closed")
            self._open.add(request)
            self._queue.put(request)

    def reap(self) -> list[IODone]:
        """Everything that ended since the last call; never blocks."""
        done = self._done
        return [done.popleft() for _ in range(len(done))]

    def close(self, timeout_s: float) -> int:
        """Cancel what has not begun (ECANCELED, still to be reaped), wait for the rest; returns how many still run."""
        with self._intake:
            self._closed = True
            self._cancel_queued()
            self._stop_threads()  # each time: Ctrl-C may have come between the first one and this
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        return len(self._open)

    def _stop_threads(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _cancel_queued(self) -> None:
        while True:
            try:
                request = self._queue.get_nowait()
            except Empty:
                return
            if request is not None:
                self._end(cancelled(request))

    def _loop(self) -> None:
        while (request := self._queue.get()) is not None:
            self._end(perform(request))
            del request  # an idle thread must not keep the buffers of its last request alive

    def _end(self, done: IODone) -> None:
        self._done.append(done)
        self._open.discard(done.request)
        self.ready.set()
