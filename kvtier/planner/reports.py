"""What data planes report of themselves: that they are there or gone, which copies they lost, how their disks are."""

from __future__ import annotations

import numpy as np

from kvtier.core.plan import DiskState, Hello, Lost, Tier
from kvtier.index.entries import Mask
from kvtier.planner.commits import Commits
from kvtier.planner.hellos import check_hello
from kvtier.planner.recovery import Recovery
from kvtier.planner.state import ControlState


class Reports:
    """Takes reports in."""

    def __init__(self, state: ControlState, commits: Commits, recovery: Recovery) -> None:
        """What ends because of a report goes on through ``commits``; ``recovery`` takes what was found on disk."""
        self._state = state
        self._commits = commits
        self._recovery = recovery

    def attach(self, hello: Hello) -> None:
        """A data plane is there; if its rank was there before, all that the old life held is void.

        Raises:
            ConfigError: there is no such rank, or it has another layout.
        """
        state = self._state
        check_hello(hello, state.layout, state.index.ranks)
        if hello.rank in state.incarnations:
            self.detach(hello.rank)
        state.incarnations[hello.rank] = hello.incarnation
        state.host.attach(hello.rank, hello.host_pages)
        if state.device is not None:
            state.device.attach(hello.rank, hello.device_pages)
        state.disk.attach(hello)
        if hello.disk_bytes:
            self._recovery.begin(hello.rank)

    def detach(self, rank: int) -> None:
        """The data plane of ``rank`` is gone: nothing is asked of it before another says hello."""
        del self._state.incarnations[rank]  # first: what its plans end may ask for more
        self._void(rank)
        for book in self._state.books.values():
            book.attach(rank, 0)
        self._state.disk.detach(rank)
        self._recovery.give_up(rank)

    def _void(self, rank: int) -> None:
        state, index = self._state, self._state.index
        state.plans = [plan for plan in state.plans if plan.rank != rank]
        self._commits.void(rank)
        bit = np.uint32(1 << rank)
        touched = slice(0, index.table.touched)
        either = on_disk = np.flatnonzero(index.disk_ranks[touched] & bit).astype(np.int32)
        complete = on_disk[index.on_disk(on_disk)]
        for tier, book in state.books.items():
            there = np.flatnonzero(book.copies.ranks[touched] & bit).astype(np.int32)
            for entry in there.tolist():
                book.drop(entry)
            state.tell("removed", there, tier)
            either = np.union1d(either, there)
        index.drop_disk(rank, on_disk)
        state.tell("removed", complete, Tier.DISK)
        self._note_lost(index.readable(either))
        state.forget_unreadable(either)

    def lost(self, report: Lost) -> None:
        """Copies that turned out damaged or gone; newer copies at other places stay."""
        state, index, rank = self._state, self._state.index, report.rank
        for row in report.rows:
            entry = index.table.find_one(row["key"].tobytes(), int(row["group"]))
            if entry < 0 or not self._is_at(entry, rank, row):
                continue
            lost = np.array([entry], np.int32)
            tier = Tier(int(row["tier"]))
            if tier in state.books:
                state.books[tier].drop(entry)
                state.tell("removed", lost, tier)
                self._note_lost(index.readable(lost))
                state.forget_unreadable(lost)
            else:
                self._note_lost(index.on_host(lost) | index.on_device(lost))
                state.leave_disk(rank, lost)

    def _note_lost(self, is_kept: Mask) -> None:
        """Of entries that lost a copy, whether there is another."""
        self._state.lost_blocks |= not is_kept.all()

    def _is_at(self, entry: int, rank: int, row: np.void) -> bool:
        """Whether the copy that ``rank`` has of ``entry`` is the one that ``row`` (dtype ``LOST``) speaks of."""
        index = self._state.index
        tier = Tier(int(row["tier"]))
        if tier != Tier.DISK:
            book = self._state.books.get(tier)
            if book is None:
                return False
            return bool(book.copies.ranks[entry] >> rank & 1 and book.copies.page[rank, entry] == row["page"])
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
            self._note_lost(self._state.index.on_host(entries) | self._state.index.on_device(entries))
            self._state.leave_disk(report.rank, entries)
