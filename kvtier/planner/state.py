"""What the planner knows: one object that its journeys and commits share."""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal

import numpy as np

from kvtier.config import Config
from kvtier.core.memory import PageTable
from kvtier.core.plan import NOWHERE, Plan, PlanKind, Priority, Reason, Tier
from kvtier.index.cells import Cells, wide
from kvtier.index.copies import Copies
from kvtier.index.entries import EntryRows, KeyRows, Mask
from kvtier.models.layout import KVLayout
from kvtier.planner.checkpoints import Checkpoints
from kvtier.planner.dead import DeadBlocks
from kvtier.planner.device import DeviceKeeper
from kvtier.planner.disk import DiskBook
from kvtier.planner.events import ControlEvents
from kvtier.planner.eviction import Keeper
from kvtier.planner.finding import Finder
from kvtier.planner.hops import Hop, Ints
from kvtier.planner.leases import LeaseBook
from kvtier.planner.memory import MemoryBook, Uses
from kvtier.planner.rows import NO_PARENTS, plan_rows
from kvtier.planner.tickets import Ticket
from kvtier.planner.windows import Windows
from kvtier.planner.writes import WriteQueue
from kvtier.policy import EVICTION_POLICIES, TwoAges

_COUNTER: Final = {(change, tier): f"{change}_{tier.label}_blocks" for change in ("stored", "removed") for tier in Tier}

_FEW: Final = 8
"""So many entries are forgotten one by one in less time than together."""


class ControlState:
    """Books, hops in flight and the outbox of one planner."""

    def __init__(self, config: Config, layout: KVLayout, index: Cells) -> None:
        """Nothing is stored, nobody is attached."""
        self.config = config
        self.layout = layout
        self.index = index
        self.windows = Windows(layout, config.policy)
        self.finder = Finder(index, self.windows)
        spilled = range(len(layout.groups)) if config.policy.spill_windows else self.windows.whole
        self.spilled_groups = frozenset(spilled)
        """Groups that go to disk."""
        self._spills_all = len(self.spilled_groups) == len(layout.groups)
        self.uses = Uses()
        self.host = self._book(index.host, self)
        self.landing = WriteQueue(config.host.staging, index.table.capacity if index.device is not None else 0)
        """Blocks of the device tier that host memory has to have, too."""
        self.device_keeper = DeviceKeeper(self)
        self.device = None if index.device is None else self._book(index.device, self.device_keeper)
        self.books = {Tier.HOST: self.host} if self.device is None else {Tier.DEVICE: self.device, Tier.HOST: self.host}
        """The memory tiers, the fastest first."""
        self.top_tier = next(iter(self.books))
        self.top = self.books[self.top_tier]
        self.disk = DiskBook(config.host.staging, index.table.capacity)
        self.leases = LeaseBook(index)
        self.dead = DeadBlocks(index, self.windows, self.disk.awaits_write)
        self.events = ControlEvents()
        self.version = ""
        self.incarnations: dict[int, int] = {}
        self.recovering: set[int] = set()
        self.hops: dict[int, Hop] = {}
        self.storing: dict[int, Hop] = {}
        self.row_waiters: dict[int, list[tuple[Ticket, int, bytes]]] = {}
        self.plans: list[Plan] = []
        self.news: list[Ticket] = []
        self.counts: Counter[str] = Counter()
        self.unpinned_entries = 0
        self.missing_entries = 0
        """So many more a store would have taken than may be; nothing has been done about it."""
        self._gone: list[tuple[int, KeyRows]] = []
        """Blocks, by group, that were evicted since others of the same keys were looked at."""
        self.lost_blocks = False
        """Blocks have gone that the disk never had, or had no longer though they were not the oldest."""
        self.mistakes: list[tuple[str, BaseException]] = []
        self.in_flight_bytes: Counter[PlanKind] = Counter()
        self.is_plain = index.ranks == 1 and len(layout.groups) == 1 and not self.windows.partial
        self.writes_through = config.policy.write == "write_through" and bool(config.disk.directories)
        self.block_bytes = sum(layout.block_bytes)
        self._next_number = 0

    def _book(self, copies: Copies, keeper: Keeper) -> MemoryBook:
        kind, capacity = EVICTION_POLICIES[self.config.policy.eviction], self.index.table.capacity
        if not self.windows.partial:
            order = kind(capacity)
            return MemoryBook(self.index, copies, order, self.layout.record_pages, keeper, uses=self.uses)
        ages = TwoAges(kind, capacity)
        is_partial = [group in self.windows.partial for group in range(len(self.layout.groups))]
        checkpoints = Checkpoints(self.index, ages, is_partial, self.config.policy.checkpoint_ttl_s)
        return MemoryBook(self.index, copies, ages, self.layout.record_pages, keeper, checkpoints, self.uses)

    @property
    def attached(self) -> bool:
        """Whether every rank has a data plane."""
        return len(self.incarnations) == self.index.ranks

    def has_room_for(self, kind: PlanKind, nbytes: int, limit_bytes: int) -> bool:
        """Whether ``nbytes`` more of ``kind`` may be under way; whatever its size, one alone always may."""
        under_way = self.in_flight_bytes[kind]
        return not under_way or under_way + nbytes <= limit_bytes

    def tiers_of(self, entries: EntryRows) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Of each of ``entries``, all readable, the fastest tier that every rank has it in."""
        tiers = np.full(len(entries), Tier.HOST, np.uint8)
        if not self.index.all_on_host(entries):
            tiers[~self.index.on_host(entries)] = Tier.DISK
        if self.device is not None:
            tiers[self.device.copies.are_complete(entries)] = Tier.DEVICE
        return tiers

    def nbytes_of(self, entries: EntryRows) -> int:
        """What ``entries`` take in engine memory."""
        sizes = self.layout.block_bytes
        if len(sizes) == 1:
            return len(entries) * sizes[0]
        return int(np.array(sizes)[self.index.table.groups[entries]].sum())

    def next_number(self) -> int:
        """A number that no plan of this planner has had."""
        self._next_number += 1
        return self._next_number

    def may_go(self, entry: int) -> bool:
        """Whether the host copies of ``entry`` may be evicted: nothing is lost by it that could have been kept."""
        if self.disk.awaits_write(entry):
            return False
        if self.index.disk_ranks_at[entry] == self.index.every_rank:
            return True
        return not self.disk.usable or self.disk.was_refused(entry) or self.stays_off_disk(entry)

    def which_may_go(self, entries: EntryRows) -> Mask:
        """``may_go`` of each of ``entries``."""
        free = ~self.disk.which_await_write(entries)
        if self.disk.usable:
            free &= self.index.on_disk(entries) | self.disk.which_were_refused(entries) | ~self.which_spill(entries)
        return free

    def stays_off_disk(self, entry: int) -> bool:
        """Whether ``entry`` is of a group that is not written down."""
        return not self._spills_all and self.index.cells.groups_at[entry] not in self.spilled_groups

    def which_spill(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` are of groups that are written down."""
        if self._spills_all:
            return np.ones(len(entries), np.bool_)
        return np.isin(self.index.table.groups[entries], list(self.spilled_groups))

    def being_stored(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` somebody is storing."""
        if not self.storing:
            return np.zeros(len(entries), np.bool_)
        return np.array([entry in self.storing for entry in entries.tolist()], np.bool_)

    def send(
        self,
        hop: Hop,
        *,
        priority: Priority,
        parents: bytes = NO_PARENTS,
        chain: str = "raw",
        pages: PageTable | None = None,
        start: int = 0,
        stop: int = 0,
        durable: bool = False,
        deadline_s: float | None = None,
    ) -> None:
        """Pin the entries of ``hop`` and put one plan per rank into the outbox.

        ``parents`` are the keys that the rows of a store extend, one after another.
        """
        chains = ("raw",) if chain == "raw" else (chain, "raw")
        plans = [
            Plan(
                plan_id=hop.plan_id, rank=rank, kind=hop.kind, priority=priority,
                rows=plan_rows(self.index, hop, rank, parents), chains=chains, pages=pages, start=start, stop=stop,
                durable=durable, deadline_s=deadline_s, segment=hop.segment, generation=hop.generation,
                incarnation=self.incarnations.get(rank, NOWHERE), target=hop.tier,
            )
            for rank in hop.unanswered
        ]  # fmt: skip
        self.index.pin(hop.entries)
        self.hops[hop.plan_id] = hop
        self.in_flight_bytes[hop.kind] += hop.nbytes
        if hop.ticket is not None:
            hop.ticket.plan_ids.append(hop.plan_id)
            hop.ticket.waits += 1
        for share in hop.shares:
            share.ticket.waits += 1
        self.plans += plans

    def sync_hop(self, ticket: Ticket, entries: EntryRows, blocks: Ints) -> None:
        """``ticket`` waits until ``entries``, its ``blocks``, are durable on every rank; without any: all there is."""
        ranks = int(self.index.all_ranks)
        hop = Hop(self.next_number(), PlanKind.SYNC, entries, blocks, ranks, self.version, ticket)
        self.send(hop, priority=Priority.SPILL)

    def unpinned(self, entries: EntryRows) -> None:
        """Nobody holds ``entries`` any more: free what waited for that, forget those without copies and children."""
        if not len(entries):
            return
        self.unpinned_entries += len(entries)
        index = self.index
        self.dead.let_go()
        for entry in entries[~index.linked[entries]].tolist() if len(index.reachable(entries)) < len(entries) else ():
            self._drop_superseded(entry)
        for book in self.books.values():
            book.unpinned(entries)
        bare = index.bare(entries)
        if len(self.layout.groups) > 1:
            self._release(np.union1d(self._with_dead(bare), self._drop_orphans(entries)))
        else:
            self._release(bare)

    def supersede(self, entries: EntryRows) -> None:
        """Their keys are for other content now: nobody finds them any more, and they go with their last pin."""
        if not len(entries):
            return
        self._tell_gone(entries)
        for entry in entries.tolist():
            self.index.unlink(entry)

    def _tell_gone(self, entries: EntryRows) -> None:
        """No copy of ``entries`` will be found any more, in any tier."""
        for tier, book in self.books.items():
            self.tell("removed", entries[book.copies.are_complete(entries)], tier)
        self.tell("removed", entries[self.index.on_disk(entries)], Tier.DISK)

    def _drop_from_memory(self, entries: EntryRows) -> None:
        for book in self.books.values():
            for entry in entries[book.copies.ranks[entries] != 0].tolist():
                book.drop(entry)

    def _drop_superseded(self, entry: int) -> None:
        one = np.array([entry], np.int32)
        self._forget_refusals(one)
        self._drop_from_memory(one)
        for rank in range(self.index.ranks):
            self.index.drop_disk(rank, one)

    def _forget_refusals(self, entries: EntryRows) -> None:
        self.disk.forget(entries)
        if self.device is not None:
            self.landing.forget(entries)

    def leave_disk(self, rank: int, entries: EntryRows) -> None:
        """The copies that ``rank`` has of ``entries`` are gone: tell of those that were complete on disk until now."""
        complete = entries[self.index.on_disk(entries)]
        self.index.drop_disk(rank, entries)
        self.tell("removed", complete, Tier.DISK)
        self.forget_unreadable(entries)

    def forget_unreadable(self, entries: EntryRows) -> None:
        """Forget those of ``entries`` that cannot be read any more and that nothing holds."""
        gone = entries[~self.index.readable(entries)]
        self.dead.note(gone)
        self._drop_from_memory(gone)
        self._forget(gone)

    def evicted(self, entries: EntryRows) -> None:
        """The host copies of ``entries`` are gone: tell, and forget those that cannot be read any more."""
        self.left_memory(entries, Tier.HOST)

    def left_memory(self, entries: EntryRows, tier: Tier) -> None:
        """The copies of ``entries`` in that memory tier are gone."""
        self.tell("removed", entries, tier)
        if self.device is not None:
            entries = entries[~self.index.readable(entries)]
        elif np.count_nonzero(self.index.disk_ranks[entries]):
            entries = entries[~self.index.on_disk(entries)]
        self.lost_blocks |= len(entries) > 0
        if len(self.layout.groups) > 1:  # in the middle of a pass over host memory nothing else may leave it
            self._gone += self._blocks_of(entries)
            self.dead.note(entries)
        self._forget_refusals(entries)
        self._release(entries)

    def made_room(self) -> None:
        """Nothing more is evicted now: what is of no use without that which was goes, too."""
        self._drop_gone()
        self.bury()

    def bury(self) -> None:
        """Free what no hit can reach any more, as far as one turn goes."""
        if not self.dead.has_suspects:
            return
        dead = self.dead.take()
        for book in self.books.values():
            here = dead[book.copies.are_complete(dead)]
            if len(here):
                self.counts["dropped_dead_blocks"] += len(here)
                book.evict(wide(here))
        self._drop_gone()

    def _drop_gone(self) -> None:
        """What other groups had of blocks that went is of no use without them."""
        gone, self._gone = self._gone, []
        for group, keys in gone:
            self._forget(self._drop_blocks(group, keys))

    def _forget(self, entries: EntryRows) -> None:
        """Nothing of ``entries`` is left to be written, or to be kept unless somebody holds it."""
        if len(self.layout.groups) > 1:
            entries = self._with_dead(entries)
        self._forget_refusals(entries)
        self._release(entries)

    def _with_dead(self, gone: EntryRows) -> EntryRows:
        """``gone``, and what other groups had of the same blocks where a group that needs the whole prefix has none.

        No hit can end there, nor lead through them: it would only take room. What somebody holds goes when it is let
        go of.
        """
        index, all_gone = self.index, [gone]
        while len(gone := gone[index.having(gone) == 0]):
            dropped = [self._drop_blocks(group, keys) for group, keys in self._blocks_of(gone)]
            gone = np.concatenate([gone[:0], *dropped])
            all_gone.append(gone)
        return all_gone[0] if len(all_gone) == 1 else np.unique(np.concatenate(all_gone))

    def _blocks_of(self, entries: EntryRows) -> list[tuple[int, KeyRows]]:
        """Per group that needs the whole prefix, the keys of those of ``entries`` that are found by them."""
        table, found = self.index.table, list[tuple[int, KeyRows]]()
        for group in self.windows.whole:
            own = entries[(table.groups[entries] == group) & self.index.linked[entries]]
            if len(own):
                found.append((group, np.ascontiguousarray(table.keys[own])))
        return found

    def _drop_blocks(self, group: int, keys: KeyRows) -> EntryRows:
        """Drop what groups other than ``group`` have of the blocks of ``keys``; returns which entries."""
        others = [other for other in range(len(self.layout.groups)) if other != group]
        return wide(np.concatenate([self._drop(self.index.table.find(keys, other)) for other in others]))

    def _drop_orphans(self, entries: EntryRows) -> EntryRows:
        """Drop those of ``entries``, windows and states, whose blocks another group has not any more; returns which.

        With a device tier those of all groups: they may have been held by their way to host memory alone.
        """
        index = self.index
        own = entries[index.linked[entries]]
        if self.device is None:
            own = own[np.isin(index.table.groups[own], self.windows.partial)]
        keys, alive = np.ascontiguousarray(index.table.keys[own]), np.ones(len(own), np.bool_)
        for group in self.windows.whole if len(own) else ():
            found = wide(index.table.find(keys, group))
            alive &= (found >= 0) & (index.readable(found) | self.being_stored(found))
        return self._drop(own[~alive])

    def _drop(self, entries: EntryRows) -> EntryRows:
        """Drop all copies of those of ``entries`` that nobody holds; some are MISSING. Returns which."""
        index = self.index
        entries = wide(entries[entries >= 0])
        held = (index.pins[entries] > 0) | self.disk.which_await_write(entries)
        entries = entries[~held & (index.having(entries) != 0)]
        if not len(entries):
            return entries
        self._tell_gone(entries)
        self._drop_from_memory(entries)
        for rank in range(index.ranks):
            index.drop_disk(rank, entries)
        self.counts["dropped_dead_blocks"] += len(entries)
        return entries

    def _release(self, entries: EntryRows) -> None:
        if len(entries) < _FEW:
            for entry in entries.tolist():
                self.index.release(entry)
        else:
            self.index.release_many(entries)

    def tell(self, change: Literal["stored", "removed"], entries: EntryRows, tier: Tier) -> None:
        """Note an event for whoever listens; what was superseded has been told as removed already."""
        entries = self.index.reachable(entries)
        self.counts[_COUNTER[change, tier]] += len(entries)
        if self.events.listening and self.windows.partial:  # a window or a state alone is no block to be found
            entries = entries[np.isin(self.index.table.groups[entries], self.windows.whole)]
        if self.events.listening and len(entries):
            index, parents = self.index, self.index.parent[entries]
            keys = index.table.keys
            self.events.add(change, tier, keys[entries], keys[parents], parents >= 0, index.tokens[entries])

    def end_postponed(self, entry: int, reason: int) -> list[Ticket]:
        """What stood between ``entry`` and its write ended so; returns tickets that wait for nothing more."""
        if not self.disk.is_postponed(entry):
            return []
        if reason == Reason.NONE:
            self.disk.resume(entry, first=entry in self.row_waiters)
            return []
        self.disk.take_back(entry)
        return self.row_ended(entry, reason)

    def row_ended(self, entry: int, reason: int) -> list[Ticket]:
        """A write that tickets wait for ended; returns those that wait for nothing more."""
        ready = []
        for ticket, block, key in self.row_waiters.pop(entry, ()):
            if reason == Reason.NONE and key != self.index.cells.key(entry):
                ticket.fail(block, Reason.GONE)  # the number is another block's by now
            elif reason != Reason.NONE:
                ticket.fail(block, reason)
            ticket.waits -= 1
            if not ticket.waits:
                ready.append(ticket)
        return ready
