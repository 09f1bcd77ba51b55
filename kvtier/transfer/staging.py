"""Staging: a fixed set of buffers between host memory and disk, shared by priorities with a reserve for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import PAGE_BYTES, Priority
from kvtier.runtime.seam import Arena, Buffer
from kvtier.transfer.images import Extents

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

    def room_for(self, priority: Priority) -> int:
        """How many buffers there are for ``priority``: its share may be in use."""
        lower = sum([self._in_use[other] for other in Priority if other >= priority])
        return max(0, min(len(self._free), self._limit[priority] - lower))

    def take(self, priority: Priority, most: int = 1) -> list[int]:
        """As many buffers as there are for ``priority``, up to ``most``; adjacent ones where possible."""
        count = min(most, self.room_for(priority))
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        self._in_use[priority] += count
        return taken

    def view(self, buffer: int) -> Buffer:
        """The bytes of ``buffer``."""
        return self._arena.view(buffer * self._buffer_pages, self._buffer_pages)

    def records(self, buffers: Sequence[int], pages: npt.NDArray[np.integer[Any]]) -> Extents:
        """Records at the beginning of ``buffers``, which are ``pages`` long."""
        return Extents(self._arena, np.array(buffers, np.intp) * self._buffer_pages, pages)

    def give_back(self, buffers: Sequence[int], priority: Priority) -> None:
        """``buffers``, taken with ``priority``, are free again."""
        self._in_use[priority] -= len(buffers)
        self._free += buffers

    @property
    def free(self) -> int:
        """Buffers that nobody has."""
        return len(self._free)
