"""Bare kernels: threads that copy the blocks of a request and take their checksums, and do nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch

from benchmarks.engine import EngineMemory
from kvtier import KVLayout
from kvtier.codecs.checksums import content_sum, content_sums
from kvtier.core.memory import Bytes2D, PageTable, Tokens
from kvtier.core.plan import PAGE_BYTES
from kvtier.kernels import Addresses, address_of
from kvtier.transfer.shapes import RecordShape

PIECE_BYTES: Final = 8 << 20
SUM_BYTES: Final = 16


class BareKernels:
    """Room for one request, which is copied there in pieces as large as kvtier's."""

    def __init__(self, engine: EngineMemory, request_pages: int, *, threads: int) -> None:
        self._memory = engine.memory
        tokens = request_pages * engine.layout.page_tokens
        self.rooms = [_Room.of(engine.layout, group, tokens) for group in range(len(engine.layout.groups))]
        self._threads = ThreadPoolExecutor(threads)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def gather(self, table: PageTable) -> None:
        """Blocks of ``table`` to memory of one's own, and their checksums."""
        pieces = [(room, piece) for room in self.rooms for piece in room.pieces()]
        list(self._threads.map(lambda own: self._gather(table, *own), pieces))

    def _gather(self, table: PageTable, room: _Room, piece: slice) -> None:
        shape, tokens = room.shape, room.tokens[piece]
        if self._memory.moves_records:
            records = room.addresses[piece]
            sums = self._memory.gather_records(table, shape.group, tokens, shape.slice_table, records)
        else:
            self._memory.gather(table, shape.group, tokens, shape.parts, room.content[piece])
            sums = _sums_of(room.content[piece], room.cuts)
        room.sums[piece] = sums


@dataclass(frozen=True, slots=True, eq=False)
class _Room:
    """Records of one group of a request: of a group that needs no whole prefix, that of its last block."""

    shape: RecordShape
    cuts: Sequence[int]
    """Where in the payload slices begin, and where the last one ends."""
    tokens: Tokens
    records: Bytes2D
    sums: Bytes2D

    @classmethod
    def of(cls, layout: KVLayout, group: int, tokens: int) -> _Room:
        """For a request of ``tokens`` tokens."""
        shape = RecordShape.of(layout, group)
        first = np.arange(0, tokens, layout.block_tokens)
        own = first if layout.groups[group].reuse.rule == "all" else first[-1:]
        cuts = [0, *np.cumsum([span.nbytes for span in layout.slices[group]]).tolist()]
        records = torch.zeros((len(own), shape.pages * PAGE_BYTES), dtype=torch.uint8).numpy()
        return cls(shape, cuts, own, records, np.zeros((len(own), SUM_BYTES * len(shape.slices)), np.uint8))

    @property
    def addresses(self) -> Addresses:
        """Of the records."""
        found: Addresses = address_of(self.records) + np.arange(len(self.records)) * self.records.shape[1]
        return found

    @property
    def content(self) -> Bytes2D:
        """The same memory, payload behind payload."""
        blocks, nbytes = len(self.records), self.shape.nbytes
        return self.records.reshape(-1)[: blocks * nbytes].reshape(blocks, nbytes)

    def pieces(self) -> Iterator[slice]:
        """Blocks that are moved at once."""
        step = max(1, PIECE_BYTES // self.records.shape[1])
        return (slice(at, min(at + step, len(self.tokens))) for at in range(0, len(self.tokens), step))


def _sums_of(content: Bytes2D, cuts: Sequence[int]) -> Bytes2D:
    if len(cuts) == 2:
        return content_sums(content)
    rows = [b"".join(content_sum(row[start:stop]) for start, stop in pairwise(cuts)) for row in content]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(content), -1)
