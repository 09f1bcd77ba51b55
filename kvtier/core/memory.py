"""The engine's own KV memory as the core sees it: registered once, then named by number in plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

NO_PAGE: Final = -1
"""In place of a page id: the engine has no page there, or not any more, as behind a sliding window."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupPages:
    """Where one group of a request lies: page ``ids[i]`` holds the tokens from ``first_token + i * page_tokens``.

    In a group of states page ``ids[i]`` is the state behind the i-th block that begins at ``first_token`` or later. In
    groups that need no whole prefix (``trailing``, ``last``) ids may be ``NO_PAGE``.
    """

    first_token: int
    ids: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class PageTable:
    """A request's pages as a plain value: which registered memory, and per group which of its pages."""

    memory_id: int
    groups: tuple[GroupPages, ...]


Bytes1D = npt.NDArray[np.uint8]
Bytes2D = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int64]
"""Positions in a sequence."""


@runtime_checkable
class KVMemory(Protocol):
    """Engine memory that blocks are gathered from and scattered to.

    Implementations are safe to call from several threads on disjoint blocks, and release the GIL while they copy.
    """

    @property
    def placement(self) -> str:
        """Placement digest (hex) of the layout that the memory was built for; compared when it is registered."""

    @property
    def is_paged(self) -> bool:
        """Whether id i of a table is the page of tokens [first_token + i * page_tokens, ...), and of no others.

        The tables of small jobs are then put together, and their blocks are copied with one call.
        """

    def check(self, table: PageTable, start: int, stop: int) -> None:
        """Refuse a page table that does not cover tokens [start, stop); called for every job.

        They have to be covered in every group that needs the whole prefix (rule ``all``); ids of all groups have to be
        those of pages.

        Raises:
            ConfigError: what is missing, and how many pages it would take; or the memory is not where it was.
        """

    def gather(self, table: PageTable, group: int, first_tokens: Tokens, parts: range, out: Bytes2D) -> None:
        """Copy ``parts`` of the blocks that begin at ``first_tokens`` to ``out``, a block a row.

        ``out`` is uint8 ``[blocks, bytes of the parts]``, C-contiguous: part after part, nothing between.
        """

    def scatter(
        self, table: PageTable, group: int, first_tokens: Tokens, parts: range, source: Bytes2D, start: int, stop: int
    ) -> None:
        """Write ``source`` (as ``gather`` lays it out) to the tokens in [start, stop) of these blocks, no others."""


Blocks = npt.NDArray[np.int64]
"""Numbers of blocks in a sequence."""
Mask = npt.NDArray[np.bool_]


@runtime_checkable
class WindowedMemory(KVMemory, Protocol):
    """What a layout with rules ``trailing`` or ``last`` takes: of such groups an engine has some blocks only."""

    def held(self, table: PageTable, group: int, blocks: Blocks) -> Mask:
        """Which of ``blocks`` lie in the pages of ``group``, all that their records hold: the others are not stored."""


@runtime_checkable
class DeviceMemory(KVMemory, Protocol):
    """Engine memory on a GPU, which copies to and from device memory without passing through the host.

    ``gather`` and ``scatter`` of host bytes work as well, and are over when they return.
    """

    def mark(self) -> None:
        """What this thread's current stream has been given until now comes before every copy that begins later.

        So a store waits for the compute that wrote, and a load for the compute that last read. ``check`` does it, which
        is called on the thread of whoever asks for a job; with data planes in other processes the engine there does it
        right before it asks. Compute waits for a load by being queued when the job, or the part, has ended.
        """

    def gather_on_device(self, table: PageTable, group: int, first_tokens: Tokens, parts: range, out: Any) -> None:
        """As ``gather``; ``out`` is a ``torch.Tensor`` on that device. Queued to the current stream."""

    def scatter_on_device(
        self, table: PageTable, group: int, first_tokens: Tokens, parts: range, source: Any, start: int, stop: int
    ) -> None:
        """As ``scatter``; ``source`` is a ``torch.Tensor`` on that device. Queued to the current stream."""


@dataclass(frozen=True, slots=True, eq=False)
class KVPages:
    """A memory and a request's page table in it: the convenience for callers in one process.

    ``table.memory_id`` is filled in when the memory is registered with a cache; before that it is -1.
    """

    memory: KVMemory
    table: PageTable
