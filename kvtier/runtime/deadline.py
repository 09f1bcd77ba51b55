"""One deadline for several steps that wait, one after the other."""

from __future__ import annotations

from kvtier.config import MOST_SECONDS
from kvtier.runtime.seam import Clock


class Deadline:
    """A moment on a clock: each step gets what the earlier ones left of the time."""

    def __init__(self, clock: Clock, timeout_s: float) -> None:
        """``timeout_s`` from now, thirty years at most: threads cannot be waited for endlessly."""
        self._clock = clock
        self._at_s = clock.monotonic() + min(timeout_s, MOST_SECONDS)

    def left_s(self) -> float:
        """Seconds until then; 0 afterwards: look, and do not wait."""
        return max(0.0, self._at_s - self._clock.monotonic())
