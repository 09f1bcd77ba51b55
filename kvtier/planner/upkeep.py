"""What nobody asked for: spills over the watermark, queued landings and writes, reclaims."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtier.core.plan import PAGE_BYTES, PlanKind, Priority, Reason
from kvtier.index.cells import wide
from kvtier.index.entries import EntryRows
from kvtier.planner.disk import Directory
from kvtier.planner.draining import Drain
from kvtier.planner.hops import WRITE_HOP_BYTES, Hop, stretches
from kvtier.planner.landings import Landings
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState

_NO_ENTRIES: Final = np.empty(0, np.int32)
_RECLAIMS_IN_VAIN: Final = 8


class Upkeep:
    """Plans what keeps the tiers in order."""

    def __init__(self, state: ControlState, stages: Stages) -> None:
        """Tickets that wait for a write go on through ``stages``."""
        self._state = state
        self._stages = stages
        self._host = Drain(state, state.host, state.disk, state, lambda: state.disk.usable)
        self._device = None
        if state.device is not None:
            self._device = Drain(state, state.device, state.landing, state.device_keeper)
        self._landings = Landings(state, stages)

    def plan(self) -> None:
        """Plan what follows from how full the tiers are."""
        if self._device is not None:
            self._device.plan()
        self._host.plan()
        if self._state.disk.backlog:
            self._write()
        if self._device is not None and self._state.landing.backlog:
            self._landings.plan()
        for rank, disk in self._state.disk.ranks.items():
            for directory in disk.directories.values():
                while directory.waits_for_segments and self._reclaim(rank, directory):
                    pass
        self._make_entries_free()
        self._state.bury()

    def _make_entries_free(self) -> None:
        """Give segments back, the oldest of every directory in turn, until a store gets the entries that it lacked.

        In turn, because an entry is free when no rank has a copy of it. But not many whose blocks are all in host
        memory, too: that makes no entry free.
        """
        state, in_vain = self._state, 0
        if not state.missing_entries:
            return
        wanted, state.missing_entries = state.index.table.free + state.missing_entries, 0
        directories = [
            (rank, directory)
            for rank, disk in state.disk.ranks.items()
            for directory in disk.directories.values()
            if directory.writable
        ]
        while (free := state.index.table.free) < wanted and in_vain < _RECLAIMS_IN_VAIN:
            if not sum(self._reclaim(rank, directory) for rank, directory in directories):
                return
            in_vain = in_vain + 1 if state.index.table.free == free else 0

    @property
    def waits_for_segments(self) -> bool:
        """Whether a directory needs segments back that somebody may have held: who writes to it waits for them."""
        return any(
            directory.waits_for_segments
            for disk in self._state.disk.ranks.values()
            for directory in disk.directories.values()
        )

    def _write(self) -> None:
        state, more = self._state, True
        nbytes = max(state.layout.record_pages) * PAGE_BYTES
        while more:
            entries: list[int] = []
            try:
                state.disk.next_writes(nbytes, state.in_flight_bytes[PlanKind.SPILL], entries)
                more = bool(entries)
                if more:
                    self._write_those(entries, nbytes)
            except BaseException:  # Ctrl-C: whoever waits for the disk must not wait for ever
                going = [hop.entries for hop in state.hops.values() if hop.kind == PlanKind.SPILL]
                self._let_go(np.setdiff1d(np.array(entries, np.int32), np.concatenate([_NO_ENTRIES, *going])))
                raise

    def _let_go(self, entries: EntryRows) -> None:
        """``entries`` are not written now, which is no refusal by the disk."""
        for entry in entries.tolist():
            self._state.disk.take_back(entry)
            for ticket in self._state.row_ended(entry, Reason.REFUSED):
                self._stages.advance(ticket)

    def _write_those(self, entries: list[int], nbytes: int) -> None:
        state, wanted = self._state, wide(np.array(entries, np.int32))
        if state.device is not None and state.disk.usable:
            wanted = self._without_unlanded(wanted)
            entries = wanted.tolist()
        wanted = wanted[state.index.on_host(wanted) & ~state.index.on_disk(wanted)] if state.disk.usable else wanted[:0]
        going = set(wanted.tolist())
        hindrance = Reason.GONE if state.disk.usable else Reason.NO_DISK
        for entry in entries:
            if entry not in going:
                done = int(state.index.disk_ranks[entry]) == int(state.index.all_ranks)
                state.disk.take_back(entry)
                for ticket in state.row_ended(entry, Reason.NONE if done else hindrance):
                    self._stages.advance(ticket)
        for rows in stretches(len(wanted), nbytes, WRITE_HOP_BYTES):
            try:
                self._send_write(wanted[rows], nbytes)
            except Exception as error:  # a mistake of ours
                state.mistakes.append(("planning a write", error))
                self._refuse(wanted[rows])

    def _without_unlanded(self, entries: EntryRows) -> EntryRows:
        """``entries`` without those of the device alone: they go to disk when they have landed in host memory."""
        state, index = self._state, self._state.index
        unlanded = index.on_device(entries) & ~index.on_host(entries) & ~index.on_disk(entries)
        for entry in entries[unlanded].tolist():
            state.disk.postpone(entry)
            state.landing.enqueue(entry, first=True)
            self._landings.look_again()
        return wide(entries[~unlanded]) if unlanded.any() else entries

    def _refuse(self, entries: EntryRows) -> None:
        for entry in entries.tolist():
            self._state.disk.write_ended(entry, written=False)
            for ticket in self._state.row_ended(entry, Reason.REFUSED):
                self._stages.advance(ticket)

    def _send_write(self, entries: EntryRows, nbytes: int) -> None:
        state = self._state
        ranks = int(state.index.all_ranks)
        blocks = state.index.depth[entries]
        hop = Hop(state.next_number(), PlanKind.SPILL, entries, blocks, ranks, state.version)
        hop.nbytes = nbytes * len(entries)
        state.send(hop, priority=Priority.SPILL, chain=state.config.disk.codec)

    def _reclaim(self, rank: int, directory: Directory) -> bool:
        """Unpublish the oldest sealed segment that nobody reads, and ask for it to be made clean."""
        state, index = self._state, self._state.index
        pinned = index.pinned_segments(rank) if directory.sealed else set()
        segment = next((segment for segment in directory.sealed if segment not in pinned), None)
        if segment is None:
            return False
        generation = directory.sealed.pop(segment)
        directory.reclaiming.add(segment)
        state.disk.ranks[rank].reclaimed[segment] = generation
        entries = index.in_segment(rank, segment)
        state.leave_disk(rank, entries)
        index.segment_generation[rank].pop(segment, None)
        nothing = np.empty(0, np.int32)
        hop = Hop(state.next_number(), PlanKind.RECLAIM, nothing, nothing, 1 << rank, state.version)
        hop.segment, hop.generation = segment, generation
        state.send(hop, priority=Priority.SPILL)
        return True
