"""The slab: records in extents of 4 KiB pages of device memory, as they lie in host memory.

A record that came from the engine has no header yet; it gets one, with its checksums, when it lands in host memory.
Everything here is torch, on a GPU and on the CPU alike: what runs without a GPU is what runs with one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

import numpy as np
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

    def empty(self, count: int, nbytes: int) -> torch.Tensor:
        """Room beside the slab: uint8 ``[count, nbytes]``."""
        return torch.empty((count, nbytes), dtype=torch.uint8, device=self.device)

    def payloads(self, first: Firsts, nbytes: int) -> torch.Tensor:
        """Copies of the ``nbytes`` behind the header page of each record: uint8 ``[n, nbytes]``, contiguous."""
        count = -(-nbytes // PAGE_BYTES)
        pages = self._table.index_select(0, self._payload_pages(first, count)).view(len(first), -1)
        return pages[:, :nbytes].contiguous()

    def write_payloads(self, first: Firsts, payloads: torch.Tensor) -> None:
        """Write what stands behind the header pages: uint8 ``[n, nbytes]``, and zeros to the end of the last page."""
        count = -(-payloads.shape[1] // PAGE_BYTES)
        whole = torch.zeros((len(first), count * PAGE_BYTES), dtype=torch.uint8, device=self.device)
        whole[:, : payloads.shape[1]] = payloads
        self._table.index_copy_(0, self._payload_pages(first, count), whole.view(-1, PAGE_BYTES))

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
        sums = [(self.record(page + 1, pages - 1).view(torch.int64) * weights).sum() for page in first]
        found: list[int] = torch.stack(sums).tolist()
        return found

    def _payload_pages(self, first: Firsts, count: int) -> torch.Tensor:
        pages = np.array(first, np.int64)[:, None] + np.arange(1, 1 + count)
        return torch.from_numpy(pages.reshape(-1)).to(self.device)


def _runs(source: Firsts, target: Firsts, pages: int) -> Iterator[tuple[int, int, int]]:
    """(first page of the source, of the target, pages) of records that are neighbours on both sides, as one."""
    begin = 0
    for at in range(1, len(source) + 1):
        is_next = at < len(source) and source[at] == source[at - 1] + pages and target[at] == target[at - 1] + pages
        if not is_next:
            yield source[begin], target[begin], (at - begin) * pages
            begin = at
