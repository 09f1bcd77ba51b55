"""A simulated disk: ``seam.Files`` over files in memory, and the I/O engines that reach the same files.

Whatever was not synced is lost in a ``crash``, except for a random part of it; every operation takes virtual time.
A harness that injects faults extends ``service_s`` (slow, hung), ``begin`` and ``finish`` (failed, torn, misdirected).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from posixpath import dirname
from random import Random
from typing import Protocol

from kvtier.runtime.seam import Buffer, Clock, Event, IOEngine, IORequest, Op
from kvtier.testing.simfile import PAGE_BYTES, SimFile, Snapshot
from kvtier.testing.simio import SimIOEngine
from kvtier.testing.simnames import SimNames


class World(Protocol):
    """What a simulated device needs of its simulation."""

    @property
    def clock(self) -> Clock:
        """Virtual time."""

    def event(self) -> Event:
        """A new event, not set."""

    def after(self, delay_s: float, name: str, action: Callable[[], None]) -> None:
        """Call ``action`` after ``delay_s`` of virtual time."""

    def run_until(self, predicate: Callable[[], bool], *, timeout_s: float | None = None) -> bool:
        """Run the simulation."""

    def rng(self, name: str) -> Random:
        """A seeded generator of its own."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """What a file descriptor stands for."""

    file: SimFile
    direct: bool
    writable: bool


class SimDisk:
    """One disk with one file system. Direct I/O insists on alignment to 4096, as the strictest real disk does.

    Args:
        world: the simulation that gives time and seeds.
        capacity_bytes: room for files; more is ENOSPC.
        latency_s: time of one operation besides its bytes; requests overlap in it.
        bytes_per_s: shared by all requests.
        jitter: each latency is multiplied by a random factor in [1, 1 + jitter].
    """

    def __init__(
        self,
        world: World,
        *,
        capacity_bytes: int = 1 << 30,
        latency_s: float = 80e-6,
        bytes_per_s: float = 2e9,
        jitter: float = 1.0,
        name: str = "disk",
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.jitter = jitter
        self.rng = world.rng(name)
        self._world = world
        self._busy_until_s = 0.0
        self._names = SimNames()
        self._opened: dict[int, OpenFile] = {}
        self._next_fd = 1000
        self._engines: list[SimIOEngine] = []

    # -- the disk under the engines

    def io_engine(self, name: str, threads: int) -> IOEngine:
        """A new engine on this disk."""
        engine = SimIOEngine(self, self._world, name, threads)
        self._engines.append(engine)
        return engine

    def service_s(self, request: IORequest) -> float:
        """Virtual time until a request that starts now takes effect; infinite = never."""
        now_s = self._world.clock.monotonic()
        nbytes = 0 if request.op is Op.SYNC else request.nbytes
        self._busy_until_s = max(now_s, self._busy_until_s) + nbytes / self.bytes_per_s
        return self._busy_until_s - now_s + self.latency_s * (1.0 + self.jitter * self.rng.random())

    def begin(self, request: IORequest) -> Snapshot | None:
        """Start a request: a sync covers what was written until now."""
        entry = self._opened.get(request.fd)
        return entry.file.snapshot() if request.op is Op.SYNC and entry else None

    def finish(self, request: IORequest, snapshot: Snapshot | None) -> None:
        """Let a request take effect; OSError when it fails."""
        entry = self._entry(request.fd)
        if request.op is Op.SYNC:
            self._sync(entry.file, snapshot or entry.file.snapshot())
        elif request.op is Op.WRITE:
            self._write(entry, request.offset, request.buffers)
            self._check_linked(entry.file)
        elif self._read(entry, request.offset, request.buffers) < request.nbytes:
            raise OSError(errno.EIO, f"the file ends at {entry.file.size}, before the read does")

    # -- what a test does to it

    def kill(self) -> None:
        """Its process dies: descriptors and locks go, requests in flight take effect in part, or not."""
        for engine in self._engines:
            for request in engine.running:
                self._land_in_part(request)
            engine.void()
        self._engines.clear()
        for fd in list(self._opened):
            self.close(fd)
        self._busy_until_s = 0.0

    def crash(self) -> None:
        """The power goes: as ``kill``, and of what was not synced only a random part survives."""
        self.kill()
        self._names.lose_unsynced(self.rng)
        for file in dict.fromkeys(self._names.live.values()):
            file.lose_unsynced(self.rng)

    def remove_tree(self, path: str) -> None:
        """``rm -r`` from outside; open descriptors go on working."""
        self._names.remove_tree(path)

    # -- seam.Files

    def make_directory(self, path: str) -> None:
        """Create it and its parents where missing; durable when it returns."""
        while path not in self._names.directories:
            if path in self._names.live:
                raise _os_error(errno.ENOTDIR, path)
            self._names.directories.add(path)
            path = dirname(path)

    def list_directory(self, path: str) -> list[str]:
        """Names in it, sorted."""
        self._check_directory(path)
        entries = [*self._names.live, *self._names.directories - {"/"}]
        return sorted(entry.rpartition("/")[2] for entry in entries if dirname(entry) == path)

    def open(self, path: str, *, create: bool = False, direct: bool = True, writable: bool = True) -> int:
        """Open a file; numbers are never used twice."""
        self._check_directory(dirname(path))
        if path in self._names.directories:
            raise _os_error(errno.EISDIR, path)
        file = self._names.live.get(path)
        if file is None:
            if not create:
                raise _os_error(errno.ENOENT, path)
            file = SimFile()
            self._names.change(added=((path, file),))
        self._next_fd += 1
        self._opened[self._next_fd] = OpenFile(file, direct, writable)
        return self._next_fd

    def close(self, fd: int) -> None:
        """Close it; its lock goes."""
        file = self._entry(fd).file
        if file.locked_by == fd:
            file.locked_by = None
        del self._opened[fd]

    def size(self, fd: int) -> int:
        """Length in bytes."""
        return self._entry(fd).file.size

    def links(self, fd: int) -> int:
        """Number of directory entries."""
        return self._links(self._entry(fd).file)

    def allocate(self, fd: int, nbytes: int) -> None:
        """Reserve ``nbytes`` from the start; ENOSPC where there is no room."""
        self._reserve(self._writable(fd).file, nbytes)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Set the length."""
        self._writable(fd).file.truncate(nbytes)

    def read_at(self, fd: int, offset: int, buffer: Buffer) -> int:
        """Fill ``buffer``; returns the bytes read, fewer only at the end of the file."""
        return self._read(self._entry(fd), offset, (buffer,))

    def write_at(self, fd: int, offset: int, buffer: Buffer) -> None:
        """Write all of ``buffer``."""
        self._write(self._entry(fd), offset, (buffer,))

    def sync(self, fd: int) -> None:
        """Make its bytes and its length durable."""
        file = self._entry(fd).file
        self._sync(file, file.snapshot())

    def sync_directory(self, path: str) -> None:
        """Make creations, renames and removals in it durable."""
        self._check_directory(path)
        self._names.sync(path)

    def rename(self, old: str, new: str) -> None:
        """Atomically replace ``new``."""
        self._check_directory(dirname(new))
        if old not in self._names.live:
            raise _os_error(errno.ENOENT, old)
        if old != new:
            self._names.change(removed=(old,), added=((new, self._names.live[old]),))

    def unlink(self, path: str) -> None:
        """Remove a file."""
        if path not in self._names.live:
            raise _os_error(errno.ENOENT, path)
        self._names.change(removed=(path,))

    def lock(self, fd: int) -> bool:
        """Take the exclusive lock; False when another descriptor has it."""
        file = self._entry(fd).file
        if file.locked_by not in (None, fd):
            return False
        file.locked_by = fd
        return True

    def free_bytes(self, path: str) -> int:
        """Room left."""
        self._check_directory(path)
        return self.capacity_bytes - self._used_bytes()

    # -- below

    def _read(self, entry: OpenFile, offset: int, buffers: Sequence[Buffer]) -> int:
        _check_alignment(entry, offset, buffers)
        read = 0
        for buffer in buffers:
            read += entry.file.read(offset + read, buffer)
        return read

    def _links(self, file: SimFile) -> int:
        return sum(other is file for other in self._names.live.values())

    def _check_linked(self, file: SimFile) -> None:
        if not self._links(file):
            raise OSError(errno.ENOENT, "the file was removed")

    def _sync(self, file: SimFile, snapshot: Snapshot) -> None:
        self._check_linked(file)
        file.settle(snapshot)

    def _write(self, entry: OpenFile, offset: int, buffers: Sequence[Buffer]) -> None:
        _check_alignment(entry, offset, buffers)
        if not entry.writable:
            raise _os_error(errno.EBADF, "a descriptor opened for reading")
        self._reserve(entry.file, offset + sum(buffer.nbytes for buffer in buffers))
        for buffer in buffers:
            entry.file.write(offset, buffer)
            offset += buffer.nbytes

    def _land_in_part(self, request: IORequest) -> None:
        entry = self._opened.get(request.fd)
        if request.op is not Op.WRITE or entry is None:
            return
        offset = request.offset
        try:
            self._reserve(entry.file, offset + request.nbytes)
        except OSError:
            return
        for buffer in request.buffers:
            for start in range(0, buffer.nbytes, PAGE_BYTES):
                if self.rng.random() < 0.5:
                    entry.file.write(offset + start, buffer[start : start + PAGE_BYTES])
            offset += buffer.nbytes

    def _reserve(self, file: SimFile, nbytes: int) -> None:
        more_bytes = -(-nbytes // PAGE_BYTES) * PAGE_BYTES - file.allocated_pages * PAGE_BYTES
        if more_bytes > 0 and more_bytes > self.capacity_bytes - self._used_bytes():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.extend(nbytes)

    def _used_bytes(self) -> int:
        files = {*self._names.live.values(), *(entry.file for entry in self._opened.values())}
        return sum(file.allocated_pages for file in files) * PAGE_BYTES

    def _entry(self, fd: int) -> OpenFile:
        if fd not in self._opened:
            raise _os_error(errno.EBADF, f"fd {fd}")
        return self._opened[fd]

    def _writable(self, fd: int) -> OpenFile:
        entry = self._entry(fd)
        if not entry.writable:
            raise _os_error(errno.EBADF, f"fd {fd}")
        return entry

    def _check_directory(self, path: str) -> None:
        if path not in self._names.directories:
            raise _os_error(errno.ENOENT, path)


def _check_alignment(entry: OpenFile, offset: int, buffers: Sequence[Buffer]) -> None:
    if not entry.direct:
        return
    full = [buffer for buffer in buffers if buffer.nbytes]
    places = [offset, *(buffer.nbytes for buffer in full), *(buffer.ctypes.data for buffer in full)]
    if any(place % PAGE_BYTES for place in places):
        raise OSError(errno.EINVAL, "direct I/O needs offset, lengths and addresses in multiples of 4096")


def _os_error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)
