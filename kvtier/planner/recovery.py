"""What an earlier life left on disk: which copy of a block counts, and which block extends which.

Rows come by segment, so the copies of one block may lie in different batches, and children may come before their
parents. Everything is done for whole batches in arrays; what waits for its parent waits in arrays, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import Lineage, Recovered, Table, Tier
from kvtier.index.entries import MISSING, EntryRows, KeyRows, Mask
from kvtier.planner.state import ControlState


@dataclass(frozen=True, slots=True, eq=False)
class _Orphans:
    """Entries whose parents were not known yet. Their keys tell whether a number is still theirs."""

    entries: EntryRows
    keys: KeyRows
    parents: KeyRows
    group: int


class Recovery:
    """Takes in what data planes found, until the last of them has told everything."""

    def __init__(self, state: ControlState) -> None:
        """Nothing was found."""
        self._state = state
        self._sequences: dict[int, npt.NDArray[np.int64]] = {}
        self._orphans: list[_Orphans] = []

    def begin(self, rank: int) -> None:
        """From now on ``rank`` tells what it found."""
        self._state.recovering.add(rank)
        self._sequences[rank] = np.zeros(self._state.index.table.capacity, np.int64)

    def written(self, rank: int, entries: EntryRows) -> None:
        """This life wrote ``entries``: nothing that is found can be newer."""
        if rank in self._sequences:
            self._sequences[rank][entries] = 0

    def take(self, report: Recovered) -> None:
        """One batch: exact copies come first, then the highest sequence counts."""
        if report.rank not in self._sequences:
            self.begin(report.rank)
        for group in np.unique(report.rows["group"]).tolist():
            self._take_group(report.rank, group, _winners(report.rows[report.rows["group"] == group]))
        if report.final:
            self._end(report.rank)

    def give_up(self, rank: int) -> None:
        """``rank`` is gone and tells nothing more."""
        if rank in self._state.recovering:
            try:
                self._end(rank)
            finally:
                self._state.recovering.discard(rank)

    def _end(self, rank: int) -> None:
        orphans, self._orphans = self._orphans, []
        for some in orphans:
            self._link(some)
        self._state.recovering.discard(rank)
        if not self._state.recovering:
            self._sequences.clear()
            self._orphans.clear()

    def _take_group(self, rank: int, group: int, rows: Table) -> None:
        state, index = self._state, self._state.index
        keys = np.ascontiguousarray(rows["key"])
        entries = index.table.find(keys, group)
        self._supersede(entries, rows)
        useful = self._useful(rank, entries, rows)
        missing = np.flatnonzero(entries == MISSING)[: index.table.free]
        entries[missing] = index.add(
            keys[missing], group, depths=rows["depth"][missing], tokens=rows["tokens"][missing],
            lineage=rows["lineage"][missing],
        )  # fmt: skip
        useful &= entries >= 0
        rows, entries, keys = rows[useful], entries[useful], keys[useful]
        before = index.on_disk(entries)
        index.add_disk(rank, entries, rows["segment"], rows["page"], rows["pages"], rows["generation"])
        index.lineage[entries] = rows["lineage"]
        self._sequences[rank][entries] = rows["sequence"] + 1
        if group in state.windows.partial:  # windows and states extend nothing
            waiting = np.zeros(len(entries), np.bool_)
        else:
            waiting = (index.parent[entries] == MISSING) & (rows["depth"] > 0)
        orphans = _Orphans(entries[waiting], keys[waiting], np.ascontiguousarray(rows["parent"][waiting]), group)
        if len(orphans.entries):
            self._link(orphans)
        state.tell("stored", entries[index.on_disk(entries) & ~before], Tier.DISK)

    def _supersede(self, entries: EntryRows, rows: Table) -> None:
        """An exact copy takes the place of approximate content, and an approximate one that of what left no copy.

        The latter where somebody holds the exact block: it is not to be filled with other content than was promised.
        Those of ``entries`` whose place is taken become MISSING.
        """
        state, index = self._state, self._state.index
        found_exact, known_exact = rows["lineage"] == Lineage.EXACT, index.lineage[entries] == Lineage.EXACT
        bare = (index.having(entries) | state.being_stored(entries)) == 0
        over = (found_exact & ~known_exact) | (~found_exact & known_exact & bare & (index.pins[entries] > 0))
        over &= entries >= 0
        old = entries[over]
        state.supersede(old)
        entries[over] = MISSING
        state.unpinned(old[index.pins[old] == 0])

    def _useful(self, rank: int, entries: EntryRows, rows: Table) -> Mask:
        """Rows that are no worse than what is known: unknown blocks, ghosts, and newer copies of the same lineage."""
        index, sequences = self._state.index, self._sequences[rank]
        held = index.having(entries) != 0
        held |= self._state.being_stored(entries)
        same = rows["lineage"] == index.lineage[entries]
        here = (index.disk_ranks[entries] >> np.uint32(rank) & np.uint32(1)).astype(np.bool_)
        newer = ~here | ((sequences[entries] > 0) & (sequences[entries] <= rows["sequence"]))
        useful: Mask = (entries == MISSING) | ~held | (same & newer)
        return useful

    def _link(self, orphans: _Orphans) -> None:
        """Link those whose parents are there; the others wait until their rank has told everything."""
        index, entries = self._state.index, orphans.entries
        theirs = (index.table.keys[entries] == orphans.keys).all(axis=1) & index.linked[entries]
        theirs &= index.parent[entries] == MISSING
        parents = index.table.find(orphans.parents, orphans.group)
        known = theirs & (parents >= 0)
        # Depths count up along a chain: whatever damaged rows say, links never run in a circle.
        sound = known & (index.depth[parents] + 1 == index.depth[entries])
        index.link(entries[sound], parents[sound])
        left = theirs & ~known
        if left.any():
            rest = _Orphans(entries[left], orphans.keys[left], orphans.parents[left], orphans.group)
            self._orphans.append(rest)


def _winners(rows: Table) -> Table:
    """One row per key: exact lineage before approximate, then the highest sequence."""
    order = np.lexsort((-rows["sequence"], rows["lineage"]))
    keys = np.ascontiguousarray(rows["key"][order]).view("V32").reshape(-1)
    _, first = np.unique(keys, return_index=True)
    winners: Table = rows[np.sort(order[first])]
    return winners
