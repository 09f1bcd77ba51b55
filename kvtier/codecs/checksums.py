"""The checksums, in one place.

xxh3 is as fast as memory, and 128 bits of it make an unnoticed damage a matter of more reads than there will ever be.
It guards against accidents, not against somebody who may write the disk.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from kvtier.core.memory import Bytes1D


def content_sum(data: Bytes1D) -> bytes:
    """xxh3-128 of ``data``, 16 bytes; releases the GIL."""
    return xxh3_128_digest(data.data)


def page_sum(data: Bytes1D) -> int:
    """xxh3-64 of a header or what else is small, as an unsigned integer."""
    return xxh3_64_intdigest(data.data)
