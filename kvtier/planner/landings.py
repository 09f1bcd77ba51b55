"""Landings: blocks of the device tier are copied to host memory in the background, and may then leave the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from kvtier.core.keys import KEY_BYTES
from kvtier.core.plan import PAGE_BYTES, PlanKind, Priority, Reason
from kvtier.index.cells import wide
from kvtier.index.entries import EntryRows
from kvtier.planner.hops import Hop, Ints
from kvtier.planner.memory import targets_of
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState

_NOTHING_SEEN: Final = (-1, -1, -1, -1)


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
        nbytes = max(state.layout.record_pages) * PAGE_BYTES
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
        state, index = self._state, self._state.index
        wanted = wide(np.array(entries, np.int32))
        useless = ~index.on_device(wanted) | (index.host_ranks[wanted] != 0)
        for entry in wanted[useless].tolist():
            there = index.host_ranks_at[entry] == index.every_rank or index.disk_ranks_at[entry] == index.every_rank
            self._end((entry,), Reason.NONE if there else Reason.GONE)
        wanted = wide(wanted[~useless])
        groups = index.table.groups[wanted]
        for group in range(len(state.layout.groups)):
            self._plan_group(group, wide(wanted[groups == group]))

    def _plan_group(self, group: int, entries: EntryRows) -> None:
        state, index = self._state, self._state.index
        if not len(entries):
            return
        index.pin(entries)
        try:
            fit, starts = state.host.reserve(group, len(entries))
        finally:
            state.unpinned(index.unpin(entries))
        if fit:
            hop = self._hop(entries[:fit])
            for rank, first_pages in starts.items():
                pages = state.layout.record_pages[group]
                hop.targets[rank] = targets_of(first_pages, np.arange(fit, dtype=np.int32), fit, pages)
            hop.nbytes = fit * state.layout.record_pages[group] * PAGE_BYTES
            state.send(hop, priority=Priority.SPILL, parents=self._parents(hop.entries), chain=state.config.host.codec)
        if fit < len(entries):
            self._wait_for_room(entries[fit:])

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
