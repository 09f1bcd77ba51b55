"""The index: what is known of every (key, group), in columns.

An entry has a parent (the block that it extends), pins, and copies: per rank an extent of the host arena and a place
on disk. It can be read when every rank has a copy; until then, and after its last copy went, lookups do not see it.
An entry that children still extend stays behind without copies, so that their links hold.

Memory: 112 bytes an entry for one rank (``Index.ENTRY_BYTES``), 20 more for every further one, touched as entries come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.core.columns import column
from kvtier.core.plan import DIRECTORY_SHIFT, Lineage
from kvtier.index.keytable import MISSING, EntryRows, KeyRows, KeyTable

Mask = npt.NDArray[np.bool_]

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

    def __init__(self, capacity: int, ranks: int) -> None:
        """Room for ``capacity`` entries of ``ranks`` ranks (at most 32)."""
        self.table = KeyTable(capacity)
        self.ranks = ranks
        self.all_ranks = np.uint32((1 << ranks) - 1)
        self.parent = column(capacity, np.int32)
        self.children = column(capacity, np.int32)
        self.host_children = column(capacity, np.int32)
        self.depth = column(capacity, np.int32)
        self.tokens = column(capacity, np.int32)
        self.pins = column(capacity, np.int32)
        self.lineage = column(capacity, np.uint8)
        self.linked = column(capacity, np.bool_)  # found by key; False once superseded or free
        self.host_ranks = column(capacity, np.uint32)  # bit r: rank r has a copy there
        self.disk_ranks = column(capacity, np.uint32)
        self.host_page = column((ranks, capacity), np.int32)
        self.host_pages = column((ranks, capacity), np.int32)
        self.disk_segment = column((ranks, capacity), np.int32)
        self.disk_page = column((ranks, capacity), np.int32)
        self.disk_pages = column((ranks, capacity), np.int32)
        # A segment is reclaimed only after all its entries forgot it, so they share its generation.
        self.segment_generation: tuple[dict[int, int], ...] = tuple({} for _ in range(ranks))
        self.count = 0

    def readable(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` every rank has a copy of."""
        ready: Mask = (self.host_ranks[entries] | self.disk_ranks[entries]) == self.all_ranks
        return ready

    def on_host(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` every rank has in host memory."""
        ready: Mask = self.host_ranks[entries] == self.all_ranks
        return ready

    def on_disk(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` every rank has on disk."""
        ready: Mask = self.disk_ranks[entries] == self.all_ranks
        return ready

    def prefix(self, keys: KeyRows, group: int, *, exact: bool) -> EntryRows:
        """Entries of the longest run of ``keys`` from the first on that can be read.

        A miss at the first key costs one probe; long runs are looked up in growing batches.
        """
        runs: list[EntryRows] = []
        at, size = 0, 1
        while at < len(keys):
            entries = self.table.find(keys[at : at + size], group)
            good = self._usable(entries, exact=exact)
            if not good.all():
                runs.append(entries[: int(np.argmin(good))])
                break
            runs.append(entries)
            at, size = at + size, _FIRST_LOOK if size == 1 else size * 8
        return np.concatenate(runs) if runs else np.empty(0, np.int32)

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
        self.parent[entries] = MISSING
        self.depth[entries] = depths
        self.tokens[entries] = tokens
        self.lineage[entries] = lineage
        for counts in (self.children, self.host_children, self.pins, self.host_ranks, self.disk_ranks):
            counts[entries] = 0
        self.linked[entries] = True
        self.count += len(entries)
        return entries

    def link(self, entries: EntryRows, parents: EntryRows) -> None:
        """Give ``entries``, which have none, their parents: entries, or MISSING."""
        self.parent[entries] = parents
        self._count_children(self.children, parents, 1)
        here = self.host_ranks[entries] == self.all_ranks
        self._count_children(self.host_children, parents[here], 1)

    def pin(self, entries: EntryRows) -> None:
        """Hold ``entries`` and their copies in place."""
        self.pins[entries] += 1

    def unpin(self, entries: EntryRows) -> EntryRows:
        """Let go of ``entries``; returns those that nobody holds any more."""
        self.pins[entries] -= 1
        free: EntryRows = entries[self.pins[entries] == 0]
        return free

    def add_host(
        self, rank: int, entries: EntryRows, pages: Sequence[int] | EntryRows, lengths: EntryRows
    ) -> EntryRows:
        """Rank ``rank`` has copies of ``entries`` in host memory; returns those that are complete there now."""
        self.host_page[rank, entries] = pages
        self.host_pages[rank, entries] = lengths
        self.host_ranks[entries] |= np.uint32(1 << rank)
        complete: EntryRows = entries[self.on_host(entries)]
        self._count_children(self.host_children, self.parent[complete], 1)
        return complete

    def drop_host(self, entry: int) -> list[tuple[int, int, int]]:
        """Forget the host copies of ``entry``; returns the (rank, page, pages) that they took."""
        ranks = int(self.host_ranks[entry])
        if ranks == int(self.all_ranks) and (parent := int(self.parent[entry])) >= 0:
            self.host_children[parent] -= 1
        self.host_ranks[entry] = 0
        return [
            (rank, int(self.host_page[rank, entry]), int(self.host_pages[rank, entry]))
            for rank in range(self.ranks)
            if ranks >> rank & 1
        ]

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
        self.disk_segment[rank, entries] = segments
        self.disk_page[rank, entries] = pages
        self.disk_pages[rank, entries] = lengths
        self.segment_generation[rank].update(zip(segments.tolist(), generations.tolist(), strict=True))
        self.disk_ranks[entries] |= np.uint32(1 << rank)
        complete: EntryRows = entries[self.on_disk(entries)]
        return complete

    def drop_disk(self, rank: int, entries: EntryRows) -> None:
        """Forget the copies that ``rank`` has of ``entries`` on disk."""
        self.disk_ranks[entries] &= ~np.uint32(1 << rank)

    def generations(self, rank: int, entries: EntryRows) -> list[int]:
        """The life of the segment that ``rank`` has each of ``entries`` in; 0 where it never had one."""
        of_segment = self.segment_generation[rank]
        return [of_segment.get(segment, 0) for segment in self.disk_segment[rank, entries].tolist()]

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
        self.linked[entry] = False

    def release(self, entry: int) -> None:
        """Forget ``entry`` if nothing holds it: no pin, no copy, no child. Then its parent likewise.

        Harmless for an entry that went already, as those do that went as parents of others.
        """
        while entry >= 0 and not (
            self.pins[entry] or self.host_ranks[entry] or self.disk_ranks[entry] or self.children[entry]
        ):
            parent = int(self.parent[entry])
            if self.linked[entry]:
                self.table.unlink(entry)
                self.linked[entry] = False
            self.table.recycle(entry)
            self.children[entry] = _FREE
            self.count -= 1
            if parent >= 0:
                self.children[parent] -= 1
            entry = parent

    def _usable(self, entries: EntryRows, *, exact: bool) -> Mask:
        # MISSING indexes the last entry: whatever that says is overruled by the sign.
        good: Mask = (entries >= 0) & self.readable(entries)
        if exact:
            good &= self.lineage[entries] == Lineage.EXACT
        return good

    @staticmethod
    def _count_children(counts: npt.NDArray[np.int32], parents: EntryRows, step: int) -> None:
        known = parents[parents >= 0]
        if len(known) == 1:
            counts[known[0]] += step
        elif len(known):
            np.add.at(counts, known, step)


__all__ = ["MAX_RANKS", "MISSING", "EntryRows", "Index", "KeyRows", "Mask"]
