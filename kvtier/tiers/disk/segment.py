"""One segment as memory knows it: how far it is filled, what is under way, what goes into its footer."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from kvtier.codecs.headers import Pages, identities
from kvtier.core.plan import Table
from kvtier.tiers.disk.format import ENTRY, HEADER_SLOTS, footer_pages
from kvtier.tiers.disk.places import Place, SyncTarget


class Stage(Enum):
    """Where in its life a segment is."""

    CLEAN = auto()  # its header is durable and nothing was placed in it
    OPEN = auto()  # takes records
    FULL = auto()  # takes no more; waits for its last writes, then for its footer
    SEALED = auto()  # written to the end, until it is reclaimed
    POISONED = auto()  # a write or a sync failed: read with care, written never again in this generation
    UNREADABLE = auto()  # the device failed when it was opened: left alone, for the next life to look at
    RECLAIMING = auto()  # control has let go of it


@dataclass(slots=True, eq=False)
class Segment:
    """One file. ``cursor`` is the next free page; ``slot`` is where the header in force lies, 0 or 1."""

    number: int
    fd: int
    pages: int
    generation: int
    slot: int
    stage: Stage
    cursor: int = HEADER_SLOTS
    placed: int = 0
    """Records that were given a place, this generation."""
    in_flight: int = 0
    """Places whose write has not ended."""
    writes: int = 0
    """Writes that ended well, this generation."""
    synced_writes: int = 0
    """How many of these a sync has covered."""
    syncing: bool = False
    syncing_writes: int = 0
    """How many of these the sync that is under way covers."""
    footed: bool = False
    """Its records and its footer are durable: only the header does not say so yet."""
    sync_failed: bool = False
    """What was written since the last good sync may be gone, whatever a later sync says."""
    failed_reclaims: int = 0
    """How often it could not be made clean, this generation."""
    cleaned_before: int = 0
    """How many segments had been made clean when that failed first."""
    announced: bool = False
    """Control knows that it may be reclaimed."""
    entries: bytearray = field(default_factory=bytearray)

    def fits(self, pages: int, count: int = 1) -> bool:
        """Whether ``count`` records of ``pages`` can be placed so that the footer still fits behind them."""
        return self.cursor + count * pages + footer_pages(self.placed + count) <= self.pages

    def room_for(self, pages: int, most: int) -> int:
        """How many records of ``pages`` fit, up to ``most``."""
        count = min(most, max(0, self.pages - self.cursor) // pages)
        while count and not self.fits(pages, count):
            count -= 1
        return count

    def take(self, pages: int, count: int, sequence: int) -> Place:
        """Place ``count`` records of ``pages``; they must fit."""
        place = Place(self.number, self.cursor, pages, self.generation, sequence, self.fd, count)
        self.cursor += count * pages
        self.placed += count
        self.in_flight += count
        return place

    def add_entries(self, place: Place, headers: Pages) -> None:
        """Remember for the footer what was written to ``place``; ``headers`` are the header pages."""
        entries = np.zeros(place.count, ENTRY)
        who = identities(headers)
        for name in ("key", "parent", "group", "lineage", "depth", "tokens"):
            entries[name] = who[name]
        entries["segment"], entries["page"], entries["pages"] = place.segment, place.first_pages(), place.pages
        entries["generation"], entries["sequence"] = place.generation, place.sequences()
        self.entries += entries.tobytes()

    def entry_table(self) -> Table:
        """What goes into the footer, dtype ``ENTRY``."""
        return np.frombuffer(bytes(self.entries), ENTRY)

    def renew(self, generation: int, slot: int) -> None:
        """Begin another life, with nothing in it."""
        self.generation, self.slot, self.cursor = generation, slot, HEADER_SLOTS
        self.placed = self.writes = self.synced_writes = self.failed_reclaims = 0
        self.footed = self.sync_failed = self.announced = False
        self.entries = bytearray()

    def sync_target(self) -> SyncTarget:
        """What to sync so that everything written until now is durable."""
        return SyncTarget(self.number, self.generation, -1 if self.sync_failed else self.fd, self.writes)

    @property
    def idle(self) -> bool:
        """No write and no sync is under way."""
        return not self.in_flight and not self.syncing

    @property
    def unsynced(self) -> bool:
        """Some block that others may rely on is not known to be durable."""
        return self.writes > self.synced_writes and self.stage in (Stage.OPEN, Stage.FULL, Stage.POISONED)
