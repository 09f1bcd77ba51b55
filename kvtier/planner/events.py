"""Stored and removed blocks as a bounded queue: for routers and indexes that follow a cache from outside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import Tier

MAX_BLOCKS: Final = 1 << 18
"""Kept for whoever listens, 71 bytes each, however few came at a time: 19 MB."""
Change: TypeAlias = Literal["stored", "removed"]
_CHANGES: Final[tuple[Change, ...]] = ("stored", "removed")
_LABELS: Final = {tier.value: tier.label for tier in Tier}


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One block came to a tier or left it. ``parent`` is empty where it is not known."""

    change: Change
    key: bytes
    parent: bytes
    tokens: int
    tier: str


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Blocks that changed, in columns, in order."""

    keys: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    known: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int32]
    changes: npt.NDArray[np.uint8]
    tiers: npt.NDArray[np.uint8]

    @classmethod
    def empty(cls, blocks: int) -> Batch:
        """Room for as many; what is not written to takes no memory."""
        return cls(
            np.empty((blocks, 32), np.uint8), np.empty((blocks, 32), np.uint8), np.empty(blocks, np.bool_),
            np.empty(blocks, np.int32), np.empty(blocks, np.uint8), np.empty(blocks, np.uint8),
        )  # fmt: skip

    def part(self, start: int, stop: int) -> Batch:
        """Blocks [start, stop), where they are."""
        span = slice(start, stop)
        return Batch(
            self.keys[span], self.parents[span], self.known[span], self.tokens[span], self.changes[span],
            self.tiers[span],
        )  # fmt: skip


class ControlEvents:
    """Collects events while somebody listens; over the limit the oldest go, and are counted in ``dropped``.

    They lie in a ring, made when the first one comes after a ``take``, which gives it away: nothing is moved twice.
    """

    def __init__(self) -> None:
        """Nobody listens yet."""
        self.listening = False
        self.dropped = 0
        self._ring: Batch | None = None
        self._added = 0  # to this ring, also what is in it no more

    def add(
        self,
        change: Change,
        tier: Tier,
        keys: npt.NDArray[np.uint8],
        parents: npt.NDArray[np.uint8],
        known: npt.NDArray[np.bool_],
        tokens: npt.NDArray[np.int32],
    ) -> None:
        """Blocks with ``keys`` (uint8 ``[n, 32]``) changed; ``known`` says which of ``parents`` mean something."""
        if self._ring is None:
            self._ring = Batch.empty(MAX_BLOCKS)
        ring, size, blocks = self._ring, len(self._ring.known), len(keys)
        self.dropped += max(0, min(self._added, size) + blocks - size)
        at = max(0, blocks - size)  # the newest that fit
        while at < blocks:
            start = self._added % size
            count = min(blocks - at, size - start)
            into, out = slice(start, start + count), slice(at, at + count)
            ring.keys[into], ring.parents[into] = keys[out], parents[out]
            ring.known[into], ring.tokens[into] = known[out], tokens[out]
            ring.changes[into], ring.tiers[into] = _CHANGES.index(change), tier
            at += count
            self._added += count

    def take(self) -> list[BlockEvent]:
        """Everything since the last call, in order."""
        return events_of(self.take_batches())

    def take_batches(self) -> list[Batch]:
        """The same, to be taken apart with ``events_of`` where nobody waits for it."""
        ring, added, self._ring, self._added = self._ring, self._added, None, 0
        if ring is None:
            return []
        size = len(ring.known)
        if added <= size:
            return [ring.part(0, added)]
        return [ring.part(added % size, size), ring.part(0, added % size)]


def events_of(batches: Iterable[Batch]) -> list[BlockEvent]:
    """One event for every block of ``batches``, in order."""
    return [
        BlockEvent(_CHANGES[change], key.tobytes(), parent.tobytes() if known else b"", tokens, _LABELS[tier])
        for b in batches
        for change, tier, key, parent, known, tokens in zip(
            b.changes.tolist(), b.tiers.tolist(), b.keys, b.parents, b.known.tolist(), b.tokens.tolist(), strict=True
        )
    ]
