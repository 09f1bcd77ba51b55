"""Room in a memory tier: extents of 4 KiB pages, first reserved at their worst-case length, trimmed at commit.

Free runs are kept by size in powers of two and joined with their neighbours when freed, so that blocks of one size
never fragment the tier and compressed blocks fragment it little (two-level segregated fit: Masmano et al., 2004).
"""

from __future__ import annotations

from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

NO_ROOM: Final = -1
_LOOK_AT: Final = 32


class Space:
    """Extents in [0, capacity_pages)."""

    def __init__(self, capacity_pages: int) -> None:
        """All of it is free."""
        self.capacity_pages = capacity_pages
        self.used_pages = 0
        self._length_at: dict[int, int] = {}  # first page of a free run -> its length
        self._start_of_end: dict[int, int] = {}  # page after a free run -> its first page
        self._bins: list[dict[int, None]] = [{} for _ in range(capacity_pages.bit_length() + 1)]
        self._filled = 0  # bit b is set where bin b has a run
        if capacity_pages:
            self._add(0, capacity_pages)

    @property
    def free_pages(self) -> int:
        """Pages in no extent."""
        return self.capacity_pages - self.used_pages

    def take(self, pages: int) -> int:
        """First page of a new extent of ``pages``, or NO_ROOM."""
        start = self._find(pages)
        if start == NO_ROOM:
            return NO_ROOM
        length = self._remove(start)
        if length > pages:
            self._add(start + pages, length - pages)
        self.used_pages += pages
        return start

    def take_many(self, pages: int, count: int) -> list[int]:
        """First pages of up to ``count`` extents of ``pages`` each: fewer where room ends."""
        taken: list[int] = []
        while len(taken) < count:
            start = self._find(pages)
            if start == NO_ROOM:
                break
            length = self._remove(start)
            fit = min(length // pages, count - len(taken))
            taken.extend(range(start, start + fit * pages, pages))
            if length > fit * pages:
                self._add(start + fit * pages, length - fit * pages)
            self.used_pages += fit * pages
        return taken

    def give_back(self, start: int, pages: int) -> None:
        """Free pages [start, start + pages), all of which are taken."""
        self.used_pages -= pages
        length = self._length_at.get(start + pages)
        if length is not None:
            self._remove(start + pages)
            pages += length
        before = self._start_of_end.get(start)
        if before is not None:
            pages += self._remove(before)
            start = before
        self._add(start, pages)

    def give_back_many(self, starts: npt.NDArray[np.int32], pages: npt.NDArray[np.int32]) -> None:
        """Free extents [starts[i], starts[i] + pages[i]), all of which are taken; neighbours come back as one."""
        order = starts.argsort()
        firsts = starts[order]
        ends = firsts + pages[order]
        breaks = (firsts[1:] != ends[:-1]).nonzero()[0]
        lasts = ends[breaks].tolist() + ends[-1:].tolist()
        for first, last in zip(firsts[:1].tolist() + firsts[breaks + 1].tolist(), lasts, strict=True):
            self.give_back(first, last - first)

    def free_runs(self) -> list[tuple[int, int]]:
        """(first page, pages) of every free run in order: for checks."""
        return sorted(self._length_at.items())

    def _find(self, pages: int) -> int:
        # Runs of the same power of two may fit, those of any higher one do: the closest first, a few of them looked at.
        level = pages.bit_length() - 1
        for start in islice(self._bins[level], _LOOK_AT) if level < len(self._bins) else ():
            if self._length_at[start] >= pages:
                return start
        higher = self._filled >> (level + 1)
        if not higher:
            return NO_ROOM
        return next(iter(self._bins[level + (higher & -higher).bit_length()]))

    def _add(self, start: int, pages: int) -> None:
        self._length_at[start] = pages
        self._start_of_end[start + pages] = start
        level = pages.bit_length() - 1
        self._bins[level][start] = None
        self._filled |= 1 << level

    def _remove(self, start: int) -> int:
        pages = self._length_at.pop(start)
        del self._start_of_end[start + pages]
        level = pages.bit_length() - 1
        del self._bins[level][start]
        if not self._bins[level]:
            self._filled &= ~(1 << level)
        return pages
