"""What a disk tier and its callers pass to each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Place:
    """Room for ``count`` records of ``pages`` 4 KiB pages each, one behind the other.

    ``page`` is where the first one begins, from the start of the file behind ``fd``; ``sequence`` is the first one's,
    and those behind it have the numbers behind it.
    """

    segment: int
    page: int
    pages: int
    generation: int
    sequence: int
    fd: int
    count: int = 1

    def first_pages(self) -> npt.NDArray[np.int64]:
        """Where each record begins, in pages."""
        return np.arange(self.page, self.page + self.count * self.pages, self.pages)

    def sequences(self) -> npt.NDArray[np.int64]:
        """The number of each record."""
        return np.arange(self.sequence, self.sequence + self.count)


@dataclass(frozen=True, slots=True)
class SyncTarget:
    """A file with records that are not known to be durable.

    ``fd`` is -1 when they never will be, because a sync of the file failed: a sync of -1 fails as it should.
    """

    segment: int
    generation: int
    fd: int
    writes: int


@dataclass(frozen=True, slots=True)
class DiskEvents:
    """What changed since it was last asked. ``sealed``: (segment, generation), oldest first, may be reclaimed."""

    sealed: tuple[tuple[int, int], ...]
    reclaimed: tuple[int, ...]
    """Segments whose reclaim ended: they are clean, or gone."""
    usable: bool
    reason: str
    """Why it is not usable, or not as good as it should be; empty when all is well."""
    clean_segments: int
    reclaims_wanted: int
    """How many segments control has to give back in all, those included that it has been asked for already."""
