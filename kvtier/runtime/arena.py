"""Arenas in anonymous memory files: one run of pages that another process can map, too."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from threading import Event, Thread

import numpy as np

from kvtier.errors import ConfigError
from kvtier.runtime.mapping import HUGE_PAGE_BYTES, MADV_COLLAPSE, advise, map_shared
from kvtier.runtime.memory import available_memory_bytes
from kvtier.runtime.seam import Buffer
from kvtier.runtime.threads import MORE_THREADS, start_all, wait_for_end

PAGE_BYTES = 4096
TOUCH_RUN_BYTES = 4 << 20
"""What one call touches, without the GIL; a multiple of a huge page."""
TOUCH_THREADS = 4
"""The kernel clears pages on whichever core touches them first; more threads find the memory bus full."""


class MemfdArena:
    """Shared memory on a memfd: page-aligned, huge pages where the kernel allows, pre-touched, left out of core dumps.

    First touch is ten times slower than a copy, so all of it happens here. Views, and what is made of them, keep the
    memory mapped: ``close`` gives up the arena's own hold, and the pages return when the last view is gone.
    """

    data: Buffer
    _fd: int

    def __init__(self, name: str, nbytes: int) -> None:
        """Make an arena of ``nbytes``, all zero.

        Raises:
            ConfigError: ``nbytes`` is not a positive multiple of 4096, or more than the memory that is free.
            OSError: the memory cannot be had.
            TierError: there are no threads to touch it with.
        """
        _check_size(name, nbytes)
        fd = os.memfd_create(f"kvtier-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            # A process that shrank it would kill the others with SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map(fd, nbytes)
            _in_runs(self.data, _clear)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> MemfdArena:
        """Map the arena behind ``fd``, which another process made and sent; the caller keeps its own ``fd``.

        Raises:
            OSError: ``fd`` is not a file that can be mapped for reading and writing.
            TierError: there are no threads to touch it with.
        """
        arena = cls.__new__(cls)
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            nbytes = os.fstat(own).st_size
            arena._map(own, nbytes)
            # The other side may be writing: reading maps a shared page just as well, and for writing, too.
            _in_runs(arena.data, lambda run: run[::PAGE_BYTES].max())
        except BaseException:
            os.close(own)
            raise
        return arena

    @property
    def fd(self) -> int:
        """The memfd, to be sent to another process and to be mapped there with ``attach``; -1 after ``close``."""
        return self._fd

    def view(self, page: int, pages: int) -> Buffer:
        """4 KiB pages ``[page, page + pages)``."""
        return self.data[page * PAGE_BYTES : (page + pages) * PAGE_BYTES]

    def close(self) -> None:
        """Drop the arena's own hold on the memory; idempotent."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self.data = np.empty(0, np.uint8)  # the mapping goes with the last view

    def _map(self, fd: int, nbytes: int) -> None:
        self.data = map_shared(fd, nbytes)
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTDUMP):
            advise(self.data, advice)  # a kernel without it works, only slower or with larger core dumps
        self._fd = fd


def _clear(run: Buffer) -> None:
    """Back ``run`` with huge pages if the kernel gives them now, then touch what is left.

    Direct I/O and copies go through huge pages faster, and shared memory gets none by itself unless the administrator
    says so. Collapsing before the first touch clears each huge page once.
    """
    run[::HUGE_PAGE_BYTES] = 0
    advise(run, MADV_COLLAPSE)
    run[::PAGE_BYTES] = 0


def _in_runs(data: Buffer, touch: Callable[[Buffer], object]) -> None:
    """Call ``touch`` on one run of ``data`` after the other, from several threads at once."""
    threads = max(1, min(TOUCH_THREADS, os.cpu_count() or 1, data.nbytes // TOUCH_RUN_BYTES))

    given_up = Event()

    def work(first: int) -> None:
        for start in range(first * TOUCH_RUN_BYTES, data.nbytes, threads * TOUCH_RUN_BYTES):
            if given_up.is_set():
                return
            touch(data[start : start + TOUCH_RUN_BYTES])

    others = [Thread(target=work, args=(first,), name="kvtier-touch", daemon=True) for first in range(1, threads)]
    start_all(others, given_up.set, MORE_THREADS)
    try:
        work(0)
        for thread in others:
            thread.join()
    except BaseException:  # Ctrl-C: what nobody will use need not be touched
        given_up.set()
        wait_for_end(others)
        raise


def _check_size(name: str, nbytes: int) -> None:
    if nbytes <= 0 or nbytes % PAGE_BYTES:
        raise ConfigError(f"arena {name!r}: {nbytes} bytes is not a positive multiple of {PAGE_BYTES}; round it up")
    free_bytes = available_memory_bytes()
    if nbytes > free_bytes:
        raise ConfigError(
            f"arena {name!r}: {nbytes} bytes are more than the {free_bytes} bytes of memory that are available; "
            "make the capacity smaller"
        )
