"""Rows of a load that lie in the slab, or are copied into it on their way from host memory."""

from __future__ import annotations

from kvtier.core.plan import NOWHERE, Plan, Reason
from kvtier.tiers.device import Resident
from kvtier.transfer.device import deliver_from_slab, note_residents
from kvtier.transfer.endpoint import DeviceEndpoint, Endpoint, table_of
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.images import Extents
from kvtier.transfer.shapes import RecordShape


class SlabRows:
    """What of one LOAD or FETCH plan concerns the slab; without one nothing is there, and nothing gets there."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """Nothing was looked for."""
        self._plan = plan
        self._equipment = equipment
        self._residents: dict[int, Resident] = {}
        self._digests: dict[int, int] = {}
        self.promoted: set[int] = set()
        """Rows that were copied into the slab."""

    def find(self, rows: list[int]) -> list[int]:
        """Those of ``rows`` that lie there as the plan says. Under the lock."""
        slab, table = self._equipment.slab, self._plan.rows
        if slab is None:
            return []
        for row in rows:
            one = table[row]
            found = slab.residents.find(
                int(one["device_page"]), int(one["device_pages"]), one["key"].tobytes(), int(one["group"])
            )
            if found is not None:
                self._residents[row] = found
        return [row for row in rows if row in self._residents]

    def deliver(self, shape: RecordShape, rows: list[int], target: Endpoint | None) -> list[Reason]:
        """On a copy thread: copy ``rows``, which were found, to the engine; how it went, row by row."""
        slab, engine = self._equipment.slab, None if target is None else DeviceEndpoint.of(target)
        if slab is None:
            return [Reason.GONE] * len(rows)
        residents = [self._residents[row] for row in rows]
        return deliver_from_slab(self._equipment, self._plan, slab, shape, rows, residents, engine)

    def promote(self, shape: RecordShape, rows: list[int]) -> None:
        """On a copy thread: copy those of ``rows``, verified ones in host memory, that have a target there and are raw.

        The others stay where they are.
        """
        slab, table = self._equipment.slab, self._plan.rows
        long = table["host_pages"] == shape.pages
        rows = [row for row in rows if table["target_page"][row] != NOWHERE and long[row]]
        if slab is None or not (rows := self._raw(shape, rows)):
            return
        own = table_of(self._plan, rows)
        targets = own["target_page"].tolist()
        with slab.ordered():
            slab.copy_from_host(self._equipment.host.data, own["host_page"].tolist(), shape.pages, targets)
            if slab.verifies:
                self._digests.update(zip(rows, slab.digests(targets, shape.pages), strict=True))
        self.promoted.update(rows)

    def note(self, shape: RecordShape, rows: list[int]) -> None:
        """Under the lock: ``rows``, which were copied, lie in the slab from now on."""
        if self._equipment.slab is not None:
            digests = [self._digests.get(row) for row in rows]
            note_residents(self._equipment.slab, self._plan, rows, shape, digests, sealed=True)

    def _raw(self, shape: RecordShape, rows: list[int]) -> list[int]:
        """Those of ``rows`` that no codec made shorter."""
        if not rows:
            return rows
        own = table_of(self._plan, rows)
        headers = Extents(self._equipment.host, own["host_page"], own["host_pages"]).headers()
        raw = shape.headers.read(headers, own["key"], None)[0].tolist()
        return [row for row, is_raw in zip(rows, raw, strict=True) if is_raw]
