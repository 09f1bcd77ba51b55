"""Leases: hits that are pinned, each with one owner, each released once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier.core.keys import Keys
from kvtier.core.plan import Lineage
from kvtier.index.entries import EntryRows, Index


@dataclass(slots=True, eq=False)
class Lease:
    """What a lookup found of the blocks [first_block, last_block) of ``keys``, held in place until released.

    ``groups[g]`` are the entries of the blocks [begins[g], first_block + blocks) in group g, those that the hit needs;
    ``tiers`` (uint8) is per block the slowest of its groups' and ranks' fastest copies. ``replay_tokens`` at its end
    have to be computed again.
    """

    number: int
    owner: Hashable | None
    keys: Keys
    first_block: int
    last_block: int
    blocks: int
    begins: tuple[int, ...]
    groups: tuple[EntryRows, ...]
    tiers: npt.NDArray[np.uint8]
    pending_blocks: int
    lineage: int
    replay_tokens: int = 0
    released: bool = False


class LeaseBook:
    """All leases that are out."""

    def __init__(self, index: Index) -> None:
        """Pins live in ``index``."""
        self._index = index
        self._next = 0
        self._open: dict[int, Lease] = {}
        self._by_owner: dict[Hashable, Lease] = {}

    def __len__(self) -> int:
        """Number of leases that are out."""
        return len(self._open)

    def of(self, owner: Hashable, keys: Keys, blocks: range, *, exact: bool) -> Lease | None:
        """The lease that ``owner`` already holds from looking for the same blocks of the same keys."""
        lease = self._by_owner.get(owner)
        if lease is None or range(lease.first_block, lease.last_block) != blocks:
            return None
        if exact and lease.lineage != int(Lineage.EXACT):
            return None
        # Keys grow: of the same object, too, more blocks may be asked for than before.
        same = lease.keys is keys or lease.keys.digests[: blocks.stop] == keys.digests[: blocks.stop]
        return lease if same else None

    def open(self, lease: Lease) -> Lease:
        """Pin what ``lease`` found."""
        lease.number = self._next
        self._next += 1
        for entries in lease.groups:
            self._index.pin(entries)
        self._open[lease.number] = lease
        if lease.owner is not None:
            self._by_owner[lease.owner] = lease
        return lease

    def release(self, lease: Lease) -> list[EntryRows]:
        """Unpin; returns the entries that nobody holds any more. A second release does nothing."""
        if lease.released:
            return []
        lease.released = True
        del self._open[lease.number]
        if lease.owner is not None and self._by_owner.get(lease.owner) is lease:
            del self._by_owner[lease.owner]
        return [self._index.unpin(entries) for entries in lease.groups]
