"""Spills: host extents -> disk, straight from the arena, or through staging where a byte codec is added."""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.codecs.chain import chain_of
from kvtier.codecs.headers import whole
from kvtier.core.plan import LOST, NOWHERE, PAGE_BYTES, Plan, Priority, Reason, Tier
from kvtier.errors import CapacityError, CorruptBlockError
from kvtier.runtime.seam import IODone, IORequest, Op
from kvtier.tiers.disk import Place
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.faults import reason_of
from kvtier.transfer.images import Extents
from kvtier.transfer.lanes import MAX_ROWS_A_MOVE, global_segment
from kvtier.transfer.paths import DiskPath
from kvtier.transfer.records import encode_record, stamp
from kvtier.transfer.run import Run
from kvtier.transfer.work import Piece, Service, pieces

_WRITE_PATIENCE_S: Final = 10.0
"""So long a write waits for a clean segment before it is refused; time in the queue of a slow disk is none of it."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """Records of one length on their way to disk: where their bytes are, and the staging buffer they are in, if any."""

    rows: list[int]
    records: Extents
    pages: int
    """Of each record."""
    staged: int | None = None
    chain: int = 0

    @property
    def nbytes(self) -> int:
        """Of all records."""
        return len(self.rows) * self.pages * PAGE_BYTES

    def part(self, at: slice) -> Outgoing:
        """Some of them."""
        return replace(self, rows=self.rows[at], records=self.records.part(at))

    def some(self, at: npt.NDArray[np.intp]) -> Outgoing:
        """Those at ``at``."""
        return replace(self, rows=[self.rows[each] for each in at.tolist()], records=self.records.part(at))


class SpillRun(Run):
    """Runs one SPILL plan."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """Nothing is written yet."""
        super().__init__(plan, equipment)
        self._page = plan.rows["host_page"]
        self._pages = plan.rows["host_pages"]
        self._to_encode: deque[int] = deque()
        self._encoding = chain_of(plan.chains[0]).byte is not None

    def begin(self) -> None:
        """Queue all rows for writing, or first for encoding."""
        gone = self._page == NOWHERE
        for row in np.flatnonzero(gone).tolist():
            self.failed(row, Reason.GONE)
        rows = np.flatnonzero(~gone)
        if not self.equipment.paths:
            for row in rows.tolist():
                self.failed(row, Reason.NO_DISK)
        elif self._encoding:
            self._to_encode.extend(rows.tolist())
            self.encode_more()
        else:
            for length in np.unique(self._pages[rows]).tolist():
                self._write_all(rows[self._pages[rows] == length].tolist(), length)
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
            buffers = self.equipment.staging.take(Priority.SPILL)
            if not buffers:
                self.equipment.waiting_for_staging.append(self)
                return
            self._encode(self._to_encode.popleft(), buffers[0])

    def _encode(self, row: int, buffer: int) -> None:
        staging = self.equipment.staging
        out = staging.view(buffer)

        def work() -> tuple[int, bool]:
            return encode_record(self._host_records([row]).one(0), self.plan.chains[0], out)

        def finish(result: tuple[int, bool] | Exception) -> None:
            if isinstance(result, Exception):
                staging.give_back([buffer], Priority.SPILL)
                if isinstance(result, CorruptBlockError):
                    self.damaged([row])
                else:
                    self.failed(row, reason_of(result))
                self.settle()
            else:
                pages, coded = result
                records = staging.records([buffer], np.array([pages]))
                self._write(Outgoing([row], records, pages, buffer, chain=int(not coded)))

        self.equipment.work.put(Piece(Service.BACKGROUND, work, finish))

    def _write_all(self, rows: list[int], pages: int) -> None:
        for piece in pieces(rows, pages * PAGE_BYTES):
            for at in range(0, len(piece), MAX_ROWS_A_MOVE):
                own = piece[at : at + MAX_ROWS_A_MOVE]
                self._write(Outgoing(own, self._host_records(own), pages))

    def _write(self, records: Outgoing) -> None:
        path = min(self.equipment.paths, key=DiskPath.reluctance)
        move = WriteMove(self, records, path, self.equipment.clock.monotonic())
        path.assigned_bytes += move.nbytes
        path.lane.put(move)

    def written(self, records: Outgoing, place: Place, directory: int) -> None:
        """``records`` are in their place; what they went through comes back as the rows' chain."""
        self.done_with(records)
        self.all_ok(
            records.rows, moved_bytes=place.pages * PAGE_BYTES, tier=Tier.DISK, pages=place.pages,
            segment=global_segment(directory, place.segment), page=place.first_pages(), generation=place.generation,
            chain=records.chain,
        )  # fmt: skip

    def not_written(self, records: Outgoing, reason: Reason) -> None:
        """``records`` are not on disk."""
        self.done_with(records)
        for row in records.rows:
            self.failed(row, reason)

    def damaged(self, rows: list[int]) -> None:
        """``rows`` are not what was stored: nobody must find them in host memory either."""
        table, own = np.zeros(len(rows), LOST), self.plan.rows[rows]
        table["key"], table["group"], table["page"] = own["key"], own["group"], own["host_page"]
        table["tier"], table["reason"], table["segment"] = Tier.HOST, Reason.DAMAGED, NOWHERE
        self.tell_lost(table, Tier.HOST)
        for row in rows:
            self.failed(row, Reason.DAMAGED)

    def done_with(self, records: Outgoing) -> None:
        """Nobody needs the bytes of ``records`` any more."""
        if records.staged is not None:
            self.equipment.staging.give_back([records.staged], Priority.SPILL)

    def _host_records(self, rows: list[int]) -> Extents:
        return Extents(self.equipment.host, self._page[rows], self._pages[rows])


class WriteMove:
    """Records that go to adjacent places of one segment, each behind its own header page.

    Their pages reach the disk in any order, and after a crash some of them: recovery compares all of a record.
    """

    priority = Priority.SPILL

    def __init__(
        self, run: SpillRun, records: Outgoing, path: DiskPath, since_s: float, headers: list[int] | None = None
    ) -> None:
        """A place is taken when the lane has room, so that segments fill in the order of writing.

        ``since_s`` is when the move was queued; ``headers`` are copies of the header pages, if there are any yet.
        """
        self.nbytes = records.nbytes
        self._run = run
        self._path = path
        self._records = records
        self._headers = headers or []
        self._place: Place | None = None
        self._since_s = since_s

    @property
    def wanted(self) -> bool:
        """False once there is nothing left to write."""
        return bool(self._records.rows)

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
        if not (self._headers or self._copy_headers()) or not self._take_place():
            if self._late():
                self._give_up(Reason.NO_SPACE)
            return None
        place, headers = self._place, self._header_pages()
        assert place is not None
        stamp(headers.headers(), tier, place)
        return IORequest(Op.WRITE, place.fd, place.page * PAGE_BYTES, self._records.records.behind(headers), self)

    def finish(self, done: IODone) -> None:
        """The write returned: publish its records, or give up the segment."""
        run, tier, place = self._run, self._path.tier, self._place
        assert place is not None
        if done.error is None:
            tier.written(place, self._header_pages().headers())
            run.written(self._records, place, self._path.number)
        else:
            tier.failed(place, done.error)
            run.not_written(self._records, Reason.IO_ERROR)
            if done.error.errno != errno.ECANCELED:
                run.equipment.metrics.add("write_errors", lane=self._path.lane.name)
        self._give_back(self._headers)
        run.settle()

    def _late(self) -> bool:
        starved_s = self._path.starved_since_s
        now_s = self._run.equipment.clock.monotonic()
        return starved_s is not None and now_s - max(starved_s, self._since_s) > _WRITE_PATIENCE_S

    def _give_up(self, reason: Reason) -> None:
        if self._place is not None:
            self._path.tier.abandoned(self._place)
            self._place = None
        self._give_back(self._headers)
        records, self._records, self._headers = self._records, self._records.part(slice(0)), []
        if records.rows:
            self._run.not_written(records, reason)
        self._run.settle()

    def _copy_headers(self) -> bool:
        """Copy as many header pages as there is room for; records whose header is damaged are not written."""
        headers = self._run.equipment.headers.take(Priority.SPILL, len(self._records.rows))
        self._headers = headers
        if not headers:
            return False
        self._split(len(headers))
        pages = self._header_pages().headers()
        self._records.records.copy_headers(pages)
        good = whole(pages)
        if not good.all():
            self._drop_damaged(good)
        return bool(self._headers)

    def _drop_damaged(self, good: npt.NDArray[np.bool_]) -> None:
        """Only the records that are ``good`` are written."""
        records, headers = self._records, self._headers
        kept, lost = np.flatnonzero(good), np.flatnonzero(~good)
        self._records = records.some(kept)
        self._headers = [headers[at] for at in kept.tolist()]
        self._give_back([headers[at] for at in lost.tolist()])
        if not len(kept):
            self._run.done_with(records)
        self._run.damaged(records.some(lost).rows)
        self._run.settle()

    def _take_place(self) -> bool:
        """Take a place for the first records; those that do not fit the segment go with the next move."""
        records, path = self._records, self._path
        try:
            self._place = path.tier.place(records.pages, len(records.rows))
        except CapacityError:
            self._place = None
        if self._place is not None:
            path.starved_since_s = None
            self._split(self._place.count)
            return True
        if path.starved_since_s is None:
            path.starved_since_s = self._run.equipment.clock.monotonic()
        return False

    def _header_pages(self) -> Extents:
        return self._run.equipment.headers.records(self._headers, np.ones(len(self._headers), np.intp))

    def _give_back(self, headers: list[int]) -> None:
        self._run.equipment.headers.give_back(headers, Priority.SPILL)

    def _split(self, at: int) -> None:
        """Leave the records from ``at`` on, with what is taken for them, to a move of their own right behind."""
        if at == len(self._records.rows):
            return
        rest = WriteMove(self._run, self._records.part(slice(at, None)), self._path, self._since_s, self._headers[at:])
        self._records, self._headers = self._records.part(slice(at)), self._headers[:at]
        self.nbytes -= rest.nbytes
        self._path.lane.insert_second(rest)
