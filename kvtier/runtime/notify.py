"""A wake-up that select, epoll and event loops understand."""

from __future__ import annotations

import os


class Notifier:
    """An eventfd: readable from ``set`` until ``clear``."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor, to be polled for reading; -1 after ``close``."""
        return self._fd

    def set(self) -> None:
        """Make it readable; nothing happens after ``close``."""
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Make it unreadable; clear first, then drain."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return  # nobody set it since the last time

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
