"""Landings: the slab -> host extents. Here content checksums are made, unless the record brought its own along."""

from __future__ import annotations

import numpy as np

from kvtier.core.plan import LOST, NOWHERE, PAGE_BYTES, Plan, Reason, Tier
from kvtier.tiers.device import Resident, Slab
from kvtier.transfer.delivery import Delivery
from kvtier.transfer.device import are_sound
from kvtier.transfer.endpoint import table_of
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.faults import reason_of
from kvtier.transfer.images import Extents
from kvtier.transfer.records import seal_records
from kvtier.transfer.run import Run
from kvtier.transfer.shapes import RecordShape
from kvtier.transfer.work import Piece, Service, pieces


class LandRun(Run):
    """Runs one LAND plan."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """Nothing is copied yet."""
        super().__init__(plan, equipment)
        self._residents: dict[int, Resident] = {}

    def begin(self) -> None:
        """Queue the copies of what lies in the slab as the plan says, several blocks a piece where blocks are small."""
        slab, table = self.equipment.slab, self.plan.rows
        for row in range(len(table)):
            one = table[row]
            found = slab and slab.residents.find(
                int(one["device_page"]), int(one["device_pages"]), one["key"].tobytes(), int(one["group"])
            )
            if found:
                self._residents[row] = found
            else:
                self._lose([row], Reason.GONE)
        if slab is not None:
            for shape, own in self.by_group(self._residents):
                for rows in pieces(own, shape.pages * PAGE_BYTES):
                    self._queue(slab, shape, rows)
        self.settle()

    def abandon(self, reason: Reason) -> None:
        """A landing that nobody waits for any more is finished all the same: the device wants its room back."""
        del reason

    def _queue(self, slab: Slab, shape: RecordShape, rows: list[int]) -> None:
        def work() -> list[Reason]:
            return self._land_now(slab, shape, rows)

        def finish(result: list[Reason] | Exception) -> None:
            reasons = [reason_of(result)] * len(rows) if isinstance(result, Exception) else result
            landed = [row for row, reason in zip(rows, reasons, strict=True) if reason == Reason.NONE]
            for row, reason in zip(rows, reasons, strict=True):
                if reason == Reason.DAMAGED:
                    self._lose([row], reason)
                elif reason != Reason.NONE:
                    self.failed(row, reason)
            if landed:
                self.all_ok(
                    landed, moved_bytes=shape.pages * PAGE_BYTES, tier=Tier.HOST,
                    page=table_of(self.plan, landed)["target_page"], pages=shape.pages,
                )  # fmt: skip
            self.settle()

        self.equipment.work.put(Piece(Service.BACKGROUND, work, finish))

    def _land_now(self, slab: Slab, shape: RecordShape, rows: list[int]) -> list[Reason]:
        """On a copy thread: how each row went."""
        table, residents = table_of(self.plan, rows), [self._residents[row] for row in rows]
        first, to = table["device_page"].tolist(), table["target_page"].tolist()
        reasons = dict.fromkeys(rows, Reason.NONE)
        with slab.ordered():
            slab.copy_to_host(first, shape.pages, self.equipment.host.data, to)
            if slab.verifies:
                sound = are_sound(slab, shape, first, residents).tolist()
                reasons.update({row: Reason.DAMAGED for row, good in zip(rows, sound, strict=True) if not good})
        fresh = [row for row in rows if not self._residents[row].sealed and reasons[row] == Reason.NONE]
        if fresh:
            seal_records(self.plan, shape, fresh, self._extents(fresh))
        known = [row for row in rows if self._residents[row].sealed and reasons[row] == Reason.NONE]
        if known:
            delivery = Delivery(
                self.equipment, self.plan, shape, known, records=self._extents(known), places=None, target=None,
                verify=True,
            )  # fmt: skip
            reasons.update(zip(known, delivery.deliver(), strict=True))
        return [reasons[row] for row in rows]

    def _lose(self, rows: list[int], reason: Reason) -> None:
        """What lies in the slab is not what the plan says, or is damaged: nobody must find it there."""
        table, own = np.zeros(len(rows), LOST), self.plan.rows[rows]
        table["key"], table["group"], table["page"] = own["key"], own["group"], own["device_page"]
        table["tier"], table["reason"], table["segment"] = Tier.DEVICE, reason, NOWHERE
        self.tell_lost(table, Tier.DEVICE)
        for row in rows:
            self.failed(row, reason)

    def _extents(self, rows: list[int]) -> Extents:
        table = table_of(self.plan, rows)
        return Extents(self.equipment.host, table["target_page"], table["target_pages"])
