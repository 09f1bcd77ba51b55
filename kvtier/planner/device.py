"""The device tier as control sees it: what may leave it without being lost."""

from __future__ import annotations

from typing import Protocol

from kvtier.core.plan import Tier
from kvtier.index.cells import Cells
from kvtier.index.entries import EntryRows, Mask
from kvtier.planner.writes import WriteQueue


class _Control(Protocol):
    """What it asks of the planner's state."""

    index: Cells
    landing: WriteQueue

    def left_memory(self, entries: EntryRows, tier: Tier) -> None:
        """See ``ControlState``."""

    def made_room(self) -> None:
        """See ``ControlState``."""


class DeviceKeeper:
    """A block leaves the device once host memory or the disk has it, too; nothing there is the only copy then.

    One whose copy to host memory failed may go as well: it would never land.
    """

    def __init__(self, state: _Control) -> None:
        """Everything is kept in ``state``."""
        self._state = state

    def may_go(self, entry: int) -> bool:
        """See ``eviction.Keeper``."""
        state, index = self._state, self._state.index
        if state.landing.awaits_write(entry):
            return False
        below = index.host_ranks_at[entry], index.disk_ranks_at[entry]
        return index.every_rank in below or state.landing.was_refused(entry)

    def which_may_go(self, entries: EntryRows) -> Mask:
        """See ``eviction.Keeper``."""
        state, index = self._state, self._state.index
        below = index.on_host(entries) | index.on_disk(entries) | state.landing.which_were_refused(entries)
        free: Mask = below & ~state.landing.which_await_write(entries)
        return free

    def evicted(self, entries: EntryRows) -> None:
        """See ``eviction.Keeper``."""
        self._state.left_memory(entries, Tier.DEVICE)

    def made_room(self) -> None:
        """See ``eviction.Keeper``."""
        self._state.made_room()
