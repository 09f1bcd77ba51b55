"""Landings: blocks of the device tier are copied to host memory in the background, and may then leave the device."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from kvtier.core.keys import KEY_BYTES
from kvtier.core.plan import PAGE_BYTES, PlanKind, Priority, Reason
from kvtier.index.cells import wide
from kvtier.index.entries import EntryRows, Mask
from kvtier.planner.hops import Hop, Ints
from kvtier.planner.memory import targets_of
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState

_NOTHING_SEEN: Final = (-1, -1, -1, -1)
_BLOCKS_AT_ONCE: Final = 32
"""Where host memory has room for one group of so many blocks but not for the next, that much may go in vain."""


class Landings:
    """Plans the copies from device to host."""

    def __init__(self, state: ControlState, stages: Stages) -> None:
        """Tickets that wait for a copy go on through ``stages``."""
        self._state = state
        self._stages = stages
        self._no_room = _NOTHING_SEEN

    def plan(self) -> None:
        """Plan copies while no more than a budget of bytes is under way, and as long as host memory has room.

        Where it had none, it is not looked at again before something has changed there.
        """
        state = self._state
        nbytes = sum(state.layout.record_pages) * PAGE_BYTES  # what other groups have of a block comes along
        while self._host_now() != self._no_room:
            entries: list[int] = []
            try:
                state.landing.next_writes(nbytes, state.in_flight_bytes[PlanKind.LAND], entries)
                if not entries:
                    return
                self._plan_those(entries)
            except BaseException as error:  # a mistake of ours, or Ctrl-C: whoever waits must not wait for ever
                going = {entry for hop in state.hops.values() if hop.kind == PlanKind.LAND for entry in hop.entries}
                self._end((entry for entry in entries if entry not in going), Reason.REFUSED)
                if not isinstance(error, Exception):
                    raise
                state.mistakes.append(("planning a landing", error))

    def look_again(self) -> None:
        """Somebody waits for a copy: if there is no room he has to be told."""
        self._no_room = _NOTHING_SEEN

    def _host_now(self) -> tuple[int, int, int, int]:
        """Equal for two moments between which nothing in host memory has come free."""
        state = self._state
        return state.disk.ended, state.host.evicted, state.host.free_pages, state.unpinned_entries

    def _plan_those(self, entries: list[int]) -> None:
        """Send ``entries``, just taken, and with each what other groups have of its block on the device alone.

        Those are added to ``entries``. None of it, and nothing that host memory has of the same blocks, may go to make
        room: they are held until the hops that they are sent with hold them.
        """
        state, index = self._state, self._state.index
        wanted = wide(np.array(entries, np.int32))
        useless = ~self._are_to_land(wanted)
        for entry in wanted[useless].tolist():
            there = index.host_ranks_at[entry] == index.every_rank or index.disk_ranks_at[entry] == index.every_rank
            self._end((entry,), Reason.NONE if there else Reason.GONE)
        wanted, alike = wide(wanted[~useless]), self._alike(wanted[~useless])
        missing = alike[self._are_to_land(alike) & ~index.on_disk(alike) & ~state.landing.which_were_refused(alike)]
        coming = state.landing.take_along(np.setdiff1d(missing, wanted), entries)
        wanted, held = wide(np.concatenate((wanted, coming))), wide(np.union1d(wanted, alike))
        index.pin(held)
        try:
            left = [self._plan_blocks(own, before) for own, before in self._by_age(wanted, held)]
        finally:
            state.unpinned(index.unpin(held))
        if any(map(len, left)):
            self._wait_for_room(wide(np.concatenate(left)))

    def _are_to_land(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` the device has, and host memory not."""
        to_land: Mask = self._state.index.on_device(entries) & (self._state.index.host_ranks[entries] == 0)
        return to_land

    def _alike(self, entries: EntryRows) -> EntryRows:
        """What other groups have of the blocks of ``entries``."""
        table, groups = self._state.index.table, range(len(self._state.layout.groups))
        if len(groups) == 1:
            return entries[:0]
        keys = np.ascontiguousarray(table.keys[entries[self._state.index.linked[entries]]])
        found = np.concatenate([table.find(keys, group) for group in groups])
        return wide(np.setdiff1d(found[found >= 0], entries))

    def _by_age(self, entries: EntryRows, held: EntryRows) -> Iterator[tuple[EntryRows, int | None]]:
        """``entries`` in portions of whole blocks, each with the time since when nothing may go to make room for it.

        What is on its way to the disk has to pass through host memory whatever its age: what goes for that is on disk.
        Anything else makes no room but that of blocks which were used before it was, in any group. The newest come
        first. ``held`` is all that there is of them in any tier.
        """
        if not len(entries):
            return
        blocks, since = self._by_block(held), np.full(len(held), sys.maxsize)
        for book in self._state.books.values():
            here = book.copies.are_complete(held)
            np.minimum.at(since, blocks[here], book.used(held[here]))
        goes_on = np.zeros(len(held), np.bool_)
        np.logical_or.at(goes_on, blocks, self._go_on(held))
        blocks = blocks[np.searchsorted(held, entries)]
        goes_on, since = goes_on[blocks], since[blocks]
        if goes_on.any():
            yield wide(entries[goes_on]), None
        for moment in np.unique(since[~goes_on])[::-1].tolist():
            yield wide(entries[~goes_on & (since == moment)]), moment

    def _go_on(self, entries: EntryRows) -> Mask:
        """Which of ``entries`` have to be written to disk."""
        state = self._state
        if not state.disk.usable:
            return np.zeros(len(entries), np.bool_)
        going: Mask = state.which_spill(entries) & ~state.index.on_disk(entries)
        return going

    def _plan_blocks(self, entries: EntryRows, before: int | None) -> EntryRows:
        """Send the ``entries`` of as many blocks as find room in all groups, made of what was used ``before``.

        Returns those that wait for room. Where there is none to wait for, they may leave the device without a copy.
        """
        blocks = self._by_block(entries)
        count = int(blocks.max(initial=-1)) + 1
        first, size = 0, _BLOCKS_AT_ONCE
        while first < count and size:
            stop = min(first + size, count)
            rows = (blocks >= first) & (blocks < stop)
            fit = self._send_fitting(wide(entries[rows]), blocks[rows], before)
            if fit < stop:
                size = (stop - fit) // 2  # groups that were first took what others would have needed
            first = fit
        left: EntryRows = entries[blocks >= first]
        if before is None or self._state.host.has_older(before):
            return left
        for entry in left.tolist():
            self._state.landing.write_ended(entry, written=False)
        return left[:0]

    def _by_block(self, entries: EntryRows) -> Ints:
        """Of each of ``entries``, the number of its block: they count up in the order of their first entries."""
        keys = self._state.index.table.keys[entries].view("V32").reshape(-1)
        _, firsts, numbers = np.unique(keys, return_index=True, return_inverse=True)
        return wide(firsts.argsort().argsort()[numbers])

    def _send_fitting(self, entries: EntryRows, blocks: Ints, before: int | None) -> int:
        """Send the ``entries`` of the first blocks that find room in all groups; returns the first block that does not.

        ``blocks`` are their numbers; ``before`` as ``MemoryBook.reserve_among``.
        """
        state, index, last = self._state, self._state.index, int(blocks.max()) + 1
        order = np.argsort(blocks, kind="stable")
        entries, blocks = wide(entries[order]), blocks[order]
        groups, rooms = index.table.groups[entries], list[tuple[int, EntryRows, Ints, dict[int, list[int]]]]()
        for group in np.unique(groups).tolist():
            own, of_blocks = wide(entries[groups == group]), blocks[groups == group]
            if before is None:
                fit, starts = state.host.reserve(group, len(own))
            else:
                fit, starts = state.host.reserve_among(group, len(own), before, state.config.host.high_watermark)
            last = min([last, *of_blocks[fit : fit + 1].tolist()])
            rooms.append((group, own, of_blocks, starts))
        for group, own, of_blocks, starts in rooms:
            fit = int(np.count_nonzero(of_blocks < last))
            state.host.cancel(group, {rank: first_pages[fit:] for rank, first_pages in starts.items()})
            if fit:
                self._send(group, own[:fit], {rank: first_pages[:fit] for rank, first_pages in starts.items()})
        return last

    def _send(self, group: int, entries: EntryRows, starts: dict[int, list[int]]) -> None:
        state, count, pages = self._state, len(entries), self._state.layout.record_pages[group]
        hop = self._hop(entries)
        for rank, first_pages in starts.items():
            hop.targets[rank] = targets_of(first_pages, np.arange(count, dtype=np.int32), count, pages)
        hop.nbytes = count * pages * PAGE_BYTES
        state.send(hop, priority=Priority.SPILL, parents=self._parents(hop.entries), chain=state.config.host.codec)

    def _wait_for_room(self, entries: EntryRows) -> None:
        """Those that somebody waits for are refused, the others come next once there is room."""
        awaited = [entry for entry in entries.tolist() if entry in self._state.row_waiters]
        self._end(awaited, Reason.REFUSED)
        self._state.landing.put_back([entry for entry in entries.tolist() if entry not in awaited])
        self._no_room = self._host_now()

    def _end(self, entries: Iterable[int], reason: Reason) -> None:
        for entry in entries:
            self._state.landing.take_back(entry)
            for ticket in self._state.end_postponed(entry, reason):
                self._stages.advance(ticket)

    def _hop(self, entries: EntryRows) -> Hop:
        state, blocks = self._state, self._state.index.depth[entries]
        hop = Hop(state.next_number(), PlanKind.LAND, entries, blocks, state.index.every_rank, state.version)
        if state.device is not None:
            hop.between = state.device.between(entries)
        return hop

    def _parents(self, entries: EntryRows) -> bytes:
        """The keys of what ``entries`` extend, one after another; zeros where that is not known any more."""
        index = self._state.index
        parents: Ints = index.parent[entries]
        keys = index.table.keys[parents].copy()
        keys[parents < 0] = np.zeros(KEY_BYTES, np.uint8)
        return keys.tobytes()
