"""The bare disk: plain threads that read and write whole records with direct I/O, and do nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np

from kvtier.runtime import MemfdArena
from kvtier.runtime.seam import Buffer

FILL_BYTES: Final = 8 << 20


class RawDisk:
    """One file of ``areas`` areas, each as large as ``buffer_bytes``, which is moved at once by ``threads`` threads.

    Every extent is written once when it is made, as those of segments are: first writes are slower than later ones.
    The memory is of the same kind as that of the cache.
    """

    def __init__(self, path: Path, *, areas: int, buffer_bytes: int, threads: int) -> None:
        self.nbytes = areas * buffer_bytes
        self._path = path
        self._arena = MemfdArena("raw-disk", buffer_bytes)
        self.buffer[:] = np.random.default_rng(0).integers(0, 256, buffer_bytes, np.uint8)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, self.nbytes)
        for area in range(areas):
            self.write(area, FILL_BYTES)
        os.fsync(self._fd)

    @property
    def buffer(self) -> Buffer:
        """What ``write`` writes and ``read`` fills."""
        return self._arena.data

    def write(self, area: int, record_bytes: int) -> None:
        """Write the buffer to ``area``, one call per record."""
        self._each_record(os.pwritev, area, record_bytes)

    def read(self, area: int, record_bytes: int) -> None:
        """Read ``area`` into the buffer, one call per record."""
        self._each_record(os.preadv, area, record_bytes)

    def close(self) -> None:
        """Remove the file."""
        self._pool.shutdown()
        os.close(self._fd)
        self._path.unlink()
        self._arena.close()

    def _each_record(self, call: Callable[..., int], area: int, record_bytes: int) -> None:
        buffer = self.buffer
        first = area * buffer.nbytes
        numbers = count()

        def loop(_: int) -> None:
            while (at := next(numbers) * record_bytes) < buffer.nbytes:
                record = buffer[at : at + record_bytes]
                moved = call(self._fd, [record], first + at)
                if moved != record.nbytes:
                    raise OSError(f"{call.__name__} moved {moved} of {record.nbytes} bytes")

        list(self._pool.map(loop, range(self._threads)))
