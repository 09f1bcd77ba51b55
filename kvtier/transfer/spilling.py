"""Spills: host extents -> disk, straight from the arena, or through staging where a byte codec is added."""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtier.codecs.chain import chain_of
from kvtier.core.plan import LOST, NOWHERE, PAGE_BYTES, Plan, Priority, Reason, Tier
from kvtier.errors import CapacityError, CorruptBlockError
from kvtier.runtime.seam import Buffer, IODone, IORequest, Op
from kvtier.tiers.disk import Place
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.faults import reason_of
from kvtier.transfer.lanes import MAX_ROWS_A_MOVE, global_segment
from kvtier.transfer.paths import DiskPath
from kvtier.transfer.records import encode_record, stamp
from kvtier.transfer.run import Run
from kvtier.transfer.work import Piece, Service, pieces

_WRITE_PATIENCE_S: Final = 10.0
"""So long a write waits for a clean segment before it is refused; time in the queue of a slow disk is none of it."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """A record on its way to disk: where its bytes are, and the staging buffer that they are in, if any."""

    row: int
    record: Buffer
    staged: int | None = None
    chain: int = 0


class SpillRun(Run):
    """Runs one SPILL plan."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """Nothing is written yet."""
        super().__init__(plan, equipment)
        self._page = plan.rows["host_page"].tolist()
        self._pages = plan.rows["host_pages"].tolist()
        self._to_encode: deque[int] = deque()
        self._encoding = chain_of(plan.chains[0]).byte is not None

    def begin(self) -> None:
        """Queue all rows for writing, or first for encoding."""
        rows = [row for row, page in enumerate(self._page) if page != NOWHERE]
        for row in set(range(len(self._page))) - set(rows):
            self.failed(row, Reason.GONE)
        if not self.equipment.paths:
            for row in rows:
                self.failed(row, Reason.NO_DISK)
        elif self._encoding:
            self._to_encode.extend(rows)
            self.encode_more()
        else:
            for piece in pieces(rows, max(self._pages) * PAGE_BYTES):
                for at in range(0, len(piece), MAX_ROWS_A_MOVE):
                    self._write([Outgoing(row, self._host_record(row)) for row in piece[at : at + MAX_ROWS_A_MOVE]])
        self.settle()

    def abandon(self, reason: Reason) -> None:
        """Only closing gives a spill up: rows that no lane has yet end now."""
        super().abandon(reason)
        while self._to_encode:
            self.failed(self._to_encode.popleft(), reason)
        self.settle()

    def encode_more(self) -> None:
        """Encode as many rows as there are staging buffers for."""
        while self._to_encode:
            buffer = self.equipment.staging.take(Priority.SPILL)
            if buffer is None:
                self.equipment.waiting_for_staging.append(self)
                return
            self._encode(self._to_encode.popleft(), buffer)

    def _encode(self, row: int, buffer: int) -> None:
        out = self.equipment.staging.view(buffer)

        def work() -> tuple[int, bool]:
            return encode_record(self._host_record(row), self.plan.chains[0], out)

        def finish(result: tuple[int, bool] | Exception) -> None:
            if isinstance(result, CorruptBlockError):
                self.damaged(Outgoing(row, out, buffer))
                self.settle()
            elif isinstance(result, Exception):
                self.not_written(Outgoing(row, out, buffer), reason_of(result))
                self.settle()
            else:
                pages, coded = result
                self._write([Outgoing(row, out[: pages * PAGE_BYTES], buffer, chain=int(not coded))])

        self.equipment.work.put(Piece(Service.BACKGROUND, work, finish))

    def _write(self, records: list[Outgoing]) -> None:
        path = min(self.equipment.paths, key=DiskPath.reluctance)
        move = WriteMove(self, records, path, self.equipment.clock.monotonic())
        path.assigned_bytes += move.nbytes
        path.lane.put(move)

    def written(self, record: Outgoing, place: Place, directory: int) -> None:
        """``record`` is in its place; what it went through comes back as the row's chain."""
        self._done_with(record)
        self.ok(
            record.row, moved_bytes=place.pages * PAGE_BYTES, tier=Tier.DISK, pages=place.pages, page=place.page,
            segment=global_segment(directory, place.segment), generation=place.generation, chain=record.chain,
        )  # fmt: skip

    def not_written(self, record: Outgoing, reason: Reason) -> None:
        """``record`` is not on disk."""
        self._done_with(record)
        self.failed(record.row, reason)

    def damaged(self, record: Outgoing) -> None:
        """``record`` is not what was stored: nobody must find it in host memory either."""
        table = np.zeros(1, LOST)
        rows = self.plan.rows[record.row : record.row + 1]
        table["key"], table["group"], table["page"] = rows["key"], rows["group"], rows["host_page"]
        table["tier"], table["reason"], table["segment"] = Tier.HOST, Reason.DAMAGED, NOWHERE
        self.tell_lost(table, Tier.HOST)
        self.not_written(record, Reason.DAMAGED)

    def _done_with(self, record: Outgoing) -> None:
        if record.staged is not None:
            self.equipment.staging.give_back(record.staged, Priority.SPILL)

    def _host_record(self, row: int) -> Buffer:
        return self.equipment.host.view(self._page[row], self._pages[row])


class WriteMove:
    """Records that go to adjacent places of one segment, each behind its own header page.

    Their pages reach the disk in any order, and after a crash some of them: recovery compares all of a record.
    """

    priority = Priority.SPILL

    def __init__(
        self,
        run: SpillRun,
        records: list[Outgoing],
        path: DiskPath,
        since_s: float,
        places: list[Place] | None = None,
        headers: list[int] | None = None,
    ) -> None:
        """Places are taken when the lane has room, so that segments fill in the order of writing.

        ``since_s`` is when the move was queued; ``places`` and ``headers`` are what is taken already.
        """
        self.nbytes = sum(record.record.nbytes for record in records)
        self._run = run
        self._path = path
        self._records = records
        self._places = places or []
        self._headers = headers or []
        self._since_s = since_s

    @property
    def wanted(self) -> bool:
        """False once there is nothing left to write."""
        return bool(self._records)

    def prepare(self) -> IORequest | None:
        """Take adjacent places and stamp the headers; what does not fit the segment goes with the next move.

        What raises, by a mistake of ours or for want of memory, gives the move up.
        """
        try:
            return self._prepared()
        except BaseException:
            self._give_up(Reason.IO_ERROR)
            raise

    def _prepared(self) -> IORequest | None:
        run, tier = self._run, self._path.tier
        if run.abandoned or not tier.takes_writes:
            self._give_up(Reason.CLOSED if run.abandoned else Reason.NO_DISK)
            return None
        while len(self._places) < len(self._records):
            if len(self._headers) == len(self._places) and not self._take_header():
                break
            place = self._next_place()
            if place is None:
                break
            self._places.append(place)
            if len(self._places) > 1 and not _adjacent(*self._places[-2:]):
                self._split(len(self._places) - 1)
        if not self._places:
            if self._late():
                self._give_up(Reason.NO_SPACE)
            return None
        self._split(len(self._places))
        buffers: list[Buffer] = []
        for at, (record, place, header) in enumerate(zip(self._records, self._places, self._headers, strict=True)):
            page = run.equipment.headers.view(header)
            np.copyto(page, record.record[:PAGE_BYTES])
            try:
                stamp(page, tier, place)
            except CorruptBlockError:
                self._drop_damaged(at)
                break
            buffers += [page, record.record[PAGE_BYTES:]]
        if not buffers:
            return None
        return IORequest(Op.WRITE, self._places[0].fd, self._places[0].page * PAGE_BYTES, buffers, self)

    def finish(self, done: IODone) -> None:
        """The write returned: publish its records, or give up the segment."""
        run, tier = self._run, self._path.tier
        for record, place, header in zip(self._records, self._places, self._headers, strict=True):
            if done.error is None:
                tier.written(place, run.equipment.headers.view(header))
                run.written(record, place, self._path.number)
            else:
                tier.failed(place, done.error)
                run.not_written(record, Reason.IO_ERROR)
            run.equipment.headers.give_back(header, Priority.SPILL)
        if done.error is not None and done.error.errno != errno.ECANCELED:
            run.equipment.metrics.add("write_errors", lane=self._path.lane.name)
        run.settle()

    def _late(self) -> bool:
        starved_s = self._path.starved_since_s
        now_s = self._run.equipment.clock.monotonic()
        return starved_s is not None and now_s - max(starved_s, self._since_s) > _WRITE_PATIENCE_S

    def _give_up(self, reason: Reason) -> None:
        for place in self._places:
            self._path.tier.abandoned(place)
        for header in self._headers:
            self._run.equipment.headers.give_back(header, Priority.SPILL)
        records, self._records, self._places, self._headers = self._records, [], [], []
        for record in records:
            self._run.not_written(record, reason)
        self._run.settle()

    def _drop_damaged(self, at: int) -> None:
        """Record ``at`` cannot be written; those behind it go with the next move."""
        self._split(at + 1)
        record, place, header = self._records.pop(), self._places.pop(), self._headers.pop()
        self._path.tier.abandoned(place)
        self._run.equipment.headers.give_back(header, Priority.SPILL)
        self._run.damaged(record)
        self._run.settle()

    def _take_header(self) -> bool:
        header = self._run.equipment.headers.take(Priority.SPILL)
        if header is not None:
            self._headers.append(header)
        return header is not None

    def _next_place(self) -> Place | None:
        record, path = self._records[len(self._places)].record, self._path
        try:
            place = path.tier.place(record.nbytes // PAGE_BYTES)
        except CapacityError:
            place = None
        if place is not None:
            path.starved_since_s = None
        elif path.starved_since_s is None:
            path.starved_since_s = self._run.equipment.clock.monotonic()
        return place

    def _split(self, at: int) -> None:
        """Leave the records from ``at`` on, with what is taken for them, to a move of their own right behind."""
        if at == len(self._records):
            return
        rest = WriteMove(
            self._run, self._records[at:], self._path, self._since_s, self._places[at:], self._headers[at:]
        )
        self._records, self._places, self._headers = self._records[:at], self._places[:at], self._headers[:at]
        self.nbytes -= rest.nbytes
        self._path.lane.insert_second(rest)


def _adjacent(first: Place, second: Place) -> bool:
    return (first.segment, first.generation, first.page + first.pages) == (
        second.segment,
        second.generation,
        second.page,
    )
