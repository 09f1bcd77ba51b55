"""Who uses a directory right now: housekeeping stands back as long as somebody does."""

from __future__ import annotations

import math
from typing import Final

from kvtier.runtime.seam import Clock

QUIET_S: Final = 0.01
"""How long nobody must have used a directory: between two writes of one burst there are pauses of milliseconds."""


class Traffic:
    """What is under way, and when something last was; whoever owns it serialises ``began`` and ``ended``."""

    def __init__(self, clock: Clock) -> None:
        """Nobody has used the directory yet."""
        self._clock = clock
        self._under_way = 0
        self._last_s = -math.inf

    def began(self, count: int = 1) -> None:
        """Writes of ``count`` records, or a sync, that somebody waits for were begun."""
        self._under_way += count
        self.seen()

    def ended(self, count: int = 1) -> None:
        """They ended."""
        self._under_way -= count
        self.seen()

    def seen(self) -> None:
        """Somebody uses the directory, and will not say when that ends: a read."""
        self._last_s = self._clock.monotonic()

    @property
    def quiet(self) -> bool:
        """Whether a sync or a large write would be in nobody's way."""
        return not self._under_way and self._clock.monotonic() - self._last_s >= QUIET_S
