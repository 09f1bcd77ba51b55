"""Records where they lie, many at a time: in extents of an arena, or in buffers that something was read into.

A call for every record costs more than the bytes of a small one, so headers and payloads of all are one table each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvtier.codecs.base import pages_of
from kvtier.codecs.headers import BLANK_PAGE, WHOLE_PAGE, Pages
from kvtier.core.memory import Bytes2D
from kvtier.core.plan import PAGE_BYTES
from kvtier.kernels import Addresses, address_of
from kvtier.runtime.seam import Arena, Buffer


class Records(Protocol):
    """Records of one group, each with a header page in front."""

    def __len__(self) -> int:
        """How many."""

    def one(self, at: int) -> Buffer:
        """Record ``at`` itself."""

    def are_long(self, pages: int) -> bool:
        """Whether each of them is ``pages`` pages long."""

    def headers(self) -> Pages:
        """The header pages."""

    def addresses(self) -> Addresses:
        """Where each of them begins."""

    def payloads(self, nbytes: int) -> Bytes2D:
        """Copies of the ``nbytes`` behind each header page: uint8 ``[n, nbytes]``, C-contiguous."""


class Extents:
    """Records in extents of an arena."""

    def __init__(self, arena: Arena, first: npt.NDArray[np.integer[Any]], pages: npt.NDArray[np.integer[Any]]) -> None:
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

    def headers(self) -> Pages:
        """See ``Records``; to be read or written."""
        return Pages(self._table, self._first)

    def addresses(self) -> Addresses:
        """See ``Records``."""
        addresses: Addresses = address_of(self._arena.data) + self._first * PAGE_BYTES
        return addresses

    def payloads(self, nbytes: int) -> Bytes2D:
        """See ``Records``."""
        if nbytes < PAGE_BYTES:
            return self._table[self._first + 1, :nbytes]
        pages = self._table[self._payload_pages(pages_of(nbytes))]
        return np.ascontiguousarray(pages.reshape(len(self), -1)[:, :nbytes])

    def write_payloads(self, payloads: Bytes2D) -> None:
        """Write what stands behind the header pages: uint8 ``[n, nbytes]``, and zeros to the end of the last page."""
        whole, rest = divmod(payloads.shape[1], PAGE_BYTES)
        if whole:
            pages = payloads[:, : whole * PAGE_BYTES].reshape(len(self), whole, PAGE_BYTES)
            self._table[self._payload_pages(whole)] = pages
        if rest:
            last = self._first + (1 + whole)
            self._table.view(WHOLE_PAGE)[last, 0] = BLANK_PAGE
            self._table[last, :rest] = payloads[:, whole * PAGE_BYTES :]

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
        return all(buffer.nbytes == pages * PAGE_BYTES for buffer in self._buffers)

    def headers(self) -> Pages:
        """See ``Records``."""
        return Pages(np.stack([buffer[:PAGE_BYTES] for buffer in self._buffers]), np.arange(len(self)))

    def addresses(self) -> Addresses:
        """See ``Records``."""
        return np.array([address_of(buffer) for buffer in self._buffers], np.int64)

    def payloads(self, nbytes: int) -> Bytes2D:
        """See ``Records``."""
        return np.stack([buffer[PAGE_BYTES : PAGE_BYTES + nbytes] for buffer in self._buffers])
