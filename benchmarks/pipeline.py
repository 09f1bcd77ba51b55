"""The bare pipeline: what no cache can do without, and nothing else. Its ratio is the most that a machine allows.

Two threads gather or scatter and take checksums, those of the bare disk write or read, each record as soon as it can.
There are no plans, no index, no headers and no commits, and nobody waits for another record than its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from benchmarks.engine import EngineMemory
from benchmarks.payload import Ids
from benchmarks.rawdisk import RawDisk
from kvtier.codecs.checksums import content_sum
from kvtier.runtime.seam import Buffer


class BarePipeline:
    """Stores and loads of whole requests between ``engine`` and areas of ``raw``."""

    def __init__(self, engine: EngineMemory, raw: RawDisk, *, threads: int) -> None:
        self._engine = engine
        self._raw = raw
        self._record_bytes = engine.layout.block_bytes[0]
        self._threads = ThreadPoolExecutor(threads)

    def store(self, area: int, sources: Ids) -> Buffer:
        """Gather, checksum and write the blocks that lie in the pages ``sources``; returns what was written."""
        buffer, table = self._raw.take_buffer(), self._engine.pages(sources).table

        def copy(number: int) -> Future[None]:
            record = self._record(buffer, number)
            self._engine.memory.gather(table, 0, self._first_token(number), self._parts, record[None])
            self._sums(record)
            return self._raw.submit_write(area, number * self._record_bytes, record)

        writes = list(self._threads.map(copy, range(buffer.nbytes // self._record_bytes)))
        for write in writes:
            write.result()
        return buffer

    def load(self, area: int, targets: Ids) -> None:
        """Read, checksum and scatter an area to the pages ``targets``."""
        buffer, pages = self._raw.take_buffer(), self._engine.pages(targets)
        tokens = len(targets) * self._engine.layout.page_tokens

        def copy(read: Future[None], number: int) -> None:
            read.result()
            record = self._record(buffer, number)
            self._sums(record)
            at = self._first_token(number)
            self._engine.memory.scatter(pages.table, 0, at, self._parts, record[None], 0, tokens)

        records = [self._record(buffer, number) for number in range(buffer.nbytes // self._record_bytes)]
        reads = [self._raw.submit_read(area, n * self._record_bytes, record) for n, record in enumerate(records)]
        for copied in [self._threads.submit(copy, read, number) for number, read in enumerate(reads)]:
            copied.result()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _record(self, buffer: Buffer, number: int) -> Buffer:
        return buffer[number * self._record_bytes : (number + 1) * self._record_bytes]

    def _first_token(self, number: int) -> Ids:
        return np.array([number * self._engine.layout.block_tokens])

    def _sums(self, record: Buffer) -> Sequence[bytes]:
        sums, at = [], 0
        for span in self._engine.layout.slices[0]:
            sums.append(content_sum(record[at : at + span.nbytes]))
            at += span.nbytes
        return sums

    @property
    def _parts(self) -> range:
        return range(len(self._engine.layout.groups[0].parts))
