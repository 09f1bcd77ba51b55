"""Stores: which blocks are new, where they will lie, and the plans that bring them there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtier.core.keys import Keys
from kvtier.core.memory import PageTable
from kvtier.core.plan import PAGE_BYTES, Lineage, PlanKind, Priority, Reason, Tier
from kvtier.index.cells import wide
from kvtier.index.entries import MISSING, EntryRows, Mask
from kvtier.planner.hops import (
    FIRST_WRITE_HOP_BYTES,
    NO_ENTRIES,
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
_FAILED: Final = int(Outcome.FAILED)
_WAITING: Final = bytes((Outcome.WAITING,))
_EXISTING: Final = bytes((Outcome.EXISTING,))


@dataclass(slots=True, eq=False)
class _Asked:
    """Blocks of one group that a store is about, and their entries: MISSING where there is none yet."""

    group: int
    blocks: Ints
    entries: EntryRows
    is_chain: bool
    """Whether each block extends the one before it."""
    are_spare: bool = False
    """Windows and states that no hit is likely to end with: they are kept where nothing else has to go for them."""


@dataclass(slots=True, eq=False)
class _Room:
    """Reserved room per rank for ``rows`` of a part, and its blocks that found none."""

    part: _Asked
    rows: Ints
    starts: dict[int, list[int]]
    refused: Ints
    tier: Tier = Tier.HOST


@dataclass(slots=True, eq=False)
class _NewRows:
    """What one group of a store adds: entries, their blocks, and the reserved extents per rank."""

    entries: EntryRows
    blocks: Ints
    targets: dict[int, Targets]
    pages: int
    """Of the longest record among them."""
    between: EntryRows
    """Windows and states that no hit is likely to end with."""
    tier: Tier = Tier.HOST
    """That the extents are in."""

    @classmethod
    def together(cls, parts: Sequence[_NewRows]) -> _NewRows:
        """All of ``parts``, at least one, of one tier, one after the other."""
        if len(parts) == 1:
            return parts[0]
        targets = {
            rank: Targets(
                np.concatenate([part.targets[rank].page for part in parts]),
                np.concatenate([part.targets[rank].pages for part in parts]),
            )
            for rank in parts[0].targets
        }
        return cls(
            np.concatenate([part.entries for part in parts]), np.concatenate([part.blocks for part in parts]), targets,
            max(part.pages for part in parts), np.concatenate([part.between for part in parts]), parts[0].tier,
        )  # fmt: skip


_NOTHING_NEW: Final = _NewRows(NO_ENTRIES, NO_ENTRIES, {}, 0, NO_ENTRIES)


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
        state, ticket, keys = self._state, wish.ticket, wish.keys
        first = ticket.first_block
        if keys.root.weights_version != state.version or not state.attached:
            ticket.fail_from(first, Reason.RETIRED if state.attached else Reason.CLOSED)
            self._stages.advance(ticket)
            return
        is_short = len(ticket.outcome) == 1 and ticket.durability == Durability.MEMORY
        if is_short and self._store_one(wish):
            return
        asked = [self._whole(wish, group) for group in state.windows.whole]
        if sum(len(part.blocks) for part in asked) > self._spare_entries:
            self._make_entries_free(sum(int(np.count_nonzero(part.entries == MISSING)) for part in asked))
            asked = [self._whole(wish, group) for group in state.windows.whole]  # some may have been forgotten
        shields: list[EntryRows] = []
        try:
            wanted = [self._wanted(ticket, part, wish.lineage, shields) for part in asked]  # before anything may go
            new = self._add(wish, asked, wanted) if asked else []
            # Of blocks that found no room above nothing is worth keeping.
            stored = state.windows.stored if len(ticket.outcome) else ()
            for group in stored:
                for part in self._partial(wish, group):
                    new += self._add_partial(wish, part, shields)
            self._mark_existing(ticket, new)
            self._send_stores(wish, new)
        finally:
            for shield in shields:
                state.unpinned(state.index.unpin(shield))
        self._stages.advance(ticket)

    def _whole(self, wish: StoreWish, group: int) -> _Asked:
        """All blocks that are to be stored of ``group``."""
        keys, span = wish.keys, slice(wish.ticket.first_block, wish.stop)
        entries = self._state.index.find_blocks(keys.rows()[span], keys.digests[span], group)
        blocks = wide(np.arange(span.start, span.start + len(entries)))
        return _Asked(group, blocks, entries, keys.chained)

    def _partial(self, wish: StoreWish, group: int) -> Iterator[_Asked]:
        """Blocks of ``group``, which only ends of hits need, that are worth keeping and that the engine has.

        First those that hits are likely to end with, then the others. Windows reach back to blocks before the first one
        that is to be stored.
        """
        windows, ticket, size = self._state.windows, wish.ticket, wish.keys.block_tokens
        first, stop = ticket.first_block, ticket.first_block + len(ticket.outcome)
        tokens = (stop * size,) if wish.checkpoints is None else wish.checkpoints
        ends = windows.ends(first, stop, tokens)
        refused = np.frombuffer(ticket.outcome, np.uint8) == _FAILED
        ends = ends[~refused[ends - 1 - first]]
        low = windows.reach(group, first, stop).start
        are_ends = windows.are_worth_keeping(group, low, stop, ends)
        worth = are_ends.copy()
        if windows.keeps_every_block:
            worth[first - low :] = ~refused
        worth[: first - low] &= self._are_kept(wish.keys, range(low, first))
        if (held := wish.held.get(group)) is not None:
            worth &= held.those_of(np.arange(low, stop))
        for own, are_spare in ((worth & are_ends, False), (worth & ~are_ends, True)):
            blocks = wide(low + own.nonzero()[0])
            if len(blocks):
                entries = wide(self._state.index.table.find(wish.keys.rows()[blocks], group))
                yield _Asked(group, blocks, entries, is_chain=False, are_spare=are_spare)

    def _are_kept(self, keys: Keys, blocks: range) -> Mask:
        """Which of ``blocks`` every group has, or is getting, that needs the whole prefix."""
        index = self._state.index
        kept = np.ones(len(blocks), np.bool_)
        for group in self._state.windows.whole if blocks else ():
            entries = wide(index.table.find(keys.rows()[blocks.start : blocks.stop], group))
            kept &= (entries >= 0) & (index.readable(entries) | self._state.being_stored(entries))
        return kept

    def _add_partial(self, wish: StoreWish, part: _Asked, shields: list[EntryRows]) -> list[_NewRows]:
        wanted = self._wanted(wish.ticket, part, wish.lineage, shields)
        for book in self._state.books.values() if not part.are_spare else ():
            book.keep(part.entries[part.entries >= 0])
        new = self._add(wish, (part,), (wanted,))
        came = {block for one in new for block in one.blocks.tolist()}
        digests, missing = wish.keys.digests, set(part.blocks[wanted].tolist()) - came
        self._state.dead.suspect(digests[block] for block in missing)
        return new

    def _make_entries_free(self, count: int) -> None:
        """Where ``count`` new ones find too few entries, forget those that only stand for children's links.

        Copies that go leave such entries behind, so it is not worth a look before many have gone. Where that is not
        enough, the disk holds more blocks than there are entries for: the oldest have to go before it is full.
        """
        index, counts = self._state.index, self._state.counts
        if self._spare_entries >= count:
            return
        gone = counts["removed_device_blocks"] + counts["removed_host_blocks"] + counts["removed_disk_blocks"]
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
        hop.nbytes, hop.stored_at = state.nbytes_of(hop.entries), state.uses.count + 1
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
        if self._store_room(state.block_bytes) < 1 or (page := state.top.take_one()) < 0:
            return False
        before = self.before(keys, 0, block) if keys.chained else MISSING
        entry = index.add_one(key, before, depth=block, tokens=keys.block_tokens, lineage=wish.lineage)
        one = np.array((entry, block, page, state.layout.record_pages[0]), np.int32)
        hop = Hop(state.next_number(), PlanKind.STORE, one[:1], one[1:2], 1, state.version, wish.ticket)
        hop.targets, hop.tier = {0: Targets(one[2:3], one[3:])}, state.top_tier
        self.send(hop, keys.parent(block), wish.pages, wish.start, wish.stop * keys.block_tokens)
        return True

    def _wanted(self, ticket: Ticket, part: _Asked, lineage: Lineage, shields: list[EntryRows]) -> Ints:
        """Which rows of ``part`` are to be stored: all but those that are kept, or that somebody is storing.

        What is there already is pinned (into ``shields``): neither what is kept nor an entry that is to be written
        again may go to make room for the rest.
        """
        state, entries = self._state, part.entries
        if not len(entries) or state.index.all_missing(entries):
            return wide(np.arange(len(entries)))
        state.index.pin(entries[entries >= 0])
        self._supersede(entries, lineage)
        shields.append(entries[entries >= 0])
        kept = (entries >= 0) & state.index.readable(entries)
        for book in state.books.values():
            book.touch(entries[kept])
        self._join(ticket, part)
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

    def _join(self, ticket: Ticket, part: _Asked) -> None:
        storing = self._state.storing
        if not storing:
            return
        joined: dict[int, list[tuple[int, int]]] = {}
        for entry, block in zip(part.entries.tolist(), part.blocks.tolist(), strict=True):
            hop = storing.get(entry)
            if hop is not None:
                joined.setdefault(hop.plan_id, []).append((entry, block))
        for plan_id, pairs in joined.items():
            hop = self._state.hops[plan_id]
            rows = np.array([hop.row_of[entry] for entry, _ in pairs], np.int32)
            hop.joins.append(Join(ticket, rows, np.array([block for _, block in pairs], np.int32)))
            ticket.waits += 1
            if not part.are_spare:
                hop.between = np.setdiff1d(hop.between, part.entries)

    def _add(self, wish: StoreWish, parts: Sequence[_Asked], wanted: Sequence[Ints]) -> list[_NewRows]:
        """Make entries of the ``wanted`` rows, as many as fit, and hold them where somebody waits for the disk.

        A block of which one of ``parts`` found no room is refused as a whole: the others alone are of no use.
        """
        rooms = [self._reserve(wish, part, rows) for part, rows in zip(parts, wanted, strict=True)]
        refused = np.concatenate([room.refused for room in rooms])
        for block in refused.tolist():
            wish.ticket.fail(block, Reason.REFUSED)
        if len(refused) and (first := int(refused.min())):  # the end that was meant is not where this ends now
            self._state.dead.suspect((wish.keys.digests[first - 1],))
        if len(refused) and len(parts) > 1:
            rooms = [self._without(room, refused) for room in rooms]
        new = [self._enter(wish, room) for room in rooms]
        for part in parts if wish.ticket.durability > Durability.MEMORY else ():
            if part.group in self._state.spilled_groups:
                self._hold(wish.ticket, part)
        return new

    def _reserve(self, wish: StoreWish, part: _Asked, wanted: Ints) -> _Room:
        """Room for as many of the ``wanted`` rows as fit; what the first of them extends stays."""
        state, index, group = self._state, self._state.index, part.group
        if not len(wanted):
            return _Room(part, wanted, {}, part.blocks[:0])
        most = min(len(wanted), index.table.free, self._store_room(state.layout.block_bytes[group]))
        shield = self.at_stake((self.before(wish.keys, group, wish.ticket.first_block),) if part.is_chain else ())
        index.pin(shield)
        try:
            if part.are_spare:
                tier, (fit, starts) = Tier.HOST, state.host.reserve_spare(group, most)
            else:
                on_device = wish.ticket.durability == Durability.MEMORY
                tier, fit, starts = self.find_room(group, most, on_device=on_device)
        finally:
            state.unpinned(index.unpin(shield))
        refused = part.blocks[:0] if part.are_spare else part.blocks[wanted[fit:]]
        return _Room(part, wanted[:fit], starts, refused, tier)

    def find_room(self, group: int, count: int, *, on_device: bool = True) -> tuple[Tier, int, dict[int, list[int]]]:
        """Room for ``count`` new records of ``group``, on the device where all of them fit, else in host memory.

        Returns the tier, how many fit, and per rank the first pages of those. What has to reach the disk takes the
        short way: not ``on_device``.
        """
        device = self._state.device
        if on_device and device is not None and device.could_hold(group, count):
            fit, starts = device.reserve(group, count)
            if fit == count:
                return Tier.DEVICE, fit, starts
            device.cancel(group, starts)
        return Tier.HOST, *self._state.host.reserve(group, count)

    def _without(self, room: _Room, refused: Ints) -> _Room:
        """``room`` without that of blocks that another group refused, which is free again."""
        stays = ~np.isin(room.part.blocks[room.rows], refused)
        if stays.all():
            return room
        pages = self._state.layout.record_pages[room.part.group]
        starts = {rank: np.array(first, np.int32) for rank, first in room.starts.items()}
        for rank, first in starts.items():
            self._state.books[room.tier].free((rank, start, pages) for start in first[~stays].tolist())
        kept = {rank: first[stays].tolist() for rank, first in starts.items()}
        return _Room(room.part, room.rows[stays], kept, room.refused, room.tier)

    def _enter(self, wish: StoreWish, room: _Room) -> _NewRows:
        """Entries of the rows that have room; fills those of its part in."""
        state, index, part, rows = self._state, self._state.index, room.part, room.rows
        if not len(rows):
            return _NOTHING_NEW
        if part.is_chain and len(rows) == len(part.entries) and index.all_missing(part.entries):
            first = wish.ticket.first_block
            part.entries[:] = self._add_chain(wish.keys, part.group, first, len(rows), wish.lineage)
        else:
            self._add_some(wish.keys, part, rows, wish.lineage)
        new = part.entries[rows]
        between = new if part.are_spare else new[:0]
        pages = state.layout.record_pages[part.group]
        lengths = np.array((pages,), np.int32).repeat(len(new))
        targets = {rank: Targets(np.array(first, np.int32), lengths) for rank, first in room.starts.items()}
        return _NewRows(new, part.blocks[rows], targets, pages, between, room.tier)

    def _add_chain(self, keys: Keys, group: int, first: int, count: int, lineage: Lineage) -> EntryRows:
        """New entries for ``count`` blocks from ``first`` on."""
        index = self._state.index
        depths = np.arange(first, first + count, dtype=np.int32)
        rows = keys.rows()[first : first + count]
        entries = wide(index.add(rows, group, depths=depths, tokens=keys.block_tokens, lineage=int(lineage)))
        if keys.chained:
            index.link_chain(entries, self.before(keys, group, first))
        return entries

    def _add_some(self, keys: Keys, part: _Asked, wanted: Ints, lineage: Lineage) -> None:
        """Those of the ``wanted`` rows that have no entry get one; the others have new content.

        Windows and states extend nothing: each stands for itself.
        """
        index, entries = self._state.index, part.entries
        missing = wanted[entries[wanted] == MISSING]
        if len(missing):
            depths = part.blocks[missing]
            entries[missing] = index.add(
                keys.rows()[depths], part.group, depths=depths, tokens=keys.block_tokens, lineage=int(lineage)
            )
            if part.is_chain:
                before = np.array((self.before(keys, part.group, int(part.blocks[0])),), np.int32)
                index.link(entries[missing], np.concatenate((before, entries[:-1]))[missing])
        index.lineage[entries[wanted]] = int(lineage)

    def _store_room(self, block_bytes: int) -> int:
        """How many more blocks may be under way to host memory; one always may where nothing is."""
        under_way = self._state.in_flight_bytes[PlanKind.STORE]
        room = (self._state.config.host.store_queue - under_way) // block_bytes
        return max(room, 0 if under_way else 1)

    def _send_stores(self, wish: StoreWish, new: list[_NewRows]) -> None:
        """One hop over all groups that need the whole prefix; windows and states, which may be much larger, alone."""
        ticket, whole = wish.ticket, len(self._state.windows.whole)
        alike = [part for part in new[:whole] if len(part.entries)]
        parts = [_NewRows.together(alike)] if len({part.tier for part in alike}) == 1 else alike
        parts += [part for part in new[whole:] if len(part.entries)]
        for part in parts:
            self._send_store(wish, part)
        if not parts:
            ticket.source_free = True
            if ticket.waits:  # else its end is news enough
                self._state.news.append(ticket)

    def _send_store(self, wish: StoreWish, part: _NewRows) -> None:
        state, ticket, keys = self._state, wish.ticket, wish.keys
        for rows in self._hops_of(ticket, len(part.entries), part.pages * PAGE_BYTES):
            entries, blocks = part.entries[rows], part.blocks[rows]
            number, ranks = state.next_number(), state.index.every_rank
            hop = Hop(number, PlanKind.STORE, entries, blocks, ranks, state.version, ticket)
            hop.targets, hop.tier = {rank: target.of_rows(rows) for rank, target in part.targets.items()}, part.tier
            hop.between = np.intersect1d(part.between, entries) if len(part.between) else part.between
            self.send(hop, keys.parents(blocks.tolist()), wish.pages, wish.start, wish.stop * keys.block_tokens)

    def _hops_of(self, ticket: Ticket, rows: int, nbytes: int) -> list[slice]:
        if ticket.durability == Durability.MEMORY:
            return stretches(rows, nbytes, STORE_HOP_BYTES)
        under_way = self._state.in_flight_bytes
        is_idle = not under_way[PlanKind.STORE] and not under_way[PlanKind.SPILL]
        return stretches(rows, nbytes, WRITE_HOP_BYTES, first_bytes=FIRST_WRITE_HOP_BYTES if is_idle else None)

    def _hold(self, ticket: Ticket, part: _Asked) -> None:
        """Pin the entries of ``part`` until ``ticket`` ends: it follows them down to disk."""
        there = wide(((part.entries >= 0) & (part.blocks >= ticket.first_block)).nonzero()[0])
        self._state.index.pin(part.entries[there])
        ticket.held.append((part.entries[there], part.blocks[there]))
