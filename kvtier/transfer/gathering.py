"""Stores: engine pages -> host extents. Pages are copied first and freed for the engine; checksums follow."""

from __future__ import annotations

from kvtier.core.plan import PAGE_BYTES, Plan, Reason, Tier
from kvtier.transfer.parts import Equipment
from kvtier.transfer.records import seal_record
from kvtier.transfer.run import Run
from kvtier.transfer.work import Piece, Rank


class StoreRun(Run):
    """Runs one STORE plan."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """The rows' columns become lists once: scalar access to them is many times faster."""
        super().__init__(plan, equipment)
        rows = plan.rows
        self._block = rows["block"].tolist()
        self._group = rows["group"].tolist()
        self._page = rows["target_page"].tolist()
        self._pages = rows["target_pages"].tolist()
        self._gathers_left = 0
        self._broken: dict[int, Reason] = {}

    def begin(self) -> None:
        """Queue the gathers, several blocks a piece where blocks are small."""
        nbytes = max(self._pages) * PAGE_BYTES
        groups = list(self.pieces(list(range(len(self._block))), nbytes))
        self._gathers_left = len(groups)
        for rows in groups:
            self._queue_gather(rows)

    def abandon(self, reason: Reason) -> None:
        """A store that nobody waits for any more is finished all the same: its bytes are as good for the next one."""
        del reason

    def _queue_gather(self, rows: list[int]) -> None:
        def work() -> list[int]:
            return [row for row in rows if not self._gather(row)]

        def finish(result: list[int] | Exception) -> None:
            self._fail_gathers(rows if isinstance(result, Exception) else result)
            self._gathers_left -= 1
            self._queue_seal(rows)
            if not self._gathers_left:
                self.free_source()

        self.equipment.work.put(Piece(Rank.GATHER, work, finish))

    def _gather(self, row: int) -> bool:
        equipment, pages = self.equipment, self.plan.pages
        memory = equipment.memories.get(pages.memory_id) if pages else None
        if memory is None or pages is None:
            return False
        group = self._group[row]
        record = equipment.host.view(self._page[row], self._pages[row])
        first_token = self._block[row] * equipment.layout.block_tokens
        for span, at in equipment.raw_spans[group]:
            out = record[at : at + span.nbytes]
            memory.gather(pages, group, first_token, span.parts, out)
            tail = -span.nbytes % PAGE_BYTES
            if tail:
                record[at + span.nbytes : at + span.nbytes + tail] = 0
        return True

    def _fail_gathers(self, rows: list[int]) -> None:
        for row in rows:
            self._broken[row] = Reason.GONE

    def _queue_seal(self, rows: list[int]) -> None:
        sound = [row for row in rows if row not in self._broken]
        for row in rows:
            if row in self._broken:
                self.failed(row, self._broken[row])

        def work() -> None:
            for row in sound:
                record = self.equipment.host.view(self._page[row], self._pages[row])
                seal_record(self.equipment, self.plan, row, self._group[row], record)

        def finish(result: None | Exception) -> None:
            for row in sound:
                if isinstance(result, Exception):
                    self.failed(row, Reason.IO_ERROR)
                else:
                    pages = self._pages[row]
                    self.ok(row, moved_bytes=pages * PAGE_BYTES, tier=Tier.HOST, page=self._page[row], pages=pages)
            self.settle()

        if sound:
            self.equipment.work.put(Piece(Rank.BACKGROUND, work, finish))
        else:
            self.settle()
