"""The one seam to the machine: files, I/O, time, threads. Nothing else in kvtier touches them.

Product code gets these as arguments. ``kvtier.runtime.system`` implements them on the real machine; ``kvtier.testing``
implements them again as a seeded simulation in one thread, so that the code that ships is the code that is tested.
Every worker is a loop over a ``step`` that never blocks; only an I/O engine's own threads block, in one call each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = npt.NDArray[np.uint8]
"""One-dimensional, C-contiguous bytes. For direct I/O its address and length are multiples of 4096."""


class Clock(Protocol):
    """Time for deadlines and ages."""

    def monotonic(self) -> float:
        """Seconds that only go forward; the same origin in every process of the machine."""

    def wall(self) -> float:
        """Seconds since 1970, for people and for ttl on disk."""


class Event(Protocol):
    """Level-triggered wake-up: set until cleared."""

    def set(self) -> None:
        """Wake whoever waits."""

    def clear(self) -> None:
        """Take the wake-up back; clear first, then drain."""

    def wait(self, timeout_s: float | None) -> bool:
        """Block until set or timed out; True when set. Never called from a step."""


class Lock(Protocol):
    """A mutual exclusion lock, as a context manager."""

    def acquire(self, blocking: bool = True) -> bool:
        """Acquire; False where another has it, and ``blocking`` is off."""

    def release(self) -> None:
        """Let the next one have it."""

    def __enter__(self) -> Any:
        """Acquire."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Release."""


class Worker(Protocol):
    """A running loop over ``step``."""

    def stop(self, timeout_s: float) -> bool:
        """Ask the loop to end and wait; True when it has ended. Idempotent."""


class Runtime(Protocol):
    """Where loops, events and locks come from."""

    @property
    def clock(self) -> Clock:
        """The time that its loops live in."""

    def event(self) -> Event:
        """A new event, not set."""

    def lock(self) -> Lock:
        """A new lock, not held."""

    def spawn(self, name: str, step: Callable[[], bool], wake: Event, idle_s: float | None = None) -> Worker:
        """Run ``step`` over and over. When it returns False (nothing to do), wait for ``wake`` (at most ``idle_s``).

        The loop clears ``wake`` before it calls ``step`` again after waiting, so a ``set`` is never lost. ``step``
        must not raise: an exception is a defect, ends the loop, and is re-raised by ``stop``. Anybody may set ``wake``,
        but only this loop waits for it and clears it.
        """


class Op(IntEnum):
    """What an I/O request does."""

    READ = 0
    WRITE = 1
    SYNC = 2


@dataclass(frozen=True, slots=True, eq=False)
class IORequest:
    """One operation on one file. The buffers stay untouched by the caller until the matching ``IODone`` is reaped."""

    op: Op
    fd: int
    offset: int
    buffers: Sequence[Buffer]
    tag: Any
    nbytes: int = field(init=False)
    """Bytes to move."""

    def __post_init__(self) -> None:
        """Of hundreds of buffers they are counted once."""
        object.__setattr__(self, "nbytes", sum([buffer.nbytes for buffer in self.buffers]))


@dataclass(frozen=True, slots=True, eq=False)
class IODone:
    """The end of a request: all bytes moved, or an error.

    Short reads and writes are continued inside the engine; a read that meets the end of the file is an ``OSError``
    (EIO). ``elapsed_s`` is the operation alone, without the time it waited in the engine.
    """

    request: IORequest
    error: OSError | None
    elapsed_s: float


class IOEngine(Protocol):
    """Runs requests, several at once; order is not promised."""

    ready: Event
    """Set whenever something can be reaped. The owner may replace it with its own event before the first submit."""

    def submit(self, request: IORequest) -> None:
        """Queue one request, from any thread; never blocks. Raises ClosedError after ``close``."""

    def reap(self) -> list[IODone]:
        """Everything that ended since the last call; never blocks."""

    def close(self, timeout_s: float) -> int:
        """Stop; returns how many requests had not ended (their buffers must stay alive).

        Requests that had not begun are cancelled: they end with ECANCELED and are still to be reaped. Idempotent.
        """


class Files(Protocol):
    """Synchronous file operations, for opening and for the housekeeping loop of a directory. Errors are ``OSError``.

    Paths are absolute strings. ``fd`` is a number that an ``IOEngine`` of the same machine accepts.
    """

    def make_directory(self, path: str) -> None:
        """Create it and its parents where missing, mode 0700 for what is created; durable when it returns."""

    def list_directory(self, path: str) -> list[str]:
        """Names in it, sorted."""

    def open(self, path: str, *, create: bool = False, direct: bool = True, writable: bool = True) -> int:
        """Open a file, mode 0600, close-on-exec, not following links; O_DIRECT where asked for and possible."""

    def close(self, fd: int) -> None:
        """Close it; locks on it go."""

    def size(self, fd: int) -> int:
        """Length in bytes."""

    def links(self, fd: int) -> int:
        """Number of directory entries: 0 when the file was removed under us."""

    def allocate(self, fd: int, nbytes: int) -> None:
        """Reserve ``nbytes`` from the start; ENOSPC where there is no room.

        A file system that cannot leaves it to whoever writes so many bytes, and has ENOSPC for that.
        """

    def truncate(self, fd: int, nbytes: int) -> None:
        """Set the length."""

    def read_at(self, fd: int, offset: int, buffer: Buffer) -> int:
        """Fill ``buffer``; returns the bytes read, fewer only at the end of the file."""

    def write_at(self, fd: int, offset: int, buffer: Buffer) -> None:
        """Write all of ``buffer``."""

    def sync(self, fd: int) -> None:
        """Make its bytes and its length durable (fdatasync). An error means data may be lost: never try again.

        One of a file that was removed is an error, too (ENOENT).
        """

    def sync_directory(self, path: str) -> None:
        """Make creations, renames and removals in it durable."""

    def rename(self, old: str, new: str) -> None:
        """Atomically replace ``new``."""

    def unlink(self, path: str) -> None:
        """Remove a file."""

    def lock(self, fd: int) -> bool:
        """Take the exclusive advisory lock without waiting; False when another holder (another open) has it."""

    def free_bytes(self, path: str) -> int:
        """Room left on the file system of ``path`` for this user."""


class Arena(Protocol):
    """One run of memory that buffers are cut from: page-aligned, preallocated, pre-touched."""

    data: Buffer
    """All of it."""

    def view(self, page: int, pages: int) -> Buffer:
        """4 KiB pages ``[page, page + pages)``."""

    def close(self) -> None:
        """Give the memory back; views become invalid."""


@dataclass(frozen=True, slots=True)
class Machine:
    """All of the seam together: what a data plane is built on.

    ``arena(name, nbytes)`` makes an arena; ``io_engine(name, threads)`` makes an engine of the configured kind.
    ``owner`` says for people which process this is.
    """

    runtime: Runtime
    files: Files
    arena: Callable[[str, int], Arena]
    io_engine: Callable[[str, int], IOEngine]
    owner: str = ""
