"""Loads and fetches: any copy -> engine pages, or -> the extent reserved for it in a faster tier, or both.

A copy is read at most twice and another copy at most once; after that the row is a miss. A damaged copy is reported
lost. Reads go to the reserved extent where there is one, to staging otherwise: only the last copy, and only while the
caller still wants it, touches engine memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvtier.codecs.headers import Places
from kvtier.core.plan import LOST, NOWHERE, PAGE_BYTES, Plan, PlanKind, Priority, Reason, Tier
from kvtier.transfer.climbing import SlabRows
from kvtier.transfer.delivery import Delivery
from kvtier.transfer.endpoint import Endpoint, table_of
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.faults import EngineMemoryError, reason_of
from kvtier.transfer.images import Extents
from kvtier.transfer.lanes import global_segment, lane_of
from kvtier.transfer.reading import ReadMove, RowState, moves_of
from kvtier.transfer.run import Run
from kvtier.transfer.shapes import RecordShape
from kvtier.transfer.work import Piece, Service, halved, pieces


@dataclass(slots=True, eq=False)
class _Cargo:
    """Rows on their way through a copy thread: from where, to whom, and what came of each so far."""

    origin: Tier
    target: Endpoint | None
    rows: list[int]
    records: Extents | None
    """Where those from disk are."""
    reasons: dict[int, Reason]

    def records_of(self, rows: list[int]) -> Extents:
        """Where ``rows``, some of those from disk, are."""
        assert self.records is not None
        return self.records if len(rows) == len(self.rows) else self.records.part(np.searchsorted(self.rows, rows))


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
        self.device_page = rows["device_page"].tolist()
        self.target_page = rows["target_page"].tolist()
        """In host memory: what comes from disk is read right into it."""
        self._slab_rows = SlabRows(plan, equipment)
        if self._climbs:
            self.target_page = [NOWHERE] * len(rows)
        self.states = bytearray((RowState.WAITING,)) * len(rows)
        self._tried = [0] * len(rows)  # reads of any copy that were begun
        self._service = Service.LOAD if plan.priority == Priority.DEMAND else Service.FETCH

    def begin(self) -> None:
        """Queue the rows that are in memory for copying, the others for reading, adjacent ones together."""
        on_host, elsewhere = list(range(len(self.host_page))), []
        if self.device_page.count(NOWHERE) < len(self.device_page):
            on_host = self._begin_on_device()
        if NOWHERE in self.host_page:
            elsewhere = [row for row in on_host if self.host_page[row] == NOWHERE]
            on_host = [row for row in on_host if self.host_page[row] != NOWHERE]
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

    def _begin_on_device(self) -> list[int]:
        """Queue the rows that are in the slab for copying; returns the others."""
        on_device = [row for row, page in enumerate(self.device_page) if page != NOWHERE]
        for row in on_device:
            self._tried[row] += 1
        there = self._slab_rows.find(on_device)
        for shape, own in self.by_group(there):
            for rows in pieces(own, shape.pages * PAGE_BYTES):
                self._deliver(rows, Tier.DEVICE)
        if len(there) < len(on_device):
            self.lost(sorted(set(on_device) - set(there)), Tier.DEVICE, Reason.GONE)
        return [row for row, page in enumerate(self.device_page) if page == NOWHERE]

    @property
    def _climbs(self) -> bool:
        """Whether rows with a target are copied to the slab."""
        return self.plan.target == Tier.DEVICE

    def abandon(self, reason: Reason) -> None:
        """Rows that wait end now; those being read are quarantined; copy threads end theirs at once."""
        super().abandon(reason)
        for row, state in enumerate(self.states):
            if state == RowState.WAITING:
                self._end(row, reason)
            elif state == RowState.READING:
                self.states[row] = RowState.ENDED
                if self.target_page[row] != NOWHERE:
                    self.quarantine(row, reason)
                else:
                    self.failed(row, reason)
        self.settle()

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read(self, rows: list[int]) -> None:
        """Queue ``rows`` on their lanes in moves of adjacent records."""
        for run in moves_of(self, rows):
            for row in run:
                self._tried[row] += 1
                self.states[row] = RowState.WAITING
            directory, _ = lane_of(self.segment[run[0]])
            if 0 <= directory < len(self.equipment.paths):
                path = self.equipment.paths[directory]
                path.lane.put(ReadMove(self, run, path))
            else:
                self.lost(run, Tier.DISK, Reason.GONE)

    def read_ended(self, rows: list[int], records: Extents, staged: list[int], error: OSError | None) -> None:
        """The lane is done with ``rows``; the buffers ``staged`` go back when what was read was used."""
        if error is not None:
            self.equipment.metrics.add("read_errors")
            self.equipment.staging.give_back(staged, self.priority)
            for row in rows:
                if self.states[row] == RowState.ENDED:
                    self._release(row)
                else:
                    self._try_again(row, Tier.DISK, Reason.IO_ERROR)
            self.settle()
            return
        self._deliver(rows, Tier.DISK, records, staged)

    # --- delivering -------------------------------------------------------------------------------------------------

    def _deliver(
        self, rows: list[int], origin: Tier, records: Extents | None = None, staged: Sequence[int] = ()
    ) -> None:
        """Queue ``rows``: those from disk are in ``records``; the buffers ``staged`` go back afterwards."""
        if self._has_ended_among(rows):
            for row in rows:
                if self.states[row] != RowState.ENDED:
                    self.states[row] = RowState.WORKING
        else:
            self._mark(rows, RowState.WORKING)
        self.equipment.work.put(self._delivery_piece(rows, origin, records, staged))

    def _delivery_piece(
        self, rows: list[int], origin: Tier, records: Extents | None = None, staged: Sequence[int] = ()
    ) -> Piece:
        parts = halved(rows, self.host_pages[rows[0]] * PAGE_BYTES) if origin == Tier.HOST else None

        def work() -> list[Reason]:
            return self._deliver_now(rows, origin, records)

        def finish(result: list[Reason] | Exception) -> None:
            self.equipment.staging.give_back(staged, self.priority)
            reasons = [reason_of(result)] * len(rows) if isinstance(result, Exception) else result
            if self._slab_rows.promoted:
                self._note_promoted(rows)
            self._delivered_all(rows, reasons, origin)
            self.settle()

        def halves() -> tuple[Piece, Piece]:
            assert parts is not None
            return self._delivery_piece(parts[0], origin), self._delivery_piece(parts[1], origin)

        return Piece(self._service, work, finish, halves if parts else None)

    def _deliver_now(self, rows: list[int], origin: Tier, records: Extents | None) -> list[Reason]:
        """On a copy thread: what came of each row."""
        target = Endpoint.of(self.equipment, self.plan)
        if target is None and self.plan.pages is not None:
            return [Reason.GONE] * len(rows)
        reasons = dict.fromkeys(rows, Reason.ABANDONED)
        cargo = _Cargo(origin, target, rows, records, reasons)
        for shape, own in self.by_group(rows):
            for batch in self._batches(shape, own, cargo):
                self._deliver_batch(shape, batch, cargo)
            if origin == Tier.HOST and self._climbs:
                self._slab_rows.promote(shape, [row for row in own if reasons[row] == Reason.NONE])
        return [reasons[row] for row in rows]

    def _batches(self, shape: RecordShape, rows: list[int], cargo: _Cargo) -> Iterable[list[int]]:
        """``rows`` in runs that one call copies."""
        if cargo.origin == Tier.DEVICE:
            return shape.slab_batches(rows)
        at_once = cargo.target is not None and cargo.target.moves_records
        return [rows] if at_once else shape.batches(rows)

    def _deliver_batch(self, shape: RecordShape, batch: list[int], cargo: _Cargo) -> None:
        """What one call copies."""
        wanted = batch
        if self.abandoned or self._has_ended_among(batch):
            wanted = [row for row in batch if self._is_wanted(row)]
        if not wanted:
            return
        try:
            cargo.reasons.update(zip(wanted, self._deliver_wanted(shape, wanted, cargo), strict=True))
        except EngineMemoryError as error:
            cargo.reasons.update(dict.fromkeys(wanted, self.equipment.faults.of_engine(error)))
            if len(wanted) > 1:  # they may be several callers', and only one's to blame
                for row in wanted:
                    self._deliver_batch(shape, [row], cargo)

    def _deliver_wanted(self, shape: RecordShape, rows: list[int], cargo: _Cargo) -> list[Reason]:
        if cargo.origin == Tier.DEVICE:
            return self._slab_rows.deliver(shape, rows, cargo.target)
        on_host = cargo.origin == Tier.HOST
        delivery = Delivery(
            self.equipment, self.plan, shape, rows,
            records=self._extents(rows) if on_host else cargo.records_of(rows),
            places=None if on_host else self._places(rows),
            target=cargo.target,
            verify=self.equipment.verify_memory or not on_host,
        )  # fmt: skip
        return delivery.deliver()

    def _is_wanted(self, row: int) -> bool:
        return self.states[row] != RowState.ENDED and not (self.abandoned and self.plan.kind == PlanKind.LOAD)

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
        self._mark(rows, RowState.ENDED)
        table = table_of(self.plan, rows)
        if origin != Tier.DISK:
            pages = table["host_pages" if origin == Tier.HOST else "device_pages"]
            if not self._slab_rows.promoted:
                self.all_ok(rows, moved_bytes=pages.astype(np.int64) * PAGE_BYTES)
                return
            kept = np.array([row in self._slab_rows.promoted for row in rows], np.bool_)
            self.all_ok(
                rows, moved_bytes=pages.astype(np.int64) * PAGE_BYTES, tier=np.where(kept, Tier.DEVICE, Tier.ENGINE),
                page=np.where(kept, table["target_page"], NOWHERE), pages=np.where(kept, pages, 0),
            )  # fmt: skip
            return
        pages, targets = table["disk_pages"], table["target_page"]
        kept = targets != NOWHERE
        self.all_ok(
            rows, moved_bytes=pages.astype(np.int64) * PAGE_BYTES, tier=np.where(kept, Tier.HOST, Tier.ENGINE),
            page=targets, pages=np.where(kept, pages, 0),
        )  # fmt: skip

    def _delivered(self, row: int, reason: Reason, origin: Tier) -> None:
        if self.states[row] == RowState.ENDED:
            self._release(row)
        elif reason == Reason.NONE:
            self.states[row] = RowState.ENDED
            pages = self._pages_in(origin, row)
            if row in self._slab_rows.promoted:
                page = int(self.plan.rows["target_page"][row])
                self.ok(row, moved_bytes=pages * PAGE_BYTES, tier=Tier.DEVICE, page=page, pages=pages)
            elif origin == Tier.DISK and self.target_page[row] != NOWHERE:
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
        elif source != Tier.DISK:
            self._tried[row] += 1
            self._deliver([row], source)
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
            in_memory = self.device_page if tier == Tier.DEVICE else self.host_page
            table["segment"][at] = self.segment[row] if on_disk else NOWHERE
            table["page"][at] = self.disk_page[row] if on_disk else in_memory[row]
            table["generation"][at] = self.generation[row] if on_disk else 0
        self.tell_lost(table, tier)

    def _next_source(self, row: int) -> Tier | None:
        """The copy to read next: the first one twice, then any other one once."""
        places = (Tier.DEVICE, self.device_page), (Tier.HOST, self.host_page), (Tier.DISK, self.segment)
        copies = [tier for tier, at in places if at[row] != NOWHERE]
        order = [*copies[:1], *copies]
        tried = self._tried[row]
        return order[tried] if tried < len(order) else None

    def _pages_in(self, tier: Tier, row: int) -> int:
        """How long the copy of ``row`` in ``tier`` is."""
        if tier == Tier.DEVICE:
            return int(self.plan.rows["device_pages"][row])
        pages: int = self.host_pages[row] if tier == Tier.HOST else self.disk_pages[row]
        return pages

    def _note_promoted(self, rows: list[int]) -> None:
        """Those of ``rows`` that were copied lie in the slab from now on."""
        for shape, own in self.by_group([row for row in rows if row in self._slab_rows.promoted]):
            self._slab_rows.note(shape, own)

    def _has_ended_among(self, rows: list[int]) -> bool:
        """Whether any of ``rows``, ascending, has ended."""
        if rows[-1] - rows[0] + 1 == len(rows):
            return RowState.ENDED in self.states[rows[0] : rows[-1] + 1]
        return any(self.states[row] == RowState.ENDED for row in rows)

    def _mark(self, rows: list[int], state: RowState) -> None:
        """All of ``rows``, ascending, are in ``state``."""
        if rows[-1] - rows[0] + 1 == len(rows):
            self.states[rows[0] : rows[-1] + 1] = bytes((state,)) * len(rows)
            return
        for row in rows:
            self.states[row] = state

    def _end(self, row: int, reason: Reason) -> None:
        self.states[row] = RowState.ENDED
        self.failed(row, reason)

    def _release(self, row: int) -> None:
        """An abandoned row came back: nothing writes to its target any more."""
        if row in self.quarantined:
            self.failed(row, Reason.ABANDONED)

    def _extents(self, rows: list[int]) -> Extents:
        table = table_of(self.plan, rows)
        return Extents(self.equipment.host, table["host_page"], table["host_pages"])
