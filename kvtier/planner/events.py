"""Stored and removed blocks as a bounded queue: for routers and indexes that follow a cache from outside."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import Tier

MAX_BLOCKS: Final = 1 << 18
"""Kept for whoever listens, 70 bytes each."""


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One block came to a tier or left it. ``parent`` is empty where it is not known."""

    change: Literal["stored", "removed"]
    key: bytes
    parent: bytes
    tokens: int
    tier: str


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Blocks that changed together, in columns."""

    change: Literal["stored", "removed"]
    tier: Tier
    keys: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    known: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int32]


class ControlEvents:
    """Collects events while somebody listens; over the limit the oldest go, and are counted in ``dropped``."""

    def __init__(self) -> None:
        """Nobody listens yet."""
        self.listening = False
        self.dropped = 0
        self._batches: deque[Batch] = deque()
        self._blocks = 0

    def add(
        self,
        change: Literal["stored", "removed"],
        tier: Tier,
        keys: npt.NDArray[np.uint8],
        parents: npt.NDArray[np.uint8],
        known: npt.NDArray[np.bool_],
        tokens: npt.NDArray[np.int32],
    ) -> None:
        """Blocks with ``keys`` (uint8 ``[n, 32]``) changed; ``known`` says which of ``parents`` mean something."""
        self._blocks += len(keys)
        while self._batches and self._blocks > MAX_BLOCKS:
            gone = len(self._batches.popleft().keys)
            self._blocks -= gone
            self.dropped += gone
        self._batches.append(Batch(change, tier, keys, parents, known, tokens))

    def take(self) -> list[BlockEvent]:
        """Everything since the last call, in order."""
        return events_of(self.take_batches())

    def take_batches(self) -> list[Batch]:
        """The same, to be taken apart with ``events_of`` where nobody waits for it."""
        batches, self._batches, self._blocks = self._batches, deque(), 0
        return list(batches)


def events_of(batches: Iterable[Batch]) -> list[BlockEvent]:
    """One event for every block of ``batches``, in order."""
    return [
        BlockEvent(b.change, key.tobytes(), parent.tobytes() if known else b"", int(tokens), b.tier.label)
        for b in batches
        for key, parent, known, tokens in zip(b.keys, b.parents, b.known, b.tokens, strict=True)
    ]
