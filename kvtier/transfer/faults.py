"""What goes wrong in a piece of work and is no fault of a disk: counted, and told in the log with its traceback."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Final

from kvtier.core.plan import Reason
from kvtier.errors import ClosedError, CorruptBlockError
from kvtier.metrics import Metrics
from kvtier.runtime.remarks import Remarks

log = logging.getLogger(__name__)

_MOST_PLACES: Final = 64
"""So many places are told of: a mistake that comes with every block, or from everywhere, must not flood the log."""


class EngineMemoryError(Exception):
    """``gather`` or ``scatter`` of the engine's memory raised; ``__cause__`` is what."""


def reason_of(error: Exception) -> Reason:
    """How rows end whose piece of work came to nothing because of ``error``."""
    return Reason.CLOSED if isinstance(error, ClosedError) else Reason.IO_ERROR


class Faults:
    """Safe to call from any thread."""

    def __init__(self, metrics: Metrics) -> None:
        """Nothing has gone wrong. ``metrics`` counts ``failed_pieces`` by the type of the error."""
        self.remarks = Remarks(log)
        self._metrics = metrics
        self._told: dict[tuple[type[BaseException], str, int], object] = {}

    def of_engine(self, error: EngineMemoryError) -> Reason:
        """Count and tell what engine memory raised; returns how its blocks end."""
        self.tell(str(error), error.__cause__ or error)
        return Reason.ENGINE_ERROR

    def tell(self, what: str, error: BaseException) -> None:
        """``what`` raised ``error``: count it, and remark it once for each type and place that it comes from.

        Damage is only counted: it has a reason and counters of its own.
        """
        self._metrics.add("failed_pieces", error=type(error).__name__)
        if isinstance(error, CorruptBlockError) or len(self._told) >= _MOST_PLACES:
            return
        mine, key = object(), (type(error), *_place(error.__traceback__))
        if self._told.setdefault(key, mine) is mine:  # one step: of several threads one tells
            self.remarks.add(logging.ERROR, f"{what}; the next ones from there are only counted", error)


def _place(trace: TracebackType | None) -> tuple[str, int]:
    """File and line that raised."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else ("", 0)
