"""Stores: engine pages -> host extents, or extents of the slab.

Compiled kernels make checksums of the bytes in passing. Without them the engine, which waits for its pages, comes
first: all pages are copied, and checksums follow. Where the caller waits for the disk instead, and where blocks are
small, both are done at once all the same: the bytes are still in the cache. Records in the slab have no checksums:
those are made when they land in host memory.
"""

from __future__ import annotations

from typing import TypeAlias

from kvtier.core.plan import PAGE_BYTES, Plan, Reason, Tier
from kvtier.tiers.device import Slab
from kvtier.transfer.device import gather_to_slab, note_residents
from kvtier.transfer.endpoint import DeviceEndpoint, Endpoint, first_tokens, table_of
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.faults import EngineMemoryError, reason_of
from kvtier.transfer.images import Extents
from kvtier.transfer.records import fill_records, gather_record, move_records, seal_records
from kvtier.transfer.run import Run
from kvtier.transfer.shapes import RecordShape
from kvtier.transfer.work import Piece, Service, halved, pieces, steps

Failures: TypeAlias = dict[int, Reason]
"""Rows that could not be gathered, and why; nearly always none."""


class StoreRun(Run):
    """Runs one STORE plan."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """Nothing is gathered yet."""
        super().__init__(plan, equipment)
        self._gathers_left = 0
        self._moves_records = False

    def begin(self) -> None:
        """Queue the gathers, several blocks a piece where blocks are small."""
        source = Endpoint.of(self.equipment, self.plan)
        self._moves_records = source is not None and source.moves_records
        are_long = self._moves_records and not self.plan.durable  # a disk would wait for the first
        gathers = [
            (shape, rows)
            for shape, own in self.by_group(range(len(self.plan.rows)))
            for rows in pieces(own, shape.pages * PAGE_BYTES, are_long=are_long)
        ]
        self._gathers_left = len(gathers)
        for shape, rows in gathers:
            self._queue_gather(shape, rows)

    def abandon(self, reason: Reason) -> None:
        """A store that nobody waits for any more is finished all the same: its bytes are as good for the next one."""
        del reason

    def _queue_gather(self, shape: RecordShape, rows: list[int]) -> None:
        slab = self.equipment.slab if self.plan.target == Tier.DEVICE else None
        if slab is not None:
            self._queue_gather_to(slab, shape, rows)
        else:
            self.equipment.work.put(self._gather_piece(shape, rows))

    def _gather_piece(self, shape: RecordShape, rows: list[int]) -> Piece:
        seal_at_once = self._seals_at_once(shape)
        begun: list[int] = []
        """The first ones of ``rows``: all of them, unless somebody was in more of a hurry."""
        parts = halved(rows, shape.pages * PAGE_BYTES)

        def work() -> Failures:
            return self._gather_now(shape, rows, begun)

        def finish(result: Failures | Exception) -> None:
            ended = rows if isinstance(result, Exception) else begun
            gathered = self._gathered(ended, result)
            if gathered and seal_at_once:
                self._sealed(shape, gathered)
            elif gathered:
                self._queue_seal(shape, gathered)
            if len(ended) < len(rows):
                self._gathers_left += 1
                self.equipment.work.put_back(self._gather_piece(shape, rows[len(ended) :]))
            self._gather_ended()

        def halves() -> tuple[Piece, Piece]:
            assert parts is not None
            self._gathers_left += 1
            return self._gather_piece(shape, parts[0]), self._gather_piece(shape, parts[1])

        return Piece(Service.GATHER, work, finish, halves if parts else None)

    def _gathered(self, rows: list[int], result: Failures | Exception) -> list[int]:
        """Those of ``rows`` that could be gathered; the others have failed."""
        failures = dict.fromkeys(rows, reason_of(result)) if isinstance(result, Exception) else result
        for row, reason in failures.items():
            self.failed(row, reason)
        return [row for row in rows if row not in failures] if failures else rows

    def _gather_ended(self) -> None:
        self._gathers_left -= 1
        self.settle()
        if not self._gathers_left:
            self.free_source()

    # --- to the slab ------------------------------------------------------------------------------------------------

    def _queue_gather_to(self, slab: Slab, shape: RecordShape, rows: list[int]) -> None:
        digests: dict[int, int] = {}

        def work() -> Failures:
            failures: Failures = {}
            source = Endpoint.of(self.equipment, self.plan)
            if source is None:
                return dict.fromkeys(rows, Reason.GONE)
            with slab.ordered():
                for batch in shape.slab_batches(rows):
                    self._gather_batch_to(slab, DeviceEndpoint.of(source), shape, batch, failures)
            if slab.verifies and (whole := [row for row in rows if row not in failures]):
                with slab.ordered():
                    first = table_of(self.plan, whole)["target_page"].tolist()
                    digests.update(zip(whole, slab.digests(first, shape.pages), strict=True))
            return failures

        def finish(result: Failures | Exception) -> None:
            if gathered := self._gathered(rows, result):
                found = [digests[row] for row in gathered] if slab.verifies else None
                note_residents(slab, self.plan, gathered, shape, found, sealed=False)
                self._landed(shape, gathered, Tier.DEVICE)
            self._gather_ended()

        self.equipment.work.put(Piece(Service.GATHER, work, finish))

    def _gather_batch_to(
        self, slab: Slab, source: DeviceEndpoint, shape: RecordShape, rows: list[int], failures: Failures
    ) -> None:
        """As ``_gather_batch``."""
        tokens = first_tokens(self.equipment, self.plan, rows)
        try:
            gather_to_slab(slab, source, shape, tokens, table_of(self.plan, rows)["target_page"].tolist())
        except EngineMemoryError as error:
            reason = self.equipment.faults.of_engine(error)
            if len(rows) == 1:
                failures[rows[0]] = reason
                return
            for row in rows:
                self._gather_batch_to(slab, source, shape, [row], failures)

    # --- to host memory ---------------------------------------------------------------------------------------------

    def _gather_now(self, shape: RecordShape, rows: list[int], begun: list[int]) -> Failures:
        """On a copy thread: gather ``rows``, noting in ``begun`` how far it came; which of these could not be gathered.

        It ends early where something waits that comes before gathers.
        """
        source, work = Endpoint.of(self.equipment, self.plan), self.equipment.work
        failures: Failures = {}
        for batch in steps(rows, shape.pages * PAGE_BYTES) if self._moves_records else shape.batches(rows):
            if begun and work.has_before(Service.GATHER):
                break
            begun += batch
            if source is None:
                failures.update(dict.fromkeys(batch, Reason.GONE))
            else:
                self._gather_batch(source, shape, batch, failures)
        return failures

    def _gather_batch(self, source: Endpoint, shape: RecordShape, rows: list[int], failures: Failures) -> None:
        """All at once, or, where that raises, each by itself: they may be several callers', and only one's to blame."""
        try:
            self._gather(source, shape, rows)
        except EngineMemoryError as error:
            reason = self.equipment.faults.of_engine(error)
            if len(rows) == 1:
                failures[rows[0]] = reason
                return
            for row in rows:
                self._gather_batch(source, shape, [row], failures)

    def _gather(self, source: Endpoint, shape: RecordShape, rows: list[int]) -> None:
        """Many blocks by a kernel, many small ones, or large ones one by one."""
        tokens, records = first_tokens(self.equipment, self.plan, rows), self._extents(rows)
        if self._moves_records and move_records(self.plan, source, shape, rows, tokens, records):
            return
        if shape.batch > 1:
            fill_records(self.plan, source, shape, rows, tokens, records)
            return
        for at in range(len(rows)):
            gather_record(source, shape, tokens[at : at + 1], records.one(at))
        if self._seals_at_once(shape):
            seal_records(self.plan, shape, rows, records)

    def _seals_at_once(self, shape: RecordShape) -> bool:
        return self.plan.durable or self._moves_records or shape.batch > 1

    def _queue_seal(self, shape: RecordShape, rows: list[int]) -> None:
        def work() -> None:
            seal_records(self.plan, shape, rows, self._extents(rows))

        def finish(result: None | Exception) -> None:
            if isinstance(result, Exception):
                for row in rows:
                    self.failed(row, reason_of(result))
            else:
                self._sealed(shape, rows)
            self.settle()

        self.equipment.work.put(Piece(Service.BACKGROUND, work, finish))

    def _extents(self, rows: list[int]) -> Extents:
        table = table_of(self.plan, rows)
        return Extents(self.equipment.host, table["target_page"], table["target_pages"])

    def _sealed(self, shape: RecordShape, rows: list[int]) -> None:
        self._landed(shape, rows, Tier.HOST)

    def _landed(self, shape: RecordShape, rows: list[int], tier: Tier) -> None:
        self.all_ok(
            rows, moved_bytes=shape.pages * PAGE_BYTES, tier=tier, page=table_of(self.plan, rows)["target_page"],
            pages=shape.pages,
        )  # fmt: skip
