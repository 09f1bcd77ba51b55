"""The engine memory of one plan: where blocks come from, or go to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvtier.core.memory import Bytes2D, DeviceMemory, KVMemory, PageTable, Tokens, WindowedMemory
from kvtier.core.plan import Plan, PlanKind, Table
from kvtier.errors import ConfigError
from kvtier.kernels import Addresses, RecordMemory, SliceTable
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.faults import EngineMemoryError

Rows: TypeAlias = list[int]
"""Rows of one plan, ascending; at least one."""


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    """A registered memory, the request's pages in it, and the tokens that the plan is about."""

    memory: KVMemory
    table: PageTable
    start: int
    stop: int

    @classmethod
    def of(cls, equipment: Equipment, plan: Plan) -> Endpoint | None:
        """None when the plan names no memory, or one that is not registered any more."""
        memory = equipment.memories.get(plan.pages.memory_id) if plan.pages else None
        return None if memory is None or plan.pages is None else cls(memory, plan.pages, plan.start, plan.stop)

    def gather(self, group: int, first_tokens: Tokens, parts: range, out: Bytes2D) -> None:
        """Copy blocks of ``parts`` from the engine's pages; see ``KVMemory.gather``.

        Raises:
            EngineMemoryError: the memory raised, whatever it was.
        """
        try:
            self.memory.gather(self.table, group, first_tokens, parts, out)
        except BaseException as error:
            raise EngineMemoryError(f"gather of {type(self.memory).__name__} raised {error!r}") from error

    def scatter(self, group: int, first_tokens: Tokens, parts: range, source: Bytes2D) -> None:
        """Write the tokens that the plan is about to the engine's pages; see ``KVMemory.scatter``.

        Raises:
            EngineMemoryError: the memory raised, whatever it was: that says nothing about ``source``.
        """
        try:
            self.memory.scatter(self.table, group, first_tokens, parts, source, self.start, self.stop)
        except BaseException as error:
            raise EngineMemoryError(f"scatter of {type(self.memory).__name__} raised {error!r}") from error

    @property
    def moves_records(self) -> bool:
        """Whether the memory moves whole records, and makes or compares their sums on the way."""
        return isinstance(self.memory, RecordMemory) and self.memory.moves_records

    def gather_records(
        self, group: int, first_tokens: Tokens, slices: SliceTable, records: Addresses
    ) -> Bytes2D | None:
        """Copy blocks to records; see ``kernels.RecordMemory``. None where this memory does not.

        Raises:
            EngineMemoryError: the memory raised, whatever it was.
        """
        if not isinstance(self.memory, RecordMemory):
            return None
        try:
            return self.memory.gather_records(self.table, group, first_tokens, slices, records)
        except BaseException as error:
            raise EngineMemoryError(f"gather_records of {type(self.memory).__name__} raised {error!r}") from error

    def scatter_records(
        self, group: int, first_tokens: Tokens, slices: SliceTable, records: Addresses, wanted: Bytes2D | None
    ) -> npt.NDArray[np.bool_] | None:
        """Write records to the engine's pages; see ``kernels.RecordMemory``. None where this memory does not.

        Raises:
            EngineMemoryError: the memory raised, whatever it was.
        """
        if not isinstance(self.memory, RecordMemory):
            return None
        try:
            return self.memory.scatter_records(
                self.table, group, first_tokens, slices, records, wanted, self.start, self.stop
            )
        except BaseException as error:
            raise EngineMemoryError(f"scatter_records of {type(self.memory).__name__} raised {error!r}") from error


@dataclass(frozen=True, slots=True, eq=False)
class DeviceEndpoint:
    """The same, for bytes in device memory; inside ``kernels.streams.in_order``."""

    endpoint: Endpoint
    on_device: DeviceMemory | None
    """The memory, if it lies on a device itself. What lies in host memory passes through a buffer."""

    @classmethod
    def of(cls, endpoint: Endpoint) -> DeviceEndpoint:
        """Of any memory."""
        memory = endpoint.memory
        return cls(endpoint, memory if isinstance(memory, DeviceMemory) else None)

    def gather(self, group: int, first_tokens: Tokens, parts: range, out: torch.Tensor) -> None:
        """As ``Endpoint.gather``; ``out`` is uint8 ``[blocks, bytes of the parts]``."""
        if self.on_device is not None:
            try:
                self.on_device.gather_on_device(self.endpoint.table, group, first_tokens, parts, out)
            except BaseException as error:
                raise EngineMemoryError(f"gather of {type(self.on_device).__name__} raised {error!r}") from error
        elif out.device.type == "cpu" and out.is_contiguous():
            self.endpoint.gather(group, first_tokens, parts, out.numpy())
        else:
            content = np.empty(tuple(out.shape), np.uint8)
            self.endpoint.gather(group, first_tokens, parts, content)
            out.copy_(torch.from_numpy(content))

    def scatter(self, group: int, first_tokens: Tokens, parts: range, source: torch.Tensor) -> None:
        """As ``Endpoint.scatter``."""
        own = self.endpoint
        if self.on_device is None:
            own.scatter(group, first_tokens, parts, source.cpu().contiguous().numpy())
            return
        try:
            self.on_device.scatter_on_device(own.table, group, first_tokens, parts, source, own.start, own.stop)
        except BaseException as error:
            raise EngineMemoryError(f"scatter of {type(self.on_device).__name__} raised {error!r}") from error


def table_fits(equipment: Equipment, plan: Plan) -> bool:
    """Whether the pages that ``plan`` names are there; nothing is copied to or from a table that was not checked."""
    memory = equipment.memories.get(plan.pages.memory_id) if plan.pages else None
    if memory is None or plan.pages is None or not len(plan.rows):
        return True  # a plan without memory is for nobody's pages, one whose memory is gone fails row by row
    size, blocks = equipment.layout.block_tokens, plan.rows["block"]
    start = max(plan.start, int(blocks.min()) * size) if plan.kind == PlanKind.LOAD else int(blocks.min()) * size
    try:
        memory.check(plan.pages, start, min(plan.stop, (int(blocks.max()) + 1) * size))
    except ConfigError:
        return False
    return all(
        _are_held(memory, plan.pages, number, blocks[plan.rows["group"] == number])
        for number, group in enumerate(equipment.layout.groups)
        if group.reuse.rule != "all"
    )


def _are_held(memory: KVMemory, pages: PageTable, group: int, blocks: Table) -> bool:
    return isinstance(memory, WindowedMemory) and bool(memory.held(pages, group, blocks.astype(np.int64)).all())


def table_of(plan: Plan, rows: Rows) -> Table:
    """The table of ``rows``, ascending; not a copy where there are none between them."""
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return plan.rows if len(rows) == len(plan.rows) else plan.rows[first : last + 1]
    return plan.rows[rows]


def first_tokens(equipment: Equipment, plan: Plan, rows: Rows) -> Tokens:
    """Where in the sequence the blocks of ``rows`` begin."""
    tokens: Tokens = table_of(plan, rows)["block"].astype(np.int64) * equipment.layout.block_tokens
    return tokens
