"""Channels: how plans reach a data plane, and how its completions and reports come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvtier.core.memory import KVMemory
from kvtier.core.plan import Message, Plan
from kvtier.metrics import Sample
from kvtier.transfer import DataPlane


class Channel(Protocol):
    """The way to one rank. Safe to call from several threads; nothing blocks but ``close``.

    One whose rank may die tells of it with a ``Farewell``, after all that the rank still had to say; what is sent to a
    rank that is gone is passed over.
    """

    def send(self, plans: Sequence[Plan]) -> None:
        """Begin plans of this rank."""

    def call_back(self) -> bool:
        """Let a thread of the rank's own ask for wishes soon; False where it has none that could."""

    def cancel(self, plan_id: int) -> None:
        """Nobody waits for ``plan_id`` any more."""

    def poll(self) -> list[Message]:
        """What came back since the last call."""

    def register(self, memory: KVMemory) -> int:
        """Number of engine memory on this rank; the same on every rank when registered in the same order."""

    def unregister(self, memory_id: int) -> None:
        """Forget engine memory."""

    def samples(self) -> list[Sample]:
        """Counters and levels of the rank."""

    def close(self, timeout_s: float) -> bool:
        """Stop the rank, within ``timeout_s`` (0: look, and do not wait); True when nothing was left behind."""


class LocalChannel:
    """A data plane in this process: calls, nothing is encoded. ``on_news`` runs on its threads, without a lock."""

    def __init__(self, make_plane: Callable[[Callable[[], None]], DataPlane], on_news: Callable[[], None]) -> None:
        self._plane = make_plane(on_news)

    def send(self, plans: Sequence[Plan]) -> None:
        """Begin plans."""
        self._plane.submit(plans)

    def call_back(self) -> bool:
        """A copy thread calls ``on_news`` soon; False once the data plane closes, whose threads may be gone."""
        return self._plane.call_back()

    def cancel(self, plan_id: int) -> None:
        """Nobody waits for ``plan_id`` any more."""
        self._plane.cancel(plan_id)

    def poll(self) -> list[Message]:
        """What came back since the last call."""
        return self._plane.poll()

    def register(self, memory: KVMemory) -> int:
        """Number of engine memory."""
        return self._plane.register(memory)

    def unregister(self, memory_id: int) -> None:
        """Forget engine memory."""
        self._plane.unregister(memory_id)

    def samples(self) -> list[Sample]:
        """Counters and levels of the data plane."""
        return self._plane.samples()

    def close(self, timeout_s: float) -> bool:
        """Stop the data plane."""
        return self._plane.close(timeout_s)
