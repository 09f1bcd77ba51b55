"""The index: what is known of every (key, group), in columns.

An entry has a parent (the block that it extends), pins, and copies: per rank an extent of the arena of each memory tier
(``Copies``) and a place on disk. It can be read when every rank has a copy; until then, and after its last copy went,
lookups do not see it. An entry that children still extend stays behind without copies, so that their links hold.

Memory: 112 bytes an entry for one rank (``Index.ENTRY_BYTES``), 20 more for every further one, touched as entries come;
with a device tier 16 more (``Copies``), and 8 for every further rank.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.core.columns import column
from kvtier.core.plan import DIRECTORY_SHIFT, Lineage
from kvtier.index.copies import Copies, Mask, count_child
from kvtier.index.keytable import MISSING, EntryRows, KeyRows, KeyTable, Places

MAX_RANKS: Final = 32
_FIRST_LOOK: Final = 64
_FREE: Final = -1
"""In place of the number of children: nobody's entry, so that nobody releases it a second time."""


class Index:
    """Entries by number; every array argument of entries holds each of them at most once.

    Columns are public and are read freely; they are written through the methods, which keep links and counts true.
    """

    ENTRY_BYTES: Final = 112
    RANK_BYTES: Final = 20

    def __init__(self, capacity: int, ranks: int, *, has_device: bool = False) -> None:
        """Room for ``capacity`` entries of ``ranks`` ranks (at most 32), which may have copies in a device tier."""
        self.table = KeyTable(capacity)
        self.ranks = ranks
        self.all_ranks = np.uint32((1 << ranks) - 1)
        self.parent = column(capacity, np.int32)
        self.children = column(capacity, np.int32)
        self.depth = column(capacity, np.int32)
        self.tokens = column(capacity, np.int32)
        self.pins = column(capacity, np.int32)
        self.lineage = column(capacity, np.uint8)
        self.linked = column(capacity, np.bool_)  # found by key; False once superseded or free
        self.host = Copies(capacity, ranks, self.parent)
        self.host_ranks, self.host_children = self.host.ranks, self.host.children
        self.host_page, self.host_pages = self.host.page, self.host.pages
        self.on_host = self.host.are_complete
        self.device = Copies(capacity, ranks, self.parent) if has_device else None
        self._device_ranks_at = None if self.device is None else self.device.ranks_at
        self.disk_ranks = column(capacity, np.uint32)  # bit r: rank r has a copy there
        self.disk_segment = column((ranks, capacity), np.int32)
        self.disk_page = column((ranks, capacity), np.int32)
        self.disk_pages = column((ranks, capacity), np.int32)
        # A segment is reclaimed only after all its entries forgot it, so they share its generation.
        self.segment_generation: tuple[dict[int, int], ...] = tuple({} for _ in range(ranks))
        self.count = 0
        # One entry is read and written through these at a third of the price of numpy's.
        self._parent_at, self._lineage_at, self._linked_at = self.parent.data, self.lineage.data, self.linked.data
        self._children_at = self.children.data
        self._pins_at = self.pins.data
        self._host_ranks_at, self._disk_ranks_at = self.host_ranks.data, self.disk_ranks.data
        self._all_ranks = int(self.all_ranks)

    def readable(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` every rank has a copy of."""
        ready: Mask = self.having(entries.astype(np.intp)) == self.all_ranks
        return ready

    def having(self, entries: EntryRows | Places | slice) -> npt.NDArray[np.uint32]:
        """The ranks, as bits, that have copies of ``entries`` in any tier."""
        ranks: npt.NDArray[np.uint32] = self.host_ranks[entries] | self.disk_ranks[entries]
        if self.device is not None:
            ranks |= self.device.ranks[entries]
        return ranks

    def are_at_hand(self, entries: EntryRows) -> bool:
        """Whether every rank has each of ``entries`` in one memory tier."""
        if self.device is None:
            return self.host.has_all(entries)
        return bool((self.host.are_complete(entries) | self.device.are_complete(entries)).all())

    def on_device(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` every rank has in its device tier."""
        return np.zeros(len(entries), np.bool_) if self.device is None else self.device.are_complete(entries)

    def on_disk(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` every rank has on disk."""
        ready: Mask = self.disk_ranks[entries.astype(np.intp)] == self.all_ranks
        return ready

    def prefix(self, keys: KeyRows, group: int, *, exact: bool) -> EntryRows:
        """Entries of the longest run of ``keys`` from the first on that can be read.

        A miss at the first key costs one probe; long runs are looked up in growing batches.
        """
        first = self.table.find_one(keys[0].tobytes(), group) if len(keys) else MISSING
        if not self._is_usable(first, exact=exact):
            return np.empty(0, np.int32)
        runs = [np.array([first], np.int32)]
        at, size = 1, _FIRST_LOOK
        while at < len(keys):
            entries = self.table.find(keys[at : at + size], group)
            good = self._usable(entries, exact=exact)
            stop = int(good.argmin())
            if not good[stop]:
                runs.append(entries[:stop])
                break
            runs.append(entries)
            at, size = at + size, size * 8
        return np.concatenate(runs) if len(runs) > 1 else runs[0]

    def add(
        self,
        keys: KeyRows,
        group: int,
        *,
        depths: npt.NDArray[np.int32],
        tokens: int | npt.NDArray[np.int32],
        lineage: int | npt.NDArray[np.uint8],
    ) -> EntryRows:
        """New entries without parents and copies; ``link`` gives them parents.

        There must be room (``table.free``), and none of ``keys`` may be in the index.
        """
        entries = self.table.add(keys, group)
        at = entries.astype(np.intp)
        self.parent[at] = MISSING
        self.depth[at] = depths
        self.tokens[at] = tokens
        self.lineage[at] = lineage
        self.linked[at] = True
        self.children[at] = 0
        self.host_children[at] = 0  # pins and copies were gone before the number was given back
        self.count += len(entries)
        return entries

    def link(self, entries: EntryRows, parents: EntryRows) -> None:
        """Give ``entries``, which have none, their parents: entries, or MISSING."""
        at = entries.astype(np.intp)
        self.parent[at] = parents
        count_child(self.children, parents)
        self.host.linked(entries, parents)
        if self.device is not None:
            self.device.linked(entries, parents)

    def link_chain(self, entries: EntryRows, before: int) -> None:
        """``link`` of new entries, each to the one in front of it; the first extends ``before`` (or MISSING)."""
        at = entries.astype(np.intp, copy=False)
        self.parent[at[1:]] = at[:-1]
        self.children[at[:-1]] = 1
        self._parent_at[at.item(0)] = before
        if before >= 0:
            self._children_at[before] += 1

    def pin(self, entries: EntryRows) -> None:
        """Hold ``entries`` and their copies in place."""
        self.pins[entries.astype(np.intp)] += 1

    def unpin(self, entries: EntryRows) -> EntryRows:
        """Let go of ``entries``; returns those that nobody holds any more."""
        at = entries.astype(np.intp)
        left = self.pins[at] - 1
        self.pins[at] = left
        free: EntryRows = entries[left == 0]
        return free

    def add_disk(
        self,
        rank: int,
        entries: EntryRows,
        segments: EntryRows,
        pages: EntryRows,
        lengths: EntryRows,
        generations: npt.NDArray[np.int64],
    ) -> EntryRows:
        """Rank ``rank`` has copies of ``entries`` on disk; returns those that are complete there now."""
        at = entries.astype(np.intp)
        self.disk_segment[rank][at] = segments
        self.disk_page[rank][at] = pages
        self.disk_pages[rank][at] = lengths
        self.segment_generation[rank].update(zip(segments.tolist(), generations.tolist(), strict=True))
        ranks = self.disk_ranks[at] | np.uint32(1 << rank)
        self.disk_ranks[at] = ranks
        complete: EntryRows = entries[ranks == self.all_ranks]
        return complete

    def drop_disk(self, rank: int, entries: EntryRows) -> None:
        """Forget the copies that ``rank`` has of ``entries`` on disk."""
        self.disk_ranks[entries.astype(np.intp)] &= ~np.uint32(1 << rank)

    def generations(self, rank: int, entries: EntryRows) -> list[int]:
        """The life of the segment that ``rank`` has each of ``entries`` in; 0 where it never had one."""
        of_segment = self.segment_generation[rank]
        return [of_segment.get(segment, 0) for segment in self.disk_segment[rank][entries.astype(np.intp)].tolist()]

    def in_directory(self, rank: int, directory: int) -> EntryRows:
        """Entries with a copy in that directory of ``rank``."""
        touched = slice(0, self.table.touched)
        here = self.disk_segment[rank, touched] >> DIRECTORY_SHIFT == directory
        here &= (self.disk_ranks[touched] >> np.uint32(rank) & np.uint32(1)).astype(np.bool_)
        return np.flatnonzero(here).astype(np.int32)

    def in_segment(self, rank: int, segment: int) -> EntryRows:
        """Entries with a copy in that segment of ``rank``."""
        there = np.flatnonzero(self.disk_segment[rank, : self.table.touched] == segment).astype(np.int32)
        here: EntryRows = there[(self.disk_ranks[there] & np.uint32(1 << rank)) != 0]
        return here

    def pinned_segments(self, rank: int) -> set[int]:
        """Segments of ``rank`` that somebody may be reading."""
        pinned = np.flatnonzero(self.pins[: self.table.touched])
        on_disk = pinned[(self.disk_ranks[pinned] & np.uint32(1 << rank)) != 0]
        return set(self.disk_segment[rank, on_disk].tolist())

    def unlink(self, entry: int) -> None:
        """Make ``entry`` unreachable by its key, so that another can take its place; it stays until released."""
        self.table.unlink(entry)
        self._linked_at[entry] = False

    def release(self, entry: int) -> None:
        """Forget ``entry`` if nothing holds it: no pin, no copy, no child. Then its parent likewise.

        Harmless for an entry that went already, as those do that went as parents of others.
        """
        on_device = self._device_ranks_at
        while entry >= 0 and not (
            self._pins_at[entry]
            or self._host_ranks_at[entry]
            or self._disk_ranks_at[entry]
            or self._children_at[entry]
            or (on_device is not None and on_device[entry])
        ):
            parent = self._parent_at[entry]
            if self._linked_at[entry]:
                self.unlink(entry)
            self.table.recycle(entry)
            self._children_at[entry] = _FREE
            self.count -= 1
            if parent >= 0:
                self._children_at[parent] -= 1
            entry = parent

    def release_many(self, entries: EntryRows) -> None:
        """``release`` of each of ``entries``, all in use, in any order."""
        at = entries.astype(np.intp, copy=False)
        parents = self.parent[at]
        count_child(self.children, parents, -1)  # as if all of them went
        held = self.having(at) | self.pins[at].view(np.uint32)
        held |= self.children[at].view(np.uint32)
        if np.count_nonzero(held):
            going = self._without_ancestors(at, at[held != 0].tolist())
            at, parents = at[going], parents[going]
        linked = self.linked[at]
        self.table.unlink_many(at if np.count_nonzero(linked) == len(at) else at[linked])
        self.linked[at] = False
        self.table.recycle_many(at)
        self.children[at] = _FREE
        self.count -= len(at)
        above = parents[parents >= 0]
        for parent in above[self.children[above] == 0].tolist():
            self.release(parent)

    def cut_ghosts(self) -> None:
        """Forget entries that are there for their children's links alone: the children stand without a parent then.

        Nobody may be in the middle of adding entries: what is new looks the same.
        """
        touched = slice(0, self.table.touched)
        ghost = self.having(touched) == 0
        ghost &= (self.pins[touched] == 0) & (self.children[touched] > 0)
        if not ghost.any():
            return
        parents = self.parent[touched]
        below = np.flatnonzero((self.children[touched] != _FREE) & (parents >= 0) & ghost[parents])
        self.parent[below] = MISSING
        ghosts = np.flatnonzero(ghost).astype(np.int32)
        self.children[ghosts] = self.host_children[ghosts] = 0
        if self.device is not None:
            self.device.children[ghosts] = 0
        self.release_many(ghosts)

    def _without_ancestors(self, entries: Places, held: list[int]) -> Mask:
        """Which of ``entries`` go: not those ``held``, nor what these extend. Those that stay are children again."""
        going = dict.fromkeys(entries.tolist(), True)
        for first in held:
            entry = first
            while going.get(entry):
                going[entry] = False
                entry = self._parent_at[entry]
                if entry >= 0:
                    self._children_at[entry] += 1
        return np.fromiter(going.values(), np.bool_, len(going))

    def _is_usable(self, entry: int, *, exact: bool) -> bool:
        if entry < 0:
            return False
        ranks = self._host_ranks_at[entry] | self._disk_ranks_at[entry]
        if ranks != self._all_ranks and self._device_ranks_at is not None:
            ranks |= self._device_ranks_at[entry]
        if ranks != self._all_ranks:
            return False
        return not exact or self._lineage_at[entry] == Lineage.EXACT

    def _usable(self, entries: EntryRows, *, exact: bool) -> Mask:
        # MISSING indexes the last entry: whatever that says is overruled by the sign.
        good = self.readable(entries)
        good &= entries >= 0
        if exact:
            good &= self.lineage[entries] == Lineage.EXACT
        return good


__all__ = ["MAX_RANKS", "MISSING", "EntryRows", "Index", "KeyRows", "Mask"]
