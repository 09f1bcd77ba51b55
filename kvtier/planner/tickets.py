"""Tickets: what a caller waits for. One ticket is one job; it may wait for several hops, also for those of others."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.core.plan import direct_members


@direct_members
class TicketKind(IntEnum):
    """What was asked for."""

    LOAD = 0
    STORE = 1
    PREFETCH = 2
    FLUSH = 3


@direct_members
class Durability(IntEnum):
    """When a store is acknowledged: in host memory, written (survives kill -9), or synced (survives a power cut)."""

    MEMORY = 0
    PROCESS = 1
    DURABLE = 2


@direct_members
class Outcome(IntEnum):
    """How one block of a ticket ended. WAITING is not an end; what is PENDING comes later, and nobody waits for it."""

    WAITING = 0
    DONE = 1
    EXISTING = 2
    FAILED = 3
    PENDING = 4


@dataclass(slots=True, eq=False)
class Ticket:
    """Per block of the request, from ``first_block`` on: how it ended, and where it came from.

    One byte a block each: ``outcome`` (``Outcome``), ``reason`` (``Reason``), ``tiers`` (``Tier``; loads only).
    ``stage`` is the durability that is being waited for; ``waits`` counts what is missing for it.
    """

    kind: TicketKind
    first_block: int
    outcome: bytearray
    reason: bytearray
    tiers: bytearray
    durability: Durability = Durability.MEMORY
    stage: Durability = Durability.MEMORY
    waits: int = 0
    sources: int = 0
    """Hops that still read the engine's pages."""
    all_or_nothing: bool = False
    """Whether nothing of it is of use unless all of it is: what a hit's end needs was asked for that end alone."""
    climbs: bool = False
    """Whether what is in host memory is to be brought to the device before it ends; a prefetch only."""
    deadline_s: float | None = None
    """Of that."""
    source_free: bool = False
    finished: bool = False
    moved_bytes: int = 0
    plan_ids: list[int] = field(default_factory=list)
    held: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = field(default_factory=list)
    """(entries, their blocks) that are pinned until the ticket ends, because it follows them down to disk."""

    @classmethod
    def of(cls, kind: TicketKind, first_block: int, blocks: int) -> Ticket:
        """A ticket over ``blocks`` blocks, none of which has ended."""
        return cls(kind, first_block, bytearray(blocks), bytearray(blocks), bytearray(blocks))

    def cover(self, blocks: int, outcome: Outcome) -> None:
        """It turns out to be over ``blocks`` blocks, all of which ended so."""
        self.outcome = bytearray((outcome,)) * blocks
        self.reason, self.tiers = bytearray(blocks), bytearray(blocks)

    def fail(self, block: int, reason: int) -> None:
        """Block ``block`` of the sequence failed; the first reason stands.

        One before the first block is what a window reaches back to: nobody asked for it.
        """
        at = block - self.first_block
        if at >= 0 and self.outcome[at] != Outcome.FAILED:
            self.outcome[at] = Outcome.FAILED
            self.reason[at] = reason

    def fail_from(self, block: int, reason: int) -> None:
        """Every block from ``block`` on failed."""
        at = max(0, block - self.first_block)
        behind = len(self.outcome) - at
        self.outcome[at:] = bytes((Outcome.FAILED,)) * behind
        self.reason[at:] = bytes((reason,)) * behind

    def succeed(self) -> None:
        """What has not ended otherwise is done."""
        if self.all_or_nothing and (at := self.outcome.find(_FAILED)) >= 0:
            self.fail_from(self.first_block, self.reason[at])
        self.outcome = self.outcome.replace(_WAITING, _DONE)

    def count(self, outcome: Outcome) -> int:
        """Number of blocks that ended so."""
        return self.outcome.count(outcome)


_FAILED: Final = bytes((Outcome.FAILED,))
_WAITING: Final = bytes((Outcome.WAITING,))
_DONE: Final = bytes((Outcome.DONE,))
