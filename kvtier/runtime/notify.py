"""A wake-up that select, epoll and event loops understand."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress


class Notifier:
    """An eventfd: readable from ``set`` until ``clear``. Whoever has the last reference may drop it without closing."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # what is closed may be a stranger's file the next moment
        self._close = weakref.finalize(self, os.close, self._fd)  # runs once, when nobody is left who could set it
        self._close.atexit = False  # threads may set it until the very end

    def fileno(self) -> int:
        """The descriptor, to be polled for reading; -1 after ``close``."""
        return self._fd

    def set(self) -> None:
        """Make it readable; nothing happens after ``close``."""
        with self._lock:
            if self._fd >= 0:
                with suppress(OSError):  # a stranger closed it: that is no reason to end the thread that has news
                    os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Make it unreadable; clear first, then drain."""
        with self._lock, suppress(OSError):  # nobody set it since the last time, or a stranger closed it
            if self._fd >= 0:
                os.eventfd_read(self._fd)

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        with self._lock:
            self._fd = -1
            with suppress(OSError):  # a stranger closed it
                self._close()
