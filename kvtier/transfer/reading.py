"""Reads from disk: moves of adjacent records, which a lane takes one after another."""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from kvtier.core.plan import NOWHERE, PAGE_BYTES, Priority, Reason, Tier, direct_members
from kvtier.runtime.seam import Buffer, IODone, IORequest, Op
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.lanes import lane_of
from kvtier.transfer.paths import DiskPath


@direct_members
class RowState(IntEnum):
    """How far a row of a load has come."""

    WAITING = 0  # in a lane's queue
    READING = 1  # the engine has it
    WORKING = 2  # with the copy threads
    ENDED = 3


class Reader(Protocol):
    """Whose rows are read: by row, how far it has come, where it lies, and where in host memory it is to go."""

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

    def read_ended(
        self, rows: list[int], buffers: list[Buffer], staged: list[int | None], error: OSError | None
    ) -> None:
        """The lane is done with ``rows``; the staging buffers among ``buffers`` go back when their content was used."""


class ReadMove:
    """Adjacent records of one segment."""

    def __init__(self, run: Reader, rows: list[int], path: DiskPath) -> None:
        """``rows`` of ``run`` lie one after another in one segment of ``path``."""
        self.priority = run.priority
        self.nbytes = sum(run.disk_pages[row] for row in rows) * PAGE_BYTES
        self._run = run
        self._rows = rows
        self._path = path
        self._staged: list[int | None] = []
        self._buffers: list[Buffer] = []

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
        if not self._take_buffers():
            return None
        for row in self._rows:
            if run.states[row] == RowState.WAITING:
                run.states[row] = RowState.READING
        return IORequest(Op.READ, fd, run.disk_page[first] * PAGE_BYTES, self._buffers, self)

    def finish(self, done: IODone) -> None:
        """Hand the bytes on."""
        self._path.read_ended(done.error, self._run.equipment.clock.monotonic())
        self._run.read_ended(self._rows, self._buffers, self._staged, done.error)

    def _take_buffers(self) -> bool:
        run, staging = self._run, self._run.equipment.staging
        self._staged, self._buffers = [], []
        for row in self._rows:
            if run.target_page[row] != NOWHERE:
                self._staged.append(None)
                self._buffers.append(run.equipment.host.view(run.target_page[row], run.disk_pages[row]))
                continue
            buffer = staging.take(run.priority)
            if buffer is None:
                for taken in self._staged:
                    if taken is not None:
                        staging.give_back(taken, run.priority)
                return False
            self._staged.append(buffer)
            self._buffers.append(staging.view(buffer)[: run.disk_pages[row] * PAGE_BYTES])
        return True
