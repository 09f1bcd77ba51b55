"""Two orders of eviction: what goes first, whatever its age, and the rest.

A sliding window or a state is needed where a hit ends, and hits end where requests did: what was stored between two
such ends is the least worth keeping of all. DeepSeek V4 keeps nothing else (report arXiv 2606.19348, section 3.5).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from kvtier.core.columns import column
from kvtier.policy.base import Entries, EvictionPolicy


class TwoAges:
    """An ``EvictionPolicy`` made of two of one kind; entries are of the first one while they are ``set_apart``."""

    def __init__(self, kind: type[EvictionPolicy], capacity: int) -> None:
        """``capacity`` is one more than the largest entry number."""
        self.first = kind(capacity)
        """What goes first, in order; to be changed through here only."""
        self._rest = kind(capacity)
        self._is_first = column(capacity, np.bool_)
        self._is_first_at = self._is_first.data

    def set_apart(self, entries: Entries, *, goes_first: bool) -> None:
        """Entries that are not in the tier: whether they go first once they are."""
        self._is_first[entries] = goes_first

    def which_go_first(self, entries: Entries) -> npt.NDArray[np.bool_]:
        """Which of ``entries`` go first."""
        first: npt.NDArray[np.bool_] = self._is_first[entries]
        return first

    def goes_first(self, entry: int) -> bool:
        """``which_go_first`` of one."""
        return bool(self._is_first_at[entry])

    def promote(self, entries: Entries) -> None:
        """Entries of the tier that do not go first any more; they are the newest of the rest."""
        own = entries[self._is_first[entries]]
        if len(own):
            self.first.remove_many(own)
            self._is_first[own] = False
            self._rest.insert(own)

    def demote(self, entries: Entries) -> None:
        """Entries of the tier that go first from now on, behind those that already do."""
        own = entries[~self._is_first[entries]]
        if len(own):
            self._rest.remove_many(own)
            self._is_first[own] = True
            self.first.insert(own)

    def insert(self, entries: Entries, before: int | None = None) -> None:
        """As ``EvictionPolicy``; an entry of the one order has no place in the other."""
        place = None if before is None else self.first if self._is_first_at[before] else self._rest
        for order, own in self._split(entries):
            order.insert(own, before if order is place else None)

    def touch(self, entries: Entries) -> None:
        """As ``EvictionPolicy``; none of them changes its order."""
        for order, own in self._split(entries):
            order.touch(own)

    def remove(self, entry: int) -> None:
        """As ``EvictionPolicy``."""
        (self.first if self._is_first[entry] else self._rest).remove(entry)

    def remove_many(self, entries: Entries) -> None:
        """As ``EvictionPolicy``."""
        for order, own in self._split(entries):
            order.remove_many(own)

    def candidates(self) -> Iterator[int]:
        """As ``EvictionPolicy``. What is touched meanwhile comes again at the end of its order at most once."""
        return chain.from_iterable(islice(order.candidates(), len(order)) for order in (self.first, self._rest))

    def __len__(self) -> int:
        """Number of entries in the tier."""
        return len(self.first) + len(self._rest)

    def _split(self, entries: Entries) -> Iterator[tuple[EvictionPolicy, Entries]]:
        is_first = self._is_first[entries]
        if is_first.any():
            yield self.first, entries[is_first]
            entries = entries[~is_first]
        if len(entries):
            yield self._rest, entries
