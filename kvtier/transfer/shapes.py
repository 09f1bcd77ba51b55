"""What raw records of one group look like, worked out once: where their slices are, and how much one call may move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np

from kvtier.codecs.headers import RawHeaders
from kvtier.core.plan import PAGE_BYTES
from kvtier.kernels import SliceTable
from kvtier.models.layout import KVLayout, SliceSpan

BATCH_BYTES: Final = 512 << 10
"""Small blocks go through a buffer of this size, many with one call: it stays in the cache of one core."""
SLAB_BATCH_BYTES: Final = 32 << 20
"""Records that one call copies between engine pages and the slab: every call costs a launch for each part."""
RUN_BYTES: Final = 2 << 20
"""A large block is verified and scattered in runs of slices: what was just read for its checksum is still cached."""


@dataclass(frozen=True, slots=True)
class SliceRun:
    """Slices of a raw record with nothing between them."""

    slices: range
    parts: range
    at: int
    """Where it begins in the record, in bytes."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class RecordShape:
    """Raw records of one group."""

    group: int
    nbytes: int
    """Payload of one block."""
    pages: int
    """4 KiB pages of a record, header included."""
    parts: range
    slices: tuple[tuple[int, int], ...]
    """Where in the record every slice begins, and its bytes."""
    slice_table: SliceTable
    """The same with the parts of every slice."""
    payload: tuple[SliceRun, ...]
    """The whole payload in as few runs as padding allows."""
    runs: tuple[SliceRun, ...]
    """The payload in runs of about ``RUN_BYTES``."""
    padding: tuple[tuple[int, int], ...]
    """From where to where in the record nothing belongs to a slice."""
    batch: int
    """Blocks that one call copies: more than one only where a block is one slice."""
    headers: RawHeaders

    @classmethod
    def of(cls, layout: KVLayout, group: int) -> RecordShape:
        """The shape of ``group``'s records."""
        spans = layout.slices[group]
        starts = accumulate((_padded(span.nbytes) for span in spans[:-1]), initial=PAGE_BYTES)
        placed = tuple(zip(spans, starts, strict=True))
        payload = tuple(_runs(placed, layout.block_bytes[group]))
        pages = layout.record_pages[group]
        return cls(
            group=group,
            nbytes=layout.block_bytes[group],
            pages=pages,
            parts=range(len(layout.groups[group].parts)),
            slices=tuple((at, span.nbytes) for span, at in placed),
            slice_table=np.array(
                [(at, span.nbytes, span.parts.start, span.parts.stop) for span, at in placed], np.int64
            ),
            payload=payload,
            runs=tuple(_runs(placed, RUN_BYTES)),
            padding=tuple(
                (at + span.nbytes, at + _padded(span.nbytes)) for span, at in placed if span.nbytes % PAGE_BYTES
            ),
            batch=max(1, BATCH_BYTES // (pages * PAGE_BYTES)) if len(spans) == 1 else 1,
            headers=RawHeaders(layout, group),
        )

    def batches(self, rows: list[int]) -> Iterator[list[int]]:
        """``rows`` in runs that one call copies."""
        return _cut(rows, self.batch)

    def slab_batches(self, rows: list[int]) -> Iterator[list[int]]:
        """``rows`` in runs that one call copies to the slab, or from there."""
        return _cut(rows, max(1, SLAB_BATCH_BYTES // (self.pages * PAGE_BYTES)))


def _cut(rows: list[int], size: int) -> Iterator[list[int]]:
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


def _runs(placed: tuple[tuple[SliceSpan, int], ...], limit_bytes: int) -> Iterator[SliceRun]:
    first = 0
    for number, (span, at) in enumerate(placed):
        start, nbytes = placed[first][1], at + span.nbytes - placed[first][1]
        last = number + 1 == len(placed)
        padded = not last and placed[number + 1][1] != at + span.nbytes
        if last or padded or nbytes + placed[number + 1][0].nbytes > limit_bytes:
            yield SliceRun(
                range(first, number + 1), range(placed[first][0].parts.start, span.parts.stop), start, nbytes
            )
            first = number + 1


def _padded(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
