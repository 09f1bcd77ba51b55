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
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Pages2D: TypeAlias = npt.NDArray[np.uint8]
"""uint8 ``[pages, page_bytes]``, C-contiguous."""
Rows: TypeAlias = npt.NDArray[np.intp]


class RowSpace:
    """Several arrays of pages, wherever they lie, as one table of equal rows.

    A row is the largest piece that fits every page and every distance between two arrays: a whole page where the
    arrays are cut from one allocation, 4 KiB or so where each is mapped on its own. Arrays at odd distances, as small
    ones from a heap are, have rows of 16 to 64 bytes and copy two to six times slower. Between the arrays the table
    covers memory that is not theirs, so only rows that ``rows_of`` names may be asked for. The arrays must outlive it.
    """

    def __init__(self, arrays: Sequence[Pages2D]) -> None:
        """At least one array; they may differ in their pages."""
        starts = [_address(array) for array in arrays]
        base = min(starts)
        sizes = [array.shape[1] for array in arrays]
        self.row_bytes = gcd(*sizes, *(start - base for start in starts))
        stop = max(start + array.nbytes for start, array in zip(starts, arrays, strict=True))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (stop - base)).from_address(base))
        self._rows: Pages2D = memory.reshape(-1, self.row_bytes)
        self._first = [(start - base) // self.row_bytes for start in starts]
        self.rows_a_page = [size // self.row_bytes for size in sizes]

    def rows_of(self, array: int, pages: npt.NDArray[np.integer[Any]]) -> Rows:
        """The rows of ``pages`` of array number ``array``: intp ``[*pages.shape, rows_a_page]``."""
        count = self.rows_a_page[array]
        rows: Rows = (self._first[array] + pages.astype(np.intp) * count)[..., None] + np.arange(count)
        return rows

    def gather(self, rows: Rows, out: npt.NDArray[np.uint8]) -> None:
        """Copy ``rows`` (of any shape) one after another to ``out``, which is C-contiguous and exactly as long."""
        if not out.flags.c_contiguous:
            raise ValueError(f"out has strides {out.strides}, want contiguous bytes")
        rows = rows.reshape(-1)
        # Any other mode copies through a buffer of its own.
        np.take(self._rows, rows, axis=0, out=out.reshape(-1, self.row_bytes), mode="clip")

    def scatter(self, rows: Rows, source: npt.NDArray[np.uint8]) -> None:
        """Copy ``source`` to ``rows`` (of any shape); undoes ``gather`` where no row is named twice."""
        self._rows[rows.reshape(-1)] = source.reshape(-1, self.row_bytes)


def _address(array: npt.NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
