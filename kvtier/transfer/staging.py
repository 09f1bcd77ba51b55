"""Staging: a fixed set of buffers between host memory and disk, shared by priorities with a reserve for each."""

from __future__ import annotations

from typing import Final

from kvtier.core.plan import PAGE_BYTES, Priority
from kvtier.runtime.seam import Arena, Buffer

_RESERVED: Final = {Priority.DEMAND: 0.5, Priority.PREFETCH: 0.25, Priority.SPILL: 0.25}


class Staging:
    """Buffers of one size cut from an arena.

    Each class of service has its share; what the lower classes do not use is there for the higher ones, never the
    other way round, so that spills cannot starve loads.
    """

    def __init__(self, arena: Arena, buffer_pages: int, *, shares: bool = True) -> None:
        """As many buffers of ``buffer_pages`` as the arena holds; without ``shares`` any class may have all."""
        self._arena = arena
        self._buffer_pages = buffer_pages
        count = arena.data.nbytes // (buffer_pages * PAGE_BYTES)
        self.count = count
        self._free = list(range(count))
        self._in_use = dict.fromkeys(Priority, 0)
        self._limit = dict.fromkeys(Priority, count)
        if shares:
            self._limit[Priority.PREFETCH] = count - max(1, int(count * _RESERVED[Priority.DEMAND]))
            self._limit[Priority.SPILL] = max(1, int(count * _RESERVED[Priority.SPILL]))

    @staticmethod
    def arena_bytes(staging_bytes: int, buffer_pages: int) -> int:
        """Size of the arena for ``staging_bytes``: at least four buffers, so that every class has one."""
        return max(4, staging_bytes // (buffer_pages * PAGE_BYTES)) * buffer_pages * PAGE_BYTES

    def has_room(self, priority: Priority) -> bool:
        """Whether there is a buffer for ``priority``: its share is not in use."""
        lower = sum(self._in_use[other] for other in Priority if other >= priority)
        return bool(self._free) and lower < self._limit[priority]

    def take(self, priority: Priority) -> int | None:
        """A buffer for ``priority``, or None while its share is in use."""
        if not self.has_room(priority):
            return None
        self._in_use[priority] += 1
        return self._free.pop()

    def view(self, buffer: int) -> Buffer:
        """The bytes of ``buffer``."""
        return self._arena.view(buffer * self._buffer_pages, self._buffer_pages)

    def give_back(self, buffer: int, priority: Priority) -> None:
        """``buffer``, taken with ``priority``, is free again."""
        self._in_use[priority] -= 1
        self._free.append(buffer)

    @property
    def free(self) -> int:
        """Buffers that nobody has."""
        return len(self._free)
