"""Blocks of windows and states in a memory tier: those that hits end with stay, those between go first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

import numpy as np

from kvtier.core.columns import column
from kvtier.index.cells import Cells, wide
from kvtier.index.entries import EntryRows
from kvtier.policy import EvictionPolicy, LeafFirstLRU, TwoAges

_EXPIRED_A_TURN: Final = 256


class Checkpoints:
    """Which entries of groups that need no whole prefix are worth as much as other blocks, and for how long."""

    def __init__(self, index: Cells, ages: TwoAges, is_partial: Sequence[bool], ttl_s: float) -> None:
        """``is_partial`` says of each group whether it is one; after ``ttl_s`` without use they go first; 0: never."""
        self._index = index
        self._ages = ages
        self._is_partial = np.array(is_partial, np.bool_)
        self._ttl_s = ttl_s
        self._by_use = LeafFirstLRU(index.table.capacity) if ttl_s else None
        self._is_tracked = column(index.table.capacity, np.bool_)
        # Seconds since the first use: after a year the last digit of this narrow a column is worth two of them.
        self._used_s = column(index.table.capacity, np.float32)
        self._first_s: float | None = None

    def coming(self, entries: EntryRows, between: EntryRows) -> None:
        """Entries of any group that are about to come into the tier; no hit is likely to end with ``between``."""
        self._ages.set_apart(entries, goes_first=False)
        self._ages.set_apart(between, goes_first=True)

    def kept(self, entries: EntryRows, now_s: float) -> None:
        """Entries of such groups in the tier, which a hit ended with, or is likely to end with."""
        own = self._of_windows(entries)
        if len(own):
            self._ages.promote(own)
            self._used(own, now_s)

    def came(self, entries: EntryRows, now_s: float) -> None:
        """Entries of any group that came into the tier."""
        own = self._of_windows(entries)
        if self._by_use is not None and len(own):
            self._used(own[~self._ages.which_go_first(own)], now_s)

    def left(self, entries: EntryRows) -> None:
        """Entries of any group that left the tier."""
        if self._by_use is not None:
            gone = entries[self._is_tracked[entries]]
            self._by_use.remove_many(gone)
            self._is_tracked[gone] = False

    @property
    def spare(self) -> EvictionPolicy:
        """What goes first, in order."""
        return self._ages.first

    def between(self, entries: EntryRows) -> EntryRows:
        """Those of ``entries`` that no hit is likely to end with, and that therefore go first."""
        going: EntryRows = entries[self._ages.which_go_first(entries)]
        return going

    def goes_first(self, entry: int) -> bool:
        """Whether ``entry``, of any group, is one of ``between``."""
        return self._ages.goes_first(entry)

    def expire(self, now_s: float) -> None:
        """Those that nobody used for long go first from now on."""
        if self._by_use is None:
            return
        oldest = wide(np.fromiter(islice(self._by_use.candidates(), _EXPIRED_A_TURN), np.int32))
        old = oldest[self._used_s[oldest] + self._ttl_s < self._since_first(now_s)]
        if len(old):
            self.left(old)
            self._ages.demote(old[::-1])  # the end of a window goes first: it tells that no hit can end there

    def _used(self, entries: EntryRows, now_s: float) -> None:
        if self._by_use is None or not len(entries):
            return
        known = self._is_tracked[entries]
        self._by_use.touch(entries[known])
        self._by_use.insert(entries[~known])
        self._is_tracked[entries] = True
        self._used_s[entries] = self._since_first(now_s)

    def _since_first(self, now_s: float) -> float:
        if self._first_s is None:
            self._first_s = now_s
        return now_s - self._first_s

    def _of_windows(self, entries: EntryRows) -> EntryRows:
        own: EntryRows = entries[self._is_partial[self._index.table.groups[entries]]]
        return own
