"""Gather and scatter of whole pages on a GPU: any number of blocks and parts by one launch. Needs triton and torch.

A page is found by its address, as in ``fast_pages``, so the tensors of an engine need not be one allocation.
``TRITON_INTERPRET=1`` runs the same kernel on the CPU, for tests. Page tables are trusted: whoever calls has checked
them, and keeps pages, records and tables until the stream has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
import triton
import triton.language as tl

CHUNK_BYTES: Final = 8 << 10
"""What one program copies: some kilobytes, so that a launch of a few pages still fills a GPU."""
_WORD_BYTES: Final = 8


@triton.jit
def _move_pages(parts, ids, bases, records, num_parts, block_pages, gathers: tl.constexpr, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (page, chunk): words [chunk * i, chunk * (i + 1)) of one page of one part of one block."""
    number = tl.program_id(0)
    page = number % block_pages
    part = number // block_pages % num_parts
    block = number // block_pages // num_parts
    page_id = tl.load(ids + tl.load(bases + block) + page).to(tl.int64)
    first, page_bytes, offset = tl.load(parts + 3 * part), tl.load(parts + 3 * part + 1), tl.load(parts + 3 * part + 2)
    mine = (first + page_id * page_bytes).to(tl.pointer_type(tl.int64))
    theirs = (tl.load(records + block) + offset + page * page_bytes).to(tl.pointer_type(tl.int64))
    words = tl.program_id(1) * chunk + tl.arange(0, chunk)
    inside = words < page_bytes // 8
    if gathers:
        tl.store(theirs + words, tl.load(mine + words, mask=inside), mask=inside)
    else:
        tl.store(mine + words, tl.load(theirs + words, mask=inside), mask=inside)


@dataclass(frozen=True, slots=True, eq=False)
class DevicePages:
    """The pages of one group's parts, on one device; the tensors are kept alive."""

    tensors: tuple[torch.Tensor, ...]
    block_pages: int
    table: torch.Tensor
    """int64 ``[parts, 3]`` on the device: the address of page 0, the bytes of a page, where the part is in a block."""

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], block_pages: int) -> DevicePages:
        """``tensors`` are contiguous, ``[pages, ...]``, all on one device; a block takes ``block_pages`` pages of each.

        Raises:
            ValueError: a tensor is not contiguous, or its pages are not whole words of 8 bytes at a multiple of 8.
        """
        sizes = [tensor[0].nbytes for tensor in tensors]
        for number, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
            if not tensor.is_contiguous() or size % _WORD_BYTES or tensor.data_ptr() % _WORD_BYTES:
                raise ValueError(
                    f"tensor {number}: pages of {size} bytes at {tensor.data_ptr():#x}, want words of 8 bytes"
                )
        offsets = accumulate((size * block_pages for size in sizes[:-1]), initial=0)
        rows = [(tensor.data_ptr(), size, at) for tensor, size, at in zip(tensors, sizes, offsets, strict=True)]
        return cls(tuple(tensors), block_pages, torch.tensor(rows, dtype=torch.int64, device=tensors[0].device))

    def gather(self, ids: torch.Tensor, bases: torch.Tensor, records: torch.Tensor) -> None:
        """Copy blocks to ``records`` on the current stream: part after part, each in the order of its pages.

        ``ids`` is int32 ``[n]``, ``bases`` int64 ``[blocks]``: a block's pages are ``ids[base : base + block_pages]``.
        ``records`` is int64 ``[blocks]``: addresses, multiples of 8. All of them are on the device of the pages.
        """
        self._move(ids, bases, records, gathers=True)

    def scatter(self, ids: torch.Tensor, bases: torch.Tensor, records: torch.Tensor) -> None:
        """Undo ``gather``."""
        self._move(ids, bases, records, gathers=False)

    def _move(self, ids: torch.Tensor, bases: torch.Tensor, records: torch.Tensor, *, gathers: bool) -> None:
        if not len(bases):
            return
        parts, chunk = len(self.tensors), CHUNK_BYTES // _WORD_BYTES
        largest = max(tensor[0].nbytes for tensor in self.tensors)
        grid: Any = (len(bases) * parts * self.block_pages, triton.cdiv(largest, CHUNK_BYTES))
        _move_pages[grid](self.table, ids, bases, records, parts, self.block_pages, gathers=gathers, chunk=chunk)


def gather_plainly(
    tensors: Sequence[torch.Tensor], block_pages: int, ids: torch.Tensor, bases: torch.Tensor
) -> torch.Tensor:
    """What ``DevicePages.gather`` writes, in torch alone, on any device: uint8 ``[blocks, bytes of a block]``."""
    pages = ids[bases[:, None] + torch.arange(block_pages, device=bases.device)].reshape(-1)
    parts = [tensor.view(len(tensor), -1).view(torch.uint8).index_select(0, pages) for tensor in tensors]
    return torch.cat([part.view(len(bases), -1) for part in parts], dim=1)


def scatter_plainly(
    tensors: Sequence[torch.Tensor], block_pages: int, ids: torch.Tensor, bases: torch.Tensor, blocks: torch.Tensor
) -> None:
    """Undo ``gather_plainly``: ``blocks`` is what it returns."""
    pages = ids[bases[:, None] + torch.arange(block_pages, device=bases.device)].reshape(-1).long()
    at = 0
    for tensor in tensors:
        size = tensor[0].nbytes
        part = blocks[:, at : at + size * block_pages]
        tensor.view(len(tensor), -1).view(torch.uint8).index_copy_(0, pages, part.reshape(-1, size))
        at += size * block_pages
