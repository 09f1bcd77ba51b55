"""The disk tier as control sees it: whether it can be used, what waits to be written, which segment goes next."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from kvtier.core.plan import DIRECTORY_SHIFT, DiskState, Hello
from kvtier.planner.writes import WriteQueue


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


class DiskBook(WriteQueue):
    """The directories of all ranks, and the queue of entries that have to be written."""

    def __init__(self, write_budget_bytes: int, capacity: int) -> None:
        """At most ``write_budget_bytes`` are in flight to one rank's disk; entries lie in [0, capacity)."""
        super().__init__(write_budget_bytes, capacity)
        self.ranks: dict[int, RankDisk] = {}

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
