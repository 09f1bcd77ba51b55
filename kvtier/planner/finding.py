"""What of a sequence can be hit: the longest prefix that every group can serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtier.core.keys import Keys
from kvtier.core.plan import Lineage
from kvtier.index.cells import Cells, wide
from kvtier.index.entries import EntryRows, Mask
from kvtier.planner.windows import Windows

_FIRST_LOOK: Final = 64
"""Ends of blocks that are looked at first: nearly always the last one is it."""


@dataclass(slots=True, eq=False)  # nobody changes one; a frozen dataclass takes three times as long to make
class Found:
    """A prefix of blocks [first, stop): per group the first block that is needed, and the entries from there on."""

    first: int
    stop: int
    begins: tuple[int, ...]
    groups: tuple[EntryRows, ...]
    replay_tokens: int = 0
    is_approximate: bool = False
    """Whether computing these tokens again gives something else than what was there."""

    @property
    def blocks(self) -> int:
        """How many."""
        return self.stop - self.first


class Finder:
    """Looks prefixes up, and changes nothing."""

    def __init__(self, index: Cells, windows: Windows) -> None:
        """``windows`` says what a hit needs of every group."""
        self._index = index
        self._windows = windows
        self._is_plain = windows.whole == (0,) and not windows.partial

    def find(self, keys: Keys, wanted: range, *, exact: bool) -> Found:
        """The longest prefix of the blocks ``wanted`` that can be read; what is before them the engine has."""
        if self._is_plain:
            entries = wide(self._index.prefix(keys.rows()[wanted.start : wanted.stop], 0, exact=exact))
            return Found(wanted.start, wanted.start + len(entries), (wanted.start,), (entries,))
        groups = self._whole(keys, wanted, exact=exact)
        stop = wanted.start + min(map(len, groups.values()), default=len(wanted))
        if not self._windows.partial:
            return self._found(keys, wanted.start, stop, groups, ())
        replayed, useful_tokens = self._replayed_end(keys, wanted.start, stop, exact=exact)
        above = max(wanted.start, -(-useful_tokens // keys.block_tokens) - 1)  # what ends there is of less use
        end = self._last_end(keys, self._windows.partial, wanted.start, stop, above, exact=exact)
        if end > above:
            return self._found(keys, wanted.start, end, groups, self._windows.partial)
        if useful_tokens <= wanted.start * keys.block_tokens:
            return self._found(keys, wanted.start, wanted.start, groups, ())
        replay = (self._windows.replay_tokens, not self._windows.replay_is_exact)
        return self._found(keys, wanted.start, replayed, groups, self._windows.required, replay)

    def _replayed_end(self, keys: Keys, first: int, stop: int, *, exact: bool) -> tuple[int, int]:
        """The last end of a block that serves where windows are computed again, and the tokens that need not be."""
        windows = self._windows
        if not windows.optional or (exact and not windows.replay_is_exact):
            return first, 0
        end = self._last_end(keys, windows.required, first, stop, first, exact=exact)
        return end, end * keys.block_tokens - windows.replay_tokens

    def _whole(self, keys: Keys, wanted: range, *, exact: bool) -> dict[int, EntryRows]:
        """Of every group that needs the whole prefix, the entries of the longest one."""
        rows, found = keys.rows()[wanted.start : wanted.stop], dict[int, EntryRows]()
        for group in self._windows.whole:
            found[group] = wide(self._index.prefix(rows, group, exact=exact))
            rows = rows[: len(found[group])]
        return found

    def _found(
        self,
        keys: Keys,
        first: int,
        stop: int,
        whole: dict[int, EntryRows],
        partial: tuple[int, ...],
        replay: tuple[int, bool] = (0, False),
    ) -> Found:
        count = len(whole) + len(self._windows.partial)
        begins, groups = [stop] * count, [_NOTHING] * count
        for group, entries in whole.items():
            begins[group], groups[group] = first, entries[: stop - first]
        for group in partial:
            needed = self._windows.needed(group, first, stop)
            begins[group] = needed.start
            groups[group] = wide(self._index.table.find(keys.rows()[needed.start : needed.stop], group))
        return Found(first, stop, tuple(begins), tuple(groups), *replay)

    def _last_end(self, keys: Keys, groups: tuple[int, ...], first: int, stop: int, above: int, *, exact: bool) -> int:
        """The last end of a block in (above, stop] where each of ``groups`` has what a hit needs; ``above`` if none."""
        reach, size, end = max(map(self._windows.window_blocks, groups), default=0), _FIRST_LOOK, stop
        while groups and end > above:
            low = max(first, end - size - reach + 1)
            good = np.ones(end - low, np.bool_)
            for group in groups:
                good &= self._ends(keys, group, range(low, end), first, exact=exact)
            if len(at := good.nonzero()[0]):
                return max(above, low + int(at[-1]) + 1)
            end = end - size if low > first else above
            size *= 8
        return max(above, end)

    def _ends(self, keys: Keys, group: int, blocks: range, first: int, *, exact: bool) -> Mask:
        """Behind which of ``blocks`` a hit may end, as far as ``group`` can tell from these blocks."""
        entries = self._index.table.find(keys.rows()[blocks.start : blocks.stop], group)
        bad = (entries < 0) | ~self._index.readable(entries)
        if exact:
            bad |= self._index.lineage[entries] != int(Lineage.EXACT)
        at = np.arange(len(blocks))
        run = at - np.maximum.accumulate(np.where(bad, at, -1))
        good: Mask = run >= np.minimum(self._windows.window_blocks(group), at + 1 + blocks.start - first)
        return good


_NOTHING: Final = wide(np.empty(0, np.int32))
