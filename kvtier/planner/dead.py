"""Dead blocks: what no hit can end with, nor lead through. It would only take room, so it goes.

One statement says what lives. A hit *can end* at a block where every required window and state that an end there needs
is there, or held by whoever brings it. A block of a group that needs the whole prefix lives while a hit can end at it
or behind it in its chain. So what is dead is dead from some block to the end of its chain, and the last block of a
chain tells: if no hit can end there it goes, and the one before it is the last one then.

Whatever goes is noted, and what follows from it is looked at once nothing more goes: blocks behind which something
went, and, since windows and states extend nothing, blocks at whose end one went. At one turn so many steps are made;
what is left then waits for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from kvtier.index.cells import Cells, wide
from kvtier.index.entries import MISSING, EntryRows
from kvtier.planner.windows import Windows

_STEPS_A_TURN: Final = 1024
"""Blocks looked at, and those of windows with them: two milliseconds of work."""


class DeadBlocks:
    """Finds blocks that died by what went."""

    def __init__(self, index: Cells, windows: Windows, awaits_write: Callable[[int], bool]) -> None:
        """``awaits_write``: whether an entry is on its way to the disk, so that it has to stay."""
        self._index = index
        self._windows = windows
        self._awaits_write = awaits_write
        self._suspects: dict[bytes, None] = {}
        self._held: dict[bytes, None] = {}
        """Those that somebody held when they were looked at."""

    def note(self, entries: EntryRows) -> None:
        """``entries`` of any group are about to be forgotten, or cannot be read any more."""
        index, windows = self._index, self._windows
        if not windows.required or not windows.whole:
            return
        parents = np.unique(index.parent[entries])
        for parent in parents[parents >= 0].tolist():
            self._suspects[index.cells.key(parent)] = None
        partial = entries[np.isin(index.table.groups[entries], windows.required) & index.linked[entries]]
        for entry in partial.tolist():
            self._suspects[index.cells.key(entry)] = None

    def suspect(self, keys: Iterable[bytes]) -> None:
        """A hit was to end at the blocks of ``keys``, and what it needs did not come."""
        if self._windows.required and self._windows.whole:
            self._suspects.update(dict.fromkeys(keys))

    def let_go(self) -> None:
        """Somebody let go of something: what was held may be dead."""
        if self._held:
            held, self._held = self._held, {}
            self._suspects.update(held)

    @property
    def has_suspects(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._suspects)

    def take(self) -> EntryRows:
        """Entries that are dead and that nobody holds, deepest first; they may have copies in any tier."""
        found, steps = dict[int, None](), 0
        while self._suspects and steps < _STEPS_A_TURN:
            key, _ = self._suspects.popitem()
            for group in self._windows.whole:
                steps += self._climb(self._index.table.find_one(key, group), found)
            self._add_lone_states(key, found)
        return wide(np.fromiter(found, np.int32, len(found)))

    def _climb(self, last: int, found: dict[int, None]) -> int:
        """Add ``last``, and what it extends, as far as it is dead; returns how many steps that took."""
        index, entry, steps = self._index, last, 1
        while entry >= 0 and self._is_loose(entry, below=entry != last):
            steps += self._reach
            if self.can_end(entry):
                break
            found[entry] = None
            entry = index.parent_at[entry]
            if steps >= _STEPS_A_TURN and entry >= 0:
                self._suspects[index.cells.key(entry)] = None
                break
        return steps

    def _add_lone_states(self, key: bytes, found: dict[int, None]) -> None:
        """What serves an end at the block of ``key`` and nothing else, where no hit can end."""
        index, windows = self._index, self._windows
        last = index.table.find_one(key, windows.whole[0])
        if last < 0 or last in found or self.can_end(last):
            return
        for group in windows.required:
            state = index.table.find_one(key, group) if windows.window_blocks(group) == 1 else MISSING
            if state >= 0 and not index.pins_at[state] and not self._awaits_write(state):
                found[state] = None

    @property
    def _reach(self) -> int:
        return 1 + sum(map(self._windows.window_blocks, self._windows.required))

    def _is_loose(self, entry: int, *, below: bool) -> bool:
        """Whether nobody holds ``entry``, and nothing extends it but what was found ``below``."""
        index = self._index
        if index.children_at[entry] > below:
            return False
        if index.pins_at[entry] or self._awaits_write(entry):
            self._held[index.cells.key(entry)] = None
            return False
        return True

    def can_end(self, entry: int) -> bool:
        """Whether a hit can end at the block of ``entry``, which is of a group that needs the whole prefix."""
        return all(self._has_window(entry, group) for group in self._windows.required)

    def _has_window(self, entry: int, group: int) -> bool:
        """Whether all that an end at the block of ``entry`` needs of ``group`` is there, or held."""
        index = self._index
        for _ in range(self._windows.window_blocks(group)):
            part = index.table.find_one(index.cells.key(entry), group)
            if part < 0 or not (index.pins_at[part] or index.readable(np.array((part,)))[0]):
                return False
            entry = index.parent_at[entry]
            if entry < 0:
                return True
        return True


__all__ = ["DeadBlocks"]
