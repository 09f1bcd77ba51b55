"""Gather and scatter of whole pages on a GPU: any number of blocks and parts by one launch. Needs triton and torch.

A page is found by its address, as in ``fast_pages``, so the tensors of an engine need not be one allocation.
``TRITON_INTERPRET=1`` runs the same kernel on the CPU, for tests. Page tables are trusted: whoever calls has checked
them, and keeps pages, records and tables until the stream has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

import torch
import triton
import triton.language as tl

from kvtier.kernels.device_pages import WORD_BYTES, DevicePages, TorchPages

CHUNK_BYTES: Final = 8 << 10
"""What one program copies: some kilobytes, so that a launch of a few pages still fills a GPU."""


@triton.jit
def _move_pages(parts, ids, blocks, block_bytes, num_parts, block_pages, gathers: tl.constexpr, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (page, chunk): words [chunk * i, chunk * (i + 1)) of one page of one part of one block."""
    number = tl.program_id(0)
    page = number % block_pages
    part = number // block_pages % num_parts
    block = number // block_pages // num_parts
    page_id = tl.load(ids + block * block_pages + page)
    first, page_bytes, offset = tl.load(parts + 3 * part), tl.load(parts + 3 * part + 1), tl.load(parts + 3 * part + 2)
    mine = (first + page_id * page_bytes).to(tl.pointer_type(tl.int64))
    theirs = (blocks + block.to(tl.int64) * block_bytes + offset + page * page_bytes).to(tl.pointer_type(tl.int64))
    words = tl.program_id(1) * chunk + tl.arange(0, chunk)
    inside = words < page_bytes // 8
    if gathers:
        tl.store(theirs + words, tl.load(mine + words, mask=inside), mask=inside)
    else:
        tl.store(mine + words, tl.load(theirs + words, mask=inside), mask=inside)


class TritonPages(DevicePages):
    """The pages of one group's parts, moved by one launch; in torch where they are no whole words of 8 bytes."""

    def __init__(self, pages: Sequence[torch.Tensor], block_pages: int) -> None:
        """See ``DevicePages``."""
        self._plainly = TorchPages(pages, block_pages)
        self._block_pages = block_pages
        self._sizes = [each.shape[1] for each in pages]
        self._begins = list(accumulate((size * block_pages for size in self._sizes), initial=0))
        rows = [
            (each.data_ptr(), size, at) for each, size, at in zip(pages, self._sizes, self._begins[:-1], strict=True)
        ]
        self._parts = torch.tensor(rows, dtype=torch.int64, device=pages[0].device)
        """int64 ``[parts, 3]``: the address of page 0, the bytes of a page, where the part is in a block."""
        self._are_words = not any(size % WORD_BYTES or address % WORD_BYTES for address, size, _ in rows)

    def gather(self, ids: torch.Tensor, parts: range, out: torch.Tensor) -> None:
        """See ``DevicePages``."""
        if self._takes(out):
            self._move(ids, parts, out, gathers=True)
        else:
            self._plainly.gather(ids, parts, out)

    def scatter(self, ids: torch.Tensor, parts: range, source: torch.Tensor) -> None:
        """See ``DevicePages``."""
        if self._takes(source):
            self._move(ids, parts, source, gathers=False)
        else:
            self._plainly.scatter(ids, parts, source)

    def _takes(self, blocks: torch.Tensor) -> bool:
        """Whether ``blocks``, too, lie as words of 8 bytes on the device of the pages."""
        return (
            self._are_words
            and blocks.device == self._parts.device
            and not (blocks.data_ptr() % WORD_BYTES or blocks.stride(0) % WORD_BYTES or blocks.stride(1) != 1)
        )

    def _move(self, ids: torch.Tensor, parts: range, blocks: torch.Tensor, *, gathers: bool) -> None:
        if not len(blocks) or not parts:
            return
        largest = max(self._sizes[parts.start : parts.stop])
        grid: Any = (len(blocks) * len(parts) * self._block_pages, triton.cdiv(largest, CHUNK_BYTES))
        _move_pages[grid](
            self._parts[parts.start : parts.stop], ids, blocks.data_ptr() - self._begins[parts.start], blocks.stride(0),
            len(parts), self._block_pages, gathers=gathers, chunk=CHUNK_BYTES // WORD_BYTES,
        )  # fmt: skip
