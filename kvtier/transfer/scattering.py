"""Loads and fetches: any copy -> engine pages, or -> the host extent reserved for it, or both.

A copy is read at most twice and another copy at most once; after that the row is a miss. A damaged copy is reported
lost. Reads go to the reserved extent where there is one, to staging otherwise: only the last copy, and only while the
caller still wants it, touches engine memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from kvtier.codecs.headers import Places
from kvtier.core.plan import LOST, NOWHERE, PAGE_BYTES, Plan, PlanKind, Priority, Reason, Tier, direct_members
from kvtier.runtime.seam import Buffer, IODone, IORequest, Op
from kvtier.transfer.delivery import Delivery
from kvtier.transfer.endpoint import Endpoint, table_of
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.faults import EngineMemoryError, reason_of
from kvtier.transfer.images import Buffers, Extents
from kvtier.transfer.lanes import MAX_ROWS_A_MOVE, global_segment, lane_of
from kvtier.transfer.paths import DiskPath
from kvtier.transfer.run import Run
from kvtier.transfer.shapes import RecordShape
from kvtier.transfer.work import PIECE_BYTES, Piece, Service, pieces


@direct_members
class _State(IntEnum):
    WAITING = 0  # in a lane's queue
    READING = 1  # the engine has it
    WORKING = 2  # with the copy threads
    ENDED = 3


class LoadRun(Run):
    """Runs one LOAD or FETCH plan."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """The rows' columns become lists once: scalar access to them is many times faster."""
        super().__init__(plan, equipment)
        rows = plan.rows
        self.host_page = rows["host_page"].tolist()
        self.host_pages = rows["host_pages"].tolist()
        self.segment = rows["disk_segment"].tolist()
        self.disk_page = rows["disk_page"].tolist()
        self.disk_pages = rows["disk_pages"].tolist()
        self.generation = rows["disk_generation"].tolist()
        self.target_page = rows["target_page"].tolist()
        self.states = bytearray((_State.WAITING,)) * len(rows)
        self._tried = [0] * len(rows)  # reads of any copy that were begun
        self._service = Service.LOAD if plan.priority == Priority.DEMAND else Service.FETCH

    def begin(self) -> None:
        """Queue the rows that are in host memory for copying, the others for reading, adjacent ones together."""
        on_host, elsewhere = list(range(len(self.host_page))), []
        if NOWHERE in self.host_page:
            on_host = [row for row, page in enumerate(self.host_page) if page != NOWHERE]
            elsewhere = [row for row, page in enumerate(self.host_page) if page == NOWHERE]
        target = Endpoint.of(self.equipment, self.plan)
        are_long = target is not None and target.moves_records
        for rows in pieces(on_host, max(self.host_pages, default=1) * PAGE_BYTES, are_long=are_long):
            for row in rows:
                self._tried[row] += 1
            self._deliver(rows, Tier.HOST)
        self._read([row for row in elsewhere if self.segment[row] != NOWHERE])
        for row in elsewhere:
            if self.segment[row] == NOWHERE:
                self._end(row, Reason.GONE)
        self.settle()

    def abandon(self, reason: Reason) -> None:
        """Rows that wait end now; those being read are quarantined; copy threads end theirs at once."""
        super().abandon(reason)
        for row, state in enumerate(self.states):
            if state == _State.WAITING:
                self._end(row, reason)
            elif state == _State.READING:
                self.states[row] = _State.ENDED
                if self.target_page[row] != NOWHERE:
                    self.quarantine(row, reason)
                else:
                    self.failed(row, reason)
        self.settle()

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read(self, rows: list[int]) -> None:
        """Queue ``rows`` on their lanes in moves of adjacent records."""
        for run in self._adjacent(rows):
            for row in run:
                self._tried[row] += 1
                self.states[row] = _State.WAITING
            directory, _ = lane_of(self.segment[run[0]])
            if 0 <= directory < len(self.equipment.paths):
                path = self.equipment.paths[directory]
                path.lane.put(ReadMove(self, run, path))
            else:
                self.lost(run, Tier.DISK, Reason.GONE)

    def _adjacent(self, rows: list[int]) -> list[list[int]]:
        limit = min(MAX_ROWS_A_MOVE, max(1, self.equipment.staging.count // 4))
        runs: list[list[int]] = []
        for row in rows:
            last = runs[-1] if runs else None
            if (
                last
                and len(last) < limit
                and self.segment[last[-1]] == self.segment[row]
                and self.disk_page[last[-1]] + self.disk_pages[last[-1]] == self.disk_page[row]
                and (self.disk_page[row] + self.disk_pages[row] - self.disk_page[last[0]]) * PAGE_BYTES <= PIECE_BYTES
            ):
                last.append(row)
            else:
                runs.append([row])
        return runs

    def read_ended(
        self, rows: list[int], buffers: list[Buffer], staged: list[int | None], error: OSError | None
    ) -> None:
        """The lane is done with ``rows``; the staging buffers among ``buffers`` go back when their content was used."""
        if error is not None:
            self.equipment.metrics.add("read_errors")
            self._give_back(staged)
            for row in rows:
                if self.states[row] == _State.ENDED:
                    self._release(row)
                else:
                    self._try_again(row, Tier.DISK, Reason.IO_ERROR)
            self.settle()
            return
        self._deliver(rows, Tier.DISK, buffers, staged)

    # --- delivering -------------------------------------------------------------------------------------------------

    def _deliver(
        self, rows: list[int], origin: Tier, buffers: Sequence[Buffer] = (), staged: Sequence[int | None] = ()
    ) -> None:
        """Queue ``rows``: those from disk are in ``buffers``, of which ``staged`` go back to staging afterwards."""
        if self._has_ended_among(rows):
            for row in rows:
                if self.states[row] != _State.ENDED:
                    self.states[row] = _State.WORKING
        else:
            self._mark(rows, _State.WORKING)

        def work() -> list[Reason]:
            return self._deliver_now(rows, origin, buffers)

        def finish(result: list[Reason] | Exception) -> None:
            self._give_back(staged)
            reasons = [reason_of(result)] * len(rows) if isinstance(result, Exception) else result
            self._delivered_all(rows, reasons, origin)
            self.settle()

        self.equipment.work.put(Piece(self._service, work, finish))

    def _deliver_now(self, rows: list[int], origin: Tier, buffers: Sequence[Buffer]) -> list[Reason]:
        """On a copy thread: what came of each row."""
        target = Endpoint.of(self.equipment, self.plan)
        if target is None and self.plan.pages is not None:
            return [Reason.GONE] * len(rows)
        reasons = dict.fromkeys(rows, Reason.ABANDONED)
        buffer_of = dict(zip(rows, buffers, strict=False))
        on_host = origin == Tier.HOST

        def deliver(shape: RecordShape, batch: list[int]) -> None:
            wanted = batch
            if self.abandoned or self._has_ended_among(batch):
                wanted = [row for row in batch if self._is_wanted(row)]
            if not wanted:
                return
            delivery = Delivery(
                self.equipment, self.plan, shape, wanted,
                records=self._extents(wanted) if on_host else Buffers([buffer_of[row] for row in wanted]),
                places=None if on_host else self._places(wanted),
                target=target,
                verify=self.equipment.verify_memory or not on_host,
            )  # fmt: skip
            try:
                reasons.update(zip(wanted, delivery.deliver(), strict=True))
            except EngineMemoryError as error:
                reasons.update(dict.fromkeys(wanted, self.equipment.faults.of_engine(error)))
                if len(wanted) > 1:  # they may be several callers', and only one's to blame
                    for row in wanted:
                        deliver(shape, [row])

        for shape, own in self.by_group(rows):
            for batch in [own] if target is not None and target.moves_records else shape.batches(own):
                deliver(shape, batch)
        return [reasons[row] for row in rows]

    def _is_wanted(self, row: int) -> bool:
        return self.states[row] != _State.ENDED and not (self.abandoned and self.plan.kind == PlanKind.LOAD)

    def _places(self, rows: list[int]) -> Places:
        """What the headers of records from disk, all of one directory, have to say of where they lie."""
        table = table_of(self.plan, rows)
        directory, _ = lane_of(self.segment[rows[0]])
        segments = table["disk_segment"] - global_segment(directory, 0)
        nonce = self.equipment.paths[directory].tier.nonce
        return Places(nonce, segments, table["disk_page"], table["disk_generation"])

    def _delivered_all(self, rows: list[int], reasons: list[Reason], origin: Tier) -> None:
        """Note how ``rows`` ended: at once if all went well, which is nearly always."""
        if any(reasons) or self._has_ended_among(rows):
            for row, reason in zip(rows, reasons, strict=True):
                self._delivered(row, reason, origin)
            return
        self._mark(rows, _State.ENDED)
        table = table_of(self.plan, rows)
        if origin == Tier.HOST:
            self.all_ok(rows, moved_bytes=table["host_pages"].astype(np.int64) * PAGE_BYTES)
            return
        pages, targets = table["disk_pages"], table["target_page"]
        kept = targets != NOWHERE
        self.all_ok(
            rows, moved_bytes=pages.astype(np.int64) * PAGE_BYTES, tier=np.where(kept, Tier.HOST, Tier.ENGINE),
            page=targets, pages=np.where(kept, pages, 0),
        )  # fmt: skip

    def _delivered(self, row: int, reason: Reason, origin: Tier) -> None:
        if self.states[row] == _State.ENDED:
            self._release(row)
        elif reason == Reason.NONE:
            self.states[row] = _State.ENDED
            pages = self.host_pages[row] if origin == Tier.HOST else self.disk_pages[row]
            if origin == Tier.DISK and self.target_page[row] != NOWHERE:
                page = self.target_page[row]
                self.ok(row, moved_bytes=pages * PAGE_BYTES, tier=Tier.HOST, page=page, pages=pages)
            else:
                self.ok(row, moved_bytes=pages * PAGE_BYTES)
        elif reason == Reason.DAMAGED:
            self.equipment.metrics.add("damaged_reads", tier=origin.label)
            self._try_again(row, origin, reason)
        else:
            self._end(row, reason)

    def _try_again(self, row: int, origin: Tier, reason: Reason) -> None:
        """Read the same copy once more, or report it lost and take the other one, or give up."""
        if self.abandoned:
            self._end(row, Reason.ABANDONED)
            return
        source = self._next_source(row)
        if source != origin and not (reason == Reason.IO_ERROR and self._is_out(row)):
            self.report_lost([row], origin, reason)
        if source is None:
            self._end(row, reason)
        elif source == Tier.HOST:
            self._tried[row] += 1
            self._deliver([row], Tier.HOST)
        else:
            self._read([row])

    def _is_out(self, row: int) -> bool:
        """Whether the directory of ``row`` answers nothing for now; its copies will be there when it does."""
        directory, _ = lane_of(self.segment[row])
        return self.equipment.paths[directory].is_out(self.equipment.clock.monotonic())

    def lost(self, rows: list[int], tier: Tier, reason: Reason) -> None:
        """The copies of ``rows`` in ``tier`` are not there any more: no use in reading them again."""
        for row in rows:
            while self._next_source(row) == tier:
                self._tried[row] += 1
            self._try_again(row, tier, reason)
        self.settle()

    def report_lost(self, rows: list[int], tier: Tier, reason: Reason) -> None:
        """Tell the index to forget copies."""
        table = np.zeros(len(rows), LOST)
        table["key"] = self.plan.rows["key"][rows]
        table["group"] = self.plan.rows["group"][rows]
        table["tier"], table["reason"] = tier, reason
        for at, row in enumerate(rows):
            on_disk = tier == Tier.DISK
            table["segment"][at] = self.segment[row] if on_disk else NOWHERE
            table["page"][at] = self.disk_page[row] if on_disk else self.host_page[row]
            table["generation"][at] = self.generation[row] if on_disk else 0
        self.tell_lost(table, tier)

    def _next_source(self, row: int) -> Tier | None:
        """The copy to read next: the first one twice, then the other one once."""
        copies = [tier for tier, at in ((Tier.HOST, self.host_page), (Tier.DISK, self.segment)) if at[row] != NOWHERE]
        order = [*copies[:1], *copies]
        tried = self._tried[row]
        return order[tried] if tried < len(order) else None

    def _has_ended_among(self, rows: list[int]) -> bool:
        """Whether any of ``rows``, ascending, has ended."""
        if rows[-1] - rows[0] + 1 == len(rows):
            return _State.ENDED in self.states[rows[0] : rows[-1] + 1]
        return any(self.states[row] == _State.ENDED for row in rows)

    def _mark(self, rows: list[int], state: _State) -> None:
        """All of ``rows``, ascending, are in ``state``."""
        if rows[-1] - rows[0] + 1 == len(rows):
            self.states[rows[0] : rows[-1] + 1] = bytes((state,)) * len(rows)
            return
        for row in rows:
            self.states[row] = state

    def _end(self, row: int, reason: Reason) -> None:
        self.states[row] = _State.ENDED
        self.failed(row, reason)

    def _release(self, row: int) -> None:
        """An abandoned row came back: nothing writes to its target any more."""
        if row in self.quarantined:
            self.failed(row, Reason.ABANDONED)

    def _give_back(self, staged: Sequence[int | None]) -> None:
        for buffer in staged:
            if buffer is not None:
                self.equipment.staging.give_back(buffer, self.priority)

    def _extents(self, rows: list[int]) -> Extents:
        table = table_of(self.plan, rows)
        return Extents(self.equipment.host, table["host_page"], table["host_pages"])


class ReadMove:
    """Adjacent records of one segment."""

    def __init__(self, run: LoadRun, rows: list[int], path: DiskPath) -> None:
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
        return any(self._run.states[row] == _State.WAITING for row in self._rows)

    def prepare(self) -> IORequest | None:
        """Take buffers and find the file; rows whose segment is not there any more look for another copy."""
        run, first = self._run, self._rows[0]
        _, segment = lane_of(run.segment[first])
        fd = self._path.tier.locate(segment, run.generation[first])
        if fd is None:
            rows = [row for row in self._rows if run.states[row] == _State.WAITING]
            for row in rows:
                run.states[row] = _State.WORKING
            run.lost(rows, Tier.DISK, Reason.GONE)
            return None
        if not self._take_buffers():
            return None
        for row in self._rows:
            if run.states[row] == _State.WAITING:
                run.states[row] = _State.READING
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
