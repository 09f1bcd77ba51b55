"""The engine memories that a cache knows: registered on every rank while somebody uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.channel import Channel
from kvtier.core.memory import KVMemory
from kvtier.errors import ConfigError


@dataclass(slots=True, eq=False)
class _Registered:
    """Memory that ``users`` jobs, or the caller, use. Held, so that its id stays its own."""

    memory: KVMemory
    memory_id: int
    users: int = 0


class Memories:
    """Engine memories by identity. Its owner serialises the calls."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        """``channels`` lead to the ranks that have to know."""
        self._channels = channels
        self._known: dict[int, _Registered] = {}
        self._numbered: dict[int, KVMemory] = {}

    def use(self, memory: KVMemory) -> int:
        """The number of ``memory`` for page tables, until ``let_go`` was called as often.

        Raises:
            ConfigError: it does not fit the layout, or ranks disagree on its number.
        """
        known = self._known.get(id(memory))
        if known is None:
            numbers = {channel.register(memory) for channel in self._channels}
            if len(numbers) != 1:
                raise ConfigError("register: ranks disagree on the number of this memory; register in the same order")
            known = self._known[id(memory)] = _Registered(memory, numbers.pop())
            self._numbered[known.memory_id] = memory
        known.users += 1
        return known.memory_id

    def find(self, memory_id: int) -> KVMemory | None:
        """The memory that has this number, if it is known here."""
        return self._numbered.get(memory_id)

    def let_go(self, memory: KVMemory) -> None:
        """One user less; the last one makes every rank forget it. Harmless for what is not known."""
        known = self._known.get(id(memory))
        if known is None:
            return
        known.users -= 1
        if not known.users:
            del self._known[id(memory)], self._numbered[known.memory_id]
            for channel in self._channels:
                channel.unregister(known.memory_id)

    def __len__(self) -> int:
        """Memories that are registered."""
        return len(self._known)
