"""The stages of a ticket: in host memory, written, synced; each is waited for before the next begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from kvtier.core.plan import Reason
from kvtier.index.cells import wide
from kvtier.index.entries import EntryRows
from kvtier.planner.hops import Ints
from kvtier.planner.state import ControlState
from kvtier.planner.tickets import Durability, Outcome, Ticket, TicketKind

_NO_ENTRIES: Final = np.empty(0, np.int32)


class Stages:
    """Takes tickets from stage to stage."""

    def __init__(self, state: ControlState) -> None:
        """Everything is kept in ``state``."""
        self._state = state
        self.climb: Callable[[Ticket], None] = _cannot_climb
        """Plans what brings the blocks of a prefetch from host memory to the device."""

    def advance(self, ticket: Ticket) -> None:
        """Take ``ticket`` to its next stage while it waits for nothing; the last stage finishes it.

        A mistake of ours refuses it: whoever brought the news that it waited for has more to bring to others.
        """
        try:
            self._go_on(ticket)
        except Exception as error:
            self._state.mistakes.append(("taking a job to its next stage", error))
            self.give_up(ticket, Reason.REFUSED)

    def _go_on(self, ticket: Ticket) -> None:
        while not ticket.waits and not ticket.finished:
            if ticket.climbs:
                ticket.climbs = False
                self.climb(ticket)
            elif ticket.stage == ticket.durability:
                self._finish(ticket)
            elif ticket.stage == Durability.MEMORY:
                ticket.stage = Durability.PROCESS
                self._await_writes(ticket)
            else:
                ticket.stage = Durability.DURABLE
                self._sync(ticket)

    def give_up(self, ticket: Ticket, reason: Reason, *, waits: int = 0) -> None:
        """End ``ticket``, whatever it waits for, once ``waits`` hops have ended; harmless for one that has ended."""
        if ticket.finished:
            return
        ticket.fail_from(ticket.first_block, reason)
        ticket.waits = waits
        ticket.stage, ticket.climbs = ticket.durability, False
        self.advance(ticket)

    def _await_writes(self, ticket: Ticket) -> None:
        state = self._state
        if ticket.kind == TicketKind.FLUSH:
            kept = {entry: None for book in state.books.values() for entry in book.candidates()}
            entries = wide(np.array(list(kept), np.int32))
            entries = entries[state.which_spill(entries)]
            blocks = np.zeros(len(entries), np.int32)
        else:
            entries, blocks = self._kept(ticket)
        dirty = ~state.index.on_disk(entries)
        waiting, of_blocks = entries[dirty].tolist(), blocks[dirty].tolist()
        if not state.disk.usable:
            gone = [0] if ticket.kind == TicketKind.FLUSH and state.lost_blocks else []
            for block in of_blocks + gone:
                ticket.fail(block, Reason.NO_DISK)
            return
        ticket.waits += len(waiting)
        first, waiters = ticket.kind == TicketKind.STORE, state.row_waiters
        for entry, block, key in zip(waiting, of_blocks, map(state.index.cells.key, waiting), strict=True):
            state.disk.enqueue(entry, first=first)
            if entry in waiters:
                waiters[entry].append((ticket, block, key))
            else:
                waiters[entry] = [(ticket, block, key)]

    def _sync(self, ticket: Ticket) -> None:
        if not self._state.attached or not self._state.disk.is_there:  # one that is not there would never answer
            for at in range(len(ticket.outcome)):
                ticket.fail(ticket.first_block + at, Reason.NO_DISK)
            return
        entries, blocks = self._kept(ticket)
        if len(entries) or ticket.kind == TicketKind.FLUSH:
            self._state.sync_hop(ticket, entries, blocks)

    def _kept(self, ticket: Ticket) -> tuple[EntryRows, Ints]:
        """Entries that ``ticket`` holds and that have not failed, and which of its blocks they are."""
        if not ticket.held:
            return _NO_ENTRIES, _NO_ENTRIES
        entries = np.concatenate([own for own, _ in ticket.held])
        blocks = np.concatenate([own for _, own in ticket.held])
        kept = np.frombuffer(ticket.outcome, np.uint8)[blocks - ticket.first_block] != int(Outcome.FAILED)
        return wide(entries[kept]), blocks[kept]

    def _finish(self, ticket: Ticket) -> None:
        ticket.succeed()
        while ticket.held:
            entries, _ = ticket.held.pop()
            self._state.unpinned(self._state.index.unpin(entries))
        ticket.finished = ticket.source_free = True
        self._state.news.append(ticket)


def _cannot_climb(ticket: Ticket) -> None:
    raise RuntimeError(f"nobody plans how a {ticket.kind.name} climbs")
