"""Page tables of a paged engine: which pages a request names, checked against the memory that has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.checks import whole
from kvtier.core.memory import NO_PAGE, Blocks, Bytes2D, GroupPages, KVPages, Mask, PageTable, Tokens
from kvtier.errors import ConfigError
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.pages.spans import BlockPages, check_groups, frozen_ids
from kvtier.pages.tensors import Tensor, listed

Ids: TypeAlias = npt.NDArray[np.int32]
_SHORT: Final = 32
"""Page ids that are looked at one by one in less time than as an array."""


class PagedMemory(ABC):
    """What all memory in pages has in common, wherever its bytes lie: tables of pages, and what can be said of them."""

    def __init__(self, layout: KVLayout, num_pages: tuple[int, ...]) -> None:
        """``num_pages`` of each group."""
        self.layout = layout
        self.num_pages = num_pages
        self.blocks = tuple(BlockPages.of(layout, group) for group in range(len(layout.groups)))

    @property
    def placement(self) -> str:
        """Placement digest (hex) of the layout."""
        return self.layout.placement

    @property
    def is_paged(self) -> bool:
        """Yes."""
        return True

    def pages(self, ids: Any, first_token: int = 0) -> KVPages:
        """A request's pages: ``ids[i]`` holds the tokens from ``first_token + i * page_tokens``.

        ``ids`` is a list, an array or a tensor of integers; for a layout of several groups a list of them, one each.
        Of a group of states, ``ids[i]`` is the state behind token ``first_token + (i + 1) * block_tokens``. Where a
        group needs no whole prefix, an id may be ``NO_PAGE`` (-1).

        Raises:
            ConfigError: no such pages, or ``first_token`` is not a multiple of ``page_tokens``, or, with a group of
                states, of ``block_tokens``.
        """
        groups, first_token = self.layout.groups, whole("first_token", first_token)
        lists = [ids] if len(groups) == 1 else listed("page ids", ids)
        if len(lists) != len(groups):
            raise ConfigError(f"page ids: got {len(lists)} lists, the layout has {len(groups)} groups")
        per_group = tuple(
            GroupPages(first_token, frozen_ids(own, f"page ids of group {group.name!r}", least=_least_id(group)))
            for own, group in zip(lists, groups, strict=True)
        )
        table = PageTable(-1, per_group)
        covered = [
            first_token + len(pages.ids) * self.layout.page_tokens
            for pages, group in zip(per_group, groups, strict=True)
            if group.reuse.rule == "all"
        ]
        self.check_table(table, first_token, min(covered, default=first_token))
        return KVPages(self, table)

    @abstractmethod
    def check(self, table: PageTable, start: int, stop: int) -> None:
        """See ``KVMemory``."""

    @abstractmethod
    def gather(self, table: PageTable, group: int, first_tokens: Tokens, parts: range, out: Bytes2D) -> None:
        """See ``KVMemory``."""

    @abstractmethod
    def scatter(
        self, table: PageTable, group: int, first_tokens: Tokens, parts: range, source: Bytes2D, start: int, stop: int
    ) -> None:
        """See ``KVMemory``."""

    def held(self, table: PageTable, group: int, blocks: Blocks) -> Mask:
        """Which of ``blocks`` lie in the pages of ``group``; see ``WindowedMemory``."""
        return self.blocks[group].held(table.groups[group], blocks)

    def check_held(self, group: int, pages: GroupPages, first_tokens: Tokens) -> None:
        """Refuse blocks of ``group`` that have no pages in its table, or lack some.

        Raises:
            ConfigError: naming one.
        """
        held = self.blocks[group].held(pages, first_tokens // self.layout.block_tokens)
        if not held.all():
            first = int(first_tokens[~held][0])
            raise ConfigError(
                f"{self._where(group)}: the block of tokens [{first}, {first + self.layout.block_tokens}) has no pages,"
                " or lacks some: held() tells which blocks can be stored"
            )

    def check_table(self, table: PageTable, start: int, stop: int) -> None:
        """Refuse a page table that does not cover tokens [start, stop), or names pages that are not there.

        Raises:
            ConfigError: what is missing.
        """
        check_groups(table.groups, len(self.num_pages))
        for group, pages in enumerate(table.groups):
            self._check_group(group, pages, start, stop)

    def _check_group(self, group: int, pages: GroupPages, start: int, stop: int) -> None:
        size, first = self.blocks[group].unit_tokens, pages.first_token
        if first < 0 or first % size:
            name = "page_tokens" if size == self.layout.page_tokens else "block_tokens"
            raise ConfigError(f"{self._where(group)}: first_token = {first}, want a multiple of {name} = {size}")
        if self.layout.groups[group].reuse.rule == "all":
            self._check_covered(group, pages, start, stop)
            touched = pages.ids[(start - first) // size : -(-(stop - first) // size)]
        else:
            touched = pages.ids[pages.ids != NO_PAGE]
        if not len(touched):
            return
        low, high, are_distinct = _range_of(touched)
        if not 0 <= low <= high < self.num_pages[group]:
            last = self.num_pages[group] - 1
            raise ConfigError(f"{self._where(group)}: ids {low} to {high}, the memory has pages 0 to {last}")
        if not are_distinct:
            raise ConfigError(
                f"{self._where(group)}: a page id is there twice; two parts of a sequence cannot lie in one page"
            )

    def _check_covered(self, group: int, pages: GroupPages, start: int, stop: int) -> None:
        size, first = self.layout.page_tokens, pages.first_token
        covered = first + len(pages.ids) * size
        if start < first or stop > covered:
            begin = start // size * size
            raise ConfigError(
                f"{self._where(group)}: its {len(pages.ids)} pages hold tokens [{first}, {covered}), want "
                f"[{start}, {stop}): {-(-(stop - begin) // size)} pages of {size} tokens from token {begin}"
            )

    def _where(self, group: int) -> str:
        return f"page table of group {self.layout.groups[group].name!r}"


def _least_id(group: KVGroup) -> int:
    return 0 if group.reuse.rule == "all" else NO_PAGE


def _range_of(ids: Ids) -> tuple[int, int, bool]:
    """The least and the greatest of ``ids``, and whether all are different; at least one."""
    if len(ids) == 1:
        only = ids.item()
        return only, only, True
    if len(ids) <= _SHORT:
        numbers = ids.tolist()
        return min(numbers), max(numbers), len(set(numbers)) == len(numbers)
    if not np.count_nonzero(ids[1:] <= ids[:-1]):  # as an engine with many free pages gives them
        return ids.item(0), ids.item(-1), True
    ordered = np.sort(ids)
    return ordered.item(0), ordered.item(-1), not np.count_nonzero(ordered[1:] == ordered[:-1])


def in_order_of_parts(
    layout: KVLayout, tensors: Sequence[Tensor] | Mapping[tuple[int, str], Tensor]
) -> Sequence[Tensor]:
    """``tensors``, or those that stand beside (layer, kind or name), in the order of the layout's parts.

    Raises:
        ConfigError: there are too few or too many, or their names do not tell them apart.
    """
    parts = [part for group in layout.groups for part in group.parts]
    if not isinstance(tensors, Mapping):
        given = listed("tensors", tensors)
        if len(given) != len(parts):
            raise ConfigError(f"tensors: got {len(given)}, the layout has {len(parts)} parts")
        return given
    names = [(part.layer, part.name or part.kind) for part in parts]
    if len(set(names)) != len(names):
        raise ConfigError(
            "tensors: two groups have a part of the same layer and kind; pass a list in the layout's order"
        )
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in set(names)]
    if missing or unknown:
        raise ConfigError(f"tensors: missing {missing[:4]}, not in the layout {unknown[:4]}")
    return [tensors[name] for name in names]


def same_count(group: KVGroup, counts: Sequence[tuple[Part, int]]) -> int:
    """How many pages all parts of ``group`` have, which ``counts`` say.

    Raises:
        ConfigError: they differ.
    """
    first, count = counts[0]
    for part, other in counts:
        if other != count:
            raise ConfigError(
                f"group {group.name!r}: {first.label} has {count} pages, {part.label} has {other}; page ids need the"
                " same number in all"
            )
    return count


def cells_of(part: Part, pages: Any, entries: int) -> tuple[Any, ...]:
    """Views of ``pages``, an array or a tensor of bytes ``[pages, page_bytes]``, cut into ``entries`` a page.

    One for each plane of ``part``, or one for all: ``[pages, outer, entries, inner bytes]``.
    """
    count = len(pages)
    if not part.planes:
        outer = 1 if part.is_state else prod(part.shape[: part.token_axis])
        return (pages.reshape(count, outer, entries, -1),)
    begins = accumulate((entries * width for width in part.planes), initial=0)
    planes = (pages[:, begin : begin + entries * width] for begin, width in zip(begins, part.planes, strict=False))
    return tuple(plane.reshape(count, 1, entries, -1) for plane in planes)
