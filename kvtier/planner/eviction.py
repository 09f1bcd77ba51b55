"""Which entries leave a memory tier next: the policy's order, without what is pinned, kept, or extended by others.

A parent goes only after its children in that tier went; one that was passed over because of a child comes right
after it. Requests come as chains, deepest block first, so nearly always a whole batch goes as it stands, which arrays
tell at once; anything else is looked at entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, Protocol

import numpy as np

from kvtier.index.cells import Cells, wide
from kvtier.index.copies import Copies
from kvtier.index.entries import EntryRows, Mask
from kvtier.policy import EvictionPolicy

_LOOKED_AT: Final = 4096
"""So many leaves that have to stay are looked at in vain, and three more for each one that goes."""
_FEW: Final = 8
"""So many entries are looked at one by one in less time than together."""
_MOST: Final = 4096
"""Entries looked at together."""
_NOTHING: Final = wide(np.empty(0, np.int32))


class Keeper(Protocol):
    """Knows what may go, and hears of what went."""

    def may_go(self, entry: int) -> bool:
        """Whether the copies of ``entry`` in the tier may be evicted."""

    def which_may_go(self, entries: EntryRows) -> Mask:
        """``may_go`` of each of ``entries``."""

    def evicted(self, entries: EntryRows) -> None:
        """The copies of ``entries`` in the tier are gone."""

    def made_room(self) -> None:
        """Nothing more goes now: what is of no use without that which went may go, too."""


class Leaves:
    """One pass over a memory tier from the least worth keeping on. Evict what was taken before taking more."""

    def __init__(
        self,
        index: Cells,
        copies: Copies,
        policy: EvictionPolicy,
        keeper: Keeper,
        candidates: Iterable[int] | None = None,
    ) -> None:
        """Nothing was looked at. ``candidates``: those of ``policy`` that the pass is about; None: all."""
        self._index = index
        self._copies = copies
        self._policy = policy
        self._keeper = keeper
        order = policy.candidates() if candidates is None else candidates
        self._candidates = islice(order, len(policy))  # each once: what is held comes again at the end
        self._leaves: Iterator[int] = iter(())
        self._passed: dict[int, bool] = {}  # unpinned entries that others extend -> whether they may go
        self._gone: dict[int, int] = {}  # of each parent, children that were taken and are counted still
        self._extended: set[int] = set()  # unpinned entries that pinned ones extend
        self._patience = _LOOKED_AT
        self._size = 0

    def take(self, count: int) -> EntryRows:
        """The next up to ``count`` entries that go, in order; none where there are no more of them."""
        self._gone.clear()
        taken: list[EntryRows] = [_NOTHING]
        while count and self._patience > 0:
            some = wide(np.fromiter(islice(self._leaves, count), np.int32))
            if not len(some):
                if not self._patience:  # the last leaf that was looked at was one in vain too many
                    break
                batch = wide(np.fromiter(islice(self._candidates, min(_MOST, max(count, self._size))), np.int32))
                if not len(batch):
                    break
                looked_at = len(batch)
                if looked_at >= _FEW:
                    batch = self._without_held(batch)
                if len(batch) > count or not self._goes_whole(batch):
                    self._leaves = self._one_by_one(self._looked_up(batch))
                    self._size = 2 * looked_at  # too few of those went that are looked at first
                    continue
                self._patience += 3 * len(batch)
                taken.append(batch)
                break  # the parent of its last one may come next: to it, children are gone once they were evicted
            taken.append(some)
            count -= len(some)
        return taken[1] if len(taken) == 2 else np.concatenate(taken)

    def _without_held(self, batch: EntryRows) -> EntryRows:
        """``batch`` without what is pinned, or extended by that: in use, and out of the way of later passes."""
        held = self._index.pins[batch] > 0
        if held.any():
            self._note_extended(batch[held])
        if self._extended:
            held |= np.fromiter(map(self._extended.__contains__, batch.tolist()), np.bool_, len(batch))
        if held.any():
            self._policy.touch(batch[held][::-1])
            batch = wide(batch[~held])
        return batch

    def _note_extended(self, held: EntryRows) -> None:
        pins, parents, ranks = self._index.pins_at, self._index.parent_at, self._copies.ranks_at
        above = self._index.parent[held]
        for parent in above[(above >= 0) & (self._index.pins[above] == 0)].tolist():
            entry = parent
            while entry >= 0 and not pins[entry] and ranks[entry] == self._copies.every_rank:
                if entry in self._extended:
                    break
                self._extended.add(entry)
                entry = parents[entry]

    def _goes_whole(self, batch: EntryRows) -> bool:
        """Whether each of ``batch`` may go, with its only children in the tier right before it."""
        index = self._index
        if len(batch) < _FEW:
            return False
        parents = index.parent[batch]
        if int(self._copies.children[batch].sum()) != np.count_nonzero(parents[:-1] == batch[1:]):
            return False
        if self._passed and not self._passed.keys().isdisjoint(parents.tolist()):
            return False
        return int(np.count_nonzero(self._keeper.which_may_go(batch))) == len(batch)

    def _looked_up(self, batch: EntryRows) -> Iterable[tuple[int, bool]]:
        """Entries of ``batch``, and whether they may go."""
        entries = batch.tolist()
        if len(batch) < _FEW:
            return ((entry, self._keeper.may_go(entry)) for entry in entries)
        return zip(entries, self._keeper.which_may_go(batch).tolist(), strict=True)

    def _one_by_one(self, candidates: Iterable[tuple[int, bool]]) -> Iterator[int]:
        """Leaves among ``candidates``, each followed by the parents that were passed over because of it."""
        pins, children, parents = self._index.pins_at, self._copies.children_at, self._index.parent_at
        passed, gone = self._passed, self._gone
        for candidate, candidate_may in candidates:
            if pins[candidate]:
                continue
            entry, may = candidate, candidate_may
            while children[entry] == gone.get(entry, 0):
                if not may:
                    self._patience -= 1
                    if not self._patience:
                        return
                    break
                parent = parents[entry]
                gone[parent] = gone.get(parent, 0) + 1
                self._patience += 3
                yield entry
                if parent not in passed:
                    break
                entry, may = parent, passed.pop(parent)
            else:
                passed[entry] = may
