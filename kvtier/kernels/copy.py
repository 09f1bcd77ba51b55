"""Gather and scatter of whole engine pages, in numpy. Both release the GIL while bytes move.

The layers of an engine are arrays of their own, and a copy of one block takes a few pages from each. One call for each
of them costs more than its bytes: threads that meet at the interpreter lock every ten microseconds wait for it longer
than they copy. ``RowSpace`` therefore sees all arrays as one table, and any number of blocks is one call.

Row numbers are trusted here: whoever calls has checked the page table once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import gcd
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Pages2D: TypeAlias = npt.NDArray[np.uint8]
"""uint8 ``[pages, page_bytes]``, C-contiguous."""
Rows: TypeAlias = npt.NDArray[np.intp]


_LEAST_ROW_BYTES: Final = 512
"""Shorter rows than this cost more in calls of the copy routine than in bytes."""
_RUN_BYTES: Final = 512 << 10
"""What is gathered at once where rows overlap: it passes through a core's own cache on its way."""


class RowSpace:
    """Several arrays of pages, wherever they lie, as one table of equal rows.

    A row begins at every multiple of what divides all pages and all distances between two arrays: a whole page where
    the arrays are cut from one allocation, 4 KiB or so where each is mapped on its own, 16 to 64 bytes where they come
    from a heap. Where that is long enough it is a row; else rows are as long as pages allow, and overlap. Between the
    arrays the table covers memory that is not theirs, so only rows that ``rows_of`` names may be asked for. The arrays
    must outlive it.
    """

    def __init__(self, arrays: Sequence[Pages2D]) -> None:
        """At least one array; they may differ in their pages."""
        starts = [address_of(array) for array in arrays]
        base = min(starts)
        sizes = [array.shape[1] for array in arrays]
        unit = gcd(*sizes, *(start - base for start in starts))
        self.row_bytes = unit if unit >= _LEAST_ROW_BYTES else gcd(*sizes)
        stop = max(start + array.nbytes for start, array in zip(starts, arrays, strict=True))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (stop - base)).from_address(base))
        count = max(0, (stop - base - self.row_bytes) // unit + 1)
        self._rows: Pages2D = np.ndarray((count, self.row_bytes), np.uint8, memory, strides=(unit, 1))
        self._first = [(start - base) // unit for start in starts]
        self._page_step = [size // unit for size in sizes]
        self._row_step = self.row_bytes // unit
        self.rows_a_page = [size // self.row_bytes for size in sizes]

    def rows_of(self, array: int, pages: npt.NDArray[np.integer[Any]]) -> Rows:
        """The rows of ``pages`` of array number ``array``: intp ``[*pages.shape, rows_a_page]``."""
        first = self._first[array] + pages.astype(np.intp) * self._page_step[array]
        rows: Rows = first[..., None] + self._row_step * np.arange(self.rows_a_page[array])
        return rows

    def gather(self, rows: Rows, out: npt.NDArray[np.uint8]) -> None:
        """Copy ``rows`` (of any shape) one after another to ``out``, which is C-contiguous and exactly as long."""
        if not out.flags.c_contiguous:
            raise ValueError(f"out has strides {out.strides}, want contiguous bytes")
        rows = rows.reshape(-1)
        table = out.reshape(len(rows), self.row_bytes)
        if self._row_step == 1:
            np.take(self._rows, rows, axis=0, out=table, mode="clip")  # another mode copies through a buffer of its own
            return
        run = max(1, _RUN_BYTES // self.row_bytes)  # of rows that overlap, ``take`` would first copy the whole table
        for at in range(0, len(rows), run):
            table[at : at + run] = self._rows[rows[at : at + run]]

    def scatter(self, rows: Rows, source: npt.NDArray[np.uint8]) -> None:
        """Copy ``source`` to ``rows`` (of any shape); undoes ``gather`` where no row is named twice."""
        self._rows[rows.reshape(-1)] = source.reshape(rows.size, self.row_bytes)


def address_of(array: npt.NDArray[np.uint8]) -> int:
    """Where the first byte of ``array`` lies."""
    address: int = array.__array_interface__["data"][0]
    return address
