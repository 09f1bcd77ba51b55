"""The KV of a layout in an engine's pages, half of it to store from, the rest to load into, and torch that moves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch

from benchmarks.payload import Ids
from kvtier import KVGroup, KVLayout, PagedTensors
from kvtier.core.memory import NO_PAGE, KVPages
from kvtier.core.plan import PAGE_BYTES
from kvtier.pages import DeviceTensors

TAIL_PAGES: Final = 32
"""Of groups that need no whole prefix: a request has one page there, behind its last token."""


class EngineMemory:
    """Pages of random KV, and as many others as loads need: one tensor ``[parts, pages, page]`` for each size of page.

    Requests take random pages. What was loaded is compared, byte for byte, with the pages that it was stored from.
    A layout that keeps windows or states has few pages for these: of a request only its last page has one there.
    Torch moves one call for each size; its elements are of ``dtype``. Without a ``device`` the engine is one of
    the CPU; with one, ``cpu`` stands in for a GPU.
    """

    def __init__(
        self,
        layout: KVLayout,
        source_pages: int,
        target_pages: int,
        dtype: torch.dtype = torch.int64,
        device: str | None = None,
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.device = torch.device(device or "cpu")
        self._sides = (source_pages, target_pages)
        has_tails = any(group.reuse.rule != "all" for group in layout.groups)
        self._tails = min(TAIL_PAGES, *self._sides) if has_tails else 0
        self._groups = [_Group.of(group, self._sides, self._tails, self.device) for group in layout.groups]
        tensors = [tensor for group in self._groups for tensor in group.by_part]
        self.memory: Any = PagedTensors(layout, tensors) if device is None else DeviceTensors(layout, tensors)
        self._random = np.random.default_rng(0)

    # --- requests ---------------------------------------------------------------------------------------------------

    def request_bytes(self, pages: int) -> int:
        """Bytes of a request of ``pages`` pages."""
        return sum(group.page_bytes * (1 if group.is_tail else pages) for group in self._groups)

    def record_bytes(self, pages: int) -> int:
        """Bytes of the records of such a request, headers and all."""
        blocks = pages * self.layout.page_tokens // self.layout.block_tokens
        sizes = zip(self._groups, self.layout.record_pages, strict=True)
        return sum((1 if group.is_tail else blocks) * each * PAGE_BYTES for group, each in sizes)

    def sources(self, count: int) -> Ids:
        """``count`` random pages with content."""
        return self._drawn(0, 1, count)[0]

    def targets(self, count: int) -> Ids:
        """``count`` random pages to load into."""
        return self._drawn(1, 1, count)[0]

    def targets_apart(self, requests: int, count: int) -> list[Ids]:
        """``count`` random pages for each of several requests, to load into at once."""
        return self._drawn(1, requests, count)

    def pages(self, ids: Ids) -> KVPages:
        """A request's pages."""
        lists = [group.table(ids) for group in self._groups]
        return self.memory.pages(lists[0] if len(lists) == 1 else lists)  # type: ignore[no-any-return]

    def _drawn(self, side: int, requests: int, count: int) -> list[Ids]:
        """Pages of one side, none of them twice; where there are tails, the last of a request is one that has them."""
        ends = 1 if self._tails else 0
        last = self._random.permutation(self._tails)[: requests * ends]
        others = self._random.permutation(self._sides[side])
        rest = others[~np.isin(others, last)][: requests * (count - ends)].reshape(requests, count - ends)
        return list(side * self._sides[0] + np.hstack((rest, last.reshape(requests, ends))))

    # --- torch ------------------------------------------------------------------------------------------------------

    def buffers(self, pages: int) -> list[torch.Tensor]:
        """Room for a request of ``pages`` pages, on the engine's device."""
        return [
            torch.zeros((len(tensor) * count, tensor.shape[2]), dtype=torch.uint8, device=self.device).view(self.dtype)
            for group, tensor in self._tensors()
            for count in (1 if group.is_tail else pages,)
        ]

    def row_numbers(self, ids: Ids) -> list[torch.Tensor]:
        """Where in each table of pages a request lies, in the order of kvtier's records: block, part, page."""
        block_pages = self.layout.block_tokens // self.layout.page_tokens
        numbers = []
        for group, tensor in self._tensors():
            own = group.numbers(ids)
            blocks = own.reshape(-1, 1, 1 if group.is_tail else block_pages)
            rows = (blocks + np.arange(len(tensor)).reshape(1, -1, 1) * tensor.shape[1]).reshape(-1)
            numbers.append(torch.from_numpy(rows).to(self.device))
        return numbers

    def select(self, numbers: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        """``torch.index_select`` to ``buffers``."""
        for rows, own, buffer in zip(self._rows, numbers, buffers, strict=True):
            torch.index_select(rows, 0, own, out=buffer)

    def copy(self, numbers: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        """``torch.index_copy_`` from ``buffers``."""
        for rows, own, buffer in zip(self._rows, numbers, buffers, strict=True):
            rows.index_copy_(0, own, buffer)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- checks -----------------------------------------------------------------------------------------------------

    def clear(self, ids: Ids) -> None:
        """Fill the pages of a request with zeros."""
        for group, tensor in self._tensors():
            numbers = torch.from_numpy(group.numbers(ids)).to(self.device)
            for part in tensor:
                part.view(torch.int64).index_fill_(0, numbers, 0)

    def same(self, ids: Ids, others: Ids) -> bool:
        """Whether the pages of two requests hold the same bytes, page by page."""
        return all(
            torch.equal(part[one], part[other])
            for group, tensor in self._tensors()
            for one, other in ([torch.from_numpy(group.numbers(own)) for own in (ids, others)],)
            for part in tensor
        )

    def _tensors(self) -> Iterator[tuple[_Group, torch.Tensor]]:
        return ((group, tensor) for group in self._groups for tensor in group.by_size)

    @property
    def _rows(self) -> list[torch.Tensor]:
        return [tensor.view(-1, tensor.shape[2]).view(self.dtype) for _, tensor in self._tensors()]


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors of one group, pages with content first."""

    is_tail: bool
    first_target: int
    """Page of the engine from which on loads go."""
    shift: int
    """From there on, what to add to a page of the engine to have one of this group."""
    by_size: list[torch.Tensor]
    by_part: list[torch.Tensor]

    @classmethod
    def of(cls, group: KVGroup, sides: tuple[int, int], tails: int, device: torch.device) -> _Group:
        """As many pages as the engine has on its ``sides``, or ``tails`` on each; content in those of the first."""
        is_tail = group.reuse.rule != "all"
        own_sides = (tails, tails) if is_tail else sides
        parts, by_size = group.parts, []
        by_part: dict[int, torch.Tensor] = {}
        order = sorted(range(len(parts)), key=lambda number: parts[number].page_bytes)
        for page_bytes, numbers in groupby(order, key=lambda number: parts[number].page_bytes):
            own = list(numbers)
            tensor = torch.zeros((len(own), sum(own_sides), page_bytes), dtype=torch.uint8, device=device)
            for number, pages in zip(own, tensor, strict=True):
                random = torch.Generator(device).manual_seed(number)
                pages[: own_sides[0]].view(torch.int64).random_(generator=random)
                part = parts[number]
                by_part[number] = pages.view(getattr(torch, part.dtype)).view(-1, *part.shape)
            by_size.append(tensor)
        in_order = [by_part[number] for number in range(len(parts))]
        return cls(is_tail, sides[0], own_sides[0] - sides[0], by_size, in_order)

    @property
    def page_bytes(self) -> int:
        """Of one page over all parts."""
        return sum(tensor[:, 0].nbytes for tensor in self.by_size)

    def numbers(self, ids: Ids) -> Ids:
        """Which pages a request of the engine's pages ``ids`` has here."""
        if not self.is_tail:
            return ids
        last = ids[-1:]
        return last if last[0] < self.first_target else last + self.shift

    def table(self, ids: Ids) -> Ids:
        """The same as a page table: one entry for each page of the request."""
        if not self.is_tail:
            return ids
        table = np.full(len(ids), NO_PAGE)
        table[-1:] = self.numbers(ids)
        return table
