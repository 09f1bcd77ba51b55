"""Files of the real machine."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from contextlib import suppress

from kvtier.runtime.blocking import O_DIRECT, read_up_to, sync_file, write_all
from kvtier.runtime.seam import Buffer

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
_locked: set[int] = set()
"""Descriptors with a lock on them. The lock is one with that of a child after a fork, until both have closed it."""


class SystemFiles:
    """``seam.Files`` on system calls; any number of threads may share one: all that it knows is of the process."""

    def make_directory(self, path: str) -> None:
        """Create it and its parents where missing, mode 0700 for what is created; durable when it returns."""
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for directory in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(directory, DIRECTORY_MODE)
            if not os.path.isdir(directory):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)
            with suppress(PermissionError):  # a parent that is not ours may be writable and still not readable
                self.sync_directory(os.path.dirname(directory))

    def list_directory(self, path: str) -> list[str]:
        """Names in it, sorted."""
        return sorted(os.listdir(path))

    def open(self, path: str, *, create: bool = False, direct: bool = True, writable: bool = True) -> int:
        """Open a file, mode 0600, close-on-exec, not following links; O_DIRECT where asked for and possible.

        A file system that refuses O_DIRECT only at the first transfer is found out there; the fd is buffered then.
        What is no regular file is an error, ENOTSUP or what the system says of it.
        """
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_NONBLOCK  # a FIFO would wait for whoever writes to it
        if create:
            flags |= os.O_CREAT
        if direct and O_DIRECT:
            try:
                return _regular(_open(path, flags | O_DIRECT), path)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return _regular(_open(path, flags), path)

    def close(self, fd: int) -> None:
        """Close it; locks on it go."""
        _locked.discard(fd)
        os.close(fd)

    def size(self, fd: int) -> int:
        """Length in bytes."""
        return os.fstat(fd).st_size

    def links(self, fd: int) -> int:
        """Number of directory entries: 0 when the file was removed under us."""
        return os.fstat(fd).st_nlink

    def allocate(self, fd: int, nbytes: int) -> None:
        """Reserve ``nbytes`` from the start, where the file system can; ENOSPC where there is no room."""
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            # EINVAL: the C library tries it by single bytes then, which direct I/O does not take.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise

    def truncate(self, fd: int, nbytes: int) -> None:
        """Set the length."""
        os.ftruncate(fd, nbytes)

    def read_at(self, fd: int, offset: int, buffer: Buffer) -> int:
        """Fill ``buffer``; returns the bytes read, fewer only at the end of the file."""
        return read_up_to(fd, offset, (buffer,))

    def write_at(self, fd: int, offset: int, buffer: Buffer) -> None:
        """Write all of ``buffer``."""
        write_all(fd, offset, (buffer,))

    def sync(self, fd: int) -> None:
        """Make its bytes and its length durable (fdatasync). An error means data may be lost: never try again."""
        sync_file(fd)

    def sync_directory(self, path: str) -> None:
        """Make creations, renames and removals in it durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        """Atomically replace ``new``."""
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def lock(self, fd: int) -> bool:
        """Take the exclusive advisory lock without waiting; False when another holder (another open) has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _locked.add(fd)
        return True

    def free_bytes(self, path: str) -> int:
        """Room left on the file system of ``path`` for this user."""
        room = os.statvfs(path)
        return room.f_bavail * room.f_frsize


def _regular(fd: int, path: str) -> int:
    """``fd`` if it is a regular file; anything else is closed."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.ENOTSUP, "not a regular file", path)


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags, FILE_MODE)
    except OSError as error:
        if error.errno != errno.EMFILE or not _allow_more_files():
            raise
    return os.open(path, flags, FILE_MODE)


def _allow_more_files() -> bool:
    """A directory takes one descriptor per segment: use what the process may have before it is refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def _forked() -> None:
    """A child that lives on must not keep what its parent gave back, or lost with its life."""
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_forked)
