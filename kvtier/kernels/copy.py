"""Gather and scatter of whole engine pages, in numpy. Both release the GIL while bytes move.

Page ids are trusted here: whoever calls has checked them once for the whole page table, because a check in every call
costs as much as a small copy. An id outside the source is clipped on gather, and an error on scatter.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes1D: TypeAlias = npt.NDArray[np.uint8]
Pages2D: TypeAlias = npt.NDArray[np.uint8]
"""uint8 ``[pages, page_bytes]``, C-contiguous."""

PageRows: TypeAlias = slice | npt.NDArray[np.intp]
"""Which pages: a run of neighbours, copied in one piece, or their numbers."""


def page_rows(ids: npt.NDArray[np.integer[Any]]) -> PageRows:
    """``ids`` (one-dimensional, not negative) in the form that copies fastest; made once a block, for all its parts."""
    count = len(ids)
    if not count:
        return slice(0, 0)
    first = int(ids[0])
    if int(ids[-1]) - first == count - 1 and (count <= 2 or bool(np.all(np.diff(ids) == 1))):
        return slice(first, first + count)
    return ids.astype(np.intp)


def gather_pages(source: Pages2D, rows: PageRows, out: Bytes1D) -> None:
    """Copy the pages ``rows`` of ``source`` to ``out``, one after another; ``out`` is exactly as long as they are."""
    pages = out.reshape(-1, source.shape[1])
    if isinstance(rows, slice):
        np.copyto(pages, source[rows])
    else:
        np.take(source, rows, axis=0, out=pages, mode="clip")  # any other mode copies through a buffer of its own


def scatter_pages(target: Pages2D, rows: PageRows, source: Bytes1D) -> None:
    """Copy ``source`` to the pages ``rows`` of ``target``; undoes ``gather_pages`` where no page is named twice."""
    target[rows] = source.reshape(-1, target.shape[1])
