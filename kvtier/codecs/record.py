"""The record: one block of one group as it lies on disk and in host memory, a header page and then its slices.

Every slice begins at a 4 KiB page, so that one read lands header and payload in place. Host memory holds the same image
with ``segment`` = -1. ``docs/format.md`` has the byte layout in a table; the structs below say it again, and
``headers`` as much of it as differs from one raw record to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from struct import Struct
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.codecs.base import pages_of
from kvtier.codecs.checksums import content_sum, page_sum
from kvtier.core.memory import Bytes1D
from kvtier.core.plan import NOWHERE, PAGE_BYTES, Lineage
from kvtier.errors import CorruptBlockError
from kvtier.models.layout import MAX_SLICES

MAGIC: Final = b"KVTREC01"
FORMAT: Final = 1
HEADER_PAGES: Final = 1
NONCE_BYTES: Final = 16
NO_NONCE: Final = bytes(NONCE_BYTES)
"""Stands in the header of a record in host memory, which belongs to no store."""

# magic, format, header pages, slices, flags, key, parent, placement, group, lineage, depth, tokens, error, chain, pages
_IDENTITY: Final = Struct("<8s4H32s32s32sHBxiif32sI")
_RESERVED_AT: Final = 164  # nonce (12) and tag (16) of an authenticated cipher; zero in format 1
_PLACE: Final = Struct("<16siiqq")  # nonce of the store, segment, page, generation, sequence
_PLACE_AT: Final = 192
_GENERATION_AT: Final = _PLACE_AT + 24
_SLICE: Final = Struct("<II16s16s")
_SLICES_AT: Final = 256
_SUM: Final = Struct("<Q")
SUM_AT: Final = PAGE_BYTES - _SUM.size

assert _IDENTITY.size <= _RESERVED_AT
assert _SLICES_AT + MAX_SLICES * _SLICE.size <= SUM_AT


class Slice(NamedTuple):
    """One row of the slice table. A slice is byte-coded exactly when it is stored shorter than its content."""

    stored_bytes: int
    content_bytes: int
    content_sum: bytes
    """xxh3-128 of the tensor codec's output; made once, carried by every copy."""
    stored_sum: bytes
    """xxh3-128 of what lies there; equals ``content_sum`` where no byte codec won."""

    @property
    def coded(self) -> bool:
        """Whether the byte codec has to decode it."""
        return self.stored_bytes < self.content_bytes


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record is (identity), how it is encoded (chain, slices) and where it was meant to lie (place)."""

    key: bytes
    parent: bytes
    placement: bytes
    """The 32 bytes of ``KVLayout.placement``."""
    group: int
    depth: int
    """Blocks before it in its chain."""
    tokens: int
    lineage: int
    error: float
    """Relative error of the tensor codec, 0.0 when exact; kept as float32."""
    chain: str
    """Name of the codec chain (``chain_of``)."""
    slices: tuple[Slice, ...]
    nonce: bytes = NO_NONCE
    segment: int = NOWHERE
    generation: int = 0
    page: int = NOWHERE
    """Where the header page itself is, in 4 KiB pages from the start of the segment."""
    sequence: int = 0

    @property
    def pages(self) -> int:
        """4 KiB pages of the whole record."""
        return record_pages([row.stored_bytes for row in self.slices])

    def slice_offsets(self) -> tuple[int, ...]:
        """Byte offset of every slice from the start of the record; each a multiple of 4096."""
        sizes = (PAGE_BYTES * pages_of(row.stored_bytes) for row in self.slices[:-1])
        return tuple(accumulate(sizes, initial=PAGE_BYTES * HEADER_PAGES))

    def pack_into(self, page: Bytes1D) -> None:
        """Write the header page, checksum included, to ``page``, uint8 ``[4096]``. Every byte of it is written."""
        page[:] = 0
        view = page.data
        count = len(self.slices)
        _IDENTITY.pack_into(
            view, 0, MAGIC, FORMAT, HEADER_PAGES, count, 0, self.key, self.parent, self.placement, self.group,
            self.lineage, self.depth, self.tokens, self.error, self.chain.encode("ascii"), self.pages,
        )  # fmt: skip
        _PLACE.pack_into(view, _PLACE_AT, self.nonce, self.segment, self.page, self.generation, self.sequence)
        _table(count).pack_into(view, _SLICES_AT, *chain.from_iterable(self.slices))
        _SUM.pack_into(view, SUM_AT, page_sum(page[:SUM_AT]))

    @classmethod
    def unpack(cls, page: Bytes1D) -> RecordHeader:
        """The header in ``page``, uint8 ``[4096]``, after its checksum and every length in it were checked.

        What the layout allows is checked by ``check_sizes``, whose record it is by ``matches``.

        Raises:
            CorruptBlockError: it is no header page, or not one that this code wrote.
        """
        _check_page(page)
        view = page.data
        (_, form, header_pages, count, _, key, parent, placement, group, lineage, depth, tokens, error, name, pages) = (
            _IDENTITY.unpack_from(view)
        )
        if form != FORMAT or header_pages != HEADER_PAGES or not 0 < count <= MAX_SLICES:
            raise CorruptBlockError(f"record format {form} with {header_pages} header pages and {count} slices")
        values = _table(count).unpack_from(view, _SLICES_AT)
        rows = tuple(map(Slice, values[0::4], values[1::4], values[2::4], values[3::4]))
        _check_table(rows, pages)
        if lineage > max(Lineage) or depth < 0 or tokens <= 0 or not error >= 0.0:
            raise CorruptBlockError(f"record of lineage {lineage}, depth {depth}, {tokens} tokens, error {error}")
        nonce, segment, own_page, generation, sequence = _PLACE.unpack_from(view, _PLACE_AT)
        return cls(
            key, parent, placement, group, depth, tokens, lineage, error, _name(name), rows,
            nonce, segment, generation, own_page, sequence,
        )  # fmt: skip

    def matches(
        self,
        *,
        key: bytes,
        group: int,
        placement: bytes,
        nonce: bytes = NO_NONCE,
        segment: int = NOWHERE,
        generation: int = 0,
        page: int = NOWHERE,
    ) -> bool:
        """Whether this is the record that was asked for, at the place where it was looked for."""
        return (
            self.key == key
            and self.group == group
            and self.placement == placement
            and self.nonce == nonce
            and self.segment == segment
            and self.generation == generation
            and self.page == page
        )

    def check_sizes(self, content_sizes: Sequence[int]) -> None:
        """Compare the slice table with ``Chain.content_sizes`` of the layout, before any of it is decoded.

        Raises:
            CorruptBlockError: another number of slices, or one of another size.
        """
        found = [row.content_bytes for row in self.slices]
        if found != list(content_sizes):
            raise CorruptBlockError(f"slices of {found} bytes where the layout has {list(content_sizes)}")


def restamp(page: Bytes1D, *, nonce: bytes, segment: int, generation: int, page_number: int, sequence: int) -> None:
    """Give a packed header another place, in its page; identity, chain and slices stay as they are.

    Raises:
        CorruptBlockError: the page is damaged already; a new checksum would hide it.
    """
    _check_page(page)
    _PLACE.pack_into(page.data, _PLACE_AT, nonce, segment, page_number, generation, sequence)
    _SUM.pack_into(page.data, SUM_AT, page_sum(page[:SUM_AT]))


def record_pages(stored_bytes: Sequence[int]) -> int:
    """4 KiB pages of a record with slices of these stored sizes, header included."""
    return HEADER_PAGES + sum([-(-nbytes // PAGE_BYTES) for nbytes in stored_bytes])


def raw_slice(content: Bytes1D) -> Slice:
    """The table row of a slice without byte codec: ``content``, uint8 ``[nbytes]``, is what will lie there."""
    checksum = content_sum(content)
    return Slice(content.nbytes, content.nbytes, checksum, checksum)


def find_headers(image: Bytes1D, generation: int) -> npt.NDArray[np.intp]:
    """At which 4 KiB pages of ``image`` (whole pages) a header of ``generation`` may be: magic and generation only."""
    words = image.view("<u8").reshape(-1, PAGE_BYTES // 8)
    magic = int.from_bytes(MAGIC, "little")
    return np.flatnonzero((words[:, 0] == magic) & (words[:, _GENERATION_AT // 8] == generation))


def check_stored(row: Slice, stored: Bytes1D) -> None:
    """Compare what was read with its row.

    Raises:
        CorruptBlockError: another length, or another checksum.
    """
    if stored.nbytes != row.stored_bytes or content_sum(stored) != row.stored_sum:
        raise CorruptBlockError(f"a slice of {row.stored_bytes} bytes fails its stored checksum")


def check_content(row: Slice, content: Bytes1D) -> None:
    """Compare what the byte codec gave back with its row; needless for a slice that is not ``coded``.

    Raises:
        CorruptBlockError: another length, or another checksum.
    """
    if content.nbytes != row.content_bytes or content_sum(content) != row.content_sum:
        raise CorruptBlockError(f"a slice of {row.content_bytes} bytes fails its content checksum")


def check_payload(header: RecordHeader, record: Bytes1D) -> None:
    """Compare every slice of ``record`` (its image from the header page on) with the table.

    Raises:
        CorruptBlockError: one slice fails.
    """
    for row, start in zip(header.slices, header.slice_offsets(), strict=True):
        check_stored(row, record[start : start + row.stored_bytes])


def zero_padding(header: RecordHeader, record: Bytes1D) -> None:
    """Clear what lies between the end of each slice and its last 4 KiB page: it would go to disk as it is."""
    for row, start in zip(header.slices, header.slice_offsets(), strict=True):
        record[start + row.stored_bytes : start + PAGE_BYTES * pages_of(row.stored_bytes)] = 0


@lru_cache(maxsize=MAX_SLICES)
def _table(count: int) -> Struct:
    return Struct("<" + _SLICE.format.removeprefix("<") * count)


def _check_page(page: Bytes1D) -> None:
    if page.nbytes != PAGE_BYTES or bytes(page[: len(MAGIC)]) != MAGIC:
        raise CorruptBlockError("no record begins here")
    if _SUM.unpack_from(page.data, SUM_AT)[0] != page_sum(page[:SUM_AT]):
        raise CorruptBlockError("a record header fails its checksum")


def _check_table(rows: Sequence[Slice], pages: int) -> None:
    for row in rows:
        if not 0 < row.stored_bytes <= row.content_bytes:
            raise CorruptBlockError(f"a slice of {row.content_bytes} bytes stored in {row.stored_bytes}")
        if row.stored_bytes == row.content_bytes and row.stored_sum != row.content_sum:
            raise CorruptBlockError("a slice that is stored as it is has two checksums")
    expected = record_pages([row.stored_bytes for row in rows])
    if pages != expected:
        raise CorruptBlockError(f"a record of {pages} pages whose slices take {expected}")


def _name(field: bytes) -> str:
    name = field.rstrip(b"\0")
    if not name or not all(0x20 < byte < 0x7F for byte in name):
        raise CorruptBlockError(f"codec chain {field!r}")
    return name.decode("ascii")
