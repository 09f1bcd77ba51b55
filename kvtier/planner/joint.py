"""Joint plans: many small stores, or loads, as one hop. What a plan costs is paid once for all of them.

The blocks of all of them stand one after another in one table of pages, as if they were those of a single request; that
takes memory in pages, whose tables were checked. Anything out of the ordinary is left to be planned alone: blocks that
are known already, rows on disk, no room.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Final, TypeGuard

import numpy as np

from kvtier.core.keys import KEY_BYTES
from kvtier.core.memory import GroupPages, PageTable
from kvtier.core.plan import PAGE_BYTES, PlanKind, Tier
from kvtier.index.cells import wide
from kvtier.index.entries import MISSING, EntryRows, KeyRows
from kvtier.planner.hops import Hop, Share, Targets
from kvtier.planner.state import ControlState
from kvtier.planner.stores import Stores
from kvtier.planner.tickets import Durability
from kvtier.planner.wishes import LoadWish, StoreWish, Wish

SMALL_BYTES: Final = 512 << 10
"""Records of one wish, up to which it shares a plan: a larger one is worth a plan of its own."""
SMALL_BLOCK_BYTES: Final = 128 << 10
"""A longer record than this costs more in bytes than in planning, and its checksum keeps the engine's pages waiting."""
JOINT_BYTES: Final = 4 << 20
"""Records of one joint plan: all of its wishes end together, so none may wait long for the others."""
_DEADLINES_A_SECOND: Final = 100
"""Loads share a plan when their deadlines are less than a hundredth of a second apart; the first one counts."""


class JointPlans:
    """Plans small wishes together."""

    def __init__(self, state: ControlState, stores: Stores) -> None:
        """Everything is kept in ``state``; stores are sent through ``stores``."""
        self._state = state
        self._stores = stores
        layout = state.layout
        record_bytes = PAGE_BYTES * max(layout.record_pages)
        is_small = state.is_plain and record_bytes <= SMALL_BLOCK_BYTES
        self._most_blocks = SMALL_BYTES // record_bytes if is_small else 0
        self._most_together = JOINT_BYTES // record_bytes
        self._block_pages = layout.block_tokens // layout.page_tokens

    def likeness(self, wish: Wish) -> Hashable:
        """Equal for neighbours that may share a plan; the wish itself, equal to no other, where it has to be alone."""
        blocks = len(wish.ticket.outcome)
        if not 0 < blocks <= self._most_blocks:
            return wish
        if isinstance(wish, StoreWish) and wish.is_paged:
            if wish.ticket.durability != Durability.MEMORY or not wish.keys.chained:
                return wish
            return StoreWish, wish.pages.memory_id, wish.keys.root.weights_version, wish.lineage
        if isinstance(wish, LoadWish) and wish.is_paged:
            size, due = wish.lease.keys.block_tokens, wish.deadline_s
            if wish.start % size or wish.stop % size:
                return wish
            moment = None if due is None else int(due * _DEADLINES_A_SECOND)
            return LoadWish, wish.pages.memory_id, wish.lease.keys.root.weights_version, wish.priority, moment
        return wish

    def portions(self, wishes: Iterable[Wish]) -> Iterator[Sequence[Wish]]:
        """``wishes``, all of one likeness, in runs that are not too much for one plan."""
        run: list[Wish] = []
        blocks = 0
        for wish in wishes:
            blocks += len(wish.ticket.outcome)
            if run and blocks > self._most_together:
                yield run
                run, blocks = [], len(wish.ticket.outcome)
            run.append(wish)
        yield run

    def plan(self, wishes: Sequence[Wish]) -> Sequence[Wish]:
        """Plan ``wishes``, all of one likeness, as one hop; returns those that have to be planned alone."""
        if _are_stores(wishes):
            return self._plan_stores(wishes)
        if _are_loads(wishes):
            return self._plan_loads(wishes)
        return wishes

    # --- stores -----------------------------------------------------------------------------------------------------

    def _plan_stores(self, wishes: Sequence[StoreWish]) -> Sequence[StoreWish]:
        state = self._state
        if not state.attached or wishes[0].keys.root.weights_version != state.version:
            return wishes
        joint, alone = self._new_and_known(wishes)
        count = sum(len(wish.ticket.outcome) for wish in joint)
        if len(joint) < 2 or not self._stores.has_room_for(count):
            return wishes
        # What wishes have already, or extend, may not go to make room for others.
        extended = (self._stores.before(wish.keys, 0, wish.ticket.first_block) for wish in joint)
        shield = wide(np.union1d(self._entries_of(alone), self._stores.at_stake(extended)))
        state.index.pin(shield)
        try:
            tier, fit, starts = self._stores.find_room(0, count)
        finally:
            state.unpinned(state.index.unpin(shield))
        if fit < count:
            state.books[tier].cancel(0, starts)
            return wishes
        self._send_stores(joint, count, starts[0], tier)
        return alone

    def _new_and_known(self, wishes: Sequence[StoreWish]) -> tuple[Sequence[StoreWish], Sequence[StoreWish]]:
        """Those whose blocks nobody has, and nobody before them wants to store; and the others."""
        wanted = [wish.keys.digests[wish.ticket.first_block : wish.stop] for wish in wishes]
        keys = list(chain.from_iterable(wanted))
        found = self._state.index.table.find(_rows_of(keys), 0)
        if self._state.index.all_missing(found) and len(set(keys)) == len(keys):
            return wishes, ()
        taken = {key for key, entry in zip(keys, found.tolist(), strict=True) if entry != MISSING}
        new: list[StoreWish] = []
        known: list[StoreWish] = []
        for wish, own in zip(wishes, wanted, strict=True):
            is_new = taken.isdisjoint(own) and len(set(own)) == len(own)
            (new if is_new else known).append(wish)
            taken.update(own)
        return new, known

    def _entries_of(self, wishes: Sequence[StoreWish]) -> EntryRows:
        """All entries that there are of their blocks, each once."""
        keys = [key for wish in wishes for key in wish.keys.digests[wish.ticket.first_block : wish.stop]]
        found = self._state.index.table.find(_rows_of(keys), 0)
        return wide(np.unique(found[found != MISSING]))

    def _send_stores(self, wishes: Sequence[StoreWish], count: int, starts: Sequence[int], tier: Tier) -> None:
        state = self._state
        spans = [(wish.keys, range(wish.ticket.first_block, wish.stop)) for wish in wishes]
        keys = [key for keys, span in spans for key in keys.digests[span.start : span.stop]]
        entries = wide(
            state.index.add(
                _rows_of(keys), 0,
                depths=np.fromiter(chain.from_iterable(span for _, span in spans), np.int32, count),
                tokens=state.layout.block_tokens, lineage=int(wishes[0].lineage),
            )
        )  # fmt: skip
        shares = _shares(wishes)
        before = np.empty(count, np.int32)
        before[1:] = entries[:-1]
        for share, (own, span) in zip(shares, spans, strict=True):
            before[share.rows.start] = self._stores.before(own, 0, span.start)
        state.index.link(entries, before)
        hop = self._hop(PlanKind.STORE, entries, shares)
        pages = np.full(count, state.layout.record_pages[0], np.int32)
        hop.targets, hop.tier = {0: Targets(np.array(starts, np.int32), pages)}, tier
        parents = b"".join([own.parents(span) for own, span in spans])
        self._stores.send(hop, parents, self._table(wishes), 0, count * state.layout.block_tokens)

    # --- loads ------------------------------------------------------------------------------------------------------

    def _plan_loads(self, wishes: Sequence[LoadWish]) -> Sequence[LoadWish]:
        state, first = self._state, wishes[0]
        if first.lease.keys.root.weights_version != state.version:
            return wishes
        joint, alone, entries = self._at_hand(wishes)
        nbytes = len(entries) * state.block_bytes
        room = state.config.host.load_queue - state.in_flight_bytes[PlanKind.LOAD]
        if len(joint) < 2 or nbytes > room:
            return wishes
        shares = _shares(joint)
        tiers = bytearray((Tier.HOST,)) * len(entries) if state.device is None else bytearray(state.tiers_of(entries))
        for share in shares:
            share.ticket.tiers = tiers[share.rows.start : share.rows.stop]
        hop = self._hop(PlanKind.LOAD, entries, shares)
        hop.nbytes = nbytes
        due = min((wish.deadline_s for wish in joint if wish.deadline_s is not None), default=None)
        state.send(
            hop, priority=first.priority, pages=self._table(joint), stop=len(entries) * state.layout.block_tokens,
            deadline_s=due,
        )  # fmt: skip
        return alone

    def _at_hand(self, wishes: Sequence[LoadWish]) -> tuple[Sequence[LoadWish], Sequence[LoadWish], EntryRows]:
        """Those whose blocks are in memory and no earlier one's, the others, and the entries of the first."""
        index = self._state.index
        wanted = [_entries_of(wish) for wish in wishes]
        entries = np.concatenate(wanted)
        numbers = entries.tolist()
        is_plain = index.are_at_hand(entries) and len(set(numbers)) == len(numbers)
        if is_plain and not any(wish.lease.released for wish in wishes):
            return wishes, (), wide(entries)
        joint: list[LoadWish] = []
        alone: list[LoadWish] = []
        going: list[EntryRows] = []
        taken = set[int]()
        for wish, own in zip(wishes, wanted, strict=True):
            is_at_hand = not wish.lease.released and index.are_at_hand(own)
            if is_at_hand and taken.isdisjoint(own.tolist()):
                taken.update(own.tolist())
                going.append(own)
                joint.append(wish)
            else:
                alone.append(wish)
        return joint, alone, wide(np.concatenate([entries[:0], *going]))

    # --- both -------------------------------------------------------------------------------------------------------

    def _hop(self, kind: PlanKind, entries: EntryRows, shares: list[Share]) -> Hop:
        state, blocks = self._state, np.arange(len(entries), dtype=np.int32)
        hop = Hop(state.next_number(), kind, entries, blocks, state.index.every_rank, state.version)
        hop.shares = shares
        return hop

    def _table(self, wishes: Sequence[StoreWish] | Sequence[LoadWish]) -> PageTable:
        """The pages of all blocks, as if they were one request's from token 0 on."""
        layout, ids = self._state.layout, []
        for wish in wishes:
            own, ticket = wish.pages.groups[0], wish.ticket
            first = (ticket.first_block * layout.block_tokens - own.first_token) // layout.page_tokens
            ids.append(own.ids[first : first + len(ticket.outcome) * self._block_pages])
        return PageTable(wishes[0].pages.memory_id, (GroupPages(0, np.concatenate(ids)),))


def _rows_of(keys: Sequence[bytes]) -> KeyRows:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)


def _entries_of(wish: LoadWish) -> EntryRows:
    first = wish.ticket.first_block - wish.lease.first_block
    return wish.lease.groups[0][first : first + len(wish.ticket.outcome)]


def _shares(wishes: Sequence[StoreWish] | Sequence[LoadWish]) -> list[Share]:
    shares, row = [], 0
    for wish in wishes:
        rows = range(row, row + len(wish.ticket.outcome))
        shares.append(Share(wish.ticket, rows))
        row = rows.stop
    return shares


def _are_stores(wishes: Sequence[Wish]) -> TypeGuard[Sequence[StoreWish]]:
    return isinstance(wishes[0], StoreWish)


def _are_loads(wishes: Sequence[Wish]) -> TypeGuard[Sequence[LoadWish]]:
    return isinstance(wishes[0], LoadWish)
