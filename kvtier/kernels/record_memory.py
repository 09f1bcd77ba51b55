"""Engine memory that moves whole records at once, with their checksums: what compiled kernels make possible."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.memory import Bytes2D, PageTable, Tokens

Addresses: TypeAlias = npt.NDArray[np.int64]
"""Where records begin, in memory of this process that stays where it is."""
SliceTable: TypeAlias = npt.NDArray[np.int64]
"""int64 ``[slices, 4]``: where in a record a slice begins, its bytes, its first part, the part behind its last."""


class RecordMemory(ABC):
    """A ``core.memory.KVMemory`` that may move records. Where it says None it did nothing: ``KVMemory`` will do it.

    A base class and no protocol: what wraps a memory, and passes on whatever it does not know, wants to see its copies.
    """

    @property
    @abstractmethod
    def moves_records(self) -> bool:
        """Whether it is of use to ask."""

    @abstractmethod
    def gather_records(
        self, table: PageTable, group: int, first_tokens: Tokens, slices: SliceTable, records: Addresses
    ) -> Bytes2D | None:
        """Copy the blocks that begin at ``first_tokens`` to ``records``, with zeros behind every slice.

        Returns their content sums, uint8 ``[blocks, slices * 16]``.
        """

    @abstractmethod
    def scatter_records(
        self, table: PageTable, group: int, first_tokens: Tokens, slices: SliceTable, records: Addresses,
        wanted: Bytes2D | None, start: int, stop: int,
    ) -> npt.NDArray[np.bool_] | None:  # fmt: skip
        """Write ``records`` to the pages of their blocks, but no slice that is not as ``wanted``.

        Only blocks that lie in [start, stop) as a whole. ``wanted`` are content sums as ``gather_records`` returns
        them; None asks for no comparison. Returns which records were as they should be.
        """
