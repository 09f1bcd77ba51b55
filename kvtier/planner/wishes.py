"""Wishes: what callers want moved, each with the ticket that they wait for. Made without a lock, planned in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.keys import Keys
from kvtier.core.memory import Mask, PageTable
from kvtier.core.plan import Lineage, Priority
from kvtier.planner.leases import Lease
from kvtier.planner.tickets import Durability, Ticket, TicketKind


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Which of the blocks from ``first`` on lie in the engine's pages."""

    first: int
    mask: Mask

    def those_of(self, blocks: npt.NDArray[np.int64]) -> Mask:
        """Which of ``blocks``."""
        at = blocks - self.first
        inside = (at >= 0) & (at < len(self.mask))
        held: Mask = inside & self.mask[np.where(inside, at, 0)] if len(self.mask) else inside
        return held


_ALL_HELD: Final[Mapping[int, Held]] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class StoreWish:
    """Keep the full blocks [ticket.first_block, stop) of ``keys``, which may grow meanwhile."""

    ticket: Ticket
    keys: Keys
    stop: int
    pages: PageTable
    start: int
    """The first token that was asked for: it may lie inside the block before."""
    lineage: Lineage
    is_paged: bool
    """Whether id i of ``pages`` is the page of tokens [first_token + i * page_tokens, ...), and that was checked."""
    checkpoints: Sequence[int] | None
    """Tokens behind which hits are likely to end; None: behind the last block."""
    held: Mapping[int, Held]
    """Of groups that need no whole prefix, which blocks lie in ``pages``; all of those that are not named."""

    @classmethod
    def of(
        cls,
        keys: Keys,
        stop: int,
        pages: PageTable,
        *,
        start: int,
        lineage: Lineage,
        durability: Durability,
        is_paged: bool = False,
        checkpoints: Sequence[int] | None = None,
        held: Mapping[int, Held] = _ALL_HELD,
    ) -> StoreWish:
        """From token ``start`` on, the blocks before ``stop``."""
        first = -(-start // keys.block_tokens)
        ticket = Ticket.of(TicketKind.STORE, first, max(0, stop - first))
        ticket.durability = durability
        return cls(ticket, keys, stop, pages, start, lineage, is_paged, checkpoints, held)


@dataclass(slots=True, eq=False)
class LoadWish:
    """Bring tokens [start, stop) of ``lease`` into engine pages. ``deadline_s`` is on the planner's clock."""

    ticket: Ticket
    lease: Lease
    pages: PageTable
    start: int
    stop: int
    priority: Priority
    deadline_s: float | None
    is_paged: bool
    """As in a ``StoreWish``."""

    @classmethod
    def of(
        cls,
        lease: Lease,
        pages: PageTable,
        *,
        start: int,
        stop: int,
        priority: Priority,
        deadline_s: float | None,
        is_paged: bool = False,
    ) -> LoadWish:
        """The blocks that hold any of these tokens.

        Raises:
            ValueError: the lease does not hold them all.
        """
        size = lease.keys.block_tokens
        first, end = start // size, -(-stop // size)
        if start < stop and not lease.first_block <= first < end <= lease.first_block + lease.blocks:
            raise ValueError(f"[{start}, {stop}) of a lease of {lease.blocks} blocks from block {lease.first_block} on")
        ticket = Ticket.of(TicketKind.LOAD, first, end - first if start < stop else 0)
        return cls(ticket, lease, pages, start, stop, priority, deadline_s, is_paged)


@dataclass(slots=True, eq=False)
class PrefetchWish:
    """Bring those of the first ``stop`` blocks of ``keys`` that are only on disk into host memory.

    ``to_device``: all of them to the device then.
    ``waits``: the ticket ends when they are there, or when ``deadline_s`` is over; else as soon as they are under way.
    """

    ticket: Ticket
    keys: Keys
    stop: int
    deadline_s: float | None
    waits: bool
    to_device: bool = False

    @classmethod
    def of(cls, keys: Keys, deadline_s: float | None, *, waits: bool = True, to_device: bool = False) -> PrefetchWish:
        """All blocks that are full now; how many of them are stored is found out when it is planned."""
        return cls(Ticket.of(TicketKind.PREFETCH, 0, 0), keys, len(keys), deadline_s, waits, to_device)


@dataclass(slots=True, eq=False)
class FlushWish:
    """Everything that is stored when it is planned reaches the durability of the ticket."""

    ticket: Ticket

    @classmethod
    def of(cls, durability: Durability) -> FlushWish:
        """To that level."""
        ticket = Ticket.of(TicketKind.FLUSH, 0, 1)
        ticket.durability = durability
        return cls(ticket)


Wish: TypeAlias = StoreWish | LoadWish | PrefetchWish | FlushWish
