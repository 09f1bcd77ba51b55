"""The slab: records in extents of 4 KiB pages of device memory, as they lie in host memory.

A record that came from the engine has no header yet; it gets one, with its checksums, when it lands in host memory.
Everything here is torch, on a GPU and on the CPU alike: what runs without a GPU is what runs with one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

import torch

from kvtier.core.plan import PAGE_BYTES
from kvtier.kernels.streams import in_order
from kvtier.runtime.seam import Buffer
from kvtier.tiers.device.residents import Residents

Firsts = Sequence[int]
"""First pages of extents."""

_WORD_BYTES: Final = 8
_MULTIPLIER: Final = -7046029254386353131
"""An odd number of 64 bits without a pattern (2^64 divided by the golden ratio): neighbours weigh differently."""


class Slab:
    """One run of device memory. Bytes are moved by any thread, inside ``in_order``; ``residents`` has an owner."""

    def __init__(self, memory: torch.Tensor, *, verifies: bool = False) -> None:
        """``memory`` is uint8, contiguous, a multiple of 4096 bytes. ``verifies``: a digest is kept of every record."""
        self._table = memory.view(-1, PAGE_BYTES)
        self.page_count = len(self._table)
        self.device = memory.device
        self.verifies = verifies
        self.residents = Residents(self.page_count)

    def close(self) -> None:
        """Give the memory back, as soon as nobody has a view of it."""
        self._table = self._table.new_empty(0, PAGE_BYTES)

    def ordered(self) -> AbstractContextManager[None]:
        """See ``in_order``."""
        return in_order(self.device)

    def record(self, page: int, pages: int) -> torch.Tensor:
        """Pages [page, page + pages) as bytes: uint8 ``[pages * 4096]``, a view."""
        return self._table[page : page + pages].view(-1)

    def runs(self, first: Firsts, pages: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Records of ``pages`` each, those side by side together: which, and a view, uint8 ``[n, pages * 4096]``."""
        for rows in _adjacent(pages, first):
            begin = first[rows.start]
            yield rows, self.record(begin, pages * (rows.stop - rows.start)).view(-1, pages * PAGE_BYTES)

    def copy_to_host(self, first: Firsts, pages: int, host: Buffer, to: Firsts) -> None:
        """Copy records of ``pages`` each to pages ``to`` of the arena ``host``, header pages and all."""
        table = torch.from_numpy(host).view(-1, PAGE_BYTES)
        for here, there, length in _runs(first, to, pages):
            table[there : there + length].copy_(self._table[here : here + length], non_blocking=True)

    def copy_from_host(self, host: Buffer, at: Firsts, pages: int, first: Firsts) -> None:
        """Copy records of ``pages`` each from pages ``at`` of the arena ``host``, header pages and all."""
        table = torch.from_numpy(host).view(-1, PAGE_BYTES)
        for there, here, length in _runs(at, first, pages):
            self._table[here : here + length].copy_(table[there : there + length], non_blocking=True)

    def digests(self, first: Firsts, pages: int) -> list[int]:
        """Of each record of ``pages``, a number of what stands behind its header page: worked out on the device."""
        weights = torch.arange(1, 1 + (pages - 1) * (PAGE_BYTES // _WORD_BYTES), device=self.device) * _MULTIPLIER | 1
        sums = [
            (records[:, PAGE_BYTES:].view(torch.int64) * weights).sum(dim=1) for _, records in self.runs(first, pages)
        ]
        found: list[int] = torch.cat(sums).tolist()
        return found


def _runs(source: Firsts, target: Firsts, pages: int) -> Iterator[tuple[int, int, int]]:
    """(first page of the source, of the target, pages) of records that are neighbours on both sides, as one."""
    for rows in _adjacent(pages, source, target):
        yield source[rows.start], target[rows.start], (rows.stop - rows.start) * pages


def _adjacent(pages: int, *places: Firsts) -> Iterator[slice]:
    """Records of ``pages`` that lie one after another in all of ``places``."""
    begin, count = 0, len(places[0])
    for at in range(1, count + 1):
        if at == count or any(first[at] != first[at - 1] + pages for first in places):
            yield slice(begin, at)
            begin = at
