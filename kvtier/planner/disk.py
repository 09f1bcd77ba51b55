"""The disk tier as control sees it: whether it can be used, what waits to be written, which segment goes next."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvtier.core.columns import column
from kvtier.core.plan import DIRECTORY_SHIFT, DiskState, Hello
from kvtier.index.entries import EntryRows, Mask

_NOT_QUEUED: Final = 0
_WAITING: Final = 1
_UNDER_WAY: Final = 2


@dataclass(slots=True)
class Directory:
    """One directory of a rank. ``sealed`` maps segment to generation, oldest first."""

    usable: bool = True
    writable: bool = True
    reason: str = ""
    reclaims_wanted: int = 0
    reclaiming: set[int] = field(default_factory=set)
    sealed: OrderedDict[int, int] = field(default_factory=OrderedDict)

    @property
    def waits_for_segments(self) -> bool:
        """Whether more have to be given back than are on their way."""
        return self.reclaims_wanted > len(self.reclaiming)


@dataclass(slots=True)
class RankDisk:
    """The directories of one rank by number; ``reclaimed`` are the last lives of segments that ended."""

    capacity_bytes: int
    directories: dict[int, Directory] = field(default_factory=dict)
    reclaimed: dict[int, int] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether there is a directory that can be written to; one that has not reported yet counts as such."""
        working = [directory.usable and directory.writable for directory in self.directories.values()]
        return self.capacity_bytes > 0 and (any(working) or not working)

    @property
    def is_there(self) -> bool:
        """Whether there is a directory that can be read and synced, if not written to."""
        return self.capacity_bytes > 0 and len(self.gone) < max(1, len(self.directories))

    @property
    def gone(self) -> set[int]:
        """Directories that were given up."""
        return {number for number, directory in self.directories.items() if not directory.usable}

    def directory_of(self, segment: int) -> Directory:
        """The directory that ``segment`` lies in."""
        return self.directories.setdefault(segment >> DIRECTORY_SHIFT, Directory())


class DiskBook:
    """The directories of all ranks, and the queue of entries that have to be written."""

    def __init__(self, write_budget_bytes: int, capacity: int) -> None:
        """At most ``write_budget_bytes`` are in flight to one rank's disk; entries lie in [0, capacity)."""
        self.ranks: dict[int, RankDisk] = {}
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

    def attach(self, hello: Hello) -> None:
        """Rank ``hello.rank`` brings a directory, or none (``disk_bytes`` 0)."""
        directories = {number: Directory() for number in range(len(hello.directories))}
        self.ranks[hello.rank] = RankDisk(hello.disk_bytes, directories)

    def detach(self, rank: int) -> None:
        """Rank ``rank`` is gone, and its directories with it."""
        self.ranks[rank] = RankDisk(0)

    def update(self, state: DiskState) -> bool:
        """What a data plane says of one of its directories; True when it has just been given up."""
        directory = self.ranks[state.rank].directories.setdefault(state.directory, Directory())
        given_up = directory.usable and not state.usable
        directory.usable, directory.writable, directory.reason = state.usable, state.writable, state.reason
        directory.reclaims_wanted = state.reclaims_wanted
        directory.sealed.update(state.sealed.tolist())
        if given_up:
            directory.sealed.clear()
        return given_up

    @property
    def usable(self) -> bool:
        """Whether every rank can write to its disk."""
        return bool(self.ranks) and all(disk.usable for disk in self.ranks.values())

    @property
    def is_there(self) -> bool:
        """Whether every rank can sync what is on its disk."""
        return bool(self.ranks) and all(disk.is_there for disk in self.ranks.values())

    def enqueue(self, entry: int, *, first: bool = False) -> None:
        """``entry`` must reach the disk; ``first``: before those for which nobody waits."""
        queued = self._queued_at[entry]
        if not queued:
            self._queued_at[entry] = _WAITING
            self._backlog += 1
        elif not first or queued == _UNDER_WAY:
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

    def awaits_write(self, entry: int) -> bool:
        """Whether ``entry`` is queued for the disk or on its way."""
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
        """Whether the disk would not take ``entry``."""
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
        """``entries`` lost their host copies: there is nothing to write any more."""
        self._refused[entries] = False

    @property
    def backlog(self) -> int:
        """Entries that wait for the disk or are on their way."""
        return self._backlog
