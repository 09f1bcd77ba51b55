"""KV memory of one sequence: for every part one tensor of the entries that are there, or of its states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.checks import whole
from kvtier.core.memory import NO_PAGE, Blocks, Bytes1D, Bytes2D, GroupPages, KVPages, Mask, PageTable, Tokens
from kvtier.errors import ConfigError
from kvtier.models import DTYPE_BYTES, KVGroup, KVLayout, Part
from kvtier.models.layout import checked_layout
from kvtier.pages.apart import check_apart
from kvtier.pages.spans import BlockPages, check_groups, frozen_ids
from kvtier.pages.tensors import Moored, Tensor, bytes_of, dtype_of, listed

Cells: TypeAlias = npt.NDArray[np.uint8]


class SequenceTensors:
    """KV of one sequence in any layout; implements ``core.memory.WindowedMemory``.

    ``tensors`` are in the order of the layout's parts, all groups one after another. One of a part that has a token
    axis is ``part.shape`` with any number of whole pages along that axis; one of a state is ``[states, *part.shape]``.
    Within a group all have as many pages, or states. Any strides will do as long as the last dimension is contiguous;
    nothing is copied, and the tensors are kept alive. They have to stay where they are, as those of ``PagedTensors``.

    Pages lie side by side along the token axis, where ``PagedTensors`` has each by itself. So a cut of what
    transformers' caches hold is such a tensor, and the blocks of a window that are worth keeping can be put together.
    """

    def __init__(self, layout: KVLayout, tensors: Sequence[Tensor]) -> None:
        """Check every tensor against its part.

        Raises:
            ConfigError: naming the part, what was given and what it wants.
        """
        self.layout = checked_layout(layout)
        given = listed("tensors", tensors)
        parts = [part for group in layout.groups for part in group.parts]
        if len(given) != len(parts):
            raise ConfigError(f"tensors: got {len(given)}, the layout has {len(parts)} parts")
        left = iter(given)
        self._groups = tuple(
            tuple(_SequencePart.of(group, part, next(left), layout) for part in group.parts) for group in layout.groups
        )
        self._blocks = tuple(BlockPages.of(layout, number) for number in range(len(layout.groups)))
        held = [part for parts in self._groups for part in parts]
        check_apart((part.what, part.data) for part in held)
        self.num_pages = tuple(_same_count(group, own) for group, own in zip(layout.groups, self._groups, strict=True))
        self._moored = Moored("SequenceTensors", ((part.what, part.tensor) for part in held))

    @property
    def placement(self) -> str:
        """Placement digest (hex) of the layout."""
        return self.layout.placement

    @property
    def is_paged(self) -> bool:
        """No: the tables of two memories have nothing to share, as each holds one sequence."""
        return False

    def pages(self, ids: Sequence[Any], first_tokens: Sequence[int]) -> KVPages:
        """The sequence: per group, page ``ids[i]`` holds the tokens from ``first_token + i * page_tokens``.

        Of a group of states, ``ids[i]`` is the state behind the i-th block from ``first_token`` on. Where a group needs
        no whole prefix, an id may be ``NO_PAGE`` (-1).

        Raises:
            ConfigError: no such pages, or no such number of groups.
        """
        if len(ids) != len(self._groups) or len(first_tokens) != len(self._groups):
            raise ConfigError(
                f"page ids: got {len(ids)} lists and {len(first_tokens)} first tokens, the layout has"
                f" {len(self._groups)} groups"
            )
        groups = tuple(
            GroupPages(whole("first_token", first), frozen_ids(own, f"page ids of group {group.name!r}", least=least))
            for group, own, first in zip(self.layout.groups, ids, first_tokens, strict=True)
            for least in (0 if group.reuse.rule == "all" else NO_PAGE,)
        )
        table = PageTable(-1, groups)
        self._check_table(table)
        return KVPages(self, table)

    def check(self, table: PageTable, start: int, stop: int) -> None:
        """Refuse a page table that does not cover tokens [start, stop), and tensors that moved; see ``KVMemory``."""
        self._moored.check()
        self._check_table(table)
        for group, pages in zip(self.layout.groups, table.groups, strict=True):
            covered = pages.first_token + len(pages.ids) * self.layout.page_tokens
            if group.reuse.rule == "all" and (start < pages.first_token or stop > covered):
                raise ConfigError(
                    f"page table of group {group.name!r}: its pages hold tokens [{pages.first_token}, {covered}), want"
                    f" [{start}, {stop})"
                )

    def held(self, table: PageTable, group: int, blocks: Blocks) -> Mask:
        """Which of ``blocks`` lie in the pages of ``group``; see ``WindowedMemory``."""
        return self._blocks[group].held(table.groups[group], blocks)

    def gather(self, table: PageTable, group: int, first_tokens: Tokens, parts: range, out: Bytes2D) -> None:
        """Copy blocks of ``parts`` to ``out``; see ``KVMemory``.

        Raises:
            ConfigError: a block lacks pages, as ``held`` tells.
        """
        ids = self._blocks[group].ids_of(table.groups[group], first_tokens)
        if (ids == NO_PAGE).any():
            raise ConfigError(
                f"page table of group {self.layout.groups[group].name!r}: a block lacks pages: held() tells which"
                " blocks can be stored"
            )
        for block, row in zip(ids, out, strict=True):
            for part, pages in self._of_record(group, parts, row):
                for number, page in enumerate(block.tolist()):
                    np.copyto(pages[number], part.page(page))

    def scatter(
        self, table: PageTable, group: int, first_tokens: Tokens, parts: range, source: Bytes2D, start: int, stop: int
    ) -> None:
        """Write tokens [start, stop) of blocks of ``parts``; see ``KVMemory``.

        An entry of several tokens is written if its last token is among them, a state if that of its block is. Nothing
        is written where there is no page.
        """
        blocks = self._blocks[group]
        whole_ones = blocks.whole(first_tokens, start, stop)
        ids = blocks.ids_of(table.groups[group], first_tokens)
        for number, (first, row) in enumerate(zip(first_tokens.tolist(), source, strict=True)):
            if not whole_ones[number] and blocks.is_state:
                continue
            begin = first + blocks.skipped_tokens
            for part, pages in self._of_record(group, parts, row):
                for at, page in enumerate(ids[number].tolist()):
                    if page == NO_PAGE:
                        continue
                    if whole_ones[number]:
                        np.copyto(part.page(page), pages[at])
                    else:
                        part.write(page, pages[at], start - begin, stop - begin, at * self.layout.page_tokens)

    def _of_record(self, group: int, parts: range, row: Bytes1D) -> Iterator[tuple[_SequencePart, Cells]]:
        """Each of ``parts`` with its share of one record: ``[pages, *page]``."""
        at = 0
        for part in self._groups[group][parts.start : parts.stop]:
            nbytes = part.part.page_bytes * self._blocks[group].pages
            yield part, row[at : at + nbytes].reshape(-1, *part.page_shape)
            at += nbytes

    def _check_table(self, table: PageTable) -> None:
        check_groups(table.groups, len(self._groups))
        for number, pages in enumerate(table.groups):
            where = f"page table of group {self.layout.groups[number].name!r}"
            size, first = self._blocks[number].unit_tokens, pages.first_token
            if first < 0 or first % size:
                raise ConfigError(f"{where}: first_token = {first}, want a multiple of {size}")
            touched = pages.ids[pages.ids != NO_PAGE]
            if self.layout.groups[number].reuse.rule == "all" and len(touched) != len(pages.ids):
                raise ConfigError(f"{where}: lacks a page; a hit needs all of this group")
            if len(touched) and not 0 <= touched.min() <= touched.max() < self.num_pages[number]:
                raise ConfigError(
                    f"{where}: ids {touched.min()} to {touched.max()}, the memory has pages 0 to"
                    f" {self.num_pages[number] - 1}"
                )
            if len(np.unique(touched)) != len(touched):
                raise ConfigError(f"{where}: a page id is there twice; two parts of a sequence cannot lie in one page")


@dataclass(frozen=True, slots=True, eq=False)
class _SequencePart:
    """One part's tensor as bytes: pages side by side along ``axis``."""

    what: str  # as messages call it
    tensor: Tensor  # as the caller has it
    data: Cells  # the tensor, its last dimension counted in bytes, strided
    part: Part
    axis: int  # of the tensor, along which pages lie
    step: int  # from one page to the next along it
    entry: int  # from one entry to the next along it
    ratio: int  # tokens of an entry
    page_shape: tuple[int, ...]  # of one page in bytes
    count: int  # pages

    @classmethod
    def of(cls, group: KVGroup, part: Part, tensor: Tensor, layout: KVLayout) -> _SequencePart:
        what = f"tensor of group {group.name!r}, {part.label}"
        if part.planes:
            raise ConfigError(f"{what}: its pages lie in planes, which one tensor of a sequence cannot have")
        data = bytes_of(tensor, what)
        width = DTYPE_BYTES[part.dtype]
        page_shape = (*part.shape[:-1], part.shape[-1] * width)
        axis = 0 if part.is_state else part.token_axis
        shape = list(tensor.shape)
        whole_page = 1 if part.is_state else part.shape[axis]
        count, odd = divmod(shape[axis] if axis < len(shape) else 0, whole_page)
        rest = (*part.shape,) if part.is_state else (*part.shape[:axis], *part.shape[axis + 1 :])
        if odd or (*shape[:axis], *shape[axis + 1 :]) != rest or dtype_of(tensor) != part.dtype:
            raise ConfigError(f"{what}: got {dtype_of(tensor)} {shape}, want {part.dtype} {_wanted(part)}")
        unit = width if axis == len(part.shape) - 1 and not part.is_state else 1
        step = 1 if part.is_state else part.shape[axis] * unit
        return cls(what, tensor, data, part, axis, step, unit, part.tokens_per_entry, page_shape, count)

    def page(self, number: int) -> Cells:
        """Page ``number`` as the tensor has it, ``page_shape``."""
        page: Cells = self.data[self._along(number * self.step, (number + 1) * self.step)]
        return page[0] if self.part.is_state else page

    def write(self, number: int, source: Cells, start: int, stop: int, skipped: int) -> None:
        """What tokens [start, stop) finish of page ``number``; ``skipped`` tokens come before the page."""
        size = self.step // self.entry
        first = max(start - skipped, 0) // self.ratio
        last = min((stop - skipped) // self.ratio, size)
        if first < last:
            span = self._along(first * self.entry, last * self.entry)
            self.page(number)[span] = source[span]

    def _along(self, start: int, stop: int) -> tuple[slice, ...]:
        return (*(slice(None) for _ in range(self.axis)), slice(start, stop))


def _wanted(part: Part) -> str:
    if part.is_state:
        return f"[states, {', '.join(map(str, part.shape))}]"
    sizes = [f"a multiple of {size}" if at == part.token_axis else str(size) for at, size in enumerate(part.shape)]
    return f"[{', '.join(sizes)}]"


def _same_count(group: KVGroup, parts: tuple[_SequencePart, ...]) -> int:
    counts = {part.count for part in parts}
    if len(counts) > 1:
        raise ConfigError(f"group {group.name!r}: its tensors have {sorted(counts)} pages; all need the same number")
    return counts.pop()
