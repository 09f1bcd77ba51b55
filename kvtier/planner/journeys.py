"""Loads, prefetches and flushes: from a wish to plans in the outbox and a ticket to wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtier.core.plan import PlanKind, Priority, Reason, Tier
from kvtier.index.cells import wide
from kvtier.index.entries import EntryRows, Mask
from kvtier.planner.hops import Hop, Ints, Join
from kvtier.planner.leases import Lease
from kvtier.planner.memory import targets_of
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState
from kvtier.planner.tickets import Outcome, Ticket
from kvtier.planner.wishes import FlushWish, LoadWish, PrefetchWish


class Journeys:
    """Plans everything but stores."""

    def __init__(self, state: ControlState, stages: Stages) -> None:
        """Everything is kept in ``state``; tickets go on through ``stages``."""
        self._state = state
        self._stages = stages
        stages.climb = self._climb

    # --- load -------------------------------------------------------------------------------------------------------

    def load(self, wish: LoadWish) -> None:
        """Bring tokens of a lease into engine pages, promoting what is only on disk."""
        state, ticket, lease = self._state, wish.ticket, wish.lease
        first, blocks = ticket.first_block, len(ticket.outcome)
        if (reason := self._hindrance(lease)) != Reason.NONE:
            ticket.fail_from(first, reason)
            self._stages.advance(ticket)
            return
        begins = [max(begin, first) for begin in lease.begins]
        groups = [
            entries[begin - own : max(0, first + blocks - own)]
            for begin, own, entries in zip(begins, lease.begins, lease.groups, strict=True)
        ]
        ticket.tiers = self._tiers(groups, begins, first, blocks)
        ticket.all_or_nothing = any(len(lease.groups[group]) for group in state.windows.partial)
        hop = self._hop(PlanKind.LOAD, groups, begins, ticket)
        hop.nbytes = blocks * state.block_bytes if state.is_plain else state.nbytes_of(hop.entries)
        if not state.has_room_for(PlanKind.LOAD, hop.nbytes, state.config.host.load_queue):
            ticket.fail_from(first, Reason.REFUSED)
            self._stages.advance(ticket)
            return
        self._promote(hop, ticket)
        if len(hop.entries):
            state.send(
                hop, priority=wish.priority, pages=wish.pages, start=wish.start, stop=wish.stop,
                deadline_s=wish.deadline_s,
            )  # fmt: skip
        self._stages.advance(ticket)

    def prefetch(self, wish: PrefetchWish) -> None:
        """Bring the blocks of the longest stored prefix that are only on disk into memory, or all to the device."""
        state, ticket, keys = self._state, wish.ticket, wish.keys
        stale = keys.root.weights_version != state.version
        prefix = state.finder.find(keys, range(0 if stale else wish.stop), exact=False)
        found = self._hop(PlanKind.FETCH, prefix.groups, prefix.begins, ticket if wish.waits else None)
        missing = self._only(found, self._only_on_disk(found.entries))
        ticket.cover(prefix.blocks, Outcome.EXISTING)
        for block in missing.blocks.tolist():
            ticket.outcome[block] = Outcome.WAITING if wish.waits else Outcome.PENDING
        state.index.pin(found.entries)  # what is there of the prefix must not go to make room for the rest
        placed = self._target(missing, np.ones(len(missing.entries), np.bool_))
        state.unpinned(state.index.unpin(found.entries))
        for block in missing.blocks[~placed].tolist():
            ticket.fail(block, Reason.REFUSED)
        if placed.any():
            state.send(self._only(missing, placed), priority=Priority.PREFETCH, deadline_s=wish.deadline_s)
        ticket.deadline_s = wish.deadline_s
        if wish.to_device and state.device is not None and wish.waits:
            state.index.pin(found.entries)
            ticket.held.append((found.entries, found.blocks))
            ticket.climbs = True
        elif wish.to_device and state.device is not None:  # what comes from disk now does not go on by itself
            self._climb_those(ticket, found.entries, found.blocks, Outcome.PENDING)
        self._stages.advance(ticket)

    def _climb(self, ticket: Ticket) -> None:
        """Bring what ``ticket`` holds from host memory to the device."""
        self._climb_those(ticket, *ticket.held[0], Outcome.WAITING)

    def _climb_those(self, ticket: Ticket, entries: EntryRows, blocks: Ints, outcome: Outcome) -> None:
        """Those of ``entries`` that host memory has and the device not; what finds no room there is refused."""
        state = self._state
        kept = np.frombuffer(ticket.outcome, np.uint8)[blocks - ticket.first_block] != int(Outcome.FAILED)
        rows = kept & self._raw_on_host(entries) & ~state.index.on_device(entries)
        hop = Hop(
            state.next_number(), PlanKind.FETCH, wide(entries[rows]), blocks[rows], state.index.every_rank,
            state.version, ticket if outcome == Outcome.WAITING else None, tier=Tier.DEVICE,
        )  # fmt: skip
        placed = self._target(hop, np.ones(len(hop.entries), np.bool_))
        for block, is_placed in zip(hop.blocks.tolist(), placed.tolist(), strict=True):
            ticket.outcome[block - ticket.first_block] = outcome
            if not is_placed:
                ticket.fail(block, Reason.REFUSED)
        if placed.any():
            state.send(self._only(hop, placed), priority=Priority.PREFETCH, deadline_s=ticket.deadline_s)

    # --- flush ------------------------------------------------------------------------------------------------------

    def flush(self, wish: FlushWish) -> None:
        """Wait for the stores under way; then, level by level, write and sync everything that is in host memory."""
        state, ticket = self._state, wish.ticket
        if not state.attached:  # a rank that is not there yet may hold what has to be written
            self._stages.give_up(ticket, Reason.CLOSED)
            return
        nothing = np.empty(0, np.int32)
        for hop in {id(hop): hop for hop in state.storing.values()}.values():
            hop.joins.append(Join(ticket, nothing, nothing))
            ticket.waits += 1
        self._stages.advance(ticket)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _hindrance(self, lease: Lease) -> Reason:
        """Why nothing of ``lease`` can be loaded, or NONE."""
        state = self._state
        if lease.released:
            return Reason.GONE
        if lease.keys.root.weights_version != state.version:
            return Reason.RETIRED
        return Reason.NONE if state.attached else Reason.CLOSED

    def _hop(self, kind: PlanKind, groups: Sequence[EntryRows], begins: Sequence[int], ticket: Ticket | None) -> Hop:
        """``groups[g]`` are the blocks from ``begins[g]`` on."""
        state = self._state
        spans = [np.arange(begin, begin + len(own), dtype=np.int32) for begin, own in zip(begins, groups, strict=True)]
        entries, blocks = groups[0], spans[0]
        if len(groups) > 1:
            entries, blocks = np.concatenate(groups), np.concatenate(spans)
        return Hop(state.next_number(), kind, entries, blocks, state.index.every_rank, state.version, ticket)

    def _tiers(self, groups: Sequence[EntryRows], begins: Sequence[int], first: int, blocks: int) -> bytearray:
        """Per block from ``first`` on, the slowest of its groups' tiers."""
        state = self._state
        tiers = bytearray((state.top_tier,)) * blocks
        for begin, entries in zip(begins, groups, strict=True):
            if state.device is not None or not state.index.all_on_host(entries):
                own = np.frombuffer(tiers, np.uint8)[begin - first :]
                np.maximum(own, state.tiers_of(entries), out=own)
        return tiers

    def _promote(self, hop: Hop, ticket: Ticket) -> None:
        """Reserve room, where policy wants it, for what is loaded: one tier up, from the slowest tier of all."""
        state = self._state
        if Tier.DISK in ticket.tiers:
            if state.config.read.promote:
                self._target(hop, self._only_on_disk(hop.entries))
        elif state.device is not None and state.config.device.promote and Tier.HOST in ticket.tiers:
            hop.tier = Tier.DEVICE
            self._target(hop, self._raw_on_host(hop.entries) & (state.device.copies.ranks[hop.entries] == 0))

    def _only_on_disk(self, entries: EntryRows) -> Mask:
        """Which of ``entries``, all readable, no memory tier has."""
        index = self._state.index
        only: Mask = (index.host_ranks[entries] == 0) & ~index.on_device(entries)
        return only

    def _raw_on_host(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` have whole raw records in host memory, as the device takes them."""
        index = self._state.index
        lengths = np.array(self._state.layout.record_pages, np.int32)[index.table.groups[entries]]
        raw: Mask = index.on_host(entries) & (index.host_pages[:, entries] == lengths).all(axis=0)
        return raw

    def _target(self, hop: Hop, wanted: Mask) -> Mask:
        """Reserve extents in the hop's tier for the ``wanted`` rows; returns which rows got one."""
        state, index = self._state, self._state.index
        placed = np.zeros(len(hop.entries), np.bool_)
        if not wanted.any():
            return placed
        index.pin(hop.entries)
        for group, pages in enumerate(state.layout.record_pages):
            rows = np.flatnonzero(wanted & (index.table.groups[hop.entries] == group)).astype(np.int32)
            fit, starts = state.books[hop.tier].reserve(group, len(rows))
            placed[rows[:fit]] = True
            for rank, first_pages in starts.items():
                mine = targets_of(first_pages, rows[:fit], len(hop.entries), pages)
                hop.targets[rank] = mine if rank not in hop.targets else hop.targets[rank].merged(mine)
        index.unpin(hop.entries)
        return placed

    def _only(self, hop: Hop, rows: Mask) -> Hop:
        less = Hop(
            hop.plan_id, hop.kind, hop.entries[rows], hop.blocks[rows], hop.ranks, hop.version, hop.ticket,
            tier=hop.tier,
        )  # fmt: skip
        less.targets = {rank: target.of_rows(rows) for rank, target in hop.targets.items()}
        return less
