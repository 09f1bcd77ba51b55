"""What an eviction policy is asked and told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Entries: TypeAlias = npt.NDArray[np.int32]
"""Entry numbers, small ints that are reused after ``remove``; each at most once in an array."""


class EvictionPolicy(Protocol):
    """The order in which entries of one tier go.

    The caller passes a request's entries in prefix order (parent before child) and evicts leaves only: it takes the
    first of ``candidates`` that are unpinned and have no child in the tier, so a policy need not know links or pins.
    """

    def __init__(self, capacity: int) -> None:
        """``capacity`` is one more than the largest entry number."""

    def insert(self, entries: Entries, before: int | None = None) -> None:
        """Entries that came into the tier, in prefix order; none of them is in it already.

        They are to go ``before`` that one, which is in the tier, or are the newest.
        """

    def touch(self, entries: Entries) -> None:
        """Entries that were used by one request, in prefix order; all of them are in the tier."""

    def remove(self, entry: int) -> None:
        """An entry that left the tier."""

    def remove_many(self, entries: Entries) -> None:
        """As ``remove`` of each of ``entries``, in any order; those evicted together come in that of ``candidates``."""

    def candidates(self) -> Iterator[int]:
        """Entries from the least to the most worth keeping. Those given so far may be removed while it runs."""

    def __len__(self) -> int:
        """Number of entries in the tier."""
