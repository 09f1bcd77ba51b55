"""The I/O engine on aiofiles: an asyncio loop of its own in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack, suppress
from functools import partial
from queue import SimpleQueue
from selectors import DefaultSelector
from socket import socketpair
from typing import Any, ParamSpec, TypeVar

import aiofiles.os

from kvtier.errors import ClosedError, TierError
from kvtier.runtime.blocking import cancelled, perform
from kvtier.runtime.seam import Event, IODone, IORequest
from kvtier.runtime.system import SystemEvent
from kvtier.runtime.threads import FEWER_IO_THREADS, start_all

P = ParamSpec("P")
T = TypeVar("T")

# Not ``aiofiles.open``: its file objects have no pread, and duplicates of one fd share their position, so two reads of
# one segment could not run at once; kept by number they would also outlive the file that the number meant.
perform_async = aiofiles.os.wrap(perform)


class AiofilesIOEngine:
    """``seam.IOEngine`` that awaits its calls through aiofiles, at most ``threads`` at once on as many daemon threads.

    The queue is as long as its owner lets it grow: a lane bounds its bytes in flight.
    """

    ready: Event

    def __init__(self, name: str, threads: int) -> None:
        """Start the threads.

        Raises:
            TierError: there are not so many, or no descriptors for the loop; nothing is left.
        """
        self.ready = SystemEvent()
        self._done: deque[IODone] = deque()
        self._queue: deque[IORequest] = deque()
        self._open: set[IORequest] = set()
        self._intake = threading.Lock()
        self._closed = False
        self._threads = threads
        self._executor = DaemonExecutor(name, threads)
        self._loop = _new_loop(name)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False
        self._thread = threading.Thread(target=self._run_loop, name=f"{name}-loop", daemon=True)
        try:
            start_all([*self._executor.threads, self._thread], self._stop_threads, FEWER_IO_THREADS)
        except BaseException:
            if not self._loop.is_running():  # else its thread, which was told to end, closes it
                self._loop.close()
            raise

    def submit(self, request: IORequest) -> None:
        """Queue one request, from any thread; never blocks. Raises ClosedError after ``close``."""
        with self._intake:
            if self._closed:
                raise ClosedError("the I/O engine is closed")
            self._open.add(request)
            self._queue.append(request)
            self._loop.call_soon_threadsafe(self._begin)

    def reap(self) -> list[IODone]:
        """Everything that ended since the last call; never blocks."""
        done = self._done
        return [done.popleft() for _ in range(len(done))]

    def close(self, timeout_s: float) -> int:
        """Cancel what has not begun (ECANCELED, still to be reaped), wait for the rest; returns how many still run."""
        with self._intake:
            self._closed = True
            while (request := self._next()) is not None:
                self._end(cancelled(request))
            with suppress(RuntimeError):  # each time, as Ctrl-C may have come between; the loop may have ended by now
                self._loop.call_soon_threadsafe(self._begin_ending)
        deadline = time.monotonic() + timeout_s
        for thread in (self._thread, *self._executor.threads):  # the loop's ends first, and tells the others to
            thread.join(max(deadline - time.monotonic(), 0.0))
        return len(self._open)

    def _stop_threads(self) -> None:
        self._executor.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _next(self) -> IORequest | None:
        try:
            return self._queue.popleft()
        except IndexError:  # looking first would not do: the loop's thread and ``close`` take from it at once
            return None

    def _end(self, done: IODone) -> None:
        self._done.append(done)
        self._open.discard(done.request)
        self.ready.set()

    # -- in the loop's thread

    def _run_loop(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _begin(self) -> None:
        while len(self._tasks) < self._threads and (request := self._next()) is not None:
            task = self._loop.create_task(self._run(request))
            self._tasks.add(task)
            task.add_done_callback(self._forget)

    async def _run(self, request: IORequest) -> None:
        self._end(await perform_async(request, executor=self._executor))

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._begin()
        self._stop_when_empty()

    def _begin_ending(self) -> None:
        self._ending = True
        self._stop_when_empty()

    def _stop_when_empty(self) -> None:
        if self._ending and not self._tasks:
            self._executor.shutdown()
            self._loop.stop()


def _new_loop(name: str) -> asyncio.AbstractEventLoop:
    try:
        with ExitStack() as held:  # what a loop takes: one that is refused half of it complains when it goes
            held.enter_context(DefaultSelector())
            for end in socketpair():
                held.enter_context(end)
        return asyncio.new_event_loop()
    except OSError as error:
        raise TierError(
            f"the event loop of {name!r}: {error}; raise the limit of open files (ulimit -n), or set disk.io_engine = "
            '"threads", which has none'
        ) from error


class DaemonExecutor(Executor):
    """A fixed number of daemon threads; unlike ThreadPoolExecutor's they are never joined at the interpreter's exit."""

    def __init__(self, name: str, threads: int) -> None:
        """Its owner starts ``threads``."""
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self.threads = [
            threading.Thread(target=self._loop, name=f"{name}-{slot}", daemon=True) for slot in range(threads)
        ]

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue one call."""
        future: Future[T] = Future()
        self._queue.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Let the threads end after what is queued; never waits, whatever is asked."""
        for _ in self.threads:
            self._queue.put(None)

    def _loop(self) -> None:
        while (queued := self._queue.get()) is not None:
            future, call = queued
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del queued, future, call  # an idle thread must not keep the buffers of its last request alive
