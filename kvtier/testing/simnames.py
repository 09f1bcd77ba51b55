"""Directory entries of a simulated disk, and which of them a power cut keeps."""

from __future__ import annotations

from dataclasses import dataclass
from posixpath import dirname
from random import Random

from kvtier.testing.simfile import SimFile


@dataclass(frozen=True, slots=True)
class NameChange:
    """One creation, rename or removal, atomic: all of it survives or nothing."""

    removed: tuple[str, ...]
    added: tuple[tuple[str, SimFile], ...]

    @property
    def paths(self) -> set[str]:
        """Every entry it touches."""
        return {*self.removed, *(path for path, _ in self.added)}

    def apply(self, names: dict[str, SimFile]) -> None:
        """Make the change."""
        for path in self.removed:
            names.pop(path, None)
        names.update(self.added)


class SimNames:
    """Live and durable directory entries. Directories themselves are durable when ``make_directory`` returns."""

    def __init__(self) -> None:
        self.live: dict[str, SimFile] = {}
        self.directories = {"/"}
        self._durable: dict[str, SimFile] = {}
        self._pending: list[NameChange] = []

    def change(self, *, removed: tuple[str, ...] = (), added: tuple[tuple[str, SimFile], ...] = ()) -> None:
        """Make a change that lasts from the next ``sync`` of a directory it touches."""
        change = NameChange(removed, added)
        change.apply(self.live)
        self._pending.append(change)

    def sync(self, directory: str) -> None:
        """Make durable what was changed in ``directory``, and the earlier changes that it builds on."""
        touched: set[str] = set()
        wanted: list[NameChange] = []
        for change in reversed(self._pending):
            if touched & change.paths or directory in map(dirname, change.paths):
                touched |= change.paths
                wanted.append(change)
        for change in reversed(wanted):
            change.apply(self._durable)
            self._pending.remove(change)

    def remove_tree(self, directory: str) -> None:
        """Remove a directory with all that is in it, durably."""
        prefix = directory + "/"
        for path in [path for path in self.live if path.startswith(prefix)]:
            self.change(removed=(path,))
            self.sync(dirname(path))
        self.directories = {path for path in self.directories if path != directory and not path.startswith(prefix)}

    def lose_unsynced(self, rng: Random) -> None:
        """Cut the power: the pending changes survive up to a random one, in their order, as a journal keeps them."""
        for change in self._pending[: rng.randint(0, len(self._pending))]:
            change.apply(self._durable)
        self._pending.clear()
        self.live = dict(self._durable)
