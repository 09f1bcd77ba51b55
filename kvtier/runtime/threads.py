"""Starting threads: all of them, or none and an error that says what to do about it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from kvtier.errors import TierError

MORE_THREADS: Final = "raise the limit of threads (ulimit -u) or of address space (ulimit -v)"
FEWER_IO_THREADS: Final = f"lower disk.io_threads, or {MORE_THREADS}"
"""What helps an I/O engine that did not get all of its own."""


def start_all(threads: Sequence[threading.Thread], stop: Callable[[], object], remedy: str) -> None:
    """Start ``threads``. Where one cannot be, ``stop`` tells those before it to end, and they are waited for.

    Raises:
        TierError: the operating system has no thread to give; it ends with ``remedy``.
    """
    for count, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError as error:
            stop()
            for started in threads[:count]:
                started.join()
            raise TierError(f"thread {thread.name!r}, {count + 1} of {len(threads)}: {error}; {remedy}") from error
