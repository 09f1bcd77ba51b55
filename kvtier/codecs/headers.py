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
from kvtier.codecs.record import MAGIC, SUM_AT, RecordHeader, Slice
from kvtier.core.memory import Bytes2D
from kvtier.core.plan import PAGE_BYTES, Table
from kvtier.models.layout import KVLayout

SUM_BYTES: Final = 16
_BLANK_SUM: Final = bytes(SUM_BYTES)
_BLANK_KEY: Final = bytes(32)

_SLICES_AT: Final = 256
_PLACE: Final = np.dtype(
    [("nonce", "u1", (16,)), ("segment", "<i4"), ("page", "<i4"), ("generation", "<i8"), ("sequence", "<i8")]
)
_SLICE: Final = np.dtype([("bytes", "<u4", (2,)), ("sums", "u1", (2, SUM_BYTES))])


_IDENTITY: Final = np.dtype(
    {
        "names": ["key", "parent", "group", "lineage", "depth", "tokens"],
        "formats": [("u1", (32,)), ("u1", (32,)), "<u2", "u1", "<i4", "<i4"],
        "offsets": [16, 48, 112, 114, 116, 120],
        "itemsize": 128,
    }
)
_PLACE_AT: Final = 192
_MAGIC_WORD: Final = int.from_bytes(MAGIC, "little")

WHOLE_PAGE: Final = np.dtype((np.void, PAGE_BYTES))
"""Pages as numpy copies them fastest: each as one item."""
BLANK_PAGE: Final = np.zeros(1, WHOLE_PAGE)[0]
_SUM_WORD: Final = SUM_AT // 8


class Places(NamedTuple):
    """Where on disk records were read from, or go to: a nonce, and a column each."""

    nonce: bytes
    segment: npt.NDArray[np.int32]
    page: npt.NDArray[np.int32]
    generation: npt.NDArray[np.int64]


class Pages(NamedTuple):
    """Some rows of a table of 4 KiB pages, uint8 ``[*, 4096]``, C-contiguous."""

    table: Bytes2D
    rows: npt.NDArray[np.intp]


class Known(NamedTuple):
    """What became of header pages that were read."""

    good: npt.NDArray[np.bool_]
    """Which of them begin a whole raw record of the block that was asked for."""
    sums: Bytes2D
    """The content checksums of each one's slices, uint8 ``[n, slices * 16]``; of good ones only they mean something."""


class RawHeaders:
    """The header pages of raw records of one group of a layout."""

    def __init__(self, layout: KVLayout, group: int) -> None:
        """What all of them have in common is worked out once."""
        sizes = chain_of("raw").content_sizes(layout, group)
        self._slices = len(sizes)
        self._head = _head(self._slices)
        self._words = self._head.itemsize // 8
        blank = np.zeros(PAGE_BYTES, np.uint8)
        RecordHeader(
            key=_BLANK_KEY, parent=_BLANK_KEY, placement=bytes.fromhex(layout.placement), group=group, depth=0,
            tokens=0, lineage=0, error=0.0, chain="raw",
            slices=tuple(Slice(nbytes, nbytes, _BLANK_SUM, _BLANK_SUM) for nbytes in sizes),
        ).pack_into(blank)  # fmt: skip
        self._blank = blank[: self._head.itemsize].view(np.uint64)
        self._compared = self._bits_compared(with_place=True)
        self._compared_in_memory = self._bits_compared(with_place=False)

    def write(self, pages: Pages, rows: Table, sums: Bytes2D) -> None:
        """Write to ``pages`` the headers of the blocks that ``rows`` (dtype ``core.plan.ROW``) name.

        ``sums`` is uint8 ``[n, slices * 16]``: the content checksums of each block's slices.
        """
        words = self._blank[None].repeat(len(rows), axis=0)
        heads = words.view(self._head)[:, 0]
        for name in ("key", "parent", "lineage", "depth", "tokens"):
            heads[name] = rows[name]
        heads["slices"]["sums"] = sums.reshape(len(rows), self._slices, 1, SUM_BYTES)
        table, at = pages
        table.view(WHOLE_PAGE)[at, 0] = BLANK_PAGE
        table.view(np.uint64)[at, : self._words] = words
        table.view(np.uint64)[at, _SUM_WORD] = page_sums(table, at, SUM_AT)

    def read(self, pages: Pages, keys: Bytes2D, places: Places | None) -> Known:
        """Compare ``pages`` with what a whole raw record begins with of the block whose key stands beside each.

        ``keys`` is uint8 ``[n, 32]``. ``places`` is where the records were read from on disk, None for host memory.
        """
        table, at = pages
        words = table.view(np.uint64)[at, : self._words]
        wanted = self._blank[None].repeat(len(at), axis=0)
        heads = wanted.view(self._head)[:, 0]
        heads["key"] = keys
        if places is not None:
            place = heads["place"]
            place["nonce"] = np.frombuffer(places.nonce, np.uint8)
            place["segment"], place["page"], place["generation"] = places[1:]
        different = (words ^ wanted) & (self._compared_in_memory if places is None else self._compared)
        good = ~different.any(axis=1)
        good &= table.view(np.uint64)[at, _SUM_WORD] == page_sums(table, at, SUM_AT)
        sums: Bytes2D = words.view(self._head)[:, 0]["slices"]["sums"][:, :, 0]
        return Known(good, sums.reshape(len(at), -1))

    def _bits_compared(self, *, with_place: bool) -> npt.NDArray[np.uint64]:
        """All bits of a head but those of fields that nobody can know beforehand."""
        bits = np.full(self._head.itemsize, 0xFF, np.uint8)
        head = bits.view(self._head)
        for name in ("parent", "lineage", "depth", "tokens"):
            head[name] = 0
        head["slices"]["sums"] = 0
        head["place"]["sequence"] = 0
        if not with_place:
            head["place"] = np.zeros((), _PLACE)
        return bits.view(np.uint64)


def whole(pages: Pages) -> npt.NDArray[np.bool_]:
    """Which of ``pages`` are header pages that pass their checksums, of records of any chain."""
    words = pages.table.view(np.uint64)
    begins = words[pages.rows, 0] == _MAGIC_WORD
    sound: npt.NDArray[np.bool_] = begins & (words[pages.rows, _SUM_WORD] == page_sums(*pages, SUM_AT))
    return sound


def stamp(pages: Pages, places: Places, sequence: npt.NDArray[np.int64]) -> None:
    """Give header pages, which are ``whole``, other places; identity, chain and slices stay as they are."""
    table, at = pages
    where = np.zeros(len(at), _PLACE)
    where["nonce"] = np.frombuffer(places.nonce, np.uint8)
    where["segment"], where["page"], where["generation"] = places[1:]
    where["sequence"] = sequence
    table[at, _PLACE_AT : _PLACE_AT + _PLACE.itemsize] = where.view(np.uint8).reshape(len(at), -1)
    table.view(np.uint64)[at, _SUM_WORD] = page_sums(table, at, SUM_AT)


def identities(pages: Pages) -> Table:
    """Which blocks header pages are of that the caller wrote or checked: nothing is verified here.

    The fields are key, parent, group, lineage, depth and tokens.
    """
    return pages.table[pages.rows, : _IDENTITY.itemsize].view(_IDENTITY)[:, 0]


def _head(slices: int) -> np.dtype[np.void]:
    """What differs from one raw record to the next, where ``docs/format.md`` has it, up to the end of the slices."""
    return np.dtype(
        {
            "names": ["key", "parent", "lineage", "depth", "tokens", "place", "slices"],
            "formats": [("u1", (32,)), ("u1", (32,)), "u1", "<i4", "<i4", _PLACE, (_SLICE, (slices,))],
            "offsets": [16, 48, 114, 116, 120, _PLACE_AT, _SLICES_AT],
            "itemsize": _SLICES_AT + slices * _SLICE.itemsize,
        }
    )
