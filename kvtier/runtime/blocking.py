"""The blocking system calls that move bytes, whole: shared by ``SystemFiles`` and the I/O engines."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

from kvtier.runtime.seam import Buffer, IODone, IORequest, Op

DIRECT_ALIGNMENT_BYTES = 4096
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""0 where the operating system has no direct I/O; files are buffered there."""
IOV_MAX = os.sysconf("SC_IOV_MAX")

VectorCall: TypeAlias = Callable[[int, Sequence[Buffer], int], int]
preadv = cast(VectorCall, os.preadv)
pwritev = cast(VectorCall, os.pwritev)


def perform(request: IORequest) -> IODone:
    """Run one request to its end. Never raises: an error that is no ``OSError`` becomes the cause of one (EIO)."""
    started = time.monotonic()
    error: OSError | None = None
    try:
        _run(request)
    except OSError as failure:
        error = failure
    except BaseException as failure:
        error = OSError(errno.EIO, f"{request.op.name} at offset {request.offset} failed: {failure!r}")
        error.__cause__ = failure
    return IODone(request, error, time.monotonic() - started)


def cancelled(request: IORequest) -> IODone:
    """The end of a request that never began, because its engine was closed."""
    return IODone(request, OSError(errno.ECANCELED, "the I/O engine was closed before the request began"), 0.0)


def read_up_to(fd: int, offset: int, buffers: Sequence[Buffer]) -> int:
    """Fill ``buffers`` from ``offset``; returns the bytes read, fewer only at the end of the file."""
    wanted = sum([buffer.nbytes for buffer in buffers])
    read = 0
    while read < wanted:
        moved = _call(preadv, fd, _rest(buffers, read), offset + read)
        read += moved
        if moved == 0 or (read < wanted and offset + read >= os.fstat(fd).st_size):
            break  # asking again at an unaligned end of file is EINVAL under O_DIRECT
    return read


def write_all(fd: int, offset: int, buffers: Sequence[Buffer]) -> None:
    """Write ``buffers`` at ``offset``, all of them."""
    wanted = sum([buffer.nbytes for buffer in buffers])
    written = 0
    while written < wanted:
        moved = _call(pwritev, fd, _rest(buffers, written), offset + written)
        if moved == 0:
            raise OSError(errno.EIO, f"a write at offset {offset + written} moved no bytes")
        written += moved


def sync_file(fd: int) -> None:
    """Make the bytes and the length of ``fd`` durable.

    Raises:
        OSError: it failed, or (ENOENT) the file was removed: nothing in it will ever be found again.
    """
    os.fdatasync(fd)
    _check_linked(fd)


def _run(request: IORequest) -> None:
    if request.op is Op.SYNC:
        sync_file(request.fd)
    elif request.op is Op.WRITE:
        write_all(request.fd, request.offset, request.buffers)
        _check_linked(request.fd)
    else:
        read = read_up_to(request.fd, request.offset, request.buffers)
        if read < request.nbytes:
            raise OSError(
                errno.EIO, f"the file ends at {request.offset + read}, {request.nbytes - read} bytes before the read"
            )


def _check_linked(fd: int) -> None:
    if not os.fstat(fd).st_nlink:
        raise OSError(errno.ENOENT, "the file was removed, and what was written to it with it")


def _rest(buffers: Sequence[Buffer], moved: int) -> Sequence[Buffer]:
    """What is left of ``buffers`` after ``moved`` bytes, at most ``IOV_MAX`` of them."""
    if moved == 0 and len(buffers) <= IOV_MAX:
        return buffers
    rest: list[Buffer] = []
    for buffer in buffers:
        skipped = min(moved, buffer.nbytes)
        moved -= skipped
        if skipped < buffer.nbytes:
            rest.append(buffer[skipped:])
        if len(rest) == IOV_MAX:
            break
    return rest


def _call(call: VectorCall, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    """One system call; a file system that refuses O_DIRECT only now gets it again, buffered."""
    try:
        return call(fd, buffers, offset)
    except OSError as error:
        if error.errno != errno.EINVAL or not _is_aligned(buffers, offset):
            raise
        # Another thread may have turned O_DIRECT off meanwhile: try again whatever the flags say.
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT)
    return call(fd, buffers, offset)


def _is_aligned(buffers: Sequence[Buffer], offset: int) -> bool:
    places = [offset, *(buffer.nbytes for buffer in buffers), *(buffer.ctypes.data for buffer in buffers)]
    return all(place % DIRECT_ALIGNMENT_BYTES == 0 for place in places)
