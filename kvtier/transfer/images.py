"""Records where they lie in an arena, many at a time: in extents of host memory, or in buffers of staging.

A call for every record costs more than the bytes of a small one, so headers and payloads of all are one table each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.codecs.base import pages_of
from kvtier.codecs.headers import BLANK_PAGE, WHOLE_PAGE, Pages
from kvtier.core.memory import Bytes2D
from kvtier.core.plan import PAGE_BYTES
from kvtier.kernels import Addresses, address_of
from kvtier.runtime.seam import Arena, Buffer


class Extents:
    """Records in extents of an arena, each with a header page in front."""

    def __init__(self, arena: Arena, first: npt.NDArray[np.integer[Any]], pages: npt.NDArray[np.integer[Any]]) -> None:
        """Record i is the pages [first[i], first[i] + pages[i])."""
        self._arena = arena
        self._table = arena.data.reshape(-1, PAGE_BYTES)
        self._first = first.astype(np.intp)
        self._pages = pages

    def __len__(self) -> int:
        """How many."""
        return len(self._first)

    def part(self, at: slice | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]) -> Extents:
        """Some of the records."""
        return Extents(self._arena, self._first[at], self._pages[at])

    def one(self, at: int) -> Buffer:
        """Record ``at`` itself, to be read or written."""
        return self._arena.view(self._first.item(at), self._pages.item(at))

    def buffers(self) -> list[Buffer]:
        """All of the records, one buffer for those that lie behind each other."""
        first, stop = self._first, self._first + self._pages
        cuts = (first[1:] != stop[:-1]).nonzero()[0]
        begins, ends = first[np.append(0, cuts + 1)].tolist(), stop[np.append(cuts, len(stop) - 1)].tolist()
        return [self._arena.view(begin, end - begin) for begin, end in zip(begins, ends, strict=True)]

    def behind(self, headers: Extents) -> list[Buffer]:
        """The pages of ``headers``, each with what follows the header page of the record that it is for."""
        data, pages = self._arena.data, headers._arena.data
        begins, ends = self._first + 1, self._first + self._pages
        places = zip(
            (headers._first * PAGE_BYTES).tolist(), (begins * PAGE_BYTES).tolist(), (ends * PAGE_BYTES).tolist(),
            strict=True,
        )  # fmt: skip
        return [
            piece
            for header, begin, end in places
            for piece in (pages[header : header + PAGE_BYTES], data[begin:end])
        ]  # fmt: skip

    def copy_headers(self, out: Pages) -> None:
        """Copy the header pages to ``out``."""
        out.table.view(WHOLE_PAGE)[out.rows, 0] = self._table.view(WHOLE_PAGE)[self._first, 0]

    def are_long(self, pages: int) -> bool:
        """Whether each of them is ``pages`` pages long."""
        return not np.count_nonzero(self._pages != pages)

    def headers(self) -> Pages:
        """The header pages, to be read or written."""
        return Pages(self._table, self._first)

    def addresses(self) -> Addresses:
        """Where each of them begins."""
        addresses: Addresses = address_of(self._arena.data) + self._first * PAGE_BYTES
        return addresses

    def payloads(self, nbytes: int) -> Bytes2D:
        """Copies of the ``nbytes`` behind each header page: uint8 ``[n, nbytes]``, C-contiguous."""
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
