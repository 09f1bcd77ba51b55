"""Engine memory as a cache takes it: known on every rank while somebody uses it, and the pages of one job in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvtier.channel import Channel
from kvtier.core.memory import GroupPages, KVMemory, Mask, PageTable, WindowedMemory
from kvtier.errors import ConfigError
from kvtier.models.layout import KVLayout
from kvtier.pages.spans import BlockPages, are_frozen, check_groups


class EnginePages(NamedTuple):
    """The pages of one job."""

    table: PageTable
    is_paged: bool = False
    """Their memory is known to be in pages, and ``table`` was compared with it."""
    lent: KVMemory | None = None
    """Memory that is used for this job, to be let go when it ends."""
    memory: KVMemory | None = None
    """Where they lie; None where only the ranks know."""

    def held(self, layout: KVLayout, group: int, blocks: range) -> Mask:
        """Which of ``blocks`` of ``group``, which needs no whole prefix, lie in these pages.

        Raises:
            ConfigError: the memory cannot tell.
        """
        numbers = np.arange(blocks.start, blocks.stop)
        if self.memory is None:
            return BlockPages.of(layout, group).held(self.table.groups[group], numbers)
        if not isinstance(self.memory, WindowedMemory):
            raise ConfigError(
                f"pages: a {type(self.memory).__name__} does not say which blocks it has of group"
                f" {layout.groups[group].name!r}, whose rule is {layout.groups[group].reuse.rule!r}: it needs the"
                " method held() of kvtier.core.memory.WindowedMemory, which PagedTensors has"
            )
        return self.memory.held(self.table, group, numbers)


@dataclass(slots=True, eq=False)
class _Registered:
    """Memory that ``users`` use: jobs, and callers that registered it. Held, so that its id stays its own."""

    memory: KVMemory
    memory_id: int
    users: int = 0
    registrations: int = 0


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
            known = self._known[id(memory)] = _Registered(memory, self._register(memory))
            self._numbered[known.memory_id] = memory
        known.users += 1
        return known.memory_id

    def register(self, memory: KVMemory) -> int:
        """As ``use``, until ``unregister`` was called as often."""
        memory_id = self.use(memory)
        self._known[id(memory)].registrations += 1
        return memory_id

    def unregister(self, memory: KVMemory) -> None:
        """Take one ``register`` back; jobs go on using it. Harmless for what was not registered."""
        known = self._known.get(id(memory))
        if known is not None and known.registrations:
            known.registrations -= 1
            self.let_go(memory)

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
            _unregister((channel, known.memory_id) for channel in self._channels)

    def _register(self, memory: KVMemory) -> int:
        numbers: list[int] = []
        try:
            for channel in self._channels:
                numbers.append(channel.register(memory))
            if len(set(numbers)) != 1:
                raise ConfigError("register: ranks disagree on the number of this memory; register in the same order")
        except BaseException:
            _unregister(zip(self._channels, numbers, strict=False))
            raise
        return numbers[0]

    def __len__(self) -> int:
        """Memories that are registered."""
        return len(self._known)


def _unregister(numbers: Iterable[tuple[Channel, int]]) -> None:
    """Make ranks forget a memory; one that does not hear of it keeps nothing from the others.

    Raises:
        Exception: the first of what channels raised.
    """
    errors: list[Exception] = []
    for channel, memory_id in numbers:
        try:
            channel.unregister(memory_id)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def own_table(table: PageTable, groups: int) -> PageTable:
    """``table``, or a copy of it, such that nobody else can change it.

    Raises:
        ConfigError: it is none, or one for another number of groups.
    """
    check_groups(table.groups, groups)
    if all(are_frozen(pages.ids) for pages in table.groups):
        return table
    own = [GroupPages(pages.first_token, pages.ids.copy()) for pages in table.groups]
    return PageTable(table.memory_id, tuple(own))
