"""Room made ahead in a memory tier: above the high watermark the least worth keeping goes, or is queued to go down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import numpy as np

from kvtier.index.cells import wide
from kvtier.planner.eviction import Keeper
from kvtier.planner.memory import MemoryBook
from kvtier.planner.state import ControlState
from kvtier.planner.writes import WriteQueue

_ENTRIES_LOOKED_AT: Final = 4096
_NOTHING_SEEN: Final = (-1, -1, -1)
_EVICTED_A_TURN: Final = 256
"""Room is made ahead in steps of less than a millisecond: nobody waits for what nobody asked for."""


class Drain:
    """Keeps one memory tier between its watermarks."""

    def __init__(
        self,
        state: ControlState,
        book: MemoryBook,
        queue: WriteQueue,
        keeper: Keeper,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        """What ``keeper`` does not let go before the tier below has it is put into ``queue``.

        ``may_write``: whether that tier takes anything.
        """
        self._may_write = may_write
        self._state = state
        self._book = book
        self._queue = queue
        self._keeper = keeper
        self._draining = False
        self._seen = _NOTHING_SEEN

    def plan(self) -> None:
        """Free and queue what there is too much of."""
        limits = self._state.config.host
        self._book.expire()
        self._draining = self._book.is_above(limits.low_watermark if self._draining else limits.high_watermark)
        if self._draining:
            self._drain()
        else:
            self._seen = _NOTHING_SEEN

    def _drain(self) -> None:
        """Look at what may go, unless nothing went the last time and nothing has changed since.

        A change is a write that ended, or so many blocks more, less or unpinned that others may be queued or freed.
        """
        step = self._book.step_blocks
        seen = (self._queue.ended, len(self._book) // step, self._state.unpinned_entries // step)
        if seen != self._seen:
            self._seen = _NOTHING_SEEN if self._spill_to_low_watermark() else seen

    def _spill_to_low_watermark(self) -> bool:
        """Free some of what is further down already, the least worth keeping first; too little: queue the rest for it.

        Returns whether something went.
        """
        book, low = self._book, self._state.config.host.low_watermark
        free_pages = min(int((1 - low) * space.capacity_pages) for space in book.spaces.values())
        gone = book.make_room(free_pages, _EVICTED_A_TURN)
        if gone == _EVICTED_A_TURN or not self._may_write():
            return bool(gone)
        surplus = free_pages - book.free_pages
        for entry in islice(self._movable(), _ENTRIES_LOOKED_AT):
            if surplus <= 0:
                break
            if not self._queue.awaits_write(entry):
                if self._keeper.may_go(entry):
                    continue
                self._queue.enqueue(entry)
            surplus -= int(book.copies.pages[0, entry])
        return bool(gone)

    def _movable(self) -> Iterator[int]:
        """Entries of the tier, the least worth keeping first, without those that somebody holds."""
        pins, candidates = self._state.index.pins, iter(self._book.candidates())
        while len(some := wide(np.fromiter(islice(candidates, _ENTRIES_LOOKED_AT), np.int32))):
            held = (pins[some] > 0) & ~self._queue.which_await_write(some)  # a write under way pins, too
            yield from some[~held].tolist()
