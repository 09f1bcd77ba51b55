"""What control is told next: which segments it may give back, and which of those that it gave back are done."""

from __future__ import annotations

from kvtier.tiers.disk.places import DiskEvents
from kvtier.tiers.disk.segment import Segment


class News:
    """Collects until it is taken; whoever owns it serialises the calls."""

    def __init__(self) -> None:
        """Nothing has happened."""
        self._sealed: list[tuple[int, int]] = []
        self._reclaimed: list[int] = []
        self._told: tuple[bool, str, int, int] | None = None

    def may_be_reclaimed(self, segment: Segment) -> None:
        """``segment`` takes no more records in this life; told once."""
        if not segment.announced:
            segment.announced = True
            self._sealed.append((segment.number, segment.generation))

    def reclaim_ended(self, number: int) -> None:
        """Segment ``number`` is clean, or gone, or was not in the life that control meant."""
        self._reclaimed.append(number)

    def take(self, state: tuple[bool, str, int, int]) -> DiskEvents | None:
        """What happened since the last call, and ``state`` (the last four fields); None when nothing did."""
        if not self._sealed and not self._reclaimed and state == self._told:
            return None
        self._told = state
        oldest_first = sorted(self._sealed, key=lambda life: life[1])
        events = DiskEvents(tuple(oldest_first), tuple(self._reclaimed), *state)
        self._sealed, self._reclaimed = [], []
        return events
