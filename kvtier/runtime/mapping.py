"""Shared mappings at huge-page boundaries, which Python's ``mmap`` cannot ask for."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Final

import numpy as np

from kvtier.runtime.seam import Buffer

HUGE_PAGE_BYTES: Final = 2 << 20
MADV_COLLAPSE: Final = 25
"""Back a range with huge pages at once (Linux 6.1); ``mmap`` has no name for it."""

_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED: Final = ctypes.c_void_p(-1).value


def map_shared(fd: int, nbytes: int) -> Buffer:
    """The first ``nbytes`` of ``fd``, readable and writable, at a huge-page boundary.

    The mapping lives as long as the array, or what was cut from it.

    Raises:
        OSError: ``fd`` cannot be mapped so.
    """
    # Reserve more than it takes, so that a boundary lies in it; the rest of the reservation costs no memory.
    reserved = nbytes + HUGE_PAGE_BYTES
    start = _map(None, reserved, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        _map(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(start, reserved)
        raise
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    # At exit other threads may still use it, and the kernel takes it back anyway.
    weakref.finalize(memory, _libc.munmap, start, reserved).atexit = False
    return np.frombuffer(memoryview(memory), np.uint8)


def advise(data: Buffer, advice: int) -> bool:
    """madvise(2) on whole pages; False where the kernel refuses."""
    return bool(_libc.madvise(data.ctypes.data, data.nbytes, advice) == 0)


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    start = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if start == _FAILED or start is None:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot map {nbytes} bytes: {os.strerror(error)}")
    return int(start)
