"""The last step of every journey: what data planes answer becomes published state, and tickets go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from kvtier.core.plan import COMPLETED, DIRECTORY_SHIFT, NOWHERE, Completion, Plan, PlanKind, Reason, Status, Tier
from kvtier.index.cells import wide
from kvtier.index.entries import EntryRows
from kvtier.planner.hops import Hop
from kvtier.planner.recovery import Recovery
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState
from kvtier.planner.tickets import Ticket


class Commits:
    """Takes completions in."""

    def __init__(self, state: ControlState, stages: Stages, recovery: Recovery) -> None:
        """Tickets go on through ``stages``; ``recovery`` hears what was written."""
        self._state = state
        self._stages = stages
        self._recovery = recovery
        self._settle = {
            PlanKind.STORE: self._settle_store,
            PlanKind.LOAD: self._settle_load,
            PlanKind.FETCH: self._settle_load,
            PlanKind.SPILL: self._settle_spill,
            PlanKind.SYNC: self._settle_sync,
            PlanKind.RECLAIM: self._settle_reclaim,
            PlanKind.LAND: self._settle_landing,
        }

    # --- completions ------------------------------------------------------------------------------------------------

    def complete(self, completion: Completion) -> None:
        """One rank says how (part of) a plan ended; answers to plans that are over are passed over."""
        state, rank = self._state, completion.rank
        hop = state.hops.get(completion.plan_id)
        if hop is None or not hop.finals_left >> rank & 1:
            return
        if freed := hop.take(completion):
            state.books[hop.tier].free(freed)
        if completion.final:
            if freed := hop.end(rank):
                state.books[hop.tier].free(freed)
        elif completion.source_free:
            hop.sources_left &= ~(1 << rank)
        self._go_on(hop)

    def give_up(self, completion: Completion) -> None:
        """Taking ``completion`` in failed: nothing of its plan is published, and whoever waits for it is refused.

        They are told no sooner than any plan of theirs has ended: until then engine memory is in use.
        """
        hop = self._state.hops.get(completion.plan_id)
        if hop is None:
            return
        hop.distrust(completion.rank, final=completion.final)
        if hop.settled:
            self._refuse(hop)
        try:
            self._go_on(hop)
        except Exception:
            self._refuse(hop)
            if not hop.finals_left:
                self._state.hops.pop(hop.plan_id, None)  # and its pins stay
            raise

    def disown(self, plan: Plan) -> None:
        """The rank of ``plan`` did not take it: as if it had answered that it will not."""
        rows = np.zeros(max(1, len(plan.rows)), COMPLETED)
        rows["row"], rows["status"], rows["reason"] = np.arange(len(rows)), int(Status.FAILED), int(Reason.REFUSED)
        rows["segment"] = rows["page"] = NOWHERE
        self.complete(Completion(plan.plan_id, plan.rank, 0, rows, source_free=True, final=True))

    def _refuse(self, hop: Hop) -> None:
        """Nobody waits for ``hop`` any more: nobody knows whom it has told already."""
        state = self._state
        self._stores_no_more(hop)
        for entry in hop.entries.tolist() if hop.kind == PlanKind.SPILL else ():
            state.disk.write_ended(entry, written=False)
            self._advance(state.row_ended(entry, Reason.REFUSED))
        for entry in hop.entries.tolist() if hop.kind == PlanKind.LAND else ():
            state.landing.write_ended(entry, written=False)
            self._advance(state.end_postponed(entry, Reason.REFUSED))
        for ticket in hop.let_go():
            others = sum(ticket in other.tickets for other in state.hops.values() if not other.settled)
            self._stages.give_up(ticket, Reason.REFUSED, waits=others)

    def void(self, rank: int) -> None:
        """Nothing that ``rank`` answered is there any more, nor will it answer what it was asked."""
        for hop in [hop for hop in self._state.hops.values() if hop.ranks >> rank & 1]:
            # Also where it has said its last word, but others have not.
            if not hop.settled or hop.finals_left >> rank & 1:
                hop.void(rank)
                self._go_on(hop)

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
        self._stores_no_more(hop)
        self._send_down(self._land(hop), hop.tier)
        state.dead.suspect(state.index.cells.key(hop.entries.item(row)) for row in hop.failed)
        self._pass_on(hop)

    def _send_down(self, landed: EntryRows, tier: Tier) -> None:
        """Queue what landed in ``tier`` for the next one, as far as it goes there by itself."""
        state = self._state
        if tier == Tier.DEVICE:
            for entry in landed.tolist():
                state.landing.enqueue(entry)
        elif state.writes_through and state.disk.usable:
            for entry in landed[state.which_spill(landed)].tolist() if state.windows.partial else landed.tolist():
                state.disk.enqueue(entry)

    def _stores_no_more(self, hop: Hop) -> None:
        if hop.stores:
            hop.stores = False  # from here on its entries may be stored anew
            deque(map(self._state.storing.pop, hop.entries.tolist()), maxlen=0)

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
            self._recovery.written(rank, written)
        state.tell("stored", complete, Tier.DISK)
        state.counts["spilled_bytes"] += hop.moved_bytes
        for row, entry in enumerate(hop.entries.tolist()):
            # What lost its host copy meanwhile cannot be written: that is no refusal of whatever has its number next.
            refused = row in hop.failed and bool(state.index.host_ranks_at[entry])
            state.disk.write_ended(entry, written=not refused)
            self._advance(state.row_ended(entry, hop.failed.get(row, Reason.NONE)))

    def _settle_landing(self, hop: Hop) -> None:
        state, device = self._state, self._state.index.device
        landed = self._land(hop)
        state.counts["landed_bytes"] += hop.moved_bytes
        for row, entry in enumerate(hop.entries.tolist()):
            # What lost its device copy meanwhile could not land: that is no refusal of whatever has its number next.
            refused = row in hop.failed and device is not None and bool(device.ranks_at[entry])
            state.landing.write_ended(entry, written=not refused)
            self._advance(state.end_postponed(entry, hop.failed.get(row, Reason.NONE)))
        self._send_down(landed, Tier.HOST)

    def _fail_overtaken(self, hop: Hop) -> None:
        """Rows whose segment was sealed and reclaimed while the rest of the plan was still being written."""
        for rank, answers in hop.answers.items():
            ended = self._state.disk.ranks[rank].reclaimed
            places = zip(answers["segment"].tolist(), answers["generation"].tolist(), strict=True)
            over = np.array([generation <= ended.get(segment, -1) for segment, generation in places], np.bool_)
            landed = hop.landed(rank, Tier.DISK)
            hop.fail(np.flatnonzero(over & landed).tolist(), Reason.NO_SPACE)
            gone = self._state.disk.ranks[rank].gone
            if gone:
                lost = np.isin(answers["segment"] >> DIRECTORY_SHIFT, list(gone)) & landed
                hop.fail(np.flatnonzero(lost).tolist(), Reason.NO_DISK)

    def _settle_sync(self, hop: Hop) -> None:
        ticket = hop.ticket
        if ticket is None:
            return
        for row, reason in hop.failed.items():
            ticket.fail(int(hop.blocks[row]) if len(hop.blocks) else ticket.first_block, reason)
        ticket.waits -= 1
        self._stages.advance(ticket)

    def _settle_reclaim(self, hop: Hop) -> None:
        for rank in hop.unanswered:
            directory = self._state.disk.ranks[rank].directory_of(hop.segment)
            directory.reclaiming.discard(hop.segment)
            directory.reclaims_wanted -= 1
        self._state.counts["reclaimed_segments"] += 1

    def _land(self, hop: Hop) -> EntryRows:
        """Publish the copies that landed in memory on every rank, free the others; returns what is complete."""
        state, book = self._state, self._state.books[hop.tier]
        if hop.landed_whole() and book.copies.has_none(hop.entries):
            complete = book.publish_whole(hop)
        else:
            complete = self._land_some(hop)
        used = state.device.used(complete) if hop.kind == PlanKind.LAND and state.device is not None else None
        between = np.intersect1d(hop.between, complete) if len(hop.between) else hop.between
        book.admit(complete, between, now=hop.stored_at, used=used)
        state.tell("stored", complete, hop.tier)
        return complete

    def _land_some(self, hop: Hop) -> EntryRows:
        book = self._state.books[hop.tier]
        fresh = hop.good() & (book.copies.ranks[hop.entries] == 0)
        for rank in hop.answers:
            fresh &= hop.landed(rank, hop.tier)
        rows = wide(fresh.nonzero()[0])
        complete = hop.entries[:0]
        for rank in hop.answers:
            stray = np.flatnonzero(hop.landed(rank, hop.tier) & ~fresh)
            answers = hop.answers[rank][stray]
            book.free(
                (rank, page, n) for page, n in zip(answers["page"].tolist(), answers["pages"].tolist(), strict=True)
            )
            complete = book.publish(hop, rank, rows)
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
        moved = np.add.reduce([answers["moved_bytes"] for answers in hop.answers.values()]).tolist()
        for share in hop.shares:
            ticket, rows = share.ticket, share.rows
            for row in hop.failed.keys() & rows if hop.failed else ():
                ticket.fail(ticket.first_block + row - rows.start, hop.failed[row])
            ticket.moved_bytes += sum(moved[rows.start : rows.stop]) if len(rows) > 1 else moved[rows.start]
            ticket.waits -= 1
            self._stages.advance(ticket)

    def _advance(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            self._stages.advance(ticket)
