"""Lanes: one physical path each, with a queue by priority, a limit in flight, and a learnt rate."""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

from kvtier.core.plan import DIRECTORY_SHIFT, Priority
from kvtier.runtime.seam import IODone, IOEngine, IORequest

MAX_ROWS_A_MOVE: Final = 64
"""Records that one system call may carry; each takes up to two of its buffers."""

_RATE_WEIGHT: Final = 0.4


class Move(Protocol):
    """Adjacent slices of one lane: one system call."""

    priority: Priority
    nbytes: int

    def prepare(self) -> IORequest | None:
        """The request to submit, tagged with this move; None while a buffer or a clean segment is missing.

        ``finish`` is called instead of a submit when ``prepare`` found that there is nothing left to do.
        """

    def finish(self, done: IODone) -> None:
        """The request ended."""

    @property
    def wanted(self) -> bool:
        """False once nobody waits for it any more: it is passed over."""


class Lane:
    """Runs moves through one I/O engine; called under the data plane's lock."""

    def __init__(self, name: str, engine: IOEngine, *, depth: int) -> None:
        """At most ``depth`` requests of loads and prefetches, and as many writes, are in flight."""
        self.name = name
        self.engine = engine
        self.depth = depth
        self.queued_bytes = 0
        self.bytes_per_s = 0.0
        self._queues: dict[Priority, deque[Move]] = {priority: deque() for priority in Priority}
        self._in_flight: dict[Priority, int] = dict.fromkeys(Priority, 0)

    def put(self, move: Move) -> None:
        """Queue ``move``."""
        self.queued_bytes += move.nbytes
        self._queues[move.priority].append(move)

    def insert_second(self, rest: Move) -> None:
        """Queue what the move at the head, which is being prepared, leaves over; its bytes are counted already."""
        self._queues[rest.priority].insert(1, rest)

    def submit(self) -> None:
        """Hand as much as the limits allow to the engine, demand first."""
        for priority, queue in self._queues.items():
            while queue and self._has_room(priority):
                move = queue[0]
                request = move.prepare() if move.wanted else None
                if request is None:
                    if move.wanted:
                        break
                    self._forget(queue.popleft())
                    continue
                queue.popleft()
                self._in_flight[priority] += 1
                self.engine.submit(request)

    def reap(self) -> int:
        """Finish what the engine is done with; returns how many."""
        ended = self.engine.reap()
        for done in ended:
            move: Move = done.request.tag
            self._in_flight[move.priority] -= 1
            self._forget(move)
            if done.error is None and done.elapsed_s > 0:
                self._learn(done.request.nbytes / done.elapsed_s)
            move.finish(done)
        return len(ended)

    @property
    def in_flight(self) -> int:
        """Requests that the engine has."""
        return sum(self._in_flight.values())

    def _has_room(self, priority: Priority) -> bool:
        # Writes and reads each have all of the depth: a full write queue never keeps a load from the disk.
        if priority == Priority.SPILL:
            return self._in_flight[priority] < self.depth
        return self._in_flight[Priority.DEMAND] + self._in_flight[Priority.PREFETCH] < self.depth

    def _forget(self, move: Move) -> None:
        self.queued_bytes -= move.nbytes

    def _learn(self, bytes_per_s: float) -> None:
        at_once = max(1, self.in_flight + 1)
        rate = bytes_per_s * at_once
        self.bytes_per_s = rate if not self.bytes_per_s else (1 - _RATE_WEIGHT) * self.bytes_per_s + _RATE_WEIGHT * rate


def global_segment(lane: int, segment: int) -> int:
    """One number for ``segment`` of directory ``lane``: what plans and the index know."""
    return lane << DIRECTORY_SHIFT | segment


def lane_of(segment: int) -> tuple[int, int]:
    """(directory, segment within it) of a global segment number."""
    return segment >> DIRECTORY_SHIFT, segment & ((1 << DIRECTORY_SHIFT) - 1)
