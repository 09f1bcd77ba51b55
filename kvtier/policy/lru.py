"""Leaf-first LRU: the least recently used block whose children are gone goes first.

A request touches its blocks tail first, so a parent is never older than its child, and the order of use is the
order of leaves. The order is a doubly linked list in two int32 arrays (8 bytes an entry). A request's blocks stand
together in it, deepest first, so moving them again is one splice per run instead of one step per block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvtier.core.columns import column
from kvtier.policy.base import Entries


class LeafFirstLRU:
    """Least recently used order over entry numbers in [0, capacity)."""

    def __init__(self, capacity: int) -> None:
        """``capacity`` is one more than the largest entry number."""
        # The sentinel closes the ring: newer[sentinel] is the oldest entry, older[sentinel] the newest one.
        self._sentinel = capacity
        self._older = column(capacity + 1, np.int32)
        self._newer = column(capacity + 1, np.int32)
        self._older_at = self._older.data  # scalar access at a third of the price of numpy's
        self._newer_at = self._newer.data
        self._older_at[capacity] = self._newer_at[capacity] = capacity
        self._count = 0

    def insert(self, entries: Entries, before: int | None = None) -> None:
        """Entries that came into the tier, in prefix order; they are to go ``before`` that one, or are the newest."""
        if len(entries):
            self._put(entries[::-1].astype(np.intp), self._sentinel if before is None else before)
            self._count += len(entries)

    def touch(self, entries: Entries) -> None:
        """Entries that were used together, in prefix order."""
        if not len(entries):
            return
        ordered = entries[::-1].astype(np.intp)
        self._unlink_runs(ordered)
        self._put(ordered, self._sentinel)

    def remove(self, entry: int) -> None:
        """An entry that left the tier."""
        self._unlink(entry, entry)
        self._count -= 1

    def remove_many(self, entries: Entries) -> None:
        """Entries that left the tier: one splice per run of neighbours."""
        if len(entries):
            self._unlink_runs(entries.astype(np.intp, copy=False))
            self._count -= len(entries)

    def candidates(self) -> Iterator[int]:
        """Entries from the oldest to the newest; the one just yielded may be removed."""
        newer = self._newer_at
        entry = newer[self._sentinel]
        while entry != self._sentinel:
            following = newer[entry]
            yield entry
            entry = following

    def __len__(self) -> int:
        """Number of entries in the tier."""
        return self._count

    def _put(self, ordered: npt.NDArray[np.intp], following: int) -> None:
        """Link ``ordered`` in right before ``following``; before the sentinel they are the newest."""
        older, newer = self._older, self._newer
        first, last = int(ordered[0]), int(ordered[-1])
        before = self._older_at[following]
        if len(ordered) > 1:
            newer[ordered[:-1]] = ordered[1:]
            older[ordered[1:]] = ordered[:-1]
        self._newer_at[before] = first
        self._older_at[first] = before
        self._newer_at[last] = following
        self._older_at[following] = last

    def _unlink_runs(self, ordered: npt.NDArray[np.intp]) -> None:
        breaks = (self._newer[ordered[:-1]] != ordered[1:]).nonzero()[0].tolist() if len(ordered) > 1 else ()
        start = 0
        for stop in breaks:
            self._unlink(int(ordered[start]), int(ordered[stop]))
            start = stop + 1
        self._unlink(int(ordered[start]), int(ordered[-1]))

    def _unlink(self, oldest: int, newest: int) -> None:
        before, after = self._older_at[oldest], self._newer_at[newest]
        self._newer_at[before] = after
        self._older_at[after] = before
