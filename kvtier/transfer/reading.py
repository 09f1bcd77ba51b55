"""Reads from disk: moves of adjacent records, which a lane takes one after another."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from enum import IntEnum
from itertools import pairwise
from typing import Protocol

import numpy as np

from kvtier.core.plan import NOWHERE, PAGE_BYTES, Plan, Priority, Reason, Tier, direct_members
from kvtier.runtime.seam import IODone, IORequest, Op
from kvtier.transfer.endpoint import table_of
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.images import Extents
from kvtier.transfer.lanes import MAX_ROWS_A_MOVE, lane_of
from kvtier.transfer.paths import DiskPath
from kvtier.transfer.work import PIECE_BYTES


@direct_members
class RowState(IntEnum):
    """How far a row of a load has come."""

    WAITING = 0  # in a lane's queue
    READING = 1  # the engine has it
    WORKING = 2  # with the copy threads
    ENDED = 3


class Reader(Protocol):
    """Whose rows are read: by row, how far it has come, where it lies, and where in host memory it is to go."""

    plan: Plan
    equipment: Equipment
    states: bytearray
    segment: list[int]
    generation: list[int]
    disk_page: list[int]
    disk_pages: list[int]
    target_page: list[int]

    @property
    def priority(self) -> Priority:
        """The plan's class of service."""

    def lost(self, rows: list[int], tier: Tier, reason: Reason) -> None:
        """The copies of ``rows`` in ``tier`` are not there any more."""

    def read_ended(self, rows: list[int], records: Extents, staged: list[int], error: OSError | None) -> None:
        """The lane is done with ``rows``; the buffers ``staged`` go back when what was read was used."""


class ReadMove:
    """Adjacent records of one segment, which all go to host memory, or all to staging."""

    def __init__(self, run: Reader, rows: list[int], path: DiskPath) -> None:
        """``rows`` of ``run`` lie one after another in one segment of ``path``."""
        self.priority = run.priority
        self.nbytes = sum(run.disk_pages[row] for row in rows) * PAGE_BYTES
        self._run = run
        self._rows = rows
        self._path = path
        self._staged: list[int] = []
        self._records: Extents | None = None

    @property
    def wanted(self) -> bool:
        """Whether a row still waits for it."""
        return any(self._run.states[row] == RowState.WAITING for row in self._rows)

    def prepare(self) -> IORequest | None:
        """Take buffers and find the file; rows whose segment is not there any more look for another copy."""
        run, first = self._run, self._rows[0]
        _, segment = lane_of(run.segment[first])
        fd = self._path.tier.locate(segment, run.generation[first])
        if fd is None:
            rows = [row for row in self._rows if run.states[row] == RowState.WAITING]
            for row in rows:
                run.states[row] = RowState.WORKING
            run.lost(rows, Tier.DISK, Reason.GONE)
            return None
        records = self._records = self._take_buffers()
        if records is None:
            return None
        for row in self._rows:
            if run.states[row] == RowState.WAITING:
                run.states[row] = RowState.READING
        return IORequest(Op.READ, fd, run.disk_page[first] * PAGE_BYTES, records.buffers(), self)

    def finish(self, done: IODone) -> None:
        """Hand the bytes on."""
        assert self._records is not None
        self._path.read_ended(done.error, self._run.equipment.clock.monotonic())
        self._run.read_ended(self._rows, self._records, self._staged, done.error)

    def _take_buffers(self) -> Extents | None:
        """Where the records go; None while staging has no room for all of them."""
        run, staging, rows = self._run, self._run.equipment.staging, self._rows
        pages = np.array([run.disk_pages[row] for row in rows], np.intp)
        if run.target_page[rows[0]] != NOWHERE:
            return Extents(run.equipment.host, np.array([run.target_page[row] for row in rows], np.intp), pages)
        if staging.room_for(run.priority) < len(rows):
            return None
        self._staged = staging.take(run.priority, len(rows))
        return staging.records(self._staged, pages)


def moves_of(run: Reader, rows: list[int]) -> list[list[int]]:
    """``rows``, ascending, in runs that one move may carry."""
    if len(rows) < 2:
        return [rows] if rows else []
    limit = min(MAX_ROWS_A_MOVE, max(1, run.equipment.staging.count // 4))
    moves: list[list[int]] = []
    for stretch in _stretches(run, rows):
        moves += _cut(run, stretch, limit if run.target_page[stretch[0]] == NOWHERE else MAX_ROWS_A_MOVE)
    return moves


def _stretches(run: Reader, rows: list[int]) -> list[list[int]]:
    """``rows`` in runs that lie behind each other in one segment, and all go to host memory, or all to staging."""
    own = table_of(run.plan, rows)
    segment, first, pages = own["disk_segment"], own["disk_page"], own["disk_pages"]
    staged = np.array([run.target_page[row] == NOWHERE for row in rows])
    cuts = (segment[1:] != segment[:-1]) | (first[1:] != first[:-1] + pages[:-1]) | (staged[1:] != staged[:-1])
    bounds = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(rows)]
    return [rows[begin:end] for begin, end in pairwise(bounds)]


def _cut(run: Reader, stretch: list[int], most: int) -> Iterator[list[int]]:
    """``stretch`` in pieces of up to ``most`` rows that are not too long for one move."""
    disk_page, disk_pages, at = run.disk_page, run.disk_pages, 0
    while at < len(stretch):
        last_page = disk_page[stretch[at]] + PIECE_BYTES // PAGE_BYTES
        stop = min(at + most, len(stretch))
        stop = bisect_right(stretch, last_page, at + 1, stop, key=lambda row: disk_page[row] + disk_pages[row])
        yield stretch[at:stop]
        at = stop
