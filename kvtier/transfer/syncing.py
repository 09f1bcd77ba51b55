"""Syncs: what a directory has written becomes durable."""

from __future__ import annotations

from kvtier.core.plan import Plan, Priority, Reason
from kvtier.runtime.seam import IODone, IORequest, Op
from kvtier.tiers.disk import SyncTarget
from kvtier.transfer.equipment import DiskPath, Equipment
from kvtier.transfer.run import Run


class SyncRun(Run):
    """Runs one SYNC plan: what every directory has written so far becomes durable."""

    def __init__(self, plan: Plan, equipment: Equipment) -> None:
        """Nothing is under way yet."""
        super().__init__(plan, equipment)
        self._left = 0
        self._error = False

    def begin(self) -> None:
        """Sync every file that has something unsynced."""
        for path in self.equipment.paths:
            for target in path.tier.unsynced():
                # What a directory that is gone holds, or a file that failed a sync, can never be called durable.
                if target.fd < 0 or not path.tier.usable:
                    self._error = True
                    continue
                self._left += 1
                path.lane.put_sync(SyncMove(self, target, path))
        self._error = self._error or not any(path.tier.usable for path in self.equipment.paths)
        self._end_if_done()

    def synced(self, *, good: bool) -> None:
        """One file is synced, or never will be."""
        self._left -= 1
        self._error = self._error or not good
        self._end_if_done()

    def _end_if_done(self) -> None:
        if not self._left:
            if self._error:
                self.failed_as_a_whole(Reason.IO_ERROR)
            self.settle()


class SyncMove:
    """One fdatasync."""

    priority = Priority.SPILL
    nbytes = 0

    def __init__(self, run: SyncRun, target: SyncTarget, path: DiskPath) -> None:
        """``target`` is a file of ``path``."""
        self.wanted = True
        self._run = run
        self._target = target
        self._path = path

    def prepare(self) -> IORequest | None:
        """The request; None while another sync of the same file is under way, or when none will follow."""
        tier = self._path.tier
        if tier.begin_sync(self._target):
            return IORequest(Op.SYNC, self._target.fd, 0, (), self)
        reason = tier.sync_over(self._target)
        if reason is not None:
            self.wanted = False
            self._run.synced(good=reason == Reason.NONE)
        return None

    def finish(self, done: IODone) -> None:
        """Tell the tier what is durable now, or that the segment cannot be trusted any more."""
        self._path.tier.synced(self._target, done.error)
        self._run.synced(good=done.error is None)
