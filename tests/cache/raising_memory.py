"""Engine memory that raises, for tests of what becomes of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvtier import PagedTensors
from kvtier.core.memory import PageTable


class RaisingMemory:
    """``memory``, whose ``verb`` (gather or scatter) raises errors like ``error``: the first ``times``, or for good.

    With ``pages`` only where one of them is touched.
    """

    def __init__(
        self, memory: PagedTensors, verb: str, error: BaseException, times: float = float("inf"),
        pages: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._memory, self._verb, self._error, self._left, self._pages = memory, verb, error, times, pages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def gather(self, *arguments: Any) -> None:
        if self._is_due("gather", *arguments):
            raise type(self._error)(*self._error.args)  # each verb at a place of its own: that is what is told once
        self._memory.gather(*arguments)

    def scatter(self, *arguments: Any) -> None:
        if self._is_due("scatter", *arguments):
            raise type(self._error)(*self._error.args)
        self._memory.scatter(*arguments)

    def check(self, *arguments: Any) -> None:
        self._memory.check(*arguments)

    @property
    def placement(self) -> str:
        return self._memory.placement

    def _is_due(self, verb: str, table: PageTable, group: int, first_tokens: np.ndarray, *_: Any) -> bool:
        if self._pages is not None:
            touched = table.groups[group].ids[first_tokens // self._memory.layout.page_tokens]
            return verb == self._verb and bool(np.isin(touched, self._pages).any())
        self._left -= verb == self._verb
        return verb == self._verb and self._left >= 0
