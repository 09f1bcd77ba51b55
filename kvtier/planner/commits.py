"""The last step of every journey: what data planes report becomes published state, and follow-ups are planned."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

import numpy as np

from kvtier.core.plan import (
    PAGE_BYTES,
    Completion,
    DiskState,
    Hello,
    Lost,
    PlanKind,
    Priority,
    Reason,
    Tier,
)
from kvtier.index.cells import wide
from kvtier.index.entries import EntryRows
from kvtier.planner.disk import Directory
from kvtier.planner.hellos import check_hello
from kvtier.planner.hops import WRITE_HOP_BYTES, Hop, stretches
from kvtier.planner.recovery import Recovery
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState
from kvtier.planner.tickets import Ticket

_ENTRIES_LOOKED_AT: Final = 4096
_EVICTED_A_TURN: Final = 256
"""Room is made ahead in steps of less than a millisecond: nobody waits for what nobody asked for."""


class Commits:
    """Takes completions and reports in."""

    def __init__(self, state: ControlState, stages: Stages) -> None:
        """Tickets go on through ``stages``."""
        self._state = state
        self._stages = stages
        self.recovery = Recovery(state)
        self._draining = False
        self._settle = {
            PlanKind.STORE: self._settle_store,
            PlanKind.LOAD: self._settle_load,
            PlanKind.FETCH: self._settle_load,
            PlanKind.SPILL: self._settle_spill,
            PlanKind.SYNC: self._settle_sync,
            PlanKind.RECLAIM: self._settle_reclaim,
        }

    # --- completions ------------------------------------------------------------------------------------------------

    def complete(self, completion: Completion) -> None:
        """One rank says how (part of) a plan ended; answers to plans that are over are passed over."""
        state, rank = self._state, completion.rank
        hop = state.hops.get(completion.plan_id)
        if hop is None or not hop.finals_left >> rank & 1:
            return
        if freed := hop.take(completion):
            state.host.free(freed)
        if completion.final:
            if freed := hop.end(rank):
                state.host.free(freed)
        elif completion.source_free:
            hop.sources_left &= ~(1 << rank)
        self._go_on(hop)

    def give_up(self, plan_id: int) -> None:
        """Refuse whoever waits for that plan. Its room and its pins stay as they are: something may still use them."""
        state = self._state
        hop = state.hops.pop(plan_id, None)
        if hop is None:
            return
        if not hop.settled:
            state.in_flight_bytes[hop.kind] -= hop.nbytes
        for entry in hop.entries.tolist():
            state.storing.pop(entry, None)
        of_others = [*(share.ticket for share in hop.shares), *(join.ticket for join in hop.joins)]
        for ticket in of_others if hop.ticket is None else (hop.ticket, *of_others):
            self._stages.give_up(ticket, Reason.REFUSED)

    def _go_on(self, hop: Hop) -> None:
        """Settle once every rank has answered; let go once every rank has said its last word."""
        state, ticket = self._state, hop.ticket
        if ticket and not hop.sources_left and not hop.source_told and hop.kind == PlanKind.STORE:
            hop.source_told = True
            ticket.sources -= 1
            if not ticket.sources and not ticket.source_free:
                ticket.source_free = True
                state.news.append(ticket)
        if not hop.settled and (hop.answered if len(hop.entries) else not hop.finals_left):
            hop.settled = True
            state.in_flight_bytes[hop.kind] -= hop.nbytes
            self._settle[hop.kind](hop)
        if not hop.finals_left:
            del state.hops[hop.plan_id]
            state.unpinned(state.index.unpin(hop.entries))

    # --- settling ---------------------------------------------------------------------------------------------------

    def _settle_store(self, hop: Hop) -> None:
        state = self._state
        if hop.version != state.version:
            hop.fail_all(Reason.RETIRED)
        for entry in hop.entries.tolist():
            state.storing.pop(entry, None)
        complete = self._land(hop)
        if state.writes_through and state.disk.usable:
            for entry in complete.tolist():
                state.disk.enqueue(entry)
        self._pass_on(hop)

    def _settle_load(self, hop: Hop) -> None:
        if hop.version != self._state.version:
            hop.fail_all(Reason.RETIRED)
        if hop.targets:
            self._land(hop)
        self._pass_on(hop)

    def _settle_spill(self, hop: Hop) -> None:
        state = self._state
        self._fail_overtaken(hop)
        rows = hop.good().nonzero()[0]
        written = hop.entries[rows]
        complete = written[:0]
        for rank in hop.answers:
            a = hop.answers[rank][rows]
            complete = state.index.add_disk(rank, written, a["segment"], a["page"], a["pages"], a["generation"])
            self.recovery.written(rank, written)
        state.tell("stored", complete, Tier.DISK)
        state.counts["spilled_bytes"] += hop.moved_bytes
        for row, entry in enumerate(hop.entries.tolist()):
            state.disk.write_ended(entry, written=row not in hop.failed)
            self._advance(state.row_ended(entry, hop.failed.get(row, Reason.NONE)))

    def _fail_overtaken(self, hop: Hop) -> None:
        """Rows whose segment was sealed and reclaimed while the rest of the plan was still being written."""
        for rank, answers in hop.answers.items():
            ended = self._state.disk.ranks[rank].reclaimed
            places = zip(answers["segment"].tolist(), answers["generation"].tolist(), strict=True)
            over = np.array([generation <= ended.get(segment, -1) for segment, generation in places], np.bool_)
            hop.fail(np.flatnonzero(over & hop.landed(rank, Tier.DISK)).tolist(), Reason.GONE)

    def _settle_sync(self, hop: Hop) -> None:
        ticket = hop.ticket
        if ticket is None:
            return
        if hop.failed:
            ticket.fail_from(ticket.first_block, hop.failed[0])
        ticket.waits -= 1
        self._stages.advance(ticket)

    def _settle_reclaim(self, hop: Hop) -> None:
        for rank in hop.unanswered:
            directory = self._state.disk.ranks[rank].directory_of(hop.segment)
            directory.reclaiming.discard(hop.segment)
            directory.reclaims_wanted -= 1
        self._state.counts["reclaimed_segments"] += 1

    def _land(self, hop: Hop) -> EntryRows:
        """Publish the copies that landed in host memory on every rank, free the others; returns what is complete."""
        state = self._state
        if hop.landed_whole() and state.index.none_on_host(hop.entries):
            complete = state.host.publish_whole(hop)
        else:
            complete = self._land_some(hop)
        state.host.admit(complete)
        state.tell("stored", complete, Tier.HOST)
        return complete

    def _land_some(self, hop: Hop) -> EntryRows:
        state = self._state
        fresh = hop.good() & (state.index.host_ranks[hop.entries] == 0)
        for rank in hop.answers:
            fresh &= hop.landed(rank, Tier.HOST)
        rows = wide(fresh.nonzero()[0])
        complete = hop.entries[:0]
        for rank in hop.answers:
            stray = np.flatnonzero(hop.landed(rank, Tier.HOST) & ~fresh)
            answers = hop.answers[rank][stray]
            state.host.free(
                (rank, page, n) for page, n in zip(answers["page"].tolist(), answers["pages"].tolist(), strict=True)
            )
            complete = state.host.publish(hop, rank, rows)
        return complete

    def _pass_on(self, hop: Hop) -> None:
        """Tell the ticket of ``hop`` and those that joined it how its rows ended."""
        ticket = hop.ticket
        if ticket is not None:
            for row, reason in hop.failed.items():
                ticket.fail(int(hop.blocks[row]), reason)
            ticket.moved_bytes += hop.moved_bytes
            ticket.waits -= 1
            self._stages.advance(ticket)
        if hop.shares:
            self._share_out(hop)
        for join in hop.joins:
            for row, block in zip(join.rows.tolist(), join.blocks.tolist(), strict=True):
                if row in hop.failed:
                    join.ticket.fail(block, hop.failed[row])
            join.ticket.waits -= 1
            self._stages.advance(join.ticket)

    def _share_out(self, hop: Hop) -> None:
        """Tell every ticket of a joint hop how its rows ended."""
        moved = [sum(ranks) for ranks in zip(*(a["moved_bytes"].tolist() for a in hop.answers.values()), strict=True)]
        for share in hop.shares:
            ticket, rows = share.ticket, share.rows
            for row in hop.failed.keys() & rows if hop.failed else ():
                ticket.fail(ticket.first_block + row - rows.start, hop.failed[row])
            ticket.moved_bytes += sum(moved[rows.start : rows.stop])
            ticket.waits -= 1
            self._stages.advance(ticket)

    def _advance(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            self._stages.advance(ticket)

    # --- reports ----------------------------------------------------------------------------------------------------

    def attach(self, hello: Hello) -> None:
        """A data plane is there; if its rank was there before, all that the old life held is void.

        Raises:
            ConfigError: there is no such rank, or it has another layout.
        """
        state = self._state
        check_hello(hello, state.layout, state.index.ranks)
        if hello.rank in state.incarnations:
            self._void(hello.rank)
        state.incarnations[hello.rank] = hello.incarnation
        state.host.attach(hello.rank, hello.host_pages)
        state.disk.attach(hello)
        if hello.disk_bytes:
            self.recovery.begin(hello.rank)

    def detach(self, rank: int) -> None:
        """The data plane of ``rank`` is gone: nothing is asked of it before another says hello."""
        del self._state.incarnations[rank]  # first: what its plans end may ask for more
        self._void(rank)
        self._state.host.attach(rank, 0)
        self._state.disk.detach(rank)
        self.recovery.give_up(rank)

    def _void(self, rank: int) -> None:
        state, index = self._state, self._state.index
        state.plans = [plan for plan in state.plans if plan.rank != rank]
        # Also those of which the rank has said its last word: what it landed is not there any more.
        for hop in [hop for hop in state.hops.values() if hop.ranks >> rank & 1]:
            if not hop.settled or hop.finals_left >> rank & 1:
                hop.void(rank)
                self._go_on(hop)
        bit = np.uint32(1 << rank)
        touched = slice(0, index.table.touched)
        on_host = np.flatnonzero(index.host_ranks[touched] & bit).astype(np.int32)
        on_disk = np.flatnonzero(index.disk_ranks[touched] & bit).astype(np.int32)
        for entry in on_host.tolist():
            state.host.drop(entry)
        index.drop_disk(rank, on_disk)
        state.tell("removed", on_host, Tier.HOST)
        state.tell("removed", on_disk, Tier.DISK)
        state.forget_unreadable(np.union1d(on_host, on_disk))

    def lost(self, report: Lost) -> None:
        """Copies that turned out damaged or gone; newer copies at other places stay."""
        state, index, rank = self._state, self._state.index, report.rank
        for row in report.rows:
            entry = index.table.find_one(row["key"].tobytes(), int(row["group"]))
            if entry < 0 or not self._is_at(entry, rank, row):
                continue
            lost = np.array([entry], np.int32)
            if row["tier"] == Tier.HOST:
                state.host.drop(entry)
            else:
                index.drop_disk(rank, lost)
            state.left(lost, Tier(int(row["tier"])))

    def _is_at(self, entry: int, rank: int, row: np.void) -> bool:
        """Whether the copy that ``rank`` has of ``entry`` is the one that ``row`` (dtype ``LOST``) speaks of."""
        index = self._state.index
        if row["tier"] == Tier.HOST:
            return bool(index.host_ranks[entry] >> rank & 1 and index.host_page[rank, entry] == row["page"])
        place = (index.disk_segment[rank, entry], index.disk_page[rank, entry])
        generation = index.generations(rank, np.array([entry], np.int32))[0]
        return bool(
            index.disk_ranks[entry] >> rank & 1
            and place == (row["segment"], row["page"])
            and generation == row["generation"]
        )

    def disk_state(self, report: DiskState) -> None:
        """How a directory is; one that cannot be used any more loses all its copies."""
        if self._state.disk.update(report):
            entries = self._state.index.in_directory(report.rank, report.directory)
            self._state.index.drop_disk(report.rank, entries)
            self._state.left(entries, Tier.DISK)

    # --- follow-ups -------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Plan what nobody asked for: spills over the watermark, queued writes, reclaims."""
        host, limits = self._state.host, self._state.config.host
        self._draining = host.is_above(limits.low_watermark if self._draining else limits.high_watermark)
        if self._draining:
            self._spill_to_low_watermark()
        if self._state.disk.backlog:
            self._write()
        for rank, disk in self._state.disk.ranks.items():
            for directory in disk.directories.values():
                while directory.reclaims_wanted > len(directory.reclaiming) and self._reclaim(rank, directory):
                    pass

    def _spill_to_low_watermark(self) -> None:
        """Free some of what is on disk already, the least worth keeping first; too little: queue the rest for it."""
        state, low = self._state, self._state.config.host.low_watermark
        free_pages = min(int((1 - low) * space.capacity_pages) for space in state.host.spaces.values())
        gone = state.host.make_room(free_pages, _EVICTED_A_TURN)
        if gone == _EVICTED_A_TURN or not state.disk.usable:
            return
        surplus = free_pages - state.host.free_pages
        for entry in islice(state.host.candidates(), _ENTRIES_LOOKED_AT):
            if surplus <= 0:
                break
            if not state.disk.awaits_write(entry):
                if state.index.pins[entry] or state.may_go(entry):
                    continue
                state.disk.enqueue(entry)
            surplus -= int(state.index.host_pages[0, entry])

    def _write(self) -> None:
        state = self._state
        nbytes = max(state.layout.record_pages) * PAGE_BYTES
        while entries := state.disk.next_writes(nbytes, state.in_flight_bytes[PlanKind.SPILL]):
            wanted = wide(np.array(entries, np.int32))
            wanted = (
                wanted[state.index.on_host(wanted) & ~state.index.on_disk(wanted)] if state.disk.usable else wanted[:0]
            )
            going = set(wanted.tolist())
            for entry in entries:
                if entry not in going:
                    done = int(state.index.disk_ranks[entry]) == int(state.index.all_ranks)
                    state.disk.take_back(entry)
                    self._advance(state.row_ended(entry, Reason.NONE if done else Reason.NO_SPACE))
            for rows in stretches(len(wanted), nbytes, WRITE_HOP_BYTES):
                self._send_write(wanted[rows], nbytes)

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
        index.drop_disk(rank, entries)
        index.segment_generation[rank].pop(segment, None)
        state.left(entries, Tier.DISK)
        nothing = np.empty(0, np.int32)
        hop = Hop(state.next_number(), PlanKind.RECLAIM, nothing, nothing, 1 << rank, state.version)
        hop.segment, hop.generation = segment, generation
        state.send(hop, priority=Priority.SPILL)
        return True
