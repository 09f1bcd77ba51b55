"""One simulated file: a durable image, and newer pages above it that a power cut may drop."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from kvtier.runtime.seam import Buffer

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a sync that begins now makes durable when it ends."""

    pages: dict[int, bytes]
    size: int


class SimFile:
    """Bytes of one file, in 4 KiB pages. A page survives whole or not at all."""

    def __init__(self) -> None:
        self.size = 0
        self.allocated_pages = 0
        self.locked_by: int | None = None
        self._durable = bytearray()
        self._durable_size = 0
        self._unsynced: dict[int, bytes] = {}

    def read(self, offset: int, buffer: Buffer) -> int:
        """Fill ``buffer``; returns the bytes read, fewer only at the end of the file."""
        stop = min(offset + buffer.nbytes, self.size)
        if stop <= offset:
            return 0
        out = buffer[: stop - offset]
        out[:] = 0
        durable = np.frombuffer(self._durable, np.uint8)[offset:stop]
        out[: durable.nbytes] = durable
        for page in range(offset // PAGE_BYTES, _pages(stop)):
            if page in self._unsynced:
                first, last = max(page * PAGE_BYTES, offset), min((page + 1) * PAGE_BYTES, stop)
                content = np.frombuffer(self._unsynced[page], np.uint8)
                out[first - offset : last - offset] = content[first - page * PAGE_BYTES : last - page * PAGE_BYTES]
        return stop - offset

    def write(self, offset: int, data: Buffer) -> None:
        """Write ``data``; not durable before a sync."""
        stop = offset + data.nbytes
        for page in range(offset // PAGE_BYTES, _pages(stop)):
            first, last = max(page * PAGE_BYTES, offset), min((page + 1) * PAGE_BYTES, stop)
            piece = data[first - offset : last - offset].tobytes()
            if len(piece) < PAGE_BYTES:
                whole = self._page(page)
                piece = whole[: first - page * PAGE_BYTES] + piece + whole[last - page * PAGE_BYTES :]
            self._unsynced[page] = piece
        self.extend(stop)

    def extend(self, nbytes: int) -> None:
        """Make it at least ``nbytes`` long, with room for them; the length is not durable before a sync."""
        self.size = max(self.size, nbytes)
        self.allocated_pages = max(self.allocated_pages, _pages(nbytes))

    def truncate(self, nbytes: int) -> None:
        """Set the length. What is cut off is gone at once, durably; a longer length is durable with the next sync."""
        if nbytes < self.size:
            self._cut(nbytes)
        self.size = nbytes

    def snapshot(self) -> Snapshot:
        """What a sync that begins now will have made durable."""
        return Snapshot(dict(self._unsynced), self.size)

    def settle(self, snapshot: Snapshot) -> None:
        """End a sync: the pages of ``snapshot`` are durable; younger ones stay as they are."""
        self._durable_size = min(max(self._durable_size, snapshot.size), self.size)
        for page, content in snapshot.pages.items():
            if page * PAGE_BYTES < self._durable_size:
                self._persist(page, content)
            if self._unsynced.get(page) is content:
                del self._unsynced[page]

    def lose_unsynced(self, rng: Random) -> None:
        """Cut the power: a random part of the un-synced pages survives, each whole."""
        self._durable_size = rng.choice((self._durable_size, self.size))
        for page, content in self._unsynced.items():
            if rng.random() < 0.5 and page * PAGE_BYTES < self._durable_size:
                self._persist(page, content)
        self._unsynced.clear()
        self._cut(self._durable_size)
        self.size = self._durable_size

    def _cut(self, nbytes: int) -> None:
        whole_pages = nbytes // PAGE_BYTES
        tail = self._page(whole_pages)[: nbytes % PAGE_BYTES]
        self._unsynced = {page: content for page, content in self._unsynced.items() if page < whole_pages}
        del self._durable[whole_pages * PAGE_BYTES :]
        if tail:
            self._persist(whole_pages, tail.ljust(PAGE_BYTES, b"\0"))
        self._durable_size = min(self._durable_size, nbytes)
        self.allocated_pages = min(self.allocated_pages, _pages(nbytes))

    def _page(self, page: int) -> bytes:
        if page in self._unsynced:
            return self._unsynced[page]
        return bytes(self._durable[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]).ljust(PAGE_BYTES, b"\0")

    def _persist(self, page: int, content: bytes) -> None:
        start = page * PAGE_BYTES
        if len(self._durable) < start:
            self._durable.extend(bytes(start - len(self._durable)))
        self._durable[start : start + PAGE_BYTES] = content


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES)
