"""From (key, group) to entry number: chained hashing in arrays, without one Python object per entry.

Keys are SHA-256 digests, so their first eight bytes are a hash already. Chains are int32 links beside the entries:
removal leaves no tombstones, and no operation ever rebuilds the table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtier.core.columns import column

KeyRows = npt.NDArray[np.uint8]
"""Keys as uint8 ``[n, 32]``, C-contiguous."""

EntryRows = npt.NDArray[np.int32]

MISSING = -1
_SCALAR_LIMIT = 4
_GROUP_MIX = 0x9E3779B97F4A7C15


class KeyTable:
    """Entries in [0, capacity) by (key, group)."""

    def __init__(self, capacity: int) -> None:
        """Memory is reserved for ``capacity`` entries and touched as they come."""
        self.capacity = capacity
        self.keys = column((capacity, 32), np.uint8)
        self.groups = column(capacity, np.uint16)
        buckets = 1 << max(4, (capacity - 1).bit_length())
        self._mask = buckets - 1
        self._heads = column(buckets, np.int32)  # entry + 1, so that untouched memory reads as empty
        self._next = column(capacity, np.int32)
        self._heads_at = self._heads.data
        self._next_at = self._next.data
        self._keys_at = self.keys.reshape(-1).data
        self._groups_at = self.groups.data
        self._words = self.keys.view(np.uint64)
        self._released = column(capacity, np.int32)  # a stack of numbers to use again
        self._released_count = 0
        self._untouched = 0

    @property
    def free(self) -> int:
        """Entries that can still be added."""
        return self.capacity - self._untouched + self._released_count

    @property
    def touched(self) -> int:
        """Entry numbers below this one have been in use."""
        return self._untouched

    def find_one(self, key: bytes, group: int) -> int:
        """The entry of ``key``, or MISSING."""
        bucket = (int.from_bytes(key[:8], "little") ^ (group * _GROUP_MIX)) & self._mask
        entry = self._heads_at[bucket] - 1
        while entry >= 0:
            if self._groups_at[entry] == group and self._keys_at[entry * 32 : entry * 32 + 32] == key:
                return entry
            entry = self._next_at[entry] - 1
        return MISSING

    def find(self, keys: KeyRows, group: int) -> EntryRows:
        """The entries of ``keys``, MISSING where there is none; int32 ``[n]``."""
        if len(keys) <= _SCALAR_LIMIT:
            return np.array([self.find_one(key.tobytes(), group) for key in keys], np.int32)
        words = keys.view(np.uint64)
        found = np.full(len(keys), MISSING, np.int32)
        open_rows = np.arange(len(keys))
        entries = self._heads[self._buckets(words, group)] - 1
        while True:
            alive = np.flatnonzero(entries >= 0)
            if not len(alive):
                return found
            open_rows, entries = open_rows[alive], entries[alive]
            same = (self._words[entries] == words[open_rows]).all(axis=1) & (self.groups[entries] == group)
            found[open_rows[same]] = entries[same]
            others = ~same
            open_rows, entries = open_rows[others], self._next[entries[others]] - 1

    def add(self, keys: KeyRows, group: int) -> EntryRows:
        """New entries for ``keys``, none of which is in the table; there must be room (``free``)."""
        entries = self._take(len(keys))
        self.keys[entries] = keys
        self.groups[entries] = group
        buckets = self._buckets(keys.view(np.uint64), group)
        pending = np.arange(len(entries))
        while len(pending):
            at, new = buckets[pending], entries[pending]
            self._next[new] = self._heads[at]
            self._heads[at] = new + 1
            # Of several new entries in one bucket only the last write stuck: link the others in the next round.
            pending = pending[self._heads[at] != new + 1]
        return entries

    def remove(self, entry: int) -> None:
        """Take ``entry`` out; its number is used again."""
        self.unlink(entry)
        self.recycle(entry)

    def unlink(self, entry: int) -> None:
        """Take ``entry`` out of reach of ``find`` without giving its number away."""
        word = int(self._words[entry, 0])
        bucket = (word ^ (self._groups_at[entry] * _GROUP_MIX)) & self._mask
        at = self._heads_at[bucket] - 1
        if at == entry:
            self._heads_at[bucket] = self._next_at[entry]
            return
        while self._next_at[at] - 1 != entry:
            at = self._next_at[at] - 1
        self._next_at[at] = self._next_at[entry]

    def recycle(self, entry: int) -> None:
        """Give the number of an unlinked entry away again."""
        self._released[self._released_count] = entry
        self._released_count += 1

    def _take(self, count: int) -> EntryRows:
        if count > self.free:
            raise OverflowError(f"{count} entries wanted, {self.free} free")
        again = min(count, self._released_count)
        self._released_count -= again
        used = self._released[self._released_count : self._released_count + again]
        fresh = np.arange(self._untouched, self._untouched + count - again, dtype=np.int32)
        self._untouched += count - again
        return np.concatenate((used, fresh))

    def _buckets(self, words: npt.NDArray[np.uint64], group: int) -> npt.NDArray[np.int64]:
        mixed = words[:, 0] ^ np.uint64((group * _GROUP_MIX) & 0xFFFFFFFFFFFFFFFF)
        return (mixed & np.uint64(self._mask)).astype(np.int64)
