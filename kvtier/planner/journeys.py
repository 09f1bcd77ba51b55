"""Loads, prefetches and flushes: from a wish to plans in the outbox and a ticket to wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtier.core.plan import PlanKind, Priority, Reason, Tier
from kvtier.index.entries import EntryRows
from kvtier.planner.hops import Hop, Join
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
        if state.config.read.promote and Tier.DISK in ticket.tiers:
            self._target(hop)
        if len(hop.entries):
            state.send(
                hop, priority=wish.priority, pages=wish.pages, start=wish.start, stop=wish.stop,
                deadline_s=wish.deadline_s,
            )  # fmt: skip
        self._stages.advance(ticket)

    def prefetch(self, wish: PrefetchWish) -> None:
        """Bring the blocks of the longest stored prefix that are only on disk into host memory."""
        state, ticket, keys = self._state, wish.ticket, wish.keys
        stale = keys.root.weights_version != state.version
        prefix = state.finder.find(keys, range(0 if stale else wish.stop), exact=False)
        found = self._hop(PlanKind.FETCH, prefix.groups, prefix.begins, ticket if wish.waits else None)
        missing = self._only(found, state.index.host_ranks[found.entries] == 0)
        ticket.cover(prefix.blocks, Outcome.EXISTING)
        for block in missing.blocks.tolist():
            ticket.outcome[block] = Outcome.WAITING if wish.waits else Outcome.PENDING
        state.index.pin(found.entries)  # what is there of the prefix must not go to make room for the rest
        placed = self._target(missing)
        state.unpinned(state.index.unpin(found.entries))
        for block in missing.blocks[~placed].tolist():
            ticket.fail(block, Reason.REFUSED)
        if placed.any():
            state.send(self._only(missing, placed), priority=Priority.PREFETCH, deadline_s=wish.deadline_s)
        self._stages.advance(ticket)

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
        index = self._state.index
        tiers = bytearray((Tier.HOST,)) * blocks
        for begin, entries in zip(begins, groups, strict=True):
            if not index.all_on_host(entries):
                np.frombuffer(tiers, np.uint8)[begin - first :][~index.on_host(entries)] = Tier.DISK
        return tiers

    def _target(self, hop: Hop) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Reserve host extents for the rows that no rank has in host memory; returns which rows got one."""
        state, index = self._state, self._state.index
        placed = np.zeros(len(hop.entries), np.bool_)
        if index.all_on_host(hop.entries):
            return placed
        elsewhere = index.host_ranks[hop.entries] == 0
        index.pin(hop.entries)
        for group, pages in enumerate(state.layout.record_pages):
            rows = np.flatnonzero(elsewhere & (index.table.groups[hop.entries] == group)).astype(np.int32)
            fit, starts = state.host.reserve(group, len(rows))
            placed[rows[:fit]] = True
            for rank, first_pages in starts.items():
                mine = targets_of(first_pages, rows[:fit], len(hop.entries), pages)
                hop.targets[rank] = mine if rank not in hop.targets else hop.targets[rank].merged(mine)
        index.unpin(hop.entries)
        return placed

    def _only(self, hop: Hop, rows: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Hop:
        less = Hop(hop.plan_id, hop.kind, hop.entries[rows], hop.blocks[rows], hop.ranks, hop.version, hop.ticket)
        less.targets = {rank: target.of_rows(rows) for rank, target in hop.targets.items()}
        return less
