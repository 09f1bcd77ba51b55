"""KV memory of a paged engine: for every part one tensor of all pages, and page tables that name them by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.memory import NO_PAGE, Bytes1D, Bytes2D, PageTable, Tokens
from kvtier.errors import ConfigError
from kvtier.kernels import Addresses, FastPages, RecordMemory, Rows, RowSpace, SliceTable
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.models.layout import checked_layout
from kvtier.pages.apart import check_apart
from kvtier.pages.spans import BlockPages, Edge, cut
from kvtier.pages.tables import PagedMemory, cells_of, in_order_of_parts, same_count
from kvtier.pages.tensors import Moored, Tensor, bytes_of, dtype_of

Ids: TypeAlias = npt.NDArray[np.int32]
Cells: TypeAlias = npt.NDArray[np.uint8]
"""uint8 ``[pages, outer, entries, inner bytes]``: pages cut at the token axis, or one plane of them."""


class PagedTensors(PagedMemory, RecordMemory):
    """Engine memory as one tensor ``[num_pages, *part.shape]`` per part; implements ``core.memory.WindowedMemory``.

    ``tensors`` are in the order of the layout's parts, all groups one after another, or a mapping from (layer, kind),
    of parts that have a name from (layer, name). They are torch tensors or numpy arrays, contiguous, in CPU memory;
    nothing is copied, and they are kept alive. All parts of a group have the same number of pages.
    They have to stay where they are. One that was moved since, as ``share_memory_()``, a queue of torch.multiprocessing
    and an assignment to ``.data`` do, is refused by every later job, and must not be moved while one runs.
    """

    def __init__(self, layout: KVLayout, tensors: Sequence[Tensor] | Mapping[tuple[int, str], Tensor]) -> None:
        """Check every tensor against its part.

        Raises:
            ConfigError: naming the part, what was given and what it wants.
        """
        given = iter(in_order_of_parts(checked_layout(layout), tensors))
        self._groups = tuple(
            _GroupRows.of(
                layout,
                number,
                tuple(_PartPages.of(group, part, next(given), layout.page_tokens) for part in group.parts),
            )
            for number, group in enumerate(layout.groups)
        )
        check_apart((part.what, part.pages) for rows in self._groups for part in rows.parts)
        super().__init__(
            layout,
            tuple(
                same_count(group, [(part.part, len(part.pages)) for part in rows.parts])
                for group, rows in zip(layout.groups, self._groups, strict=True)
            ),
        )
        parts = (part for rows in self._groups for part in rows.parts)
        self._moored = Moored("PagedTensors", ((part.what, part.tensor) for part in parts))

    def check(self, table: PageTable, start: int, stop: int) -> None:
        """Refuse a page table that does not cover tokens [start, stop), and tensors that moved; see ``KVMemory``."""
        self._moored.check()
        self.check_table(table, start, stop)

    def gather(self, table: PageTable, group: int, first_tokens: Tokens, parts: range, out: Bytes2D) -> None:
        """Copy blocks of ``parts`` to ``out``; see ``KVMemory``.

        Raises:
            ConfigError: a block has no pages, or lacks some, as ``held`` tells.
        """
        rows, pages = self._groups[group], table.groups[group]
        if rows.blocks.may_lack_pages:
            self.check_held(group, pages, first_tokens)
        rows.gather(pages.ids, rows.blocks.bases(pages, first_tokens), parts, out)

    def scatter(
        self, table: PageTable, group: int, first_tokens: Tokens, parts: range, source: Bytes2D, start: int, stop: int
    ) -> None:
        """Write tokens [start, stop) of blocks of ``parts``; see ``KVMemory``.

        An entry of several tokens is written if its last token is among them, a state if that of its block is: what
        the engine has before is unfinished. Nothing is written where it has no page.
        """
        rows, pages = self._groups[group], table.groups[group]
        whole = rows.blocks.whole(first_tokens, start, stop)
        if rows.blocks.may_lack_pages:
            whole &= rows.blocks.held(pages, first_tokens // self.layout.block_tokens)
        bases = rows.blocks.bases(pages, first_tokens)
        if whole.all():
            rows.scatter(pages.ids, bases, parts, source)
            return
        if whole.any():
            rows.scatter(pages.ids, bases[whole], parts, source[whole])
        if rows.blocks.is_state:
            return
        ids, kept = rows.blocks.ids_of(pages, first_tokens), self.layout.kept_tokens[group]
        for block in np.flatnonzero(~whole).tolist():
            first = int(first_tokens[block]) + rows.blocks.skipped_tokens
            begin, end = max(start - first, 0), min(stop - first, kept)
            if begin < end:
                self._scatter_tokens(rows, ids[block], parts, source[block], begin, end)

    @property
    def moves_records(self) -> bool:
        """Whether there are compiled kernels, and no subclass wants to see the copies; see ``kernels.RecordMemory``."""
        own = type(self)
        is_plain = own.gather is PagedTensors.gather and own.scatter is PagedTensors.scatter
        return is_plain and self._groups[0].fast is not None

    def gather_records(
        self, table: PageTable, group: int, first_tokens: Tokens, slices: SliceTable, records: Addresses
    ) -> Bytes2D | None:
        """Copy whole blocks to records; see ``kernels.RecordMemory``."""
        rows, pages = self._groups[group], table.groups[group]
        if rows.fast is None:
            return None
        if rows.blocks.may_lack_pages:
            self.check_held(group, pages, first_tokens)
        return rows.fast.gather_records(pages.ids, rows.blocks.bases(pages, first_tokens), slices, records)

    def scatter_records(
        self, table: PageTable, group: int, first_tokens: Tokens, slices: SliceTable, records: Addresses,
        wanted: Bytes2D | None, start: int, stop: int,
    ) -> npt.NDArray[np.bool_] | None:  # fmt: skip
        """Write records to the pages of whole blocks; see ``kernels.RecordMemory``."""
        rows, pages = self._groups[group], table.groups[group]
        if rows.fast is None or not rows.blocks.whole(first_tokens, start, stop).all():
            return None
        if rows.blocks.may_lack_pages and not rows.blocks.held(pages, first_tokens // self.layout.block_tokens).all():
            return None
        bases = rows.blocks.bases(pages, first_tokens)
        return rows.fast.scatter_records(pages.ids, bases, slices, records, wanted)

    def _scatter_tokens(self, rows: _GroupRows, ids: Ids, parts: range, source: Bytes1D, begin: int, end: int) -> None:
        """Tokens [begin, end) of one block, whose pages are ``ids``: whole pages, and cells at both ends."""
        whole, edges = cut(begin, end, self.layout.page_tokens)
        numbers = [page for page in whole if ids[page] != NO_PAGE]
        at = 0
        for number in parts:
            part = rows.parts[number]
            block = source[at : at + part.page_bytes * rows.block_pages].reshape(rows.block_pages, part.page_bytes)
            at += block.nbytes
            if numbers:
                rows.space.scatter(rows.space.rows_of(number, ids[numbers]), block[numbers])
            for edge in edges:
                if ids[edge.page] != NO_PAGE:
                    part.write_entries(int(ids[edge.page]), block[edge.page], edge)


@dataclass(frozen=True, slots=True, eq=False)
class _PartPages:
    """One part's tensor as bytes."""

    what: str  # as messages call it
    tensor: Tensor  # as the engine has it
    pages: npt.NDArray[np.uint8]  # [num_pages, page_bytes]
    cells: tuple[Cells, ...]  # the same, cut into entries
    part: Part
    entries: int  # of a page

    @property
    def page_bytes(self) -> int:
        return self.part.page_bytes

    @classmethod
    def of(cls, group: KVGroup, part: Part, tensor: Tensor, page_tokens: int) -> _PartPages:
        what = f"tensor of group {group.name!r}, {part.label}"
        data = bytes_of(tensor, what)
        if tuple(tensor.shape[1:]) != part.shape or dtype_of(tensor) != part.dtype:
            raise ConfigError(
                f"{what}: got {dtype_of(tensor)} {list(tensor.shape)}, "
                f"want {part.dtype} [num_pages, {', '.join(map(str, part.shape))}]"
            )
        if not len(data):
            raise ConfigError(f"{what}: got {list(tensor.shape)}: it has no pages, want at least one")
        if not data.flags.c_contiguous:
            raise ConfigError(f"{what}: strides {data.strides} of bytes, want a contiguous tensor")
        pages = data.reshape(len(data), part.page_bytes)
        entries = 1 if part.is_state else page_tokens // part.tokens_per_entry
        return cls(what, tensor, pages, cells_of(part, pages, entries), part, entries)

    def write_entries(self, page_id: int, source: Bytes1D, edge: Edge) -> None:
        """Write what is finished by the tokens of ``edge``, from ``source``, a whole page."""
        span = np.s_[:, edge.start // self.part.tokens_per_entry : edge.stop // self.part.tokens_per_entry]
        for mine, theirs in zip(self.cells, cells_of(self.part, source[None], self.entries), strict=True):
            mine[page_id][span] = theirs[0][span]


@dataclass(frozen=True, slots=True, eq=False)
class _GroupRows:
    """The parts of one group as rows of one space, and which of them a block takes, in the order of its record."""

    parts: tuple[_PartPages, ...]
    block_pages: int
    blocks: BlockPages
    space: RowSpace
    first: Rows  # [rows of a block]: where the row would lie if its page were page 0
    page: Rows  # the page of the block that it belongs to
    step: Rows  # rows from one page to the next
    begins: tuple[int, ...]  # [parts + 1]: a block's rows of part i are begins[i] to begins[i + 1]
    fast: FastPages | None  # the same pages for compiled kernels

    @classmethod
    def of(cls, layout: KVLayout, group: int, parts: tuple[_PartPages, ...]) -> _GroupRows:
        space, block_pages = RowSpace([part.pages for part in parts]), layout.block_pages[group]
        counts = space.rows_a_page
        zeros = np.zeros(block_pages, np.intp)
        first, second = (
            np.concatenate([space.rows_of(number, zeros + page).reshape(-1) for number in range(len(parts))])
            for page in (0, 1)
        )
        return cls(
            parts=parts,
            block_pages=block_pages,
            blocks=BlockPages.of(layout, group),
            space=space,
            first=first,
            page=np.concatenate([np.repeat(np.arange(block_pages), count) for count in counts]),
            step=second - first,
            begins=tuple(accumulate((block_pages * count for count in counts), initial=0)),
            fast=FastPages.of([part.pages for part in parts], block_pages),
        )

    def gather(self, ids: Ids, bases: Tokens, parts: range, out: Bytes2D) -> None:
        """Copy ``parts`` of the blocks whose pages are ``ids[base:]`` to ``out``."""
        if self.fast is None:
            self.space.gather(self.of_blocks(ids, bases, parts), out)
        else:
            self.fast.gather(ids, bases, parts, out)

    def scatter(self, ids: Ids, bases: Tokens, parts: range, source: Bytes2D) -> None:
        """Copy ``source`` to ``parts`` of the blocks whose pages are ``ids[base:]``."""
        if self.fast is None:
            self.space.scatter(self.of_blocks(ids, bases, parts), source)
        else:
            self.fast.scatter(ids, bases, parts, source)

    def of_blocks(self, ids: Ids, bases: Tokens, parts: range) -> Rows:
        """Rows of ``parts`` of the blocks whose pages are ``ids[base:]``: ``[blocks, rows]``."""
        own = slice(self.begins[parts.start], self.begins[parts.stop])
        rows: Rows = ids[bases[:, None] + self.page[own]] * self.step[own] + self.first[own]
        return rows
