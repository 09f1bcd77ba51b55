"""Requests: their tokens, and the pages that they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int64]

VOCABULARY: Final = 128_256


class Prompts:
    """Sequences of random tokens, each another one."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def take(self, tokens: int) -> npt.NDArray[np.int32]:
        """``tokens`` token ids."""
        return self._random.integers(0, VOCABULARY, tokens, dtype=np.int32)


@dataclass(slots=True)
class Request:
    """One store: its tokens, and the pages that they came from."""

    tokens: npt.NDArray[np.int32]
    sources: Ids
