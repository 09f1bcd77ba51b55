"""From (key, group) to entry number: chained hashing in arrays, without one Python object per entry.

Keys are SHA-256 digests, so their first eight bytes are a hash already. Chains are int32 links beside the entries:
removal leaves no tombstones, and no operation ever rebuilds the table.

numpy takes int64 indices as they are and converts others at ten times the cost of a small gather, so every method
widens its entry numbers once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtier.core.columns import column

KeyRows = npt.NDArray[np.uint8]
"""Keys as uint8 ``[n, 32]``, C-contiguous."""

EntryRows = npt.NDArray[np.int32]

MISSING = -1
Places = npt.NDArray[np.intp]
"""Entry numbers, or buckets, wide enough to index with."""

_SCALAR_LIMIT = 8
"""So many keys are looked up one by one in less time than together."""

_GROUP_MIX = 0x9E3779B97F4A7C15

_GOING = -1
"""In place of the link of an entry that is about to be unlinked."""


class KeyTable:
    """Entries in [0, capacity) by (key, group)."""

    def __init__(self, capacity: int) -> None:
        """Memory is reserved for ``capacity`` entries and touched as they come."""
        self.capacity = capacity
        self.keys = column((capacity, 32), np.uint8)
        self.groups = column(capacity, np.uint16)
        buckets = 1 << max(4, (capacity - 1).bit_length())
        self._mask = buckets - 1
        # Chains of entry + 1, so that untouched memory reads as empty. What points to an entry is another one's link or
        # its bucket's: they stand in one array, so that unlinking does not tell them apart.
        self._links = column(capacity + buckets, np.int32)
        self._next, self._heads = self._links[:capacity], self._links[capacity:]
        self._heads_at = self._heads.data
        self._next_at = self._next.data
        self._keys_at = self.keys.reshape(-1).data
        self._groups_at = self.groups.data
        self._words = self.keys.view(np.uint64)
        self._first_words = self._words[:, 0]
        self._words_at = self._words.reshape(-1).data
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
        word = int.from_bytes(key[:8], "little")
        return self._walk(self._heads_at[(word ^ (group * _GROUP_MIX)) & self._mask] - 1, word, key, group)

    def find(self, keys: KeyRows, group: int) -> EntryRows:
        """The entries of ``keys``, MISSING where there is none; int32 ``[n]``."""
        if len(keys) <= _SCALAR_LIMIT:
            data = keys.tobytes()
            return np.array([self.find_one(data[at : at + 32], group) for at in range(0, len(data), 32)], np.int32)
        words = keys.view(np.uint64)
        first_words = words[:, 0]
        found = self._heads[self._buckets(words, group)].astype(np.intp) - 1
        rows = self._of_others(found, first_words).nonzero()[0]
        while len(rows) > _SCALAR_LIMIT:
            following = self._next[found[rows]].astype(np.intp) - 1
            found[rows] = following
            rows = rows[self._of_others(following, first_words[rows])]
        self._walk_on(found, rows, keys, group)
        rows = (found >= 0).nonzero()[0]
        if len(rows):
            wrong = self._differ(found[rows], words if len(rows) == len(words) else words[rows], group)
            if np.count_nonzero(wrong):
                self._walk_on(found, rows[wrong], keys, group)
        return found.astype(np.int32)

    def _walk_on(self, found: Places, rows: npt.NDArray[np.intp], keys: KeyRows, group: int) -> None:
        """Look for the keys of ``rows`` behind the entries that were ``found``, which are those of others."""
        for row in rows.tolist():
            key = keys[row].tobytes()
            following = self._next_at[found[row]] - 1
            found[row] = self._walk(following, int.from_bytes(key[:8], "little"), key, group)

    def add(self, keys: KeyRows, group: int) -> EntryRows:
        """New entries for ``keys``, none of which is in the table; there must be room (``free``)."""
        entries = self._take(len(keys))
        new, heads, words = entries.astype(np.intp), entries + 1, keys.view(np.uint64)
        self._words[new] = words
        self.groups[new] = group
        at = self._buckets(words, group)
        while len(at):
            self._next[new] = self._heads[at]
            self._heads[at] = heads
            # Of several new entries in one bucket only the last write stuck: link the others in the next round.
            lost = (self._heads[at] != heads).nonzero()[0]
            at, new, heads = at[lost], new[lost], heads[lost]
        return entries

    def remove(self, entry: int) -> None:
        """Take ``entry`` out; its number is used again."""
        self.unlink(entry)
        self.recycle(entry)

    def unlink(self, entry: int) -> None:
        """Take ``entry`` out of reach of ``find`` without giving its number away."""
        word = self._words_at[4 * entry]
        bucket = (word ^ (self._groups_at[entry] * _GROUP_MIX)) & self._mask
        at = self._heads_at[bucket] - 1
        if at == entry:
            self._heads_at[bucket] = self._next_at[entry]
            return
        while self._next_at[at] - 1 != entry:
            at = self._next_at[at] - 1
        self._next_at[at] = self._next_at[entry]

    def unlink_many(self, entries: EntryRows | Places) -> None:
        """``unlink`` of each of ``entries``."""
        at = entries.astype(np.intp, copy=False)
        links, wanted = self._links, at + 1
        before = self._buckets_of(at) + self.capacity
        rows = (links[before] != wanted).nonzero()[0]
        while len(rows):
            before[rows] = links[before[rows]] - 1
            rows = rows[links[before[rows]] != wanted[rows]]
        behind = links[at]
        links[at] = _GOING
        # What stands behind another one that goes has to wait until that one is out of the way.
        late = (links[before] == _GOING).nonzero()[0]
        links[at] = behind
        if not len(late):
            links[before] = behind
            return
        now = np.delete(np.arange(len(at)), late)
        links[before[now]] = behind[now]
        for entry in at[late].tolist():
            self.unlink(entry)

    def recycle_many(self, entries: EntryRows | Places) -> None:
        """``recycle`` of each of ``entries``."""
        self._released[self._released_count : self._released_count + len(entries)] = entries
        self._released_count += len(entries)

    def recycle(self, entry: int) -> None:
        """Give the number of an unlinked entry away again."""
        self._released[self._released_count] = entry
        self._released_count += 1

    def _take(self, count: int) -> EntryRows:
        if count > self.free:
            raise OverflowError(f"{count} entries wanted, {self.free} free")
        again = min(count, self._released_count)
        if not again:
            self._untouched += count
            return np.arange(self._untouched - count, self._untouched, dtype=np.int32)
        self._released_count -= again
        used = self._released[self._released_count : self._released_count + again]
        fresh = np.arange(self._untouched, self._untouched + count - again, dtype=np.int32)
        self._untouched += count - again
        return np.concatenate((used, fresh))

    def _walk(self, entry: int, word: int, key: bytes, group: int) -> int:
        """The first entry of ``key`` from ``entry`` on along its chain; ``word`` is its first eight bytes."""
        words, following = self._words_at, self._next_at
        while entry >= 0:
            # The word differs nearly always where the key does, and costs a fraction of the whole key.
            same = words[4 * entry] == word and self._groups_at[entry] == group
            if same and self._keys_at[32 * entry : 32 * entry + 32] == key:
                return entry
            entry = following[entry] - 1
        return MISSING

    def _of_others(self, entries: Places, first_words: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Where the first word is that of another key, so that the wanted one may stand behind it."""
        others: npt.NDArray[np.bool_] = self._first_words[entries] != first_words
        others &= entries >= 0  # MISSING indexes the last entry, whatever that holds
        return others

    def _differ(self, entries: Places, words: npt.NDArray[np.uint64], group: int) -> npt.NDArray[np.bool_]:
        """Where the entry is that of another key or group, although the first word is the same."""
        differing = (self._words[entries] != words).view(np.uint32).reshape(-1)  # the four words of a key as one
        others: npt.NDArray[np.bool_] = differing != 0
        others |= self.groups[entries] != group
        return others

    def _buckets_of(self, entries: Places) -> Places:
        """The bucket of every entry, whatever its group."""
        mixed: npt.NDArray[np.uint64] = self._first_words[entries]
        groups = self.groups[entries]
        if np.count_nonzero(groups):
            mixed ^= groups * np.uint64(_GROUP_MIX)
        return (mixed & np.uint64(self._mask)).view(np.intp)

    def _buckets(self, words: npt.NDArray[np.uint64], group: int) -> Places:
        mixed = words[:, 0] ^ np.uint64((group * _GROUP_MIX) & 0xFFFFFFFFFFFFFFFF)
        return (mixed & np.uint64(self._mask)).view(np.intp)
