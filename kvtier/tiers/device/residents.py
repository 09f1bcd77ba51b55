"""Who lies where in the slab: what a header says of a record elsewhere is kept beside it in host memory here.

Reading a header out of a GPU would cost as much as a small block. So every landing is noted, and every read compares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtier.core.columns import column


@dataclass(frozen=True, slots=True)
class Resident:
    """A whole record. ``sealed``: its header page and checksums are there, too; it came from host memory."""

    key: bytes
    group: int
    pages: int
    sealed: bool
    digest: int | None
    """Of its payload, where the slab keeps digests."""
    serial: int


class Residents:
    """Landings of one slab. Its owner serialises the calls."""

    def __init__(self, pages: int) -> None:
        """Nothing lies in any of ``pages``."""
        self._at: dict[int, Resident] = {}  # by first page; those that were overwritten since are told by their serial
        self._serials = column(pages, np.int64)
        self._next = 1

    def note(self, page: int, pages: int, key: bytes, group: int, *, sealed: bool, digest: int | None = None) -> None:
        """A record lies in [page, page + pages) from now on, and nothing else that was there."""
        self._at[page] = Resident(key, group, pages, sealed, digest, self._next)
        self._serials[page : page + pages] = self._next
        self._next += 1

    def find(self, page: int, pages: int, key: bytes, group: int) -> Resident | None:
        """The record of ``key`` and ``group`` in [page, page + pages), if it lies there, whole."""
        found = self._at.get(page)
        if found is None or (found.key, found.group, found.pages) != (key, group, pages):
            return None
        whole = int(np.count_nonzero(self._serials[page : page + pages] == found.serial)) == pages
        return found if whole else None
