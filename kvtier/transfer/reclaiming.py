"""Reclaims: a segment that control has given up is made clean again."""

from __future__ import annotations

from kvtier.core.plan import Reason
from kvtier.transfer.lanes import lane_of
from kvtier.transfer.run import Run


class ReclaimRun(Run):
    """Runs one RECLAIM plan; housekeeping makes the segment clean."""

    def begin(self) -> None:
        """Ask the directory."""
        directory, segment = lane_of(self.plan.segment)
        if 0 <= directory < len(self.equipment.paths):
            self.equipment.reclaims[self.plan.segment] = self
            self.equipment.paths[directory].tier.reclaim(segment, self.plan.generation)
        else:
            self.settle()

    def abandon(self, reason: Reason) -> None:
        """At closing nobody waits for the segment: the next life finds it as it is."""
        super().abandon(reason)
        self.settle()

    def ended(self) -> None:
        """The segment is clean again, or given up."""
        self.settle()
