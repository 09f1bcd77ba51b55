"""Paths to disk: a directory, the lane to it, and what a data plane says of them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtier.config import Config
from kvtier.core.plan import DiskState, LaneRate, Message, Table
from kvtier.models.layout import KVLayout
from kvtier.runtime.seam import Event, Machine
from kvtier.tiers.disk import DiskTier
from kvtier.transfer.lanes import Lane, global_segment

FAILED_READS: Final = 3
"""In a row, and the fault may be that of the directory. One bad record is read twice, with its neighbours and alone."""
READ_OUTAGE_S: Final = 60.0
"""What cannot be read for longer is forgotten, as if it were damaged: each try may take long, and is in vain."""
IDLE_THREADS_S: Final = 5.0
"""For threads that nothing is under way in: they were told to end, and only have to be given a core to do it on."""


@dataclass(slots=True, eq=False)
class DiskPath:
    """Directory ``number`` and the lane to it; ``chores`` is set when its housekeeping has something to do.

    ``starved_since_s`` is when a write first found no clean segment, unless one has found some since; ``failed_reads``
    are those in a row, and ``failing_since_s`` when the first of them ended.
    """

    number: int
    tier: DiskTier
    lane: Lane
    chores: Event
    assigned_bytes: int = 0
    starved_since_s: float | None = None
    failed_reads: int = 0
    failing_since_s: float = 0.0

    def reluctance(self) -> tuple[bool, int, int]:
        """Least where the next write should go: what works, has little queued, and has been given least so far."""
        return not self.tier.takes_writes, self.lane.queued_bytes, self.assigned_bytes

    def read_ended(self, error: OSError | None, now_s: float) -> None:
        """Note how a read went."""
        if error is None:
            self.failed_reads = 0
            return
        if not self.failed_reads:
            self.failing_since_s = now_s
        self.failed_reads += 1

    def is_out(self, now_s: float) -> bool:
        """Whether reads fail one after the other: for a while, that says nothing of any single record."""
        return self.failed_reads > FAILED_READS and now_s - self.failing_since_s <= READ_OUTAGE_S

    def take_news(self, rank: int, incarnation: int) -> tuple[list[int], list[Message]]:
        """Segments whose reclaim ended, by their global numbers, and what control is to be told; once."""
        events = self.tier.take_events()
        if events is None:
            return [], []
        sealed = np.array(events.sealed, np.int64).reshape(-1, 2)
        sealed[:, 0] += global_segment(self.number, 0)
        state = DiskState(
            rank, incarnation, events.usable, events.clean_segments, events.reclaims_wanted, sealed, events.reason,
            self.number, self.tier.takes_writes,
        )  # fmt: skip
        rate = LaneRate(rank, incarnation, self.lane.name, self.lane.bytes_per_s, self.lane.queued_bytes)
        return [global_segment(self.number, segment) for segment in events.reclaimed], [state, rate]


def open_path(
    config: Config, layout: KVLayout, machine: Machine, number: int, held: ExitStack
) -> tuple[DiskPath, list[Table]]:
    """Open directory ``number`` of ``config``: the path, and rows of what an earlier life left. ``held`` closes it.

    Raises:
        CapacityError: a block is larger than the directory's share of the tier.
        TierError: the directory cannot be used.
    """
    disk = config.disk
    tier = DiskTier(
        machine.files, machine.runtime, directory=disk.directories[number], layout=layout,
        capacity_bytes=disk.capacity // len(disk.directories),
        segment_bytes=None if disk.segment == "auto" else disk.segment,
        clean_segments=None if disk.clean_segments == "auto" else disk.clean_segments,
        owner=machine.owner,
    )  # fmt: skip
    tier.wake = chores = machine.runtime.event()
    held.callback(tier.give_back)  # before anything of it is open: Ctrl-C may come while it is being opened
    batches = tier.open()
    found = []
    for rows in batches:
        rows["segment"] = global_segment(number, 0) + rows["segment"]
        found.append(rows)
    engine = machine.io_engine(f"disk-{number}", disk.io_threads)
    held.callback(engine.close, IDLE_THREADS_S)
    return DiskPath(number, tier, Lane(f"disk-{number}", engine, threads=disk.io_threads), chores), found
