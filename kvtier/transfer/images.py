"""Records where they lie, many at a time: in extents of an arena, or in buffers that something was read into.

A call for every record costs more than the bytes of a small one, so headers and payloads of all are one table each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvtier.codecs.base import pages_of
from kvtier.core.memory import Bytes2D
from kvtier.core.plan import PAGE_BYTES
from kvtier.runtime.seam import Arena, Buffer


class Records(Protocol):
    """Records of one group, each with a header page in front."""

    def __len__(self) -> int:
        """How many."""

    def one(self, at: int) -> Buffer:
        """Record ``at`` itself."""

    def are_long(self, pages: int) -> bool:
        """Whether each of them is ``pages`` pages long."""

    def headers(self) -> Bytes2D:
        """Copies of the header pages: uint8 ``[n, 4096]``."""

    def payloads(self, nbytes: int) -> Bytes2D:
        """Copies of the ``nbytes`` behind each header page: uint8 ``[n, nbytes]``, C-contiguous."""


class Extents:
    """Records in extents of an arena."""

    def __init__(
        self, arena: Arena, first: npt.NDArray[np.integer[Any]], pages: npt.NDArray[np.integer[Any]]
    ) -> None:
        """Record i is the pages [first[i], first[i] + pages[i])."""
        self._arena = arena
        self._table = arena.data.reshape(-1, PAGE_BYTES)
        self._first = first.astype(np.intp)
        self._pages = pages

    def __len__(self) -> int:
        """How many."""
        return len(self._first)

    def one(self, at: int) -> Buffer:
        """Record ``at`` itself, to be read or written."""
        return self._arena.view(self._first.item(at), self._pages.item(at))

    def are_long(self, pages: int) -> bool:
        """See ``Records``."""
        return not np.count_nonzero(self._pages != pages)

    def headers(self) -> Bytes2D:
        """See ``Records``."""
        return self._table[self._first]

    def payloads(self, nbytes: int) -> Bytes2D:
        """See ``Records``."""
        if nbytes < PAGE_BYTES:
            return self._table[self._first + 1, :nbytes]
        pages = self._table[self._payload_pages(pages_of(nbytes))]
        return np.ascontiguousarray(pages.reshape(len(self), -1)[:, :nbytes])

    def fill(self, headers: Bytes2D, payloads: Bytes2D) -> None:
        """Write all of the records: zeros from the end of a payload, as long as all others, to that of its page."""
        whole, rest = divmod(payloads.shape[1], PAGE_BYTES)
        if whole:
            pages = payloads[:, : whole * PAGE_BYTES].reshape(len(self), whole, PAGE_BYTES)
            self._table[self._payload_pages(whole)] = pages
        if rest:
            last = self._first + (1 + whole)
            self._table[last, :rest] = payloads[:, whole * PAGE_BYTES :]
            self._table[last, rest:] = 0
        self._table[self._first] = headers

    def _payload_pages(self, count: int) -> npt.NDArray[np.intp]:
        return self._first[:, None] + np.arange(1, 1 + count)


class Buffers:
    """Records in buffers of their own."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        """Each is one record, and nothing else."""
        self._buffers = buffers

    def __len__(self) -> int:
        """How many."""
        return len(self._buffers)

    def one(self, at: int) -> Buffer:
        """Record ``at`` itself."""
        return self._buffers[at]

    def are_long(self, pages: int) -> bool:
        """See ``Records``."""
        return all([buffer.nbytes == pages * PAGE_BYTES for buffer in self._buffers])

    def headers(self) -> Bytes2D:
        """See ``Records``."""
        return np.stack([buffer[:PAGE_BYTES] for buffer in self._buffers])

    def payloads(self, nbytes: int) -> Bytes2D:
        """See ``Records``."""
        return np.stack([buffer[PAGE_BYTES : PAGE_BYTES + nbytes] for buffer in self._buffers])
