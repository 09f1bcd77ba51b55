"""The two kinds of codec. They are different types, so that a chain in the wrong order does not type-check.

A tensor codec knows what the numbers mean and may lose some of them; it runs once, when a block is stored. A byte codec
sees bytes only, loses nothing, and may come and go as a block moves between tiers.

Both are stateless, safe to call from several threads, and release the GIL while they work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

from kvtier.core.memory import Bytes1D
from kvtier.core.plan import PAGE_BYTES
from kvtier.models import Part

MAX_WON_SHARE: Final = 0.95
"""A byte codec that leaves more than this share of the input has not won: decoding would cost more than it saves."""


@runtime_checkable
class TensorCodec(Protocol):
    """Parts of a slice -> content bytes.

    ``raw`` is the parts one after another, each the bytes of its engine pages in token order; ``parts`` says what they
    are. All buffers are uint8 ``[nbytes]``, C-contiguous, and do not overlap.
    """

    @property
    def name(self) -> str:
        """Lower-case letters, digits and ``-``; it is stored in every record, so it never changes its meaning."""

    @property
    def exact(self) -> bool:
        """Whether ``decode`` returns exactly what ``encode`` was given."""

    def encoded_bytes(self, parts: Sequence[Part], raw_bytes: int) -> int:
        """Size of the content for ``raw_bytes`` of ``parts``: depends on these alone, never above ``raw_bytes``."""

    def encode(self, raw: Bytes1D, parts: Sequence[Part], out: Bytes1D) -> float:
        """Fill ``out`` (exactly ``encoded_bytes``); returns the relative error, 0.0 when nothing was lost."""

    def decode(self, encoded: Bytes1D, parts: Sequence[Part], out: Bytes1D) -> None:
        """Fill ``out`` (exactly the raw bytes).

        Raises:
            CorruptBlockError: ``encoded`` is not of the size that belongs to ``out``, or cannot be what was encoded.
        """


@runtime_checkable
class ByteCodec(Protocol):
    """Content bytes of a slice -> fewer stored bytes. Buffers are uint8 ``[nbytes]``, C-contiguous, disjoint."""

    @property
    def name(self) -> str:
        """Lower-case letters, digits and ``-``; it is stored in every record, so it never changes its meaning."""

    def encode(self, raw: Bytes1D, out: Bytes1D) -> int | None:
        """Write the coded form to the start of ``out`` and return its size; None when it does not win (``wins``).

        With None ``out`` holds nothing of use. ``out`` may be as short as the largest size that wins.
        """

    def decode(self, stored: Bytes1D, out: Bytes1D) -> None:
        """Fill ``out``, whose size is the exact size of the raw bytes.

        Raises:
            CorruptBlockError: ``stored`` does not decode to exactly that many bytes.
        """


def pages_of(nbytes: int) -> int:
    """How many 4 KiB pages hold ``nbytes``."""
    return -(-nbytes // PAGE_BYTES)


def wins(coded_bytes: int, raw_bytes: int) -> bool:
    """Whether a byte codec paid: it saves at least one 4 KiB page and 5 %."""
    return pages_of(coded_bytes) < pages_of(raw_bytes) and coded_bytes <= MAX_WON_SHARE * raw_bytes
