"""The tensor codec that changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtier.core.memory import Bytes1D
from kvtier.errors import CorruptBlockError
from kvtier.models import Part


@dataclass(frozen=True, slots=True)
class Raw:
    """Content is the bytes as the engine has them."""

    name: str = "raw"
    exact: bool = True

    def encoded_bytes(self, parts: Sequence[Part], raw_bytes: int) -> int:
        """As many as there are."""
        return raw_bytes

    def encode(self, raw: Bytes1D, parts: Sequence[Part], out: Bytes1D) -> float:
        """Copy; callers that can move without a copy need not come here."""
        np.copyto(out, raw)
        return 0.0

    def decode(self, encoded: Bytes1D, parts: Sequence[Part], out: Bytes1D) -> None:
        """Copy.

        Raises:
            CorruptBlockError: the sizes differ.
        """
        if encoded.nbytes != out.nbytes:
            raise CorruptBlockError(f"raw: {encoded.nbytes} bytes of content for {out.nbytes} bytes of KV")
        np.copyto(out, encoded)
