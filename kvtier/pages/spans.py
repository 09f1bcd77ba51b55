"""Which tokens of a block a copy touches: whole pages in the middle, and what is left of pages at both ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtier.core.memory import NO_PAGE, Blocks, GroupPages, Mask
from kvtier.errors import ConfigError
from kvtier.models import KVLayout
from kvtier.models.parts import ReuseRule

_INT32: Final = np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class Edge:
    """Tokens [start, stop) of page ``page`` of a block, fewer than the page has."""

    page: int
    start: int
    stop: int


def cut(start: int, stop: int, page_tokens: int) -> tuple[range, tuple[Edge, ...]]:
    """Tokens [start, stop) of a block as the range of its whole pages, and the edges before and after."""
    first, head = divmod(start, page_tokens)
    last, tail = divmod(stop, page_tokens)
    if first == last:
        return range(0), (Edge(first, head, tail),) if head < tail else ()
    edges = []
    if head:
        edges.append(Edge(first, head, page_tokens))
        first += 1
    if tail:
        edges.append(Edge(last, 0, tail))
    return range(first, last), tuple(edges)


def check_groups(groups: tuple[GroupPages, ...], want: int) -> None:
    """Refuse what is no table, or one for another number of groups than the layout has.

    Raises:
        ConfigError: naming what was given, and what it takes.
    """
    if not isinstance(groups, tuple):
        raise ConfigError(f"page table: groups are a {type(groups).__name__}, want a tuple of GroupPages")
    if len(groups) != want:
        raise ConfigError(f"page table: has {len(groups)} groups, the layout has {want}")
    for pages in groups:
        if not isinstance(pages, GroupPages):
            raise ConfigError(f"page table: has a {type(pages).__name__}, want GroupPages")
        ids = pages.ids
        if not isinstance(ids, np.ndarray) or ids.dtype is not _INT32 or ids.ndim != 1:
            _check_ids(ids)
        if type(pages.first_token) is not int:
            raise ConfigError(f"page table: first_token = {pages.first_token!r}, want an int")


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, np.ndarray):
        raise ConfigError(f"page table: ids are a {type(ids).__name__}, want an array of int32")
    if ids.dtype != _INT32 or ids.ndim != 1:  # equal types need not be the same object
        raise ConfigError(f"page table: ids are {ids.dtype} {ids.shape}, want one dimension of int32")


@dataclass(frozen=True, slots=True)
class BlockPages:
    """Which pages of a table the blocks of one group take."""

    unit_tokens: int
    """From one id to the next: the tokens of a page, or of a block, where a page is a state."""
    skipped_tokens: int
    """At the beginning of a block, which its records do not hold."""
    pages: int
    block_tokens: int
    rule: ReuseRule

    @classmethod
    def of(cls, layout: KVLayout, group: int) -> BlockPages:
        """Those of ``group``."""
        rule = layout.groups[group].reuse.rule
        if rule == "last":
            return cls(layout.block_tokens, 0, 1, layout.block_tokens, rule)
        skipped = layout.block_tokens - layout.kept_tokens[group]
        return cls(layout.page_tokens, skipped, layout.block_pages[group], layout.block_tokens, rule)

    @property
    def is_state(self) -> bool:
        """Whether a page is a state, behind the last token of its block."""
        return self.rule == "last"

    @property
    def may_lack_pages(self) -> bool:
        """Whether a block may have pages in part, or none at all."""
        return self.rule != "all"

    def bases(self, table: GroupPages, first_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where in the ids of ``table`` the pages begin of blocks that begin at ``first_tokens``."""
        bases: npt.NDArray[np.int64] = (first_tokens + self.skipped_tokens - table.first_token) // self.unit_tokens
        return bases

    def ids_of(self, table: GroupPages, first_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Ids of the pages of blocks that begin at ``first_tokens``: ``[blocks, pages]``.

        NO_PAGE stands where ``table`` says so, and where it does not reach.
        """
        at = self.bases(table, first_tokens)[:, None] + np.arange(self.pages)
        inside = (at >= 0) & (at < len(table.ids))
        ids = np.full(at.shape, NO_PAGE, np.int32)
        ids[inside] = table.ids[at[inside]]
        return ids

    def held(self, table: GroupPages, blocks: Blocks) -> Mask:
        """Which of ``blocks`` have all of their pages in ``table``."""
        held: Mask = (self.ids_of(table, blocks * self.block_tokens) != NO_PAGE).all(axis=1)
        return held

    def whole(self, first_tokens: npt.NDArray[np.int64], start: int, stop: int) -> Mask:
        """Of which blocks all that their records hold lies in tokens [start, stop).

        A state is there once the last token of its block is.
        """
        begins, ends = first_tokens + self.skipped_tokens, first_tokens + self.block_tokens
        if self.is_state:
            begins = ends - 1
        whole: Mask = (begins >= start) & (ends <= stop)
        return whole


def frozen_ids(ids: Any, what: str, *, least: int = 0) -> npt.NDArray[np.int32]:
    """``ids`` (a list, an array or a tensor), ``least`` or more, as an int32 array of our own that nobody can change.

    Raises:
        ConfigError: they are not one dimension of integers that fit.
    """
    try:
        given = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    except ValueError as error:  # lists of different lengths
        raise ConfigError(f"{what}: want one dimension of integers, got {ids!r}") from error
    except (TypeError, NotImplementedError) as error:  # a dtype that numpy lacks, such as bfloat16; the meta device
        raise ConfigError(f"{what}: want one dimension of integers, got {type(ids).__name__}: {error}") from error
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ConfigError(f"{what}: want one dimension of integers, got shape {given.shape} of {given.dtype}")
    if given.size and (int(given.min()) < least or int(given.max()) > np.iinfo(np.int32).max):
        raise ConfigError(f"{what}: ids lie in [{least}, 2^31), got {int(given.min())} to {int(given.max())}")
    return np.frombuffer(given.astype(np.int32).tobytes(), np.int32)  # of bytes, which nobody can make writeable


def are_frozen(ids: npt.NDArray[np.int32]) -> bool:
    """Whether nobody can change ``ids``. Flags would not tell: they can be set back, and do not bind other views."""
    base: object = ids.base
    return type(base) is bytes
