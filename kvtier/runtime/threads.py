"""Starting threads: all of them, or none and an error that says what to do about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from kvtier.errors import TierError

MORE_THREADS: Final = "raise the limit of threads (ulimit -u) or of address space (ulimit -v)"
FEWER_IO_THREADS: Final = f"lower disk.io_threads, or {MORE_THREADS}"
"""What helps an I/O engine that did not get all of its own."""

_ENDING_S: Final = 5.0
"""For threads that were told to end and have next to nothing under way: they only have to be given a core."""
_STARTING_S: Final = 0.001
"""How often to look whether a thread runs by now."""


def start_all(threads: Sequence[threading.Thread], stop: Callable[[], object], remedy: str) -> None:
    """Start ``threads``. Where one cannot be, or Ctrl-C comes, ``stop`` tells all to end; they are waited for.

    Raises:
        TierError: the operating system has no thread to give; it ends with ``remedy``.
    """
    try:
        for count, thread in enumerate(threads, 1):
            try:
                thread.start()
            except RuntimeError as error:
                raise TierError(f"thread {thread.name!r}, {count} of {len(threads)}: {error}; {remedy}") from error
    except BaseException:
        stop()
        wait_for_end(threads)
        raise


def wait_for_end(threads: Sequence[threading.Thread]) -> None:
    """Wait, within limits, for ``threads`` that were told to end. Any of them may never have been started.

    Where Ctrl-C struck while one was being started, nobody knows whether it is about to run; then it is waited for.
    """
    deadline_s = time.monotonic() + _ENDING_S
    for thread in threads:
        while _is_starting(thread) and time.monotonic() < deadline_s:
            time.sleep(_STARTING_S)
        with suppress(RuntimeError):  # it was never started
            thread.join(max(deadline_s - time.monotonic(), 0.0))


def _is_starting(thread: threading.Thread) -> bool:
    """Whether the operating system was asked for it and it does not run yet: so long it cannot be joined."""
    return not thread.is_alive() and thread in threading.enumerate()
