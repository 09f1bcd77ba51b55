"""What is worth a line in the log and is noticed under a lock: written down at once, logged when no lock is held."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import suppress
from typing import Final

_MOST: Final = 1024
"""That wait to be logged; of more the oldest are dropped."""


class Remarks:
    """Safe to call from any thread. A log handler may take its time, or ask whoever is remarked upon how it is."""

    def __init__(self, log: logging.Logger) -> None:
        """Nothing is to be said; it will be in ``log``."""
        self._log = log
        self._waiting: deque[tuple[int, str, BaseException | None]] = deque(maxlen=_MOST)

    def add(self, level: int, message: str, error: BaseException | None = None) -> None:
        """Note ``message`` of a level of ``logging``, with the traceback of ``error``."""
        self._waiting.append((level, message, error))

    def write(self) -> None:
        """Log what was noted, in order; to be called with no lock held."""
        while self._waiting:
            try:
                level, message, error = self._waiting.popleft()
            except IndexError:
                return  # another thread was faster
            with suppress(Exception):  # a stranger's handler, on the way of somebody who has other things to do
                self._log.log(level, "%s", message, exc_info=error)
