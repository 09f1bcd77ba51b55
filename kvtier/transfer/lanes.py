"""Lanes: one physical path each, with a queue by priority, a limit in flight, and a learnt rate."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

from kvtier.core.plan import DIRECTORY_SHIFT, PAGE_BYTES, Priority
from kvtier.errors import ClosedError
from kvtier.runtime.seam import Buffer, IODone, IOEngine, IORequest

MAX_ROWS_A_MOVE: Final = 128
"""Records that one system call may carry; each takes up to two of its buffers. As many of 68 KiB fill a request."""

REQUEST_BYTES: Final = (8 << 20) + (64 << 10)
"""Payload of the longest request, and headers: few long ones keep a disk busier than many short ones."""

SHORT_REQUEST_BYTES: Final = (2 << 20) + (64 << 10)
"""The same for the last reads of a queue: the engine's threads work on one move together, and it ends before the next,
so that not all of them are left to be verified at once when the last byte is there."""

_QUEUED_A_THREAD: Final = 2  # an I/O thread has its next request while the copy threads are busy
_RATE_WEIGHT: Final = 0.4


class Move(Protocol):
    """Adjacent slices of one lane: one system call, or a few."""

    priority: Priority
    nbytes: int

    def prepare(self) -> IORequest | None:
        """The request to submit, whole; None while a buffer or a clean segment is missing.

        ``finish`` is called instead of a submit when ``prepare`` found that there is nothing left to do.
        """

    def finish(self, done: IODone) -> None:
        """The request ended, all of it: no buffer is touched any more. Of several errors it has the first."""

    @property
    def wanted(self) -> bool:
        """False once nobody waits for it any more: it is passed over."""


class Sync(Move, Protocol):
    """A move without bytes that others may join as long as it waits."""

    def join(self, other: Self) -> bool:
        """Whether this one will have done what ``other`` is for; ``other`` is dropped then."""


@dataclass(slots=True, eq=False)
class _Transfer:
    """A move on its way: how many of the requests that it was cut into have not ended, and how the others did."""

    move: Move
    whole: IORequest
    left: int = 0
    elapsed_s: float = 0.0
    error: OSError | None = None

    def cut(self, limit_bytes: int) -> list[IORequest]:
        """The requests to submit, in order."""
        whole = self.whole
        parts = [
            IORequest(whole.op, whole.fd, whole.offset + at, buffers, self)
            for at, buffers in _cut(whole.buffers, whole.nbytes, limit_bytes)
        ]
        self.left = len(parts)
        return parts

    def ended(self, done: IODone) -> None:
        """One of them did."""
        self.left -= 1
        self.elapsed_s += done.elapsed_s
        self.error = self.error or done.error


class Lane:
    """Runs moves through one I/O engine; called under the data plane's lock."""

    def __init__(self, name: str, engine: IOEngine, *, threads: int) -> None:
        """``engine`` runs ``threads`` requests at once; as many again wait in it, reads and writes each."""
        self.name = name
        self.engine = engine
        self.queued_bytes = 0
        self.bytes_per_s = 0.0
        self._threads = threads
        self._queues: dict[Priority, deque[Move]] = {priority: deque() for priority in Priority}
        self._syncs: deque[Sync] = deque()
        self._cut: dict[Priority, deque[IORequest]] = {priority: deque() for priority in Priority}
        self._in_flight: dict[Priority, int] = dict.fromkeys(Priority, 0)
        self._ended: deque[IODone] = deque()

    def put(self, move: Move) -> None:
        """Queue ``move``."""
        self.queued_bytes += move.nbytes
        self._queues[move.priority].append(move)

    def put_sync(self, sync: Sync) -> None:
        """Queue a sync, of SPILL: it waits for no write that was queued before it, and keeps none waiting.

        Of those that one can do for all, one waits: each that waits is looked at on every ``submit``.
        """
        if not any(waiting.join(sync) for waiting in self._syncs):
            self._syncs.append(sync)

    def insert_second(self, rest: Move) -> None:
        """Queue what the move at the head, which is being prepared, leaves over; its bytes are counted already."""
        self._queues[rest.priority].insert(1, rest)

    def submit(self) -> None:
        """Hand as much as the limits allow to the engine, demand first."""
        for priority in self._queues:
            while self._has_room(priority) and (request := self._next(priority)) is not None:
                self._in_flight[priority] += 1
                self._hand_over(request)

    def reap(self) -> int:
        """Finish what the engine is done with; returns how many. Where one raises, the others' turn comes next time."""
        self._ended.extend(self.engine.reap())
        reaped = 0
        while self._ended:
            reaped += 1
            self._end(self._ended.popleft())
        return reaped

    def _next(self, priority: Priority) -> IORequest | None:
        """The next request: of the move that was begun last, or of the first that is ready to begin."""
        cut, queue = self._cut[priority], self._queues[priority]
        if priority == Priority.SPILL and self._syncs and not cut and (request := self._next_sync()) is not None:
            return request
        while queue and not cut:
            move = queue[0]
            try:
                request = move.prepare() if move.wanted else None
            except BaseException:  # those behind it are others'
                self._forget(queue.popleft())
                raise
            if request is not None:
                queue.popleft()
                cut.extend(_Transfer(move, request).cut(self._request_bytes(priority)))
            elif move.wanted:
                break
            else:
                self._forget(queue.popleft())
        return cut.popleft() if cut else None

    def _next_sync(self) -> IORequest | None:
        """The request of the first sync that is ready to begin; one that is over goes."""
        for _ in range(len(self._syncs)):
            move = self._syncs.popleft()
            request = move.prepare()
            if request is not None:
                return _Transfer(move, request).cut(REQUEST_BYTES)[0]
            if move.wanted:
                self._syncs.append(move)
        return None

    def _request_bytes(self, priority: Priority) -> int:
        """How long a request may be. Nothing is left to be done with the bytes of a write: those are always long."""
        is_last = priority != Priority.SPILL and len(self._queues[priority]) < self._threads
        return SHORT_REQUEST_BYTES if is_last else REQUEST_BYTES

    def _hand_over(self, request: IORequest) -> None:
        try:
            self.engine.submit(request)
        except ClosedError:  # while a move that was cut was on its way
            self._end(IODone(request, OSError(errno.ECANCELED, "the I/O engine is closed"), 0.0))

    def _end(self, done: IODone) -> None:
        transfer: _Transfer = done.request.tag
        priority = transfer.move.priority
        self._in_flight[priority] -= 1
        transfer.ended(done)
        nbytes = done.request.nbytes
        if done.error is None and done.elapsed_s > 0 and nbytes:  # how long a sync takes says nothing of a rate
            self._learn(nbytes / done.elapsed_s)
        cut = self._cut[priority]
        if transfer.error is not None and cut and cut[0].tag is transfer:
            transfer.left -= len(cut)  # the rest would be of no use
            cut.clear()
        if not transfer.left:
            self._forget(transfer.move)
            transfer.move.finish(IODone(transfer.whole, transfer.error, transfer.elapsed_s))

    @property
    def in_flight(self) -> int:
        """Requests that the engine has."""
        return sum(self._in_flight.values())

    @property
    def is_busy(self) -> bool:
        """Whether anything waits in it, or is on its way."""
        return bool(
            self.in_flight or self._ended or self._syncs or any(self._queues.values()) or any(self._cut.values())
        )

    def _has_room(self, priority: Priority) -> bool:
        # Writes and reads each have all of the depth: a full write queue never keeps a load from the disk.
        depth = _QUEUED_A_THREAD * self._threads
        if priority == Priority.SPILL:
            return self._in_flight[priority] < depth
        return self._in_flight[Priority.DEMAND] + self._in_flight[Priority.PREFETCH] < depth

    def _forget(self, move: Move) -> None:
        self.queued_bytes -= move.nbytes

    def _learn(self, bytes_per_s: float) -> None:
        at_once = max(1, self.in_flight + 1)
        rate = bytes_per_s * at_once
        self.bytes_per_s = rate if not self.bytes_per_s else (1 - _RATE_WEIGHT) * self.bytes_per_s + _RATE_WEIGHT * rate


def _cut(buffers: Sequence[Buffer], nbytes: int, limit_bytes: int) -> Iterator[tuple[int, list[Buffer]]]:
    """``buffers`` in runs of whole pages, about equal and none above ``limit_bytes``, each with where it begins."""
    count = max(1, -(-nbytes // limit_bytes))
    if count == 1:
        yield 0, list(buffers)
        return
    size = -(-nbytes // (count * PAGE_BYTES)) * PAGE_BYTES
    start, room = 0, size
    run: list[Buffer] = []
    for buffer in buffers:
        rest = buffer
        while rest.nbytes > room:
            yield start, [*run, rest[:room]] if room else run
            rest, start, room, run = rest[room:], start + size, size, []
        run.append(rest)
        room -= rest.nbytes
    yield start, run


def global_segment(lane: int, segment: int) -> int:
    """One number for ``segment`` of directory ``lane``: what plans and the index know."""
    return lane << DIRECTORY_SHIFT | segment


def lane_of(segment: int) -> tuple[int, int]:
    """(directory, segment within it) of a global segment number."""
    return segment >> DIRECTORY_SHIFT, segment & ((1 << DIRECTORY_SHIFT) - 1)
