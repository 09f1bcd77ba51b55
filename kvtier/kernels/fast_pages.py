"""Whole pages to blocks and back by compiled kernels: what ``RowSpace`` does in numpy, by addresses.

A part is the address of its page 0 and the bytes of a page, whatever distances lie between parts, so pages need no
common row. Pages that lie one after another move as one run. Bytes go past the cache where a call moves many of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtier.kernels.copy import Pages2D, address_of
from kvtier.kernels.loading import compiled
from kvtier.kernels.record_memory import Addresses, SliceTable

STREAM_BYTES: Final = 256 << 10
"""A call that moves at least so much leaves the cache alone: nobody reads so much again at once."""
_LINE_BYTES: Final = 64

Ids = npt.NDArray[np.int32]
Bases = npt.NDArray[np.int64]
Bytes2D = npt.NDArray[np.uint8]


class FastPages:
    """The pages of one group's parts. They must outlive it."""

    def __init__(self, kernels: Any, arrays: Sequence[Pages2D], block_pages: int) -> None:
        """``kernels``: what ``loading.compiled`` returns. A block takes ``block_pages`` pages of each of ``arrays``."""
        self._kernels = kernels
        self._parts = np.array([(address_of(array), array.shape[1]) for array in arrays], np.int64)
        self._block_pages = block_pages
        self._num_pages = min(len(array) for array in arrays)
        self._begins = np.concatenate([[0], np.cumsum(self._parts[:, 1] * block_pages)]).tolist()
        self._in_lines = all(array.shape[1] % _LINE_BYTES == 0 for array in arrays)

    @classmethod
    def of(cls, arrays: Sequence[Pages2D], block_pages: int) -> FastPages | None:
        """None without numba."""
        kernels = compiled()
        return None if kernels is None else cls(kernels, arrays, block_pages)

    def gather(self, ids: Ids, bases: Bases, parts: range, out: Bytes2D) -> None:
        """Copy ``parts`` of the blocks whose pages are ``ids[base:]`` to ``out``, uint8 ``[blocks, bytes of parts]``.

        Raises:
            IndexError: a page is not there; nothing was copied.
            ValueError: ``out`` is not contiguous, or not as long.
        """
        self._move(self._kernels.gather_parts, ids, bases, parts, out)

    def scatter(self, ids: Ids, bases: Bases, parts: range, source: Bytes2D) -> None:
        """Undo ``gather``; raises what it raises."""
        self._move(self._kernels.scatter_parts, ids, bases, parts, source)

    def gather_records(self, ids: Ids, bases: Bases, slices: SliceTable, records: Addresses) -> Bytes2D | None:
        """Copy whole blocks to records, zeros behind each slice; their content sums, uint8 ``[blocks, slices * 16]``.

        None, and nothing done, where a slice is too short to be summed on the way.

        Raises:
            IndexError: a page is not there; nothing was copied.
        """
        if not self._can_sum(slices):
            return None
        sums = np.empty((len(records), len(slices), 2), np.uint64)
        _check(
            self._kernels.gather_records(
                self._parts, _plain(ids), bases, self._block_pages, self._num_pages, slices, records,
                self._in_lines and not np.count_nonzero(records % _LINE_BYTES), sums,
            )
        )  # fmt: skip
        return sums.reshape(len(records), -1).view(np.uint8)

    def scatter_records(
        self, ids: Ids, bases: Bases, slices: SliceTable, records: Addresses, wanted: Bytes2D | None
    ) -> npt.NDArray[np.bool_] | None:
        """Copy records to the pages of their blocks; which of them have the content sums ``wanted``, all without.

        No slice whose sum is another touches a page, nor does what follows it in its record. None, and nothing done,
        where a slice is too short to be summed.

        Raises:
            IndexError: a page is not there; nothing was copied.
        """
        if not self._can_sum(slices):
            return None
        shape = (len(records), len(slices), 2)
        found = np.zeros(shape, np.uint64)
        sums = found if wanted is None else np.ascontiguousarray(wanted).view(np.uint64).reshape(shape)
        _check(
            self._kernels.scatter_records(
                self._parts, _plain(ids), bases, self._block_pages, self._num_pages, slices, records,
                wanted is not None, sums, len(records) * self._begins[-1] >= STREAM_BYTES, found,
            )
        )  # fmt: skip
        good: npt.NDArray[np.bool_] = (found == sums).all(axis=(1, 2))
        return good

    def _can_sum(self, slices: SliceTable) -> bool:
        return bool(slices[:, 1].min() >= self._kernels.LEAST_SUMMED_BYTES)

    def _move(self, kernel: Any, ids: Ids, bases: Bases, parts: range, table: Bytes2D) -> None:
        nbytes = self._begins[parts.stop] - self._begins[parts.start]
        if not table.flags.c_contiguous or table.shape != (len(bases), nbytes):
            raise ValueError(f"bytes of shape {table.shape}, strides {table.strides}: want {(len(bases), nbytes)}")
        rows = address_of(table) + nbytes * np.arange(len(bases))
        _check(
            kernel(
                self._parts, _plain(ids), bases, self._block_pages, self._num_pages, parts.start, parts.stop, rows,
                table.nbytes >= STREAM_BYTES,
            )
        )  # fmt: skip


def _plain(ids: Ids) -> Ids:
    """``ids`` as kernels take them: what was cut from a message may begin anywhere."""
    return ids if ids.flags.c_contiguous and ids.flags.aligned else ids.copy()


def _check(done: int) -> None:
    if not done:
        raise IndexError("the page table names a page that the memory does not have")
