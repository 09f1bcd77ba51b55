"""What crosses between the planes: plans down, completions and reports up. Plain values without buffers or addresses.

A plan is one hop for one rank, a table with a row per (block, group). Its rows are one structured array, so that it
crosses a process boundary as one run of bytes (``core.wire``) and stays a table in columns on both sides.
Pages in rows are 4 KiB pages of an arena or a segment; only a ``PageTable`` speaks of the engine's own pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from kvtier.core.memory import PageTable

PAGE_BYTES = 4096
NOWHERE = -1
"""Stands for "no copy" in every page and segment column."""

DIRECTORY_SHIFT = 20
"""Segment numbers are those of a rank: its directory's number above this bit, the segment's own below."""

E = TypeVar("E", bound=IntEnum)


def direct_members(kind: type[E]) -> type[E]:
    """Let ``Kind.MEMBER`` be found like any class attribute.

    Python 3.11 finds members through a fallback written in Python, which costs ten times as much; hot paths name
    dozens of them per job.
    """
    for member in kind:
        type.__setattr__(kind, member.name, member)
    return kind


@direct_members
class Tier(IntEnum):
    """Where a copy is; ordered from fast to slow. ENGINE is memory of the engine, never a tier that holds copies."""

    ENGINE = 0
    DEVICE = 1
    HOST = 2
    DISK = 3
    REMOTE = 4

    @property
    def label(self) -> str:
        """The name that users see: ``device``, ``host``, ``disk``, ``remote``."""
        return self.name.lower()


@direct_members
class PlanKind(IntEnum):
    """The hops that exist."""

    STORE = 0  # engine pages -> the reserved extent
    LOAD = 1  # any copy -> engine pages; rows with a target are kept there too (promotion)
    FETCH = 2  # any slower copy -> the reserved extent
    SPILL = 3  # host extent -> disk, where the data plane chooses the place
    SYNC = 4  # what was written becomes durable: that of its rows, or without rows whatever was
    RECLAIM = 5  # one sealed segment becomes clean again; no rows
    LAND = 6  # device extent -> the reserved host extent


@direct_members
class Priority(IntEnum):
    """Order of service; each class has its own reserved staging and in-flight budget."""

    DEMAND = 0
    PREFETCH = 1
    SPILL = 2


@direct_members
class Lineage(IntEnum):
    """Whether a block is what the model computes, or was computed on top of lossy or approximate KV."""

    EXACT = 0
    APPROXIMATE = 1


@direct_members
class Status(IntEnum):
    """How one row ended. QUARANTINED: its target may still be written; freed by a later RELEASED row."""

    OK = 0
    FAILED = 1
    QUARANTINED = 2
    RELEASED = 3


@direct_members
class Reason(IntEnum):
    """Why a row failed."""

    NONE = 0
    DAMAGED = 1  # a checksum or an identity did not match, twice
    IO_ERROR = 2  # the operating system failed the read or the write
    NO_SPACE = 3  # no room on disk now
    GONE = 4  # the copy is not there any more
    ABANDONED = 5  # the caller gave up, or the deadline passed
    RETIRED = 6  # the weights version changed under way
    REFUSED = 7  # over a budget
    CLOSED = 8  # the cache was closed
    ENGINE_ERROR = 9  # the engine's own memory raised when it was to be read or written
    NO_DISK = 10  # no directory can be written to: none is configured, or none works


ROW = np.dtype(
    [
        ("key", "u1", (32,)),
        ("parent", "u1", (32,)),
        ("group", "<u2"),
        ("lineage", "u1"),
        ("chain", "u1"),  # index into Plan.chains: how the target wants it
        ("depth", "<i4"),  # number of blocks before it in its chain
        ("block", "<i4"),  # its position in this request: first token / block_tokens
        ("tokens", "<i4"),
        ("device_page", "<i4"),
        ("device_pages", "<i4"),
        ("host_page", "<i4"),
        ("host_pages", "<i4"),
        ("disk_segment", "<i4"),
        ("disk_page", "<i4"),
        ("disk_pages", "<i4"),
        ("target_page", "<i4"),  # reserved extent in Plan.target, worst-case length
        ("target_pages", "<i4"),
        ("disk_generation", "<i8"),
    ]
)

ROW_STRUCT = Struct("<32s32sHBBiiiiiiiiiiiiq")
"""One row of ``ROW`` as plain values."""

COMPLETED = np.dtype(
    [
        ("row", "<i4"),  # index into the plan's rows
        ("status", "u1"),
        ("reason", "u1"),
        ("tier", "u1"),  # where a new copy now is; ENGINE = no new copy
        ("chain", "u1"),  # index into Completion.chains: how that copy is really encoded
        ("segment", "<i4"),
        ("page", "<i4"),
        ("pages", "<i4"),
        ("generation", "<i8"),
        ("moved_bytes", "<i8"),
    ]
)

RECOVERED = np.dtype(
    [
        ("key", "u1", (32,)),
        ("parent", "u1", (32,)),
        ("group", "<u2"),
        ("lineage", "u1"),
        ("unused", "u1"),
        ("depth", "<i4"),
        ("tokens", "<i4"),
        ("segment", "<i4"),
        ("page", "<i4"),
        ("pages", "<i4"),
        ("generation", "<i8"),
        ("sequence", "<i8"),
    ]
)

LOST = np.dtype(
    [
        ("key", "u1", (32,)),
        ("group", "<u2"),
        ("tier", "u1"),
        ("reason", "u1"),
        ("segment", "<i4"),
        ("page", "<i4"),
        ("generation", "<i8"),
    ]
)

Table: TypeAlias = npt.NDArray[np.void]
"""A structured array of one of the dtypes above."""


# Plans and completions are values that nobody changes; a frozen dataclass takes three times as long to make.
@dataclass(slots=True, eq=False)
class Plan:
    """One hop for one rank, in the life ``incarnation`` of it and in no other: control -> data.

    ``[start, stop)`` are absolute token positions, for LOAD and STORE. ``deadline_s`` is on the clock of the sender
    (CLOCK_MONOTONIC, which processes of one machine share); None waits as long as the tier's own limits. Whoever asked
    for a ``durable`` store waits until it is on disk: its rows are sealed as soon as they are gathered. ``target`` is
    the memory tier that the extents of its rows' targets lie in.
    """

    plan_id: int
    rank: int
    kind: PlanKind
    priority: Priority
    rows: Table = field(default_factory=lambda: np.empty(0, ROW))
    chains: tuple[str, ...] = ("raw",)
    pages: PageTable | None = None
    start: int = 0
    stop: int = 0
    durable: bool = False
    deadline_s: float | None = None
    segment: int = NOWHERE
    generation: int = 0
    incarnation: int = 1
    target: Tier = Tier.HOST


@dataclass(slots=True, eq=False)
class Completion:
    """How (part of) a plan ended: data -> control. ``source_free`` comes at the latest with ``final``."""

    plan_id: int
    rank: int
    incarnation: int
    rows: Table = field(default_factory=lambda: np.empty(0, COMPLETED))
    chains: tuple[str, ...] = ("raw",)
    source_free: bool = False
    final: bool = False


@dataclass(frozen=True, slots=True)
class Hello:
    """A data plane is there: who it is and what it owns. A new incarnation voids all that the old one held.

    ``record_pages`` are the 4 KiB pages that a raw record takes, per group: extents of that length are reserved for it.
    """

    rank: int
    incarnation: int
    placement: str
    block_tokens: int
    record_pages: tuple[int, ...]
    host_pages: int
    disk_bytes: int
    segment_bytes: int
    directories: tuple[str, ...] = ()
    device_pages: int = 0


@dataclass(frozen=True, slots=True)
class Farewell:
    """A data plane is gone, says its channel, and answers nothing any more; its last message.

    All that it held and had under way is void. What it wrote to disk counts again once a new life has found it.
    """

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """Blocks that an earlier life left on disk, in batches; ``final`` with the last one."""

    rank: int
    incarnation: int
    rows: Table
    final: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Lost:
    """Copies that turned out damaged or gone; the reader has missed already, the index must forget them."""

    rank: int
    incarnation: int
    rows: Table


@dataclass(frozen=True, slots=True, eq=False)
class DiskState:
    """How one directory of a rank is: segments sealed since the last report, clean ones left, reclaims it waits for.

    ``sealed`` is int64 ``[n, 2]``: (segment, generation), oldest first. ``usable`` false: the tier is off.
    ``writable`` false: it is only read, in all of this life or until it says otherwise.
    """

    rank: int
    incarnation: int
    usable: bool
    clean_segments: int
    reclaims_wanted: int
    sealed: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    reason: str = ""
    directory: int = 0
    writable: bool = True


@dataclass(frozen=True, slots=True)
class LaneRate:
    """What one physical path moves, learnt from finished moves."""

    rank: int
    incarnation: int
    lane: str
    bytes_per_s: float
    queued_bytes: int


Report: TypeAlias = Hello | Farewell | Recovered | Lost | DiskState | LaneRate
Message: TypeAlias = Completion | Report
