"""Work for the copy threads: short pieces, in order of service. Called under the data plane's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from kvtier.runtime.seam import Event

PIECE_BYTES: Final = 8 << 20
"""Payload of one piece of work: long enough to hide its price, short enough that a demand load soon gets a thread."""

LONG_PIECE_BYTES: Final = 64 << 20
"""What kernels move where there is enough for two threads. Whatever runs between two pieces finds the caches full of
what was moved, and takes several times as long as it would."""
STEP_BYTES: Final = 32 << 20
"""What a kernel moves of a long piece before its thread looks whether somebody is in more of a hurry."""

HALVED_BYTES: Final = 8 << 20
"""Of a piece that is the last one and is still worth two threads: none is to work alone for long at the end."""


def pieces(rows: list[int], nbytes: int, *, are_long: bool = False) -> Iterator[list[int]]:
    """``rows`` in runs of about one piece of work each, ``nbytes`` a row; ``are_long``: kernels move them."""
    limit = min(max(PIECE_BYTES, len(rows) * nbytes // 2), LONG_PIECE_BYTES) if are_long else PIECE_BYTES
    size = max(1, limit // max(1, nbytes))
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


def steps(rows: list[int], nbytes: int) -> Iterator[list[int]]:
    """``rows`` of one piece, ``nbytes`` each, in runs that a kernel moves at once."""
    size = max(1, STEP_BYTES // max(1, nbytes))
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


def halved(rows: list[int], nbytes: int) -> tuple[list[int], list[int]] | None:
    """``rows``, ``nbytes`` each, for two pieces; None where one is enough."""
    if len(rows) < 2 or len(rows) * nbytes < HALVED_BYTES:
        return None
    middle = len(rows) // 2
    return rows[:middle], rows[middle:]


class Service(IntEnum):
    """Order of service. Gathers come before checksums: the engine waits for its pages and for nothing else."""

    LOAD = 0
    GATHER = 1
    FETCH = 2
    BACKGROUND = 3


@dataclass(slots=True)
class Piece:
    """``work`` runs on some thread without any lock and returns what ``finish`` gets, under the lock again.

    ``work`` may raise: ``finish`` then gets the exception. ``halves`` makes two pieces of one that has not begun.
    """

    service: Service
    work: Callable[[], Any]
    finish: Callable[[Any], None]
    halves: Callable[[], tuple[Piece, Piece]] | None = None


class WorkQueue:
    """Pieces by class of service, and the threads that wait for some."""

    def __init__(self) -> None:
        """Nothing to do, nobody waits."""
        self._queues: tuple[deque[Piece], ...] = tuple(deque() for _ in Service)
        self._idle: list[Event] = []

    def put(self, piece: Piece) -> None:
        """Queue ``piece`` and wake one thread that waits."""
        self._queues[piece.service].append(piece)
        self.wake_one()

    def put_back(self, piece: Piece) -> None:
        """As ``put``, before all others of its class: what is left of one that was begun."""
        self._queues[piece.service].appendleft(piece)
        self.wake_one()

    def take(self, wake: Event) -> Piece | None:
        """The next piece, or half of it where it is the last; None: then ``wake`` is set when there is one."""
        for queue in self._queues:
            if queue:
                piece = queue.popleft()
                return piece if queue or piece.halves is None else self._first_half(piece.halves, queue)
        if wake not in self._idle:
            self._idle.append(wake)
        return None

    def _first_half(self, halves: Callable[[], tuple[Piece, Piece]], queue: deque[Piece]) -> Piece:
        first, second = halves()
        queue.append(second)
        self.wake_one()
        return first

    def has_before(self, service: Service) -> bool:
        """Whether something waits that comes before ``service``; asked without the lock, too."""
        return any(self._queues[:service])

    def give_up(self, error: Exception) -> None:
        """Nobody works any more: every piece, and what follows from its end, ends with ``error``."""
        for queue in self._queues:
            while queue:
                queue.popleft().finish(error)

    def wake_one(self) -> None:
        """Let one waiting thread look again; called by I/O threads too, without the lock."""
        try:
            self._idle.pop().set()
        except IndexError:
            return  # nobody waits, or another thread woke the last one just now

    def __len__(self) -> int:
        """Pieces that wait."""
        return sum(map(len, self._queues))
