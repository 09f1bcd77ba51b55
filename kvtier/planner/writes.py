"""Entries that have to go one tier down: a queue, and what has become of each."""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

from kvtier.core.columns import column
from kvtier.index.entries import EntryRows, Mask

_NOT_QUEUED: Final = 0
_WAITING: Final = 1
_UNDER_WAY: Final = 2
_POSTPONED: Final = 3


class WriteQueue:
    """Copies that have to be made in the next tier down: on disk, or for a device tier in host memory."""

    def __init__(self, write_budget_bytes: int, capacity: int) -> None:
        """At most ``write_budget_bytes`` are in flight from one rank; entries lie in [0, capacity)."""
        self.write_budget_bytes = write_budget_bytes
        self._queue: deque[int] = deque()
        self._awaited: deque[int] = deque()
        # Flags in columns: a set of millions of entries stands still for 90 ms when it grows.
        self._queued = column(capacity, np.uint8)
        self._refused = column(capacity, np.bool_)
        self._queued_at, self._refused_at = self._queued.data, self._refused.data
        self._backlog = 0
        self.ended = 0
        """Writes that came to an end, however."""

    def enqueue(self, entry: int, *, first: bool = False) -> None:
        """``entry`` must go down; ``first``: before those for which nobody waits."""
        queued = self._queued_at[entry]
        if not queued:
            self._queued_at[entry] = _WAITING
            self._backlog += 1
        elif not first or queued != _WAITING:
            return
        (self._awaited if first else self._queue).append(entry)

    def next_writes(self, nbytes: int, in_flight_bytes: int, taken: list[int]) -> None:
        """Take entries for one plan of writes into ``taken``: as many as the budget allows, at ``nbytes`` each.

        Each is there before it leaves the queue: wherever Ctrl-C strikes, one of the two has it.
        """
        room = max(0, self.write_budget_bytes - in_flight_bytes) // max(1, nbytes)
        if not in_flight_bytes:
            room = max(1, room)  # one block larger than the budget must still get through
        while len(taken) < room and (queue := self._awaited or self._queue):
            entry = queue[0]
            # It may stand in both queues, if somebody came to wait for it.
            if self._queued[entry] == _WAITING:
                taken.append(entry)
                self._queued[entry] = _UNDER_WAY
            queue.popleft()

    def take_along(self, entries: EntryRows, taken: list[int]) -> EntryRows:
        """``entries`` go with those just taken, and into ``taken``; returns those that were not on their way before."""
        free: EntryRows = entries[self._queued[entries] <= _WAITING]
        for entry in free.tolist():
            taken.append(entry)
            self._backlog += self._queued_at[entry] == _NOT_QUEUED
            self._queued_at[entry] = _UNDER_WAY
        return free

    def put_back(self, entries: list[int]) -> None:
        """``entries``, just taken, cannot go now: they are the next ones again."""
        for entry in reversed(entries):
            self._queued[entry] = _WAITING
            self._queue.appendleft(entry)

    def postpone(self, entry: int) -> None:
        """``entry``, just taken, waits for a copy in between: until ``resume``, or until it is taken back."""
        self._queued[entry] = _POSTPONED

    def is_postponed(self, entry: int) -> bool:
        """Whether ``entry`` waits for a copy in between."""
        return bool(self._queued_at[entry] == _POSTPONED)

    def resume(self, entry: int, *, first: bool) -> None:
        """The copy that ``entry``, which is postponed, waited for is there."""
        self._queued[entry] = _WAITING
        (self._awaited if first else self._queue).append(entry)

    def awaits_write(self, entry: int) -> bool:
        """Whether ``entry`` is queued or on its way."""
        return bool(self._queued_at[entry])

    def take_back(self, entry: int) -> None:
        """Nothing of ``entry`` is there to be written, or nowhere to write it. Its number may be another's by now."""
        self._backlog -= bool(self._queued[entry])
        self.ended += 1
        self._queued[entry] = _NOT_QUEUED

    def write_ended(self, entry: int, *, written: bool) -> None:
        """The write of ``entry`` ended; one that failed is not tried again while the entry lives."""
        self.take_back(entry)
        self._refused[entry] = not written

    def was_refused(self, entry: int) -> bool:
        """Whether the tier would not take ``entry``."""
        return bool(self._refused_at[entry])

    def which_await_write(self, entries: EntryRows) -> Mask:
        """``awaits_write`` of each of ``entries``."""
        waiting: Mask = self._queued[entries] != _NOT_QUEUED
        return waiting

    def which_were_refused(self, entries: EntryRows) -> Mask:
        """``was_refused`` of each of ``entries``."""
        refused: Mask = self._refused[entries]
        return refused

    def forget(self, entries: EntryRows) -> None:
        """``entries`` lost what would be written: there is nothing to be refused any more."""
        self._refused[entries] = False

    @property
    def backlog(self) -> int:
        """Entries that wait or are on their way."""
        return self._backlog
