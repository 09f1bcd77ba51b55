"""Syncs: what a directory has written becomes durable."""

from __future__ import annotations

from kvtier.core.plan import NOWHERE, Plan, Priority, Reason
from kvtier.runtime.seam import IODone, IORequest, Op
from kvtier.tiers.disk import SyncTarget
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.lanes import global_segment, lane_of
from kvtier.transfer.paths import DiskPath
from kvtier.transfer.run import Run


class SyncRun(Run):
    """Runs one SYNC plan: what its rows, or without rows every directory, have written so far becomes durable."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """Nothing is under way yet."""
        super().__init__(plan, equipment)
        self._segments = plan.rows["disk_segment"].tolist()
        self._left = 0
        self._lost: set[int] = set()
        """Segments that can never be called durable: of a directory that is gone, or a sync of them failed."""

    def begin(self) -> None:
        """Sync every file that has something unsynced."""
        wanted = set(self._segments)
        for path in self.equipment.paths:
            for target in path.tier.unsynced():
                segment = global_segment(path.number, target.segment)
                if self._segments and segment not in wanted:
                    continue
                if target.fd < 0 or not path.tier.usable:
                    self._lost.add(segment)
                    continue
                self._left += 1
                path.lane.put_sync(SyncMove(self, target, path, segment))
        self._end_if_done()

    def synced(self, segment: int, *, good: bool) -> None:
        """One file is synced, or never will be."""
        self._left -= 1
        if not good:
            self._lost.add(segment)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._left or self.final:
            return
        usable = [path.tier.usable for path in self.equipment.paths]
        if not self._segments and (self._lost or not any(usable)):
            self.failed_as_a_whole(Reason.IO_ERROR)
        good = []
        for row, segment in enumerate(self._segments):
            if segment == NOWHERE:
                self.failed(row, Reason.GONE)
            elif segment in self._lost or not usable[lane_of(segment)[0]]:
                self.failed(row, Reason.IO_ERROR)
            else:
                good.append(row)
        if good:
            self.all_ok(good, moved_bytes=0)
        self.settle()


class SyncMove:
    """One fdatasync, for all runs that wait for it when it begins."""

    priority = Priority.SPILL
    nbytes = 0

    def __init__(self, run: SyncRun, target: SyncTarget, path: DiskPath, segment: int) -> None:
        """``target`` is a file of ``path``, and ``segment`` what plans call it."""
        self.wanted = True
        self._runs = [run]
        self._target = target
        self._path = path
        self._segment = segment

    def join(self, other: SyncMove) -> bool:
        """Whether ``other``, asked for later, is of the same life of the same file: then this one covers it, too."""
        mine, its = self._target, other._target
        if other._path is not self._path or (mine.segment, mine.generation) != (its.segment, its.generation):
            return False
        self._runs += other._runs
        self._target = its
        return True

    def prepare(self) -> IORequest | None:
        """The request; None while another sync of the same file is under way, or when none will follow."""
        tier = self._path.tier
        if tier.begin_sync(self._target):
            return IORequest(Op.SYNC, self._target.fd, 0, (), self)
        reason = tier.sync_over(self._target)
        if reason is not None:
            self.wanted = False
            self._synced(good=reason == Reason.NONE)
        return None

    def finish(self, done: IODone) -> None:
        """Tell the tier what is durable now, or that the segment cannot be trusted any more."""
        self._path.tier.synced(self._target, done.error)
        self._synced(good=done.error is None)

    def _synced(self, *, good: bool) -> None:
        for run in self._runs:
            run.synced(self._segment, good=good)
