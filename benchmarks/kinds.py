"""Engine memory of any layout of one group, beside what torch and bare kernels do with the same pages."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Final

import numpy as np
import torch

from benchmarks.payload import Ids
from kvtier import KVGroup, KVLayout, PagedTensors, Part
from kvtier.codecs.checksums import content_sums
from kvtier.core.memory import KVPages, PageTable
from kvtier.kernels import address_of
from kvtier.transfer.shapes import RecordShape

PIECE_BYTES: Final = 8 << 20


def small_blocks() -> KVLayout:
    """64 KiB a block of 16 tokens: 8 layers of one head of 128, keys and values in bfloat16, pages of 4 KiB."""
    keys = [Part(layer, "k", "bfloat16", ("token", "head", "dim"), (16, 1, 128)) for layer in range(8)]
    parts = [part for key in keys for part in (key, replace(key, kind="v"))]
    return KVLayout(16, 16, (KVGroup("attention", tuple(parts)),))


def deepseek_v32() -> KVLayout:
    """As DeepSeek V3.2 in FP8: 61 layers of 656 bytes of latent and 132 of index key a token, blocks of 64 tokens."""
    parts = []
    for layer in range(61):
        parts.append(Part(layer, "latent", "uint8", ("token", "dim"), (64, 656)))
        parts.append(Part(layer, "index", "uint8", ("token", "dim"), (64, 132)))
    return KVLayout(64, 64, (KVGroup("attention", tuple(parts)),))


class MixedMemory:
    """Pages of random KV, and as many others as loads need: one tensor ``[parts, pages, page]`` for each size of page.

    Requests take random pages. What was loaded is compared, byte for byte, with the pages that it was stored from.
    Torch moves a call for each size; its elements are of ``dtype``.
    """

    def __init__(self, layout: KVLayout, source_pages: int, target_pages: int, dtype: torch.dtype) -> None:
        self.layout = layout
        self.dtype = dtype
        parts = layout.groups[0].parts
        self.tensors: list[torch.Tensor] = []
        given: dict[int, torch.Tensor] = {}
        order = sorted(range(len(parts)), key=lambda number: parts[number].page_bytes)
        for page_bytes, numbers in groupby(order, key=lambda number: parts[number].page_bytes):
            own = list(numbers)
            tensor = torch.zeros((len(own), source_pages + target_pages, page_bytes), dtype=torch.uint8)
            for number, pages in zip(own, tensor, strict=True):
                pages[:source_pages].view(torch.int64).random_(generator=torch.Generator().manual_seed(number))
                part = parts[number]
                given[number] = pages.view(getattr(torch, part.dtype)).view(-1, *part.shape)
            self.tensors.append(tensor)
        self.memory = PagedTensors(layout, [given[number] for number in range(len(parts))])
        self._random = np.random.default_rng(0)
        self._source_pages, self._target_pages = source_pages, target_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all parts."""
        return sum(tensor[:, 0].nbytes for tensor in self.tensors)

    def sources(self, count: int) -> Ids:
        """``count`` random pages with content."""
        return self._random.permutation(self._source_pages)[:count]

    def targets(self, count: int) -> Ids:
        """``count`` random pages to load into."""
        return self._source_pages + self._random.permutation(self._target_pages)[:count]

    def pages(self, ids: Ids) -> KVPages:
        """A request's pages."""
        return self.memory.pages(ids)

    # --- torch ------------------------------------------------------------------------------------------------------

    def buffers(self, pages: int) -> list[torch.Tensor]:
        """Room for ``pages`` pages of all parts."""
        return [
            torch.zeros(pages * tensor[:, 0].numel(), dtype=torch.uint8).view(self.dtype).view(-1, rows.shape[1])
            for tensor, rows in zip(self.tensors, self._rows, strict=True)
        ]

    def row_numbers(self, ids: Ids) -> list[torch.Tensor]:
        """Where in each size's table of pages ``ids`` lie, in the order of kvtier's records: block, part, page."""
        blocks = ids.reshape(-1, 1, self.layout.block_tokens // self.layout.page_tokens)
        return [
            torch.from_numpy((blocks + np.arange(len(tensor)).reshape(1, -1, 1) * tensor.shape[1]).reshape(-1))
            for tensor in self.tensors
        ]

    def select(self, numbers: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        """``torch.index_select`` to ``buffers``."""
        for rows, own, buffer in zip(self._rows, numbers, buffers, strict=True):
            torch.index_select(rows, 0, own, out=buffer)

    def copy(self, numbers: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        """``torch.index_copy_`` from ``buffers``."""
        for rows, own, buffer in zip(self._rows, numbers, buffers, strict=True):
            rows.index_copy_(0, own, buffer)

    @property
    def _rows(self) -> list[torch.Tensor]:
        return [tensor.view(-1, tensor.shape[2]).view(self.dtype) for tensor in self.tensors]

    # --- checks -----------------------------------------------------------------------------------------------------

    def clear(self, ids: Ids) -> None:
        """Fill pages with zeros."""
        for tensor in self.tensors:
            for part in tensor:
                part.view(torch.int64).index_fill_(0, torch.from_numpy(ids), 0)

    def same(self, ids: Ids, others: Ids) -> bool:
        """Whether the pages hold the same bytes, page by page."""
        one, other = torch.from_numpy(ids), torch.from_numpy(others)
        return all(torch.equal(part[one], part[other]) for tensor in self.tensors for part in tensor)


class BareKernels:
    """Two threads that copy and sum the blocks of a request, in pieces as large as kvtier's, and do nothing else."""

    def __init__(self, engine: MixedMemory, request_pages: int, *, threads: int) -> None:
        self._memory, self._layout = engine.memory, engine.layout
        self.shape = RecordShape.of(self._layout, 0)
        self._blocks = request_pages * self._layout.page_tokens // self._layout.block_tokens
        self.room = torch.zeros((self._blocks, self.shape.pages * 4096), dtype=torch.uint8).numpy()
        self._threads = ThreadPoolExecutor(threads)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def gather(self, table: PageTable) -> None:
        """Blocks of ``table`` to memory of one's own, and their checksums."""
        step = max(1, PIECE_BYTES // self.room.shape[1])
        pieces = [range(at, min(at + step, self._blocks)) for at in range(0, self._blocks, step)]
        list(self._threads.map(lambda piece: self._gather(table, piece), pieces))

    def _gather(self, table: PageTable, piece: range) -> None:
        tokens = np.arange(piece.start, piece.stop) * self._layout.block_tokens
        records = address_of(self.room) + np.arange(piece.start, piece.stop) * self.room.shape[1]
        if self._memory.moves_records:
            self._memory.gather_records(table, 0, tokens, self.shape.slice_table, records)
            return
        content = self.room.reshape(-1)[: self._blocks * self.shape.nbytes].reshape(self._blocks, -1)
        self._memory.gather(table, 0, tokens, self.shape.parts, content[piece.start : piece.stop])
        content_sums(content[piece.start : piece.stop])
