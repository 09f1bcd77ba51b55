"""The index with a short way for one entry: an array operation on one row costs as much as thirty looks at a cell.

Requests of one block are as frequent as long ones are large, so what every store and load does exists in both forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from kvtier.index import Index
from kvtier.index.entries import EntryRows, KeyRows
from kvtier.index.keytable import KeyTable


def wide(entries: npt.NDArray[np.integer]) -> EntryRows:
    """``entries`` as numpy's own index type, in which it looks a row up in 0.1 us; others it converts, for 0.7 us."""
    return cast(EntryRows, entries.astype(np.intp, copy=False))


class CellTable(KeyTable):
    """A key table that takes one key without arrays."""

    def __init__(self, capacity: int) -> None:
        """As ``KeyTable``."""
        super().__init__(capacity)
        self.groups_at = self.groups.data

    def key(self, entry: int) -> bytes:
        """The key of ``entry``."""
        return bytes(self._keys_at[entry * 32 : entry * 32 + 32])

    def add_one(self, key: bytes) -> int:
        """A new entry for ``key`` of group 0, which is not in the table; there must be room (``free``)."""
        if self._released_count:
            self._released_count -= 1
            entry = int(self._released[self._released_count])
        else:
            entry = self._untouched
            self._untouched += 1
        self._keys_at[entry * 32 : entry * 32 + 32] = key
        self.groups_at[entry] = 0
        bucket = int.from_bytes(key[:8], "little") & self._mask  # of group 0 nothing is mixed in
        self._next_at[entry] = self._heads_at[bucket]
        self._heads_at[bucket] = entry + 1
        return entry


class Cells(Index):
    """An ``Index`` whose methods take one entry at the price of a few cells."""

    def __init__(self, capacity: int, ranks: int, *, has_device: bool = False) -> None:
        """As ``Index``."""
        super().__init__(capacity, ranks, has_device=has_device)
        self.table = self.cells = CellTable(capacity)
        self.every_rank = int(self.all_ranks)
        self.pins_at = self.pins.data
        self.parent_at = self.parent.data
        self.depth_at = self.depth.data
        self.tokens_at = self.tokens.data
        self.lineage_at = self.lineage.data
        self.linked_at = self.linked.data
        self.children_at = self.children.data
        self.host_ranks_at = self.host_ranks.data
        self.disk_ranks_at = self.disk_ranks.data
        self.host_children_at = self.host_children.data
        self.all_on_host, self.none_on_host = self.host.has_all, self.host.has_none

    # --- asked ------------------------------------------------------------------------------------------------------

    def find_blocks(self, keys: KeyRows, digests: Sequence[bytes], group: int) -> EntryRows:
        """The entries of ``keys``, which are ``digests`` in an array; MISSING where there is none."""
        if len(digests) == 1:
            return wide(np.array((self.table.find_one(digests[0], group),)))
        return wide(self.table.find(keys, group))

    def all_missing(self, entries: EntryRows) -> bool:
        """Whether ``entries`` (at least one) are all MISSING."""
        if len(entries) == 1:
            return bool(entries.item() < 0)
        return not np.count_nonzero(entries >= 0)

    def reachable(self, entries: EntryRows) -> EntryRows:
        """Those of ``entries`` that are found by their keys: all but what was superseded."""
        if len(entries) == 1:
            return entries if self.linked_at[entries.item()] else entries[:0]
        linked = self.linked[entries]
        return entries if np.count_nonzero(linked) == len(entries) else entries[linked]

    def bare(self, entries: EntryRows) -> EntryRows:
        """Those of ``entries`` that have neither copies nor children."""
        if len(entries) == 1:
            entry = entries.item()
            is_held = self.host_ranks_at[entry] or self.disk_ranks_at[entry] or self.children_at[entry]
            is_held = is_held or (self.device is not None and self.device.ranks_at[entry])
            return entries[:0] if is_held else entries
        held = self.having(entries) | self.children[entries].view(np.uint32)
        bare: EntryRows = entries[held == 0]
        return bare

    # --- told -------------------------------------------------------------------------------------------------------

    def add_one(self, key: bytes, before: int, *, depth: int, tokens: int, lineage: int) -> int:
        """A new entry of group 0, which extends entry ``before`` (or MISSING), without copies. As ``Index.add``."""
        entry = self.cells.add_one(key)
        self.parent_at[entry] = before
        self.depth_at[entry] = depth
        self.tokens_at[entry] = tokens
        self.lineage_at[entry] = lineage
        self.children_at[entry] = self.host_children_at[entry] = self.pins_at[entry] = 0
        self.host_ranks_at[entry] = self.disk_ranks_at[entry] = 0
        self.linked_at[entry] = True
        self.count += 1
        if before >= 0:
            self.children_at[before] += 1
        return entry

    def pin(self, entries: EntryRows) -> None:
        """As ``Index.pin``."""
        if len(entries) == 1:
            self.pins_at[entries.item()] += 1
        else:
            super().pin(entries)

    def unpin(self, entries: EntryRows) -> EntryRows:
        """As ``Index.unpin``."""
        if len(entries) != 1:
            return super().unpin(entries)
        entry = entries.item()
        self.pins_at[entry] -= 1
        return entries[:0] if self.pins_at[entry] else entries
