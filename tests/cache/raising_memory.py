"""Engine memory that raises, for tests of what becomes of its blocks."""

from __future__ import annotations

from typing import Any

from kvtier import PagedTensors


class RaisingMemory:
    """``memory``, whose ``verb`` (gather or scatter) raises errors like ``error``: the first ``times``, or for good."""

    def __init__(self, memory: PagedTensors, verb: str, error: BaseException, times: float = float("inf")) -> None:
        self._memory, self._verb, self._error, self._left = memory, verb, error, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def gather(self, *arguments: Any) -> None:
        if self._is_due("gather"):
            raise type(self._error)(*self._error.args)  # each verb at a place of its own: that is what is told once
        self._memory.gather(*arguments)

    def scatter(self, *arguments: Any) -> None:
        if self._is_due("scatter"):
            raise type(self._error)(*self._error.args)
        self._memory.scatter(*arguments)

    def check(self, *arguments: Any) -> None:
        self._memory.check(*arguments)

    @property
    def placement(self) -> str:
        return self._memory.placement

    def _is_due(self, verb: str) -> bool:
        self._left -= verb == self._verb
        return verb == self._verb and self._left >= 0
