"""What the runs of one data plane share: its memory, paths, queues and outbox."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvtier.codecs.chain import chain_of
from kvtier.core.memory import KVMemory
from kvtier.core.plan import Message, Priority
from kvtier.metrics import Metrics
from kvtier.models.layout import KVLayout
from kvtier.runtime.seam import Arena, Buffer, Clock
from kvtier.tiers.device import Slab
from kvtier.transfer.faults import Faults
from kvtier.transfer.paths import DiskPath
from kvtier.transfer.shapes import RecordShape
from kvtier.transfer.staging import Staging
from kvtier.transfer.work import WorkQueue


class WaitsForStaging(Protocol):
    """A run that has rows to encode and no buffer for them: one that a load gives back is as good as a spill's."""

    def encode_more(self) -> None:
        """There is a buffer; a run that wants more than there are waits again."""


class WaitsForReclaim(Protocol):
    """A run that ends with the reclaim of one segment."""

    def ended(self) -> None:
        """The segment is clean again, or given up."""


@dataclass(slots=True, eq=False)
class Equipment:
    """Everything that a plan needs to be run; guarded by the data plane's lock."""

    rank: int
    incarnation: int
    layout: KVLayout
    verify_memory: bool
    clock: Clock
    host: Arena
    staging: Staging
    headers: Staging
    metrics: Metrics
    paths: list[DiskPath]
    slab: Slab | None = None
    """The device tier, if there is one."""
    shapes: tuple[RecordShape, ...] = field(init=False)
    """Per group, what its raw records look like."""
    placement: bytes = field(init=False)
    faults: Faults = field(init=False)
    content_sizes: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    """Per chain and group, the bytes of every slice after the tensor codec: worked out when first needed."""
    scratch: list[Buffer] = field(default_factory=list)
    """Room for one decoded slice per copy thread."""
    work: WorkQueue = field(default_factory=WorkQueue)
    memories: dict[int, KVMemory] = field(default_factory=dict)
    outbox: deque[Message] = field(default_factory=deque)
    waiting_for_staging: deque[WaitsForStaging] = field(default_factory=deque)
    reclaims: dict[int, WaitsForReclaim] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What every record needs is worked out once."""
        self.placement = bytes.fromhex(self.layout.placement)
        self.faults = Faults(self.metrics)
        self.shapes = tuple(RecordShape.of(self.layout, group) for group in range(len(self.layout.groups)))

    def sizes_of(self, chain: str, group: int) -> tuple[int, ...]:
        """What the slices of a record of that chain and group hold; ConfigError for a chain that is not known."""
        sizes = self.content_sizes.get((chain, group))
        if sizes is None:
            sizes = self.content_sizes[chain, group] = chain_of(chain).content_sizes(self.layout, group)
        return sizes

    def take_scratch(self) -> Buffer:
        """Room for any decoded slice; the caller puts it back into ``scratch``. Called without the lock."""
        try:
            return self.scratch.pop()
        except IndexError:
            return np.empty(max(span.nbytes for spans in self.layout.slices for span in spans), np.uint8)

    def kick(self) -> None:
        """Let every lane submit what it may, and spills encode what there are buffers for; never raises.

        In that order: a write that a lane gives up leaves its buffers.
        """
        try:
            for path in self.paths:
                path.lane.submit()
            while self.waiting_for_staging and self.staging.room_for(Priority.SPILL):
                self.waiting_for_staging.popleft().encode_more()
        except Exception as error:  # a mistake of ours: what is behind it comes next time
            self.faults.tell("handing on what waits for a disk failed", error)

    def reap(self) -> int:
        """Finish what the lanes are done with; returns how many. Never raises."""
        try:
            return sum([path.lane.reap() for path in self.paths])
        except Exception as error:  # a mistake of ours: what is behind it comes next time
            self.faults.tell("the end of a request to a disk failed", error)
            return 1
