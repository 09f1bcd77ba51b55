"""Lanes: how moves are cut into requests, who goes first, and how a move ends when one of its requests fails."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.plan import PAGE_BYTES, Priority
from kvtier.errors import ClosedError
from kvtier.runtime.seam import Buffer, Event, IODone, IORequest, Op
from kvtier.transfer.lanes import REQUEST_BYTES, SHORT_REQUEST_BYTES, Lane

THREADS = 2
DEPTH = 2 * THREADS
LARGE_PAGES = 1 + (8 << 20) // PAGE_BYTES
MEMORY = np.zeros((24 << 20) + PAGE_BYTES, np.uint8)


class _Engine:
    """Takes requests in; the test says how they end."""

    ready: Event

    def __init__(self) -> None:
        self.taken: list[IORequest] = []
        self.closed = False
        self._done: list[IODone] = []

    def submit(self, request: IORequest) -> None:
        if self.closed:
            raise ClosedError("closed")
        self.taken.append(request)

    def end(self, request: IORequest, error: OSError | None = None) -> None:
        self.taken.remove(request)
        self._done.append(IODone(request, error, 0.001))

    def reap(self) -> list[IODone]:
        done, self._done = self._done, []
        return done

    def close(self, timeout_s: float) -> int:
        self.closed = True
        return 0


@dataclass(eq=False)
class _Move:
    """One run of buffers, at an offset of its own."""

    priority: Priority = Priority.DEMAND
    pages: Sequence[int] = (LARGE_PAGES,)
    wanted: bool = True
    ended: list[IODone] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(self.pages) * PAGE_BYTES

    def buffers(self) -> list[Buffer]:
        stops = np.cumsum(self.pages) * PAGE_BYTES
        return [MEMORY[stop - pages * PAGE_BYTES : stop] for stop, pages in zip(stops, self.pages, strict=True)]

    def prepare(self) -> IORequest | None:
        op = Op.WRITE if self.priority == Priority.SPILL else Op.READ
        return IORequest(op, 7, 5 * PAGE_BYTES, self.buffers(), self)

    def finish(self, done: IODone) -> None:
        self.ended.append(done)


@dataclass(eq=False)
class _Sync:
    """A sync of ``file``, which may begin once it is ``ready``."""

    file: int = 7
    ready: bool = False
    wanted: bool = True
    looked_at: int = 0
    joined: int = 0
    ended: int = 0
    priority: Priority = Priority.SPILL
    nbytes: int = 0

    def join(self, other: _Sync) -> bool:
        self.joined += other.file == self.file
        return other.file == self.file

    def prepare(self) -> IORequest | None:
        self.looked_at += 1
        return IORequest(Op.SYNC, self.file, 0, (), self) if self.ready else None

    def finish(self, done: IODone) -> None:
        self.ended += 1


@pytest.fixture
def engine() -> _Engine:
    return _Engine()


@pytest.fixture
def lane(engine: _Engine) -> Lane:
    return Lane("disk", engine, threads=THREADS)


def _put(lane: Lane, *moves: _Move) -> None:
    for move in moves:
        lane.put(move)
    lane.submit()


def _run(lane: Lane, engine: _Engine) -> list[IORequest]:
    """Let everything succeed, in order; returns all requests."""
    ran = []
    while engine.taken:
        ran.append(engine.taken[0])
        engine.end(engine.taken[0])
        lane.reap()
        lane.submit()
    return ran


def _addresses(buffers: Sequence[Buffer]) -> list[int]:
    """Where each 4 KiB page of ``buffers`` lies."""
    return [buffer.ctypes.data + at for buffer in buffers for at in range(0, buffer.nbytes, PAGE_BYTES)]


@given(st.lists(st.integers(1, 1100), min_size=1, max_size=5), st.sampled_from(list(Priority)))
def test_the_requests_of_a_move_are_its_buffers_in_order_and_as_few_as_may_be(
    pages: list[int], priority: Priority
) -> None:
    engine = _Engine()
    lane, move = Lane("disk", engine, threads=THREADS), _Move(priority, pages)
    _put(lane, move)
    requests = _run(lane, engine)
    assert _addresses([buffer for request in requests for buffer in request.buffers]) == _addresses(move.buffers())
    assert [request.offset for request in requests] == [
        5 * PAGE_BYTES + sum(other.nbytes for other in requests[:at]) for at in range(len(requests))
    ]
    longest = REQUEST_BYTES if priority == Priority.SPILL else SHORT_REQUEST_BYTES
    assert max(request.nbytes for request in requests) <= longest
    assert len(requests) == -(-move.nbytes // longest)
    assert all(buffer.nbytes for request in requests for buffer in request.buffers)


def test_a_move_ends_once_when_the_last_of_its_requests_did(lane: Lane, engine: _Engine) -> None:
    move = _Move()
    _put(lane, move)
    assert len(engine.taken) == DEPTH
    for left in range(DEPTH, 0, -1):
        assert not move.ended
        assert lane.queued_bytes == move.nbytes
        engine.end(engine.taken[left - 1])
        lane.reap()
    [done] = move.ended
    assert (done.error, done.request.nbytes) == (None, move.nbytes)
    assert (lane.queued_bytes, lane.in_flight) == (0, 0)


def test_a_move_that_failed_ends_when_nothing_touches_its_buffers_and_the_rest_is_not_begun(
    lane: Lane, engine: _Engine
) -> None:
    move = _Move(pages=(3 * LARGE_PAGES - 2,))
    _put(lane, move)
    assert len(engine.taken) == DEPTH
    first, second, *others = engine.taken
    engine.end(second, OSError(errno.EIO, "second"))
    lane.reap()
    lane.submit()
    assert engine.taken == [first, *others]
    engine.end(first, OSError(errno.EIO, "first"))
    for request in others:
        lane.reap()
        assert not move.ended
        engine.end(request)
    lane.reap()
    assert [str(done.error) for done in move.ended] == [str(OSError(errno.EIO, "second"))]
    assert (lane.queued_bytes, lane.in_flight) == (0, 0)


def test_the_move_behind_one_that_failed_is_whole(lane: Lane, engine: _Engine) -> None:
    first, second = _Move(pages=(3 * LARGE_PAGES - 2,)), _Move()
    _put(lane, first, second)
    engine.end(engine.taken[0], OSError(errno.EIO, "first"))
    lane.reap()
    lane.submit()
    _run(lane, engine)
    assert [len(move.ended) for move in (first, second)] == [1, 1]
    assert second.ended[0].error is None


def test_a_move_that_was_begun_when_the_engine_closed_is_cancelled_and_still_ends(lane: Lane, engine: _Engine) -> None:
    move = _Move(pages=(3 * LARGE_PAGES - 2,))
    _put(lane, move)
    engine.close(0)
    engine.end(engine.taken[0])
    lane.reap()
    lane.submit()
    assert not move.ended
    for request in list(engine.taken):
        engine.end(request)
    lane.reap()
    lane.submit()
    [done] = move.ended
    assert done.error is not None
    assert done.error.errno == errno.ECANCELED
    assert (lane.queued_bytes, lane.in_flight) == (0, 0)


def test_reads_are_long_while_many_wait_and_short_at_the_end(lane: Lane, engine: _Engine) -> None:
    moves = [_Move() for _ in range(4)]
    _put(lane, *moves)
    sizes = [request.nbytes for request in _run(lane, engine)]
    assert sizes[:2] == [moves[0].nbytes] * 2
    assert len(sizes) == 2 + 2 * 4
    assert moves[0].nbytes <= REQUEST_BYTES


def test_writes_are_long(lane: Lane, engine: _Engine) -> None:
    moves = [_Move(Priority.SPILL, (pages,)) for pages in (LARGE_PAGES, 2 * LARGE_PAGES)]
    _put(lane, *moves)
    assert [request.nbytes for request in _run(lane, engine)] == [moves[0].nbytes] * 3


def test_a_demand_load_goes_before_the_rest_of_a_prefetch(lane: Lane, engine: _Engine) -> None:
    prefetch, demand = _Move(Priority.PREFETCH, (3 * LARGE_PAGES - 2,)), _Move(pages=(1,))
    _put(lane, prefetch)
    lane.put(demand)
    engine.end(engine.taken[0])
    lane.reap()
    lane.submit()
    assert engine.taken[-1].nbytes == demand.nbytes
    _run(lane, engine)
    assert (len(prefetch.ended), len(demand.ended)) == (1, 1)


def test_a_full_queue_of_writes_keeps_no_read_waiting(lane: Lane, engine: _Engine) -> None:
    read = _Move(pages=(1,))
    _put(lane, *[_Move(Priority.SPILL) for _ in range(DEPTH)])
    assert len(engine.taken) == DEPTH
    _put(lane, read)
    assert [request.op for request in engine.taken] == [Op.WRITE] * DEPTH + [Op.READ]


def test_of_syncs_that_wait_for_the_same_one_waits_for_all(lane: Lane, engine: _Engine) -> None:
    """However many there are, a submit looks at one of each file."""
    syncs = [_Sync(file) for _ in range(100) for file in (7, 8)]
    for sync in syncs:
        lane.put_sync(sync)
    lane.submit()
    assert [sync.looked_at for sync in syncs] == [1, 1] + [0] * 198
    assert [sync.joined for sync in syncs[:2]] == [99, 99]


def test_syncs_do_not_change_the_learnt_rate(lane: Lane, engine: _Engine) -> None:
    _put(lane, _Move(Priority.SPILL))
    _run(lane, engine)
    learnt = lane.bytes_per_s
    assert learnt == LARGE_PAGES * PAGE_BYTES / 0.001
    lane.put_sync(_Sync(ready=True))
    lane.submit()
    assert [request.op for request in _run(lane, engine)] == [Op.SYNC]
    assert lane.bytes_per_s == learnt


def test_a_sync_that_was_begun_is_not_joined_any_more(lane: Lane, engine: _Engine) -> None:
    first, second = _Sync(ready=True), _Sync(ready=True)
    lane.put_sync(first)
    lane.submit()
    lane.put_sync(second)
    assert [request.tag.move for request in _run(lane, engine)] == [first, second]
    assert (first.joined, first.ended, second.ended) == (0, 1, 1)
