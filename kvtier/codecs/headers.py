"""Header pages of raw records as a table: the blocks of one group are sealed, or known again, many at a time.

The bytes are those of ``record.RecordHeader``, which stays the only code that takes in what it did not expect: here a
page either is what a raw record of this layout begins with, or it is not.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.codecs.chain import chain_of
from kvtier.codecs.checksums import page_sums
from kvtier.codecs.record import SUM_AT, RecordHeader, Slice
from kvtier.core.memory import Bytes2D
from kvtier.core.plan import PAGE_BYTES, Table
from kvtier.models.layout import MAX_SLICES, KVLayout

SUM_BYTES: Final = 16
_BLANK_SUM: Final = bytes(SUM_BYTES)
_BLANK_KEY: Final = bytes(32)

_SLICES_AT: Final = 256
_PLACE: Final = np.dtype(
    [("nonce", "u1", (16,)), ("segment", "<i4"), ("page", "<i4"), ("generation", "<i8"), ("sequence", "<i8")]
)
_SLICE: Final = np.dtype([("bytes", "<u4", (2,)), ("sums", "u1", (2, SUM_BYTES))])
HEADER: Final = np.dtype(
    {
        "names": ["key", "parent", "lineage", "depth", "tokens", "place", "slices", "sum"],
        "formats": [("u1", (32,)), ("u1", (32,)), "u1", "<i4", "<i4", _PLACE, (_SLICE, (MAX_SLICES,)), "<u8"],
        "offsets": [16, 48, 114, 116, 120, 192, _SLICES_AT, SUM_AT],
        "itemsize": PAGE_BYTES,
    }
)
"""What differs from one raw record of a layout to the next, where ``docs/format.md`` has it."""


class Places(NamedTuple):
    """Where on disk records were read from: a nonce, and a column each."""

    nonce: bytes
    segment: npt.NDArray[np.int32]
    page: npt.NDArray[np.int32]
    generation: npt.NDArray[np.int64]


class RawHeaders:
    """The header pages of raw records of one group of a layout."""

    def __init__(self, layout: KVLayout, group: int) -> None:
        """What all of them have in common is worked out once."""
        sizes = chain_of("raw").content_sizes(layout, group)
        self._slices = len(sizes)
        self._blank = np.zeros(PAGE_BYTES, np.uint8)
        RecordHeader(
            key=_BLANK_KEY, parent=_BLANK_KEY, placement=bytes.fromhex(layout.placement), group=group, depth=0,
            tokens=0, lineage=0, error=0.0, chain="raw",
            slices=tuple(Slice(nbytes, nbytes, _BLANK_SUM, _BLANK_SUM) for nbytes in sizes),
        ).pack_into(self._blank)  # fmt: skip
        own = np.zeros(1, HEADER)
        for name in ("key", "parent", "lineage", "depth", "tokens", "place", "sum"):
            own[name] = np.frombuffer(b"\xff" * PAGE_BYTES, HEADER, 1)[name]
        own["slices"]["sums"][:, : self._slices] = 0xFF
        self._words = (_SLICES_AT + self._slices * _SLICE.itemsize) // 8
        self._common = ~own.view(np.uint64)[: self._words]
        self._wanted = self._blank.view(np.uint64)[: self._words] & self._common

    def make(self, rows: Table, sums: Bytes2D) -> Bytes2D:
        """Header pages, uint8 ``[n, 4096]``, of the blocks that ``rows`` (dtype ``core.plan.ROW``) name.

        ``sums`` is uint8 ``[n, slices * 16]``: the content checksums of each block's slices.
        """
        count = len(rows)
        pages = np.empty((count, PAGE_BYTES), np.uint8)
        pages[:] = self._blank
        headers = pages.view(HEADER)[:, 0]
        for name in ("key", "parent", "lineage", "depth", "tokens"):
            headers[name] = rows[name]
        headers["slices"]["sums"][:, : self._slices] = sums.reshape(count, self._slices, 1, SUM_BYTES)
        headers["sum"] = page_sums(pages, SUM_AT)
        return pages

    def known(self, pages: Bytes2D, keys: Bytes2D, places: Places | None) -> npt.NDArray[np.bool_]:
        """Which of ``pages``, uint8 ``[n, 4096]``, begin a whole raw record of the block whose key stands beside it.

        ``keys`` is uint8 ``[n, 32]``. ``places`` is where the records were read from on disk, None for host memory.
        """
        headers = pages.view(HEADER)[:, 0]
        common = pages.view(np.uint64)[:, : self._words] & self._common
        known: npt.NDArray[np.bool_] = (common == self._wanted).all(axis=1)
        known &= (headers["key"] == keys).all(axis=1)
        known &= headers["sum"] == page_sums(pages, SUM_AT)
        if places is not None:
            place = headers["place"]
            known &= (place["nonce"] == np.frombuffer(places.nonce, np.uint8)).all(axis=1)
            known &= (place["segment"] == places.segment) & (place["page"] == places.page)
            known &= place["generation"] == places.generation
        return known

    def sums(self, pages: Bytes2D) -> Bytes2D:
        """The content checksum of every slice, uint8 ``[n, slices * 16]``, as ``make`` takes them."""
        table: Bytes2D = pages.view(HEADER)[:, 0]["slices"]["sums"][:, : self._slices, 0]
        return table.reshape(len(pages), -1)

