"""How well a directory can be written, and how long to leave it alone after it failed."""

from __future__ import annotations

from typing import Final

from kvtier.runtime.seam import Clock

POISONED_IN_A_ROW: Final = 3
WRITE_PAUSE_S: Final = 60.0
"""How long no record is placed after three segments in a row failed."""
RECLAIM_PAUSE_S: Final = 5.0
"""How long no segment is made clean after one could not be."""
GROW_PAUSE_S: Final = 30.0
"""How long no segment is made after making one failed."""


class Health:
    """Counts faults and measures pauses; whoever owns it serialises the calls."""

    def __init__(self, clock: Clock) -> None:
        """All is well."""
        self.usable = True
        self.standing_reason = ""
        self.why_not_growing = ""
        self._clock = clock
        self._poisoned_in_a_row = 0
        self._no_writing_until_s = 0.0
        self._no_reclaiming_until_s = 0.0
        self._no_growing_until_s = 0.0

    @property
    def takes_writes(self) -> bool:
        """Whether records may be placed."""
        return self._clock.monotonic() >= self._no_writing_until_s

    @property
    def may_reclaim(self) -> bool:
        """Whether segments may be made clean."""
        return self._clock.monotonic() >= self._no_reclaiming_until_s

    @property
    def may_grow(self) -> bool:
        """Whether segments may be made."""
        return self._clock.monotonic() >= self._no_growing_until_s

    @property
    def reason(self) -> str:
        """Why it is not usable, or not as good as it should be; empty when all is well."""
        if self.standing_reason:
            return self.standing_reason
        if not self.takes_writes:
            return f"takes no writes for {WRITE_PAUSE_S:g} s: segment after segment failed"
        return self.why_not_growing

    def went_well(self) -> None:
        """A sync or a seal succeeded."""
        self._poisoned_in_a_row = 0

    def poisoned(self) -> bool:
        """One segment more takes no writes; True when it is the one with which a pause begins."""
        took_writes = self.takes_writes
        self._poisoned_in_a_row += 1
        if self._poisoned_in_a_row >= POISONED_IN_A_ROW:
            self._no_writing_until_s = self._clock.monotonic() + WRITE_PAUSE_S
        return took_writes and not self.takes_writes

    def could_not_reclaim(self) -> None:
        """Making a segment clean failed."""
        self._no_reclaiming_until_s = self._clock.monotonic() + RECLAIM_PAUSE_S

    def could_not_grow(self, reason: str) -> None:
        """Making a segment failed."""
        self._no_growing_until_s = self._clock.monotonic() + GROW_PAUSE_S
        self.why_not_growing = f"cannot grow: {reason}"

    def grew(self) -> None:
        """Making a segment succeeded."""
        self.why_not_growing = ""
