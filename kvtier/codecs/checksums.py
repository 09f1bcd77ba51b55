"""The checksums, in one place.

xxh3 is as fast as memory, and 128 bits of it make an unnoticed damage a matter of more reads than there will ever be.
It guards against accidents, not against somebody who may write the disk.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from kvtier.core.memory import Bytes1D, Bytes2D


def content_sum(data: Bytes1D) -> bytes:
    """xxh3-128 of ``data``, 16 bytes; releases the GIL."""
    return xxh3_128_digest(data.data)


def page_sum(data: Bytes1D) -> int:
    """xxh3-64 of a header or what else is small, as an unsigned integer."""
    return xxh3_64_intdigest(data.data)


def content_sums(rows: Bytes2D) -> Bytes2D:
    """``content_sum`` of each of ``rows``, which are C-contiguous: uint8 ``[n, 16]``."""
    data, size = rows.reshape(-1).data, rows.shape[1]
    sums = b"".join([xxh3_128_digest(data[at : at + size]) for at in range(0, len(data), size)])
    return np.frombuffer(sums, np.uint8).reshape(len(rows), -1)


def page_sums(table: Bytes2D, rows: npt.NDArray[np.intp], nbytes: int) -> npt.NDArray[np.uint64]:
    """``page_sum`` of the first ``nbytes`` of ``rows`` of ``table``, which is C-contiguous; nothing is copied."""
    data, starts = table.reshape(-1).data, (rows * table.shape[1]).tolist()
    return np.array([xxh3_64_intdigest(data[at : at + nbytes]) for at in starts], np.uint64)
