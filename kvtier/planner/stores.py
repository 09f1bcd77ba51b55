"""Stores: which blocks are new, where they will lie, and the plans that bring them there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtier.core.keys import Keys
from kvtier.core.memory import PageTable
from kvtier.core.plan import PAGE_BYTES, Lineage, PlanKind, Priority, Reason
from kvtier.index.cells import wide
from kvtier.index.entries import MISSING, EntryRows
from kvtier.planner.hops import (
    FIRST_WRITE_HOP_BYTES,
    STORE_HOP_BYTES,
    WRITE_HOP_BYTES,
    Hop,
    Ints,
    Join,
    Targets,
    stretches,
)
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState
from kvtier.planner.tickets import Durability, Outcome, Ticket
from kvtier.planner.wishes import StoreWish

_EXACT: Final = int(Lineage.EXACT)
_WAITING: Final = bytes((Outcome.WAITING,))
_EXISTING: Final = bytes((Outcome.EXISTING,))


@dataclass(slots=True, eq=False)
class _NewRows:
    """What one group of a store adds: entries, their blocks, and the reserved extents per rank."""

    entries: EntryRows
    blocks: Ints
    starts: dict[int, list[int]]
    pages: int

    def targets(self) -> dict[int, Targets]:
        """The extents per rank."""
        pages = np.array((self.pages,), np.int32).repeat(len(self.entries))
        return {rank: Targets(np.array(starts, np.int32), pages) for rank, starts in self.starts.items()}


class Stores:
    """Plans stores."""

    def __init__(self, state: ControlState, stages: Stages) -> None:
        """Everything is kept in ``state``; tickets go on through ``stages``."""
        self._state = state
        self._stages = stages
        self._next_cut = 0
        self._least_free_entries = max(1, state.index.table.capacity >> 6)

    def store(self, wish: StoreWish) -> None:
        """Plan what is wished for: new blocks are gathered, pending ones are joined."""
        state, ticket, keys, lineage = self._state, wish.ticket, wish.keys, wish.lineage
        first = ticket.first_block
        if keys.root.weights_version != state.version or not state.attached:
            ticket.fail_from(first, Reason.RETIRED if state.attached else Reason.CLOSED)
            self._stages.advance(ticket)
            return
        is_short = len(ticket.outcome) == 1 and ticket.durability == Durability.MEMORY
        if is_short and self._store_one(wish):
            return
        span = slice(first, wish.stop)
        if len(ticket.outcome) * len(state.layout.groups) > self._spare_entries:
            self._make_entries_free(keys, span)
        new: list[_NewRows] = []
        shields: list[EntryRows] = []
        try:
            for group in range(len(state.layout.groups)):
                entries = state.index.find_blocks(keys.rows()[span], keys.digests[span], group)
                wanted = self._wanted(ticket, entries, first, lineage, shields)
                new.append(self._add(keys, group, first, entries, wanted, lineage, ticket))
                if ticket.durability > Durability.MEMORY:
                    self._hold(ticket, entries, first)
            self._mark_existing(ticket, new)
            self._send_store(wish, new)
        finally:
            for shield in shields:
                state.unpinned(state.index.unpin(shield))
        self._stages.advance(ticket)

    def _make_entries_free(self, keys: Keys, span: slice) -> None:
        """Where the new ones of those blocks find too few entries, forget those that only stand for children's links.

        Copies that go leave such entries behind, so it is not worth a look before many have gone. Where that is not
        enough, the disk holds more blocks than there are entries for: the oldest have to go before it is full.
        """
        index, counts = self._state.index, self._state.counts
        found = [
            index.find_blocks(keys.rows()[span], keys.digests[span], group)
            for group in range(len(self._state.layout.groups))
        ]
        count = sum(int(np.count_nonzero(entries == MISSING)) for entries in found)
        if self._spare_entries >= count:
            return
        gone = counts["removed_host_blocks"] + counts["removed_disk_blocks"]
        if gone >= self._next_cut:
            index.cut_ghosts()
            self._next_cut = gone + self._least_free_entries
        self._state.missing_entries = max(0, count - self._spare_entries)

    @property
    def _spare_entries(self) -> int:
        """Entries that may be taken before others have to go."""
        return self._state.index.table.free - self._least_free_entries

    def has_room_for(self, blocks: int) -> bool:
        """Whether so many new blocks, of all groups, may be entered and be under way."""
        return blocks <= min(self._spare_entries, self._store_room(self._state.block_bytes))

    def before(self, keys: Keys, group: int, block: int) -> int:
        """The entry that ``block`` extends, or MISSING."""
        return self._state.index.table.find_one(keys.digests[block - 1], group) if block else MISSING

    def at_stake(self, before: Iterable[int]) -> EntryRows:
        """Those of ``before``, entries or MISSING, that would be gone if host memory freed them.

        They are what somebody is about to extend: without them the new blocks would be of no use.
        """
        index = self._state.index
        lone = {entry for entry in before if entry >= 0 and index.disk_ranks_at[entry] != index.every_rank}
        return wide(np.array(sorted(lone), np.int32))

    def send(self, hop: Hop, parents: bytes, pages: PageTable, start: int, stop: int) -> None:
        """One STORE plan for each rank: tokens [start, stop) of ``pages``; ``parents`` are the keys the rows extend."""
        state, ticket = self._state, hop.ticket
        hop.nbytes = state.nbytes_of(hop.entries)
        state.send(
            hop, priority=Priority.SPILL, parents=parents, chain=state.config.host.codec, pages=pages, start=start,
            stop=stop, durable=ticket is not None and ticket.durability > Durability.MEMORY,
        )  # fmt: skip
        if ticket is not None:
            ticket.sources += 1
        state.storing.update(dict.fromkeys(hop.entries.tolist(), hop))
        hop.stores = True

    def _store_one(self, wish: StoreWish) -> bool:
        """The commonest store: one block that nobody knows, and there is room for it. False for any other."""
        state, index, keys, block = self._state, self._state.index, wish.keys, wish.ticket.first_block
        key = keys.digests[block]
        if not state.is_plain or index.table.find_one(key, 0) >= 0 or self._spare_entries < 1:
            return False
        if self._store_room(state.block_bytes) < 1 or (page := state.host.take_one()) < 0:
            return False
        before = self.before(keys, 0, block) if keys.chained else MISSING
        entry = index.add_one(key, before, depth=block, tokens=keys.block_tokens, lineage=wish.lineage)
        one = np.array((entry, block, page, state.layout.record_pages[0]), np.int32)
        hop = Hop(state.next_number(), PlanKind.STORE, one[:1], one[1:2], 1, state.version, wish.ticket)
        hop.targets = {0: Targets(one[2:3], one[3:])}
        self.send(hop, keys.parent(block), wish.pages, wish.start, wish.stop * keys.block_tokens)
        return True

    def _wanted(
        self, ticket: Ticket, entries: EntryRows, first: int, lineage: Lineage, shields: list[EntryRows]
    ) -> Ints:
        """Which of ``entries`` are to be stored: all but those that are kept, or that somebody is storing.

        What is there already is pinned (into ``shields``): neither what is kept nor an entry that is to be written
        again may go to make room for the rest.
        """
        state = self._state
        if state.index.all_missing(entries):
            return wide(np.arange(len(entries)))
        state.index.pin(entries[entries >= 0])
        self._supersede(entries, lineage)
        shields.append(entries[entries >= 0])
        kept = (entries >= 0) & state.index.readable(entries)
        state.host.touch(entries[kept])
        self._join(ticket, entries, first)
        wanted = wide((~kept).nonzero()[0])
        if state.storing and len(wanted):
            wanted = wanted[~state.being_stored(entries[wanted])]
        return wanted

    def _mark_existing(self, ticket: Ticket, new: list[_NewRows]) -> None:
        """What has not failed and is not stored now is there, or will be by somebody else."""
        if all(len(part.blocks) == len(ticket.outcome) for part in new):
            return
        moving = {block for part in new for block in part.blocks.tolist()}
        if not moving:
            ticket.outcome = ticket.outcome.replace(_WAITING, _EXISTING)
            return
        for at, outcome in enumerate(ticket.outcome):
            if outcome == Outcome.WAITING and ticket.first_block + at not in moving:
                ticket.outcome[at] = Outcome.EXISTING

    def _supersede(self, entries: EntryRows, lineage: Lineage) -> None:
        """Exact content takes the place of approximate content: those of ``entries``, all pinned, become MISSING.

        Whoever else holds the old content keeps it until the last pin goes. That it cannot be read makes no
        difference: a copy on one rank, or one on its way, would pass as the new content.
        """
        state, index = self._state, self._state.index
        if not len(entries):
            return
        worse = (entries >= 0) & (index.lineage[entries] != _EXACT)
        if lineage != Lineage.EXACT:  # an exact one without copies that others hold is not to be filled with this
            worse = (entries >= 0) & ~worse & ~index.readable(entries) & (index.pins[entries] > 1)
            worse &= ~state.being_stored(entries)
        if not np.count_nonzero(worse):
            return
        old = entries[worse]
        state.supersede(old)
        entries[worse] = MISSING
        state.unpinned(index.unpin(old))

    def _join(self, ticket: Ticket, entries: EntryRows, first: int) -> None:
        storing = self._state.storing
        if not storing:
            return
        joined: dict[int, list[tuple[int, int]]] = {}
        for at, entry in enumerate(entries.tolist()):
            hop = storing.get(entry)
            if hop is not None:
                joined.setdefault(hop.plan_id, []).append((entry, first + at))
        for plan_id, pairs in joined.items():
            hop = self._state.hops[plan_id]
            rows = np.array([hop.row_of[entry] for entry, _ in pairs], np.int32)
            hop.joins.append(Join(ticket, rows, np.array([block for _, block in pairs], np.int32)))
            ticket.waits += 1

    def _add(
        self,
        keys: Keys,
        group: int,
        first: int,
        entries: EntryRows,
        wanted: Ints,
        lineage: Lineage,
        ticket: Ticket,
    ) -> _NewRows:
        """Reserve room for, and make entries of, the ``wanted`` blocks, as many as fit; fills ``entries`` in."""
        state, index = self._state, self._state.index
        if not len(wanted):
            return _NewRows(entries[:0], wanted, {}, 0)
        wanted_now = min(len(wanted), index.table.free, self._store_room(state.layout.block_bytes[group]))
        shield = self.at_stake((self.before(keys, group, first),) if keys.chained else ())
        index.pin(shield)
        try:
            fit, starts = state.host.reserve(group, wanted_now)
        finally:
            state.unpinned(index.unpin(shield))
        if fit < len(wanted):
            for at in wanted[fit:].tolist():
                ticket.fail(first + at, Reason.REFUSED)
            wanted = wanted[:fit]
        if fit and fit == len(entries) and index.all_missing(entries):
            entries[:] = self._add_chain(keys, group, first, fit, lineage)
        elif fit:
            self._add_some(keys, group, first, entries, wanted, lineage)
        return _NewRows(entries[wanted], first + wanted, starts, state.layout.record_pages[group])

    def _add_chain(self, keys: Keys, group: int, first: int, count: int, lineage: Lineage) -> EntryRows:
        """New entries for ``count`` blocks from ``first`` on."""
        index = self._state.index
        depths = np.arange(first, first + count, dtype=np.int32)
        rows = keys.rows()[first : first + count]
        entries = wide(index.add(rows, group, depths=depths, tokens=keys.block_tokens, lineage=int(lineage)))
        if keys.chained:
            index.link_chain(entries, self.before(keys, group, first))
        return entries

    def _add_some(self, keys: Keys, group: int, first: int, entries: EntryRows, wanted: Ints, lineage: Lineage) -> None:
        """Those of the ``wanted`` blocks that have no entry get one; the others have new content."""
        index = self._state.index
        missing = wanted[entries[wanted] == MISSING]
        if len(missing):
            depths = first + missing
            entries[missing] = index.add(
                keys.rows()[first + missing], group, depths=depths, tokens=keys.block_tokens, lineage=int(lineage)
            )
            if keys.chained:
                before = np.array((self.before(keys, group, first),), np.int32)
                index.link(entries[missing], np.concatenate((before, entries[:-1]))[missing])
        index.lineage[entries[wanted]] = int(lineage)

    def _store_room(self, block_bytes: int) -> int:
        """How many more blocks may be under way to host memory; one always may where nothing is."""
        under_way = self._state.in_flight_bytes[PlanKind.STORE]
        room = (self._state.config.host.store_queue - under_way) // block_bytes
        return max(room, 0 if under_way else 1)

    def _send_store(self, wish: StoreWish, new: list[_NewRows]) -> None:
        state, ticket, keys = self._state, wish.ticket, wish.keys
        new = [part for part in new if len(part.entries)]
        if not new:
            ticket.source_free = True
            if ticket.waits:  # else its end is news enough
                state.news.append(ticket)
            return
        entries, blocks, targets = _together(new)
        for rows in self._hops_of(ticket, len(entries), max(part.pages for part in new) * PAGE_BYTES):
            ranks, number = state.index.every_rank, state.next_number()
            hop = Hop(number, PlanKind.STORE, entries[rows], blocks[rows], ranks, state.version, ticket)
            hop.targets = {rank: target.of_rows(rows) for rank, target in targets.items()}
            parents = keys.parents(hop.blocks.tolist())
            self.send(hop, parents, wish.pages, wish.start, wish.stop * keys.block_tokens)

    def _hops_of(self, ticket: Ticket, rows: int, nbytes: int) -> list[slice]:
        if ticket.durability == Durability.MEMORY:
            return stretches(rows, nbytes, STORE_HOP_BYTES)
        under_way = self._state.in_flight_bytes
        is_idle = not under_way[PlanKind.STORE] and not under_way[PlanKind.SPILL]
        return stretches(rows, nbytes, WRITE_HOP_BYTES, first_bytes=FIRST_WRITE_HOP_BYTES if is_idle else None)

    def _hold(self, ticket: Ticket, entries: EntryRows, first: int) -> None:
        """Pin ``entries`` until ``ticket`` ends: it follows them down to disk."""
        there = wide((entries >= 0).nonzero()[0])
        self._state.index.pin(entries[there])
        ticket.held.append((entries[there], first + there))


def _together(new: list[_NewRows]) -> tuple[EntryRows, Ints, dict[int, Targets]]:
    """Entries, blocks and targets of all groups, one after the other."""
    if len(new) == 1:
        return new[0].entries, new[0].blocks, new[0].targets()
    entries = np.concatenate([part.entries for part in new])
    blocks = np.concatenate([part.blocks for part in new])
    parts = [part.targets() for part in new]
    targets = {
        rank: Targets(
            np.concatenate([part[rank].page for part in parts]), np.concatenate([part[rank].pages for part in parts])
        )
        for rank in parts[0]
    }
    return entries, blocks, targets
