"""KV memory of a paged engine on a GPU: as ``PagedTensors``, but copied by the GPU, in the order of its streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kvtier.core.memory import NO_PAGE, Bytes2D, PageTable, Tokens
from kvtier.errors import ConfigError
from kvtier.kernels.device_pages import DevicePages, pages_on
from kvtier.kernels.streams import Marks, in_order
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.models.layout import checked_layout
from kvtier.pages.paged import Ids
from kvtier.pages.spans import Edge, cut
from kvtier.pages.tables import PagedMemory, cells_of, in_order_of_parts, same_count
from kvtier.pages.tensors import Moored, check_dense, dtype_of


class DeviceTensors(PagedMemory):
    """Engine memory as one tensor ``[num_pages, *part.shape]`` per part, all of them on one device.

    Implements ``core.memory.DeviceMemory`` and ``WindowedMemory``. ``tensors`` are as those of ``PagedTensors``, but
    torch tensors on a GPU; tensors in CPU memory go through the same code. Copies wait for what the engine had queued
    to its stream when it asked for the job (``mark``), and a job ends when its copies are over.
    """

    def __init__(
        self, layout: KVLayout, tensors: Sequence[torch.Tensor] | Mapping[tuple[int, str], torch.Tensor]
    ) -> None:
        """Check every tensor against its part.

        Raises:
            ConfigError: naming the part, what was given and what it wants.
        """
        given = iter(in_order_of_parts(checked_layout(layout), tensors))
        self._parts = tuple(
            tuple(_DevicePart.of(group, part, next(given), layout.page_tokens) for part in group.parts)
            for group in layout.groups
        )
        counts = zip(layout.groups, self._parts, strict=True)
        super().__init__(
            layout, tuple(same_count(group, [(own.part, len(own.pages)) for own in parts]) for group, parts in counts)
        )
        everything = [own for parts in self._parts for own in parts]
        self.device = _same_device(everything)
        _check_apart(everything)
        self._pages: tuple[DevicePages, ...] = tuple(
            pages_on(self.device)([own.pages for own in parts], self.blocks[group].pages)
            for group, parts in enumerate(self._parts)
        )
        self._moored = Moored("DeviceTensors", ((own.what, own.tensor) for own in everything))
        self._marks = Marks(self.device)

    def check(self, table: PageTable, start: int, stop: int) -> None:
        """Refuse a page table that does not cover tokens [start, stop), and tensors that moved; then ``mark``."""
        self._moored.check()
        self.check_table(table, start, stop)
        self._marks.add()

    def mark(self) -> None:
        """See ``DeviceMemory``."""
        self._marks.add()

    # --- to and from the device -------------------------------------------------------------------------------------

    def gather_on_device(
        self, table: PageTable, group: int, first_tokens: Tokens, parts: range, out: torch.Tensor
    ) -> None:
        """Copy blocks of ``parts`` to ``out``; see ``DeviceMemory``.

        Raises:
            ConfigError: a block has no pages, or lacks some, as ``held`` tells.
        """
        pages, blocks = table.groups[group], self.blocks[group]
        if blocks.may_lack_pages:
            self.check_held(group, pages, first_tokens)
        self._marks.wait()
        self._pages[group].gather(self._numbers(blocks.ids_of(pages, first_tokens)), parts, out)

    def scatter_on_device(
        self,
        table: PageTable,
        group: int,
        first_tokens: Tokens,
        parts: range,
        source: torch.Tensor,
        start: int,
        stop: int,
    ) -> None:
        """Write tokens [start, stop) of blocks of ``parts``; see ``DeviceMemory``, and ``PagedTensors.scatter``."""
        pages, blocks = table.groups[group], self.blocks[group]
        whole = blocks.whole(first_tokens, start, stop)
        if blocks.may_lack_pages:
            whole &= blocks.held(pages, first_tokens // self.layout.block_tokens)
        self._marks.wait()
        ids = blocks.ids_of(pages, first_tokens)
        if whole.any():
            rows = torch.from_numpy(np.flatnonzero(whole)).to(self.device)
            own = source if whole.all() else source.index_select(0, rows)
            self._pages[group].scatter(self._numbers(ids[whole]), parts, own)
        if blocks.is_state:
            return
        kept = self.layout.kept_tokens[group]
        for block in np.flatnonzero(~whole).tolist():
            first = int(first_tokens[block]) + blocks.skipped_tokens
            begin, end = max(start - first, 0), min(stop - first, kept)
            if begin < end:
                self._scatter_tokens(group, ids[block], parts, source[block], begin, end)

    def _scatter_tokens(self, group: int, ids: Ids, parts: range, source: torch.Tensor, begin: int, end: int) -> None:
        """Tokens [begin, end) of one block, whose pages are ``ids``: whole pages, and cells at both ends."""
        whole, edges = cut(begin, end, self.layout.page_tokens)
        numbers, at = [page for page in whole if ids[page] != NO_PAGE], 0
        for own in self._of(group, parts):
            width = self.blocks[group].pages * own.page_bytes
            block = source[at : at + width].view(-1, own.page_bytes)
            at += width
            for page in numbers:
                own.pages[int(ids[page])].copy_(block[page])
            for edge in edges:
                if ids[edge.page] != NO_PAGE:
                    own.write_entries(int(ids[edge.page]), block[edge.page], edge)

    # --- to and from the host ---------------------------------------------------------------------------------------

    def gather(self, table: PageTable, group: int, first_tokens: Tokens, parts: range, out: Bytes2D) -> None:
        """Copy blocks of ``parts`` to ``out``, in host memory; see ``KVMemory``. Raises as ``gather_on_device``."""
        host = torch.from_numpy(out)
        if self.device.type == "cpu":
            self.gather_on_device(table, group, first_tokens, parts, host)
            return
        with in_order(self.device):
            content = torch.empty(tuple(out.shape), dtype=torch.uint8, device=self.device)
            self.gather_on_device(table, group, first_tokens, parts, content)
            host.copy_(content, non_blocking=True)

    def scatter(
        self, table: PageTable, group: int, first_tokens: Tokens, parts: range, source: Bytes2D, start: int, stop: int
    ) -> None:
        """Write tokens [start, stop) of blocks of ``parts`` from host memory; see ``KVMemory``."""
        with in_order(self.device):
            content = torch.from_numpy(source).to(self.device, non_blocking=True)
            self.scatter_on_device(table, group, first_tokens, parts, content, start, stop)

    def _of(self, group: int, parts: range) -> tuple[_DevicePart, ...]:
        return self._parts[group][parts.start : parts.stop]

    def _numbers(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class _DevicePart:
    """One part's tensor as bytes."""

    what: str  # as messages call it
    tensor: torch.Tensor  # as the engine has it
    pages: torch.Tensor  # [num_pages, page_bytes]
    cells: tuple[Any, ...]  # the same, cut into entries
    part: Part
    entries: int  # of a page

    @property
    def page_bytes(self) -> int:
        return self.part.page_bytes

    @classmethod
    def of(cls, group: KVGroup, part: Part, tensor: torch.Tensor, page_tokens: int) -> _DevicePart:
        what = f"tensor of group {group.name!r}, {part.label}"
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{what}: got a {type(tensor).__name__}, want a torch tensor")
        check_dense(tensor, what)
        if tuple(tensor.shape[1:]) != part.shape or dtype_of(tensor) != part.dtype or not len(tensor):
            raise ConfigError(
                f"{what}: got {dtype_of(tensor)} {list(tensor.shape)}, "
                f"want {part.dtype} [num_pages, {', '.join(map(str, part.shape))}]"
            )
        if not tensor.is_contiguous():
            raise ConfigError(f"{what}: strides {tensor.stride()}, want a contiguous tensor")
        pages = tensor.detach().view(torch.uint8).view(len(tensor), part.page_bytes)
        entries = 1 if part.is_state else page_tokens // part.tokens_per_entry
        return cls(what, tensor, pages, cells_of(part, pages, entries), part, entries)

    def write_entries(self, page_id: int, source: torch.Tensor, edge: Edge) -> None:
        """Write what is finished by the tokens of ``edge``, from ``source``, a whole page."""
        span = np.s_[:, edge.start // self.part.tokens_per_entry : edge.stop // self.part.tokens_per_entry]
        for mine, theirs in zip(self.cells, cells_of(self.part, source[None], self.entries), strict=True):
            mine[page_id][span] = theirs[0][span]


def _same_device(parts: Sequence[_DevicePart]) -> torch.device:
    first = parts[0]
    for other in parts:
        if other.tensor.device != first.tensor.device:
            raise ConfigError(
                f"{other.what}: is on {other.tensor.device}, and {first.what} on {first.tensor.device}; want all of"
                " them on one device"
            )
    return first.tensor.device


def _check_apart(parts: Sequence[_DevicePart]) -> None:
    """Refuse tensors that share a byte; all of them are contiguous."""
    ordered = sorted(parts, key=lambda own: own.pages.data_ptr())
    for one, other in pairwise(ordered):
        if one.pages.data_ptr() + one.pages.numel() > other.pages.data_ptr():
            raise ConfigError(f"{one.what} and {other.what} share memory; every part needs a tensor of its own")
