"""Copies in one memory tier, in columns: which ranks have one of an entry, and in which extent of their arenas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvtier.core.columns import column
from kvtier.index.keytable import EntryRows

Mask = npt.NDArray[np.bool_]


class Copies:
    """Columns by entry; public, read freely, written through the methods. A copy is complete when every rank has one.

    One entry is as frequent as many are, and an array operation on one row costs as much as thirty looks at a cell: so
    what every store and load does has a short way for one.
    """

    def __init__(self, capacity: int, ranks: int, parent: npt.NDArray[np.int32]) -> None:
        """Nothing is there. ``parent`` is the index's column of parents."""
        self.rank_count = ranks
        self.every_rank = (1 << ranks) - 1
        self.ranks = column(capacity, np.uint32)  # bit r: rank r has a copy
        self.page = column((ranks, capacity), np.int32)
        self.pages = column((ranks, capacity), np.int32)
        self.children = column(capacity, np.int32)  # of each entry, children whose copies are complete
        self.ranks_at, self.children_at = self.ranks.data, self.children.data
        self.page_at = tuple(row.data for row in self.page)
        self.pages_at = tuple(row.data for row in self.pages)
        self._parent, self._parent_at = parent, parent.data
        self._all_ranks = np.uint32(self.every_rank)

    # --- asked ------------------------------------------------------------------------------------------------------

    def are_complete(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` every rank has a copy of."""
        ready: Mask = self.ranks[entries.astype(np.intp, copy=False)] == self._all_ranks
        return ready

    def has_all(self, entries: EntryRows) -> bool:
        """Whether every rank has a copy of each of ``entries``."""
        if len(entries) == 1:
            return bool(self.ranks_at[entries.item()] == self.every_rank)
        return int(np.count_nonzero(self.are_complete(entries))) == len(entries)

    def has_none(self, entries: EntryRows) -> bool:
        """Whether no rank has a copy of any of ``entries``."""
        if len(entries) == 1:
            return not self.ranks_at[entries.item()]
        return not np.count_nonzero(self.ranks[entries])

    # --- told -------------------------------------------------------------------------------------------------------

    def add(self, rank: int, entries: EntryRows, pages: Sequence[int] | EntryRows, lengths: EntryRows) -> EntryRows:
        """Rank ``rank`` has copies of ``entries`` now; returns those that are complete by that."""
        if len(entries) == 1:
            return self._add_one(rank, entries, int(pages[0]), int(lengths[0]))
        at = entries.astype(np.intp)
        self.page[rank][at] = pages
        self.pages[rank][at] = lengths
        ranks = self.ranks[at] | np.uint32(1 << rank)
        self.ranks[at] = ranks
        whole = ranks == self._all_ranks
        complete: EntryRows = entries[whole]
        count_child(self.children, self._parent[at[whole]])
        return complete

    def _add_one(self, rank: int, entries: EntryRows, page: int, pages: int) -> EntryRows:
        entry = entries.item()
        self.page_at[rank][entry], self.pages_at[rank][entry] = page, pages
        self.ranks_at[entry] |= 1 << rank
        if self.ranks_at[entry] != self.every_rank:
            return entries[:0]
        if (parent := self._parent_at[entry]) >= 0:
            self.children_at[parent] += 1
        return entries

    def drop(self, entry: int) -> list[tuple[int, int, int]]:
        """Forget the copies of ``entry``; returns the (rank, page, pages) that they took."""
        ranks = self.ranks_at[entry]
        if ranks == self.every_rank and (parent := self._parent_at[entry]) >= 0:
            self.children_at[parent] -= 1
        self.ranks_at[entry] = 0
        return [
            (rank, self.page_at[rank][entry], self.pages_at[rank][entry])
            for rank in range(self.rank_count)
            if ranks >> rank & 1
        ]

    def leave(self, entries: EntryRows) -> list[tuple[EntryRows, EntryRows]]:
        """Forget the copies of ``entries``, all complete; returns per rank the first pages and lengths."""
        at = entries.astype(np.intp, copy=False)
        count_child(self.children, self._parent[at], -1)
        self.ranks[at] = 0
        return [(self.page[rank][at], self.pages[rank][at]) for rank in range(self.rank_count)]

    def linked(self, entries: EntryRows, parents: EntryRows) -> None:
        """``entries`` have just been given ``parents``: entries, or MISSING."""
        here = self.ranks[entries.astype(np.intp)] == self._all_ranks
        if here.any():
            count_child(self.children, parents[here])


def count_child(counts: npt.NDArray[np.int32], parents: EntryRows, change: int = 1) -> None:
    """One child more (or less) for each of ``parents``, some of which are MISSING and some there more than once."""
    known = parents[parents >= 0].astype(np.intp)
    if len(known) == 1:
        counts[known] += change
    elif len(known):
        np.add.at(counts, known, np.int32(change))  # a plain number is int64 first, and takes four times as long
