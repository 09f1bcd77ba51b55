"""The bare disk: plain threads that read and write whole records with direct I/O, and do nothing else."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np

from kvtier.runtime import MemfdArena
from kvtier.runtime.seam import Buffer

FILL_BYTES: Final = 8 << 20


class RawDisk:
    """One file of ``areas`` areas, each of which is moved at once by ``threads`` threads.

    Every extent is written once when it is made, as those of segments are: first writes are slower than later ones.
    The memory is of the same kind and as large as that of the cache, and all of it is used in turn: a few buffers that
    stay in the last-level cache would make a faster disk than there is.
    """

    def __init__(self, path: Path, *, areas: int, area_bytes: int, memory_bytes: int, threads: int) -> None:
        self._path = path
        self._area_bytes = area_bytes
        self._arena = MemfdArena("raw-disk", memory_bytes // area_bytes * area_bytes)
        self._buffers = deque(self._arena.data.reshape(-1, area_bytes))
        random = np.random.default_rng(0)
        for buffer in self._buffers:
            buffer[:] = np.frombuffer(random.bytes(area_bytes), np.uint8)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, areas * area_bytes)
        for area in range(areas):
            self.write(area, FILL_BYTES)
        os.fsync(self._fd)

    def write(self, area: int, record_bytes: int) -> Buffer:
        """Write a buffer to ``area``, one call per record; returns it."""
        return self._each_record(os.pwritev, area, record_bytes)

    def read(self, area: int, record_bytes: int) -> Buffer:
        """Read ``area`` into a buffer, one call per record; returns it."""
        return self._each_record(os.preadv, area, record_bytes)

    def take_buffer(self) -> Buffer:
        """The next of the buffers in turn, as long as an area."""
        buffer = self._buffers[0]
        self._buffers.rotate()
        return buffer

    def submit_write(self, area: int, at: int, record: Buffer) -> Future[None]:
        """Let one of the threads write ``record`` to ``area``, ``at`` bytes from its start."""
        return self._pool.submit(self._move, os.pwritev, area * self._area_bytes + at, record)

    def submit_read(self, area: int, at: int, record: Buffer) -> Future[None]:
        """Let one of the threads fill ``record`` from ``area``, ``at`` bytes from its start."""
        return self._pool.submit(self._move, os.preadv, area * self._area_bytes + at, record)

    def close(self) -> None:
        """Remove the file."""
        self._pool.shutdown()
        os.close(self._fd)
        self._path.unlink()
        self._arena.close()

    def _each_record(self, call: Callable[..., int], area: int, record_bytes: int) -> Buffer:
        buffer = self.take_buffer()
        first = area * self._area_bytes
        numbers = count()

        def loop(_: int) -> None:
            while (at := next(numbers) * record_bytes) < buffer.nbytes:
                self._move(call, first + at, buffer[at : at + record_bytes])

        list(self._pool.map(loop, range(self._threads)))
        return buffer

    def _move(self, call: Callable[..., int], at: int, record: Buffer) -> None:
        moved = call(self._fd, [record], at)
        if moved != record.nbytes:
            raise OSError(f"{call.__name__} moved {moved} of {record.nbytes} bytes")
