"""A memory tier as control sees it: room per rank, the order in which blocks go, and what may go at all."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise, takewhile
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.core.columns import column
from kvtier.core.plan import NOWHERE
from kvtier.index.cells import Cells, wide
from kvtier.index.copies import Copies
from kvtier.index.entries import EntryRows
from kvtier.index.space import Space
from kvtier.planner.checkpoints import Checkpoints
from kvtier.planner.eviction import Keeper, Leaves
from kvtier.planner.hops import NO_ENTRIES, Extent, Hop, Ints, Targets
from kvtier.policy import EvictionPolicy

Uints = npt.NDArray[np.int64]
"""Counts of uses."""
_OLDEST_LOOKED_AT: Final = 64
"""What comes down from a tier above takes its place among so many; it is older than all else, or nearly the newest."""


class Uses:
    """Counts entries that came in, or were used, in all memory tiers: so the ages of what is in two of them compare."""

    def __init__(self) -> None:
        """None so far."""
        self.count = 0


class MemoryBook:
    """Extents of all ranks and the eviction order of one memory tier."""

    def __init__(
        self,
        index: Cells,
        copies: Copies,
        policy: EvictionPolicy,
        record_pages: Sequence[int],
        keeper: Keeper,
        checkpoints: Checkpoints | None = None,
        uses: Uses | None = None,
    ) -> None:
        """``copies`` are the tier's columns of ``index``; ``record_pages`` is the worst-case length of a record per
        group; ``keeper`` hears what was evicted.

        ``checkpoints`` are there where a layout has windows or states; ``uses`` is that of all tiers.
        """
        self._keeper = keeper
        self.checkpoints = checkpoints
        self.now_s = 0.0
        """When somebody last asked for something."""
        self.spaces: dict[int, Space] = {}
        self.evicted = 0
        self.copies = copies
        self._index = index
        self._policy = policy
        self._record_pages = tuple(record_pages)
        self._deferred: dict[int, list[Extent]] = {}
        self._uses = uses or Uses()
        self._moved = column(index.table.capacity, np.int64)
        """By entry: the use with which it and all that it extends were the newest, or a later one."""
        self._moved_at = self._moved.data

    def attach(self, rank: int, arena_pages: int) -> None:
        """Rank ``rank`` brings an empty arena of ``arena_pages``; what was to be freed in an earlier one is void."""
        for entry, extents in self._deferred.items():
            self._deferred[entry] = [extent for extent in extents if extent[0] != rank]
        self.spaces[rank] = Space(arena_pages)

    def is_above(self, watermark: float) -> bool:
        """Whether more than that share of the fullest arena is taken."""
        return any(space.used_pages > watermark * space.capacity_pages for space in self.spaces.values())

    @property
    def step_blocks(self) -> int:
        """So many blocks more or less are worth another look at what may go."""
        pages = min([space.capacity_pages for space in self.spaces.values()], default=0)
        return max(1, (pages // max(self._record_pages)) >> 8)

    @property
    def free_pages(self) -> int:
        """Pages that every arena has free."""
        return min([space.free_pages for space in self.spaces.values()], default=0)

    def take_one(self) -> int:
        """First page of an extent for one record of group 0 on the only rank; NO_ROOM where that takes an eviction."""
        return self.spaces[0].take(self._record_pages[0])

    def reserve(self, group: int, count: int) -> tuple[int, dict[int, list[int]]]:
        """Room for ``count`` records of ``group`` on every rank, evicting what may go where there is too little.

        Returns how many fit, and per rank the first pages of exactly those.
        """
        return self._reserve(group, count, self.leaves())

    def reserve_among(self, group: int, count: int, before: int, watermark: float) -> tuple[int, dict[int, list[int]]]:
        """As ``reserve``, but nothing goes that was used at ``before`` or later, as ``used`` counts.

        Nor may more than ``watermark`` of any arena be taken then: something newer would soon go for it.
        """
        older = takewhile(lambda entry: self._is_older(entry, before), self._policy.candidates())
        leaves = Leaves(self._index, self.copies, self._policy, self._keeper, older)
        pages = self._record_pages[group]
        kept_free = max(space.capacity_pages - int(watermark * space.capacity_pages) for space in self.spaces.values())
        self._evict_until(pages * count + kept_free, sys.maxsize, leaves)
        room = max(0, self.free_pages - kept_free) // pages
        return self._reserve(group, min(count, room), leaves)

    def has_older(self, before: int) -> bool:
        """Whether the tier has something that ``reserve`` would take, were it not held by something else."""
        return any(self._is_older(entry, before) for entry in islice(self._policy.candidates(), 1))

    def _is_older(self, entry: int, before: int) -> bool:
        """Whether ``entry`` was used before that, or goes first whatever its age."""
        return self._moved_at[entry] < before or (self.checkpoints is not None and self.checkpoints.goes_first(entry))

    def reserve_spare(self, group: int, count: int) -> tuple[int, dict[int, list[int]]]:
        """As ``reserve``, but only what goes first anyway goes for it."""
        spare = self._policy if self.checkpoints is None else self.checkpoints.spare
        return self._reserve(group, count, Leaves(self._index, self.copies, spare, self._keeper))

    def _reserve(self, group: int, count: int, leaves: Leaves) -> tuple[int, dict[int, list[int]]]:
        pages = self._record_pages[group]
        taken = self._take(pages, count)
        while (fit := min(map(len, taken.values()), default=0)) < count:
            gone = self._evict_until(pages * (count - fit), sys.maxsize, leaves)
            # Enough may be free and nothing fit, where records of several lengths left it in pieces.
            if not gone and not self._evict_next(count - fit, leaves):
                break
            self._take(pages, count, taken)
        for rank, starts in taken.items():
            if len(starts) > fit:
                self.free((rank, start, pages) for start in starts[fit:])
                del starts[fit:]
        self._keeper.made_room()
        return fit, taken

    def cancel(self, group: int, starts: dict[int, list[int]]) -> None:
        """Nothing will come into what ``reserve`` returned for records of ``group``."""
        pages = self._record_pages[group]
        self.free((rank, start, pages) for rank, own in starts.items() for start in own)

    def could_hold(self, group: int, count: int) -> bool:
        """Whether ``count`` records of ``group`` fit into every arena that is empty."""
        pages = min([space.capacity_pages for space in self.spaces.values()], default=0)
        return count * self._record_pages[group] <= pages

    def make_room(self, pages: int, most: int = sys.maxsize) -> int:
        """Evict the least worth keeping until every rank has ``pages`` free, or ``most`` went; returns how many did."""
        gone = self._evict_until(pages, most, self.leaves())
        self._keeper.made_room()
        return gone

    def leaves(self) -> Leaves:
        """What may go, the least worth keeping first."""
        return Leaves(self._index, self.copies, self._policy, self._keeper)

    def candidates(self) -> Iterable[int]:
        """Entries of the tier from the least to the most worth keeping."""
        return self._policy.candidates()

    def evict(self, entries: EntryRows) -> None:
        """Free the copies of ``entries``, which nobody holds."""
        self.evicted += len(entries)
        if len(entries) == 1:
            self.drop(entries.item())
        else:
            self._policy.remove_many(entries)
            self._left(entries)
            for rank, extents in enumerate(self.copies.leave(entries)):
                self.spaces[rank].give_back_many(*extents)
        self._keeper.evicted(entries)

    def drop(self, entry: int) -> None:
        """Forget the copies of ``entry``; their room is free once nobody holds the entry."""
        if self.copies.ranks_at[entry] == self.copies.every_rank:
            self._policy.remove(entry)
            if self.checkpoints is not None:
                self._left(wide(np.array((entry,), np.int32)))
        extents = self.copies.drop(entry)
        if self._index.pins_at[entry]:
            self._deferred.setdefault(entry, []).extend(extents)
        else:
            self.free(extents)

    def unpinned(self, entries: EntryRows) -> None:
        """Nobody holds ``entries`` any more: room that waited for that is free."""
        if self._deferred:
            for entry in entries.tolist():
                self.free(self._deferred.pop(entry, ()))

    def publish(self, hop: Hop, rank: int, rows: Ints) -> EntryRows:
        """Rows of ``hop`` landed on ``rank``; returns the entries that are complete there by that."""
        answers = hop.answers[rank][rows]
        return self.copies.add(rank, hop.entries[rows], answers["page"], answers["pages"])

    def publish_whole(self, hop: Hop) -> EntryRows:
        """Every row of ``hop`` landed on every rank; returns its entries."""
        for rank, answers in hop.answers.items():
            self.copies.add(rank, hop.entries, answers["page"], answers["pages"])
        return hop.entries

    def used(self, entries: EntryRows) -> Uints:
        """By which count of uses each of ``entries`` was used; what a sequence just grew by was used when that was."""
        used: Uints = self._moved[entries]
        return used

    def admit(
        self,
        entries: EntryRows,
        between: EntryRows = NO_ENTRIES,
        *,
        now: int | None = None,
        used: Uints | None = None,
    ) -> None:
        """Entries that are now complete in the tier, in prefix order. Used with them is what they extend.

        ``between`` are those of windows and states that no hit is likely to end with. ``now``: when
        they were stored, so that all groups of a block are of one age. ``used``: as ``used`` says of them in the tier
        above, since to come down is no use.
        """
        if self.checkpoints is not None:
            self.checkpoints.coming(entries, between)
        self._policy.insert(entries, self._first_newer(int(used.min())) if used is not None and len(used) else None)
        if self.checkpoints is not None:
            self.checkpoints.came(entries, self.now_s)
        self._used(entries, now)
        if used is not None:
            self._moved[entries] = used

    def _first_newer(self, used: int) -> int | None:
        """Of the oldest entries the first that was used after that."""
        oldest = islice(self._policy.candidates(), _OLDEST_LOOKED_AT)
        return next((entry for entry in oldest if self._moved_at[entry] > used), None)

    def touch(self, entries: EntryRows) -> None:
        """Entries that were used together, in prefix order, and with them what they extend.

        Those not in the tier are passed over.
        """
        if not self.copies.has_all(entries):
            entries = entries[self.copies.are_complete(entries)]
        self._policy.touch(entries)
        self._used(entries)

    def keep(self, entries: EntryRows) -> None:
        """A hit ended with ``entries``, or is likely to: of those in the tier that are windows or states."""
        if self.checkpoints is not None and len(entries):
            self.checkpoints.kept(entries[self.copies.are_complete(entries)], self.now_s)

    def between(self, entries: EntryRows) -> EntryRows:
        """Those of ``entries``, of windows and states, that no hit is likely to end with."""
        return NO_ENTRIES if self.checkpoints is None else self.checkpoints.between(entries)

    def expire(self) -> None:
        """What was worth keeping for a time only goes first once that is over."""
        if self.checkpoints is not None:
            self.checkpoints.expire(self.now_s)

    def free(self, extents: Iterable[Extent]) -> None:
        """Room that nobody uses any more."""
        for rank, page, pages in extents:
            self.spaces[rank].give_back(page, pages)

    def __len__(self) -> int:
        """Entries of the tier."""
        return len(self._policy)

    def _left(self, entries: EntryRows) -> None:
        if self.checkpoints is not None:
            self.checkpoints.left(entries)

    def _used(self, entries: EntryRows, now: int | None = None) -> None:
        """``entries`` are the newest now. What they extend must not be much older: none of it may go before them.

        Whoever holds the beginning of a sequence itself looks up, and stores, only the rest. Where parents are older
        than their children, every look at what may go walks over them in vain.
        """
        if not len(entries):
            return
        self._uses.count += len(entries)
        if len(entries) == 1:
            entry = entries.item()
            self._moved_at[entry] = self._moved_with(self._index.parent_at[entry], now)
            return
        parents = self._index.parent[entries]
        begins = (parents[1:] != entries[:-1]).nonzero()[0] + 1  # those that do not stand right behind their parent
        for first, stop in pairwise((0, *begins.tolist(), len(entries))):
            self._moved[entries[first:stop]] = self._moved_with(int(parents[first]), now)

    def _moved_with(self, entry: int, now: int | None) -> int:
        """The use with which ``entry`` and all that it extends were moved to the newest; this one, if it is time again.

        That takes a step for each. It is time when a sixteenth of what is in the tier has been used since: however
        many sequences grow block by block, and however long they are, that makes about 16 steps a block.
        """
        moved_at, due = self._moved_at, self._uses.count - (len(self._policy) >> 4)
        ranks_at, every_rank, parent_at = self.copies.ranks_at, self.copies.every_rank, self._index.parent_at
        extended: list[int] = []
        while entry >= 0 and ranks_at[entry] == every_rank and moved_at[entry] < due:
            extended.append(entry)
            entry = parent_at[entry]
        is_fresh = entry >= 0 and ranks_at[entry] == every_rank
        moved = moved_at[entry] if is_fresh else self._uses.count if now is None else now
        if extended:
            order = wide(np.array(extended, np.int32))
            self._policy.touch(order[::-1])
            self._moved[order] = moved
        return moved

    def _evict_until(self, pages: int, most: int, leaves: Leaves) -> int:
        gone, longest = 0, max(self._record_pages)
        while (missing := pages - self.free_pages) > 0 and gone < most:
            # Never more than are needed for sure, however long their records are.
            more = self._evict_next(min(-(-missing // longest), most - gone), leaves)
            if not more:
                break
            gone += more
        return gone

    def _evict_next(self, count: int, leaves: Leaves) -> int:
        entries = leaves.take(count)
        if len(entries):
            self.evict(entries)
        return len(entries)

    def _take(self, pages: int, count: int, taken: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
        taken = {rank: [] for rank in self.spaces} if taken is None else taken
        for rank, space in self.spaces.items():
            taken[rank] += space.take_many(pages, count - len(taken[rank]))
        return taken


def targets_of(starts: Sequence[int], rows: Ints, count: int, pages: int) -> Targets:
    """Reserved extents for ``rows`` of a hop of ``count`` rows, all ``pages`` long."""
    page = np.full(count, NOWHERE, np.int32)
    length = np.zeros(count, np.int32)
    page[rows] = starts
    length[rows] = pages
    return Targets(page, length)
