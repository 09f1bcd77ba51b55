"""The pages of the disk tier that are not records: superblock, segment header, footer. ``docs/format.md`` has tables.

Every such page ends with xxh3-64 of the 4088 bytes before it, in all versions of the format, so that a page of a newer
version can be told from a damaged one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final

import numpy as np

from kvtier.codecs.base import pages_of
from kvtier.codecs.checksums import content_sum, page_sum
from kvtier.codecs.record import NONCE_BYTES
from kvtier.core.memory import Bytes1D
from kvtier.core.plan import PAGE_BYTES, RECOVERED, Table
from kvtier.errors import CorruptBlockError

FORMAT_MAJOR: Final = 1
FORMAT_MINOR: Final = 0
HEADER_SLOTS: Final = 2
"""Pages 0 and 1 hold the header alternately: one that tears while it is rewritten leaves the other."""
UUID_BYTES: Final = 16

_SUM: Final = Struct("<Q")
_SUM_AT: Final = PAGE_BYTES - _SUM.size
_HEAD: Final = Struct("<8sHH")  # magic, format major, format minor; alike in all pages and all versions
_SUPERBLOCK: Final = Struct(
    "<12xIIIqd16s16s32s"
)  # compat, ro-compat, incompat, sequence, created, uuid, nonce, placement
_SEGMENT: Final = Struct("<12xIiiq16s16s32s")  # state, segment, pages, generation, uuid, nonce, placement
_TAIL: Final = Struct("<12xIiiq16s16s")  # bytes of an entry, segment, count, generation, nonce, sum of the entries

ENTRY: Final = RECOVERED
"""One record in a footer, 104 bytes: recovery hands it on as it is."""


class SegmentState(IntEnum):
    """What the header of a segment says of it."""

    OPEN = 1
    SEALED = 2


@dataclass(frozen=True, slots=True)
class Superblock:
    """One store: the blocks of one placement in one directory. ``sequence`` counts the lives of the store."""

    MAGIC = b"KVTSUPER"

    sequence: int
    created_s: float
    uuid: bytes
    nonce: bytes
    placement: bytes
    compat: int = 0
    ro_compat: int = 0
    incompat: int = 0
    major: int = FORMAT_MAJOR
    minor: int = FORMAT_MINOR

    def pack(self) -> Bytes1D:
        """The page."""
        page = new_pages(1)
        _SUPERBLOCK.pack_into(
            page.data, 0, self.compat, self.ro_compat, self.incompat, self.sequence, self.created_s, self.uuid,
            self.nonce, self.placement,
        )  # fmt: skip
        return _finished(page, self.MAGIC, self.major, self.minor)

    @classmethod
    def unpack(cls, page: Bytes1D) -> Superblock:
        """What ``page`` says, of whatever version: a newer one has at least its head in the same place.

        Raises:
            CorruptBlockError: it is no superblock, or a damaged one.
        """
        major, minor = _checked(page, cls.MAGIC)
        compat, ro_compat, incompat, sequence, created_s, uuid, nonce, placement = _SUPERBLOCK.unpack_from(page.data)
        return cls(sequence, created_s, uuid, nonce, placement, compat, ro_compat, incompat, major, minor)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Which segment this is, and in which of its lives."""

    MAGIC = b"KVTSEG01"

    state: SegmentState
    segment: int
    pages: int
    generation: int
    uuid: bytes
    nonce: bytes
    placement: bytes

    def pack(self) -> Bytes1D:
        """The page."""
        page = new_pages(1)
        _SEGMENT.pack_into(
            page.data, 0, self.state, self.segment, self.pages, self.generation, self.uuid, self.nonce, self.placement
        )
        return _finished(page, self.MAGIC)

    @classmethod
    def unpack(cls, page: Bytes1D) -> SegmentHeader:
        """What ``page`` says.

        Raises:
            CorruptBlockError: it is no segment header, a damaged one, or one of another version.
        """
        if _checked(page, cls.MAGIC)[0] != FORMAT_MAJOR:
            raise CorruptBlockError("a segment header of another format")
        state, *rest = _SEGMENT.unpack_from(page.data)
        if state not in tuple(SegmentState):
            raise CorruptBlockError(f"a segment header with state {state}")
        return cls(SegmentState(state), *rest)

    @property
    def rank(self) -> tuple[int, int]:
        """Orders the two copies of a header: the younger generation, and within one sealed after open."""
        return self.generation, self.state


@dataclass(frozen=True, slots=True)
class FooterTail:
    """The last page of a sealed segment: how many entries lie before it, and their checksum."""

    MAGIC = b"KVTFOOT1"

    segment: int
    count: int
    generation: int
    nonce: bytes
    entries_sum: bytes

    @classmethod
    def unpack(cls, page: Bytes1D) -> FooterTail:
        """What ``page`` says.

        Raises:
            CorruptBlockError: it is no tail, a damaged one, or one of another version.
        """
        major, _ = _checked(page, cls.MAGIC)
        entry_bytes, *rest = _TAIL.unpack_from(page.data)
        if major != FORMAT_MAJOR or entry_bytes != ENTRY.itemsize:
            raise CorruptBlockError("a footer of another format")
        return cls(*rest)


def footer_pages(count: int) -> int:
    """4 KiB pages of a footer of ``count`` entries, tail included."""
    return pages_of(count * ENTRY.itemsize) + 1


def pack_footer(entries: Table, *, segment: int, generation: int, nonce: bytes) -> Bytes1D:
    """The footer of ``entries`` (dtype ``ENTRY``): whole pages that end with the tail."""
    pages = new_pages(footer_pages(len(entries)))
    data = np.frombuffer(entries.tobytes(), np.uint8)
    pages[: data.nbytes] = data
    tail = pages[-PAGE_BYTES:]
    _TAIL.pack_into(
        tail.data, 0, ENTRY.itemsize, segment, len(entries), generation, nonce, content_sum(pages[:-PAGE_BYTES])
    )
    _finished(tail, FooterTail.MAGIC)
    return pages


def unpack_footer(tail: FooterTail, pages: Bytes1D, segment_pages: int) -> Table:
    """The entries in ``pages``, which lie right before the tail; their places are checked, their content not copied.

    Raises:
        CorruptBlockError: the checksum fails, or an entry points outside of the segment.
    """
    if content_sum(pages) != tail.entries_sum:
        raise CorruptBlockError(f"the footer of segment {tail.segment} fails its checksum")
    entries = pages[: tail.count * ENTRY.itemsize].view(ENTRY)
    first, length = entries["page"].astype(np.int64), entries["pages"].astype(np.int64)
    inside = (first >= HEADER_SLOTS) & (length >= 2) & (first + length <= segment_pages - footer_pages(tail.count))
    own = (entries["segment"] == tail.segment) & (entries["generation"] == tail.generation)
    if not (inside & own).all():
        raise CorruptBlockError(f"the footer of segment {tail.segment} points outside of it")
    return entries


def new_pages(pages: int) -> Bytes1D:
    """Zeroed memory of ``pages`` 4 KiB pages at a 4 KiB boundary, as direct I/O wants it."""
    memory = np.zeros((pages + 1) * PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % PAGE_BYTES
    return memory[start : start + pages * PAGE_BYTES]


def _finished(page: Bytes1D, magic: bytes, major: int = FORMAT_MAJOR, minor: int = FORMAT_MINOR) -> Bytes1D:
    _HEAD.pack_into(page.data, 0, magic, major, minor)
    _SUM.pack_into(page.data, _SUM_AT, page_sum(page[:_SUM_AT]))
    return page


def _checked(page: Bytes1D, magic: bytes) -> tuple[int, int]:
    if page.nbytes != PAGE_BYTES:
        raise CorruptBlockError(f"{page.nbytes} bytes are not a page")
    found, major, minor = _HEAD.unpack_from(page.data)
    if found != magic or _SUM.unpack_from(page.data, _SUM_AT)[0] != page_sum(page[:_SUM_AT]):
        raise CorruptBlockError(f"not a {magic.decode()} page, or a damaged one")
    return major, minor


assert NONCE_BYTES == UUID_BYTES
