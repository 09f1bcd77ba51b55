"""Stored and removed blocks as a bounded queue: for routers and indexes that follow a cache from outside."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import Tier

_MAX_BATCHES: Final = 4096


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One block came to a tier or left it. ``parent`` is empty where it is not known."""

    change: Literal["stored", "removed"]
    key: bytes
    parent: bytes
    tokens: int
    tier: str


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
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
        self._batches: deque[_Batch] = deque()

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
        if len(self._batches) >= _MAX_BATCHES:
            self.dropped += len(self._batches.popleft().keys)
        self._batches.append(_Batch(change, tier, keys, parents, known, tokens))

    def take(self) -> list[BlockEvent]:
        """Everything since the last call, in order."""
        batches, self._batches = self._batches, deque()
        return [
            BlockEvent(b.change, key.tobytes(), parent.tobytes() if known else b"", int(tokens), b.tier.label)
            for b in batches
            for key, parent, known, tokens in zip(b.keys, b.parents, b.known, b.tokens, strict=True)
        ]
