"""I/O engines of a simulated disk."""

from __future__ import annotations

import errno
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from kvtier.errors import ClosedError
from kvtier.runtime.seam import Event, IODone, IORequest
from kvtier.testing.simfile import Snapshot

if TYPE_CHECKING:
    from kvtier.testing.simdisk import SimDisk, World


class SimIOEngine:
    """``seam.IOEngine``: at most ``threads`` requests at once; each takes effect when its time on the disk is over."""

    ready: Event

    def __init__(self, disk: SimDisk, world: World, name: str, threads: int) -> None:
        self.ready = world.event()
        self.running: list[IORequest] = []
        self._disk = disk
        self._world = world
        self._name = name
        self._threads = threads
        self._waiting: deque[IORequest] = deque()
        self._done: list[IODone] = []
        self._closed = False
        self._void = False

    def submit(self, request: IORequest) -> None:
        """Queue one request. Raises ClosedError after ``close``, and after a crash."""
        if self._closed:
            raise ClosedError("the I/O engine is closed")
        self._waiting.append(request)
        self._start()

    def reap(self) -> list[IODone]:
        """Everything that ended since the last call."""
        done, self._done = self._done, []
        return done

    def close(self, timeout_s: float) -> int:
        """Cancel what has not begun (ECANCELED, still to be reaped), run until the rest ended or time is out."""
        self._closed = True
        while self._waiting:
            self._end(self._waiting.popleft(), OSError(errno.ECANCELED, "the I/O engine was closed"), 0.0)
        self._world.run_until(lambda: not self.running, timeout_s=timeout_s)
        return len(self.running)

    def void(self) -> None:
        """Its process died: nothing ends any more."""
        self._closed = self._void = True
        self._waiting.clear()
        self.running.clear()

    def _start(self) -> None:
        while self._waiting and len(self.running) < self._threads:
            request = self._waiting.popleft()
            self.running.append(request)
            service_s = self._disk.service_s(request)
            action = partial(self._finish, request, self._disk.begin(request), service_s)
            self._world.after(service_s, f"{self._name}:{request.op.name}", action)

    def _finish(self, request: IORequest, snapshot: Snapshot | None, elapsed_s: float) -> None:
        if self._void:
            return
        error: OSError | None = None
        try:
            self._disk.finish(request, snapshot)
        except OSError as failure:
            error = failure
        self.running.remove(request)
        self._end(request, error, elapsed_s)
        self._start()

    def _end(self, request: IORequest, error: OSError | None, elapsed_s: float) -> None:
        self._done.append(IODone(request, error, elapsed_s))
        self.ready.set()
