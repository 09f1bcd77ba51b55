"""KV memory of transformers: per layer a tensor of keys and one of values, ``[batch, heads, tokens, dim]``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier.core.checks import whole
from kvtier.core.memory import Bytes1D, Bytes2D, GroupPages, KVPages, PageTable, Tokens
from kvtier.errors import ConfigError
from kvtier.models import DTYPE_BYTES, KVGroup, KVLayout, Part
from kvtier.models.layout import checked_layout
from kvtier.pages.apart import check_apart
from kvtier.pages.spans import check_groups, frozen_ids
from kvtier.pages.tensors import Moored, Tensor, bytes_of, dtype_of, listed


class DenseKV:
    """Keys and values as transformers' dynamic caches keep them; implements ``core.memory.KVMemory``.

    ``keys[i]`` and ``values[i]`` belong to the i-th layer of the layout. Any strides will do as long as the last
    dimension is contiguous; nothing is copied, and the tensors are kept alive. The layout decides how a block lies in
    the tiers: heads first, as here, or tokens first, as paged engines do, in which case copies transpose.
    The tensors have to stay where they are, as those of ``PagedTensors``.
    In a page table of this memory a group has one id, the row of the batch, which holds all tokens from
    ``first_token`` on.
    """

    def __init__(self, layout: KVLayout, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Check every tensor against its part.

        Raises:
            ConfigError: naming the part, what was given and what it wants.
        """
        self.layout = checked_layout(layout)
        for group in layout.groups:
            if group.reuse.rule != "all":
                raise ConfigError(
                    f"group {group.name!r}: reuse rule {group.reuse.rule!r}: DenseKV holds whole sequences; use"
                    " PagedTensors, or describe windows as kept whole: KVLayout.from_hf_config(config, windows=False)"
                )
        layers = {layer: row for row, layer in enumerate(sorted({p.layer for g in layout.groups for p in g.parts}))}
        sides = {"k": listed("keys", keys), "v": listed("values", values)}
        for name, given in zip(("keys", "values"), sides.values(), strict=True):
            if len(given) != len(layers):
                raise ConfigError(f"{name}: got {len(given)} tensors, the layout has {len(layers)} layers")
        self._groups = tuple(
            tuple(
                _DensePart.of(group, part, _side(sides, group, part)[layers[part.layer]], layout)
                for part in group.parts
            )
            for group in layout.groups
        )
        check_apart((part.what, part.data) for parts in self._groups for part in parts)
        sizes = {(part.data.shape[0], part.data.shape[2]) for parts in self._groups for part in parts}
        if len(sizes) != 1:
            raise ConfigError(f"keys, values: tensors differ in (batch, tokens): {sorted(sizes)}")
        self.batch_size, self.num_tokens = sizes.pop()
        self._moored = Moored("DenseKV", ((part.what, part.tensor) for parts in self._groups for part in parts))

    @property
    def placement(self) -> str:
        """Placement digest (hex) of the layout."""
        return self.layout.placement

    @property
    def is_paged(self) -> bool:
        """No: an id is a whole row of the batch."""
        return False

    def row(self, batch_index: int = 0, first_token: int = 0) -> KVPages:
        """One sequence of the batch; position 0 of the tensors holds its token ``first_token``.

        Raises:
            ConfigError: no such row.
        """
        ids, first_token = frozen_ids([batch_index], "batch_index"), whole("first_token", first_token)
        table = PageTable(-1, tuple(GroupPages(first_token, ids) for _ in self.layout.groups))
        self._check_table(table, first_token, first_token)
        return KVPages(self, table)

    def check(self, table: PageTable, start: int, stop: int) -> None:
        """Refuse a page table that does not cover tokens [start, stop), and tensors that moved; see ``KVMemory``."""
        self._moored.check()
        self._check_table(table, start, stop)

    def gather(self, table: PageTable, group: int, first_tokens: Tokens, parts: range, out: Bytes2D) -> None:
        """Copy blocks of ``parts`` to ``out``; see ``KVMemory``."""
        tokens = range(self.layout.block_tokens)
        for first, row in zip(first_tokens.tolist(), out, strict=True):
            for theirs, mine in self._pairs(table.groups[group], group, first, parts, row, tokens):
                np.copyto(mine, theirs)

    def scatter(
        self, table: PageTable, group: int, first_tokens: Tokens, parts: range, source: Bytes2D, start: int, stop: int
    ) -> None:
        """Write tokens [start, stop) of blocks of ``parts``; see ``KVMemory``."""
        for first, row in zip(first_tokens.tolist(), source, strict=True):
            wanted = range(max(start - first, 0), min(stop - first, self.layout.block_tokens))
            for theirs, mine in self._pairs(table.groups[group], group, first, parts, row, wanted):
                np.copyto(theirs, mine)

    def _check_table(self, table: PageTable, start: int, stop: int) -> None:
        check_groups(table.groups, len(self.layout.groups))
        for group, pages in zip(self.layout.groups, table.groups, strict=True):
            where = f"page table of group {group.name!r}"
            if len(pages.ids) != 1 or not 0 <= int(pages.ids[0]) < self.batch_size:
                raise ConfigError(
                    f"{where}: ids {pages.ids.tolist()}, want one row of the batch, 0 to {self.batch_size - 1}"
                )
            covered = pages.first_token + self.num_tokens
            if pages.first_token < 0 or start < pages.first_token or stop > covered:
                raise ConfigError(
                    f"{where}: the tensors hold tokens [{pages.first_token}, {covered}), want [{start}, {stop}): "
                    f"{stop - start} along their token dimension from token {start}"
                )

    def _pairs(
        self, pages: GroupPages, group: int, first: int, parts: range, block: Bytes1D, tokens: range
    ) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """Views of the tensors and of ``block``, which begins at token ``first``, for those of its ``tokens``."""
        at = 0
        for part in self._groups[group][parts.start : parts.stop]:
            own = part.block(block[at : at + part.block_bytes])
            at += part.block_bytes
            yield from part.pairs(own, int(pages.ids[0]), first - pages.first_token, tokens)


@dataclass(frozen=True, slots=True, eq=False)
class _DensePart:
    """One part's tensor as bytes, and how a block of it is ordered."""

    what: str  # as messages call it
    tensor: Tensor  # as the engine has it
    data: npt.NDArray[np.uint8]  # [batch, heads, tokens, dim bytes], strided
    page_shape: tuple[int, ...]  # of one page in bytes, in the layout's order of axes
    to_heads_first: tuple[int, ...]  # axes of [page, *page_shape] in the order page, head, token, dim
    page_tokens: int
    block_bytes: int

    @classmethod
    def of(cls, group: KVGroup, part: Part, tensor: Tensor, layout: KVLayout) -> _DensePart:
        what = f"tensor of group {group.name!r}, {part.label}"
        if sorted(part.axes) != ["dim", "head", "token"] or part.axes[-1] != "dim":
            raise ConfigError(f"{what}: axes {part.axes} of the layout, want head, token and dim with dim last")
        if part.tokens_per_entry > 1:
            raise ConfigError(
                f"{what}: an entry of the layout is {part.tokens_per_entry} tokens, want one for each token"
            )
        data = bytes_of(tensor, what)
        heads, dim = part.shape[part.axes.index("head")], part.shape[-1]
        if data.ndim != 4 or (tensor.shape[1], tensor.shape[3]) != (heads, dim) or dtype_of(tensor) != part.dtype:
            raise ConfigError(
                f"{what}: got {dtype_of(tensor)} {list(tensor.shape)}, "
                f"want {part.dtype} [batch, {heads}, tokens, {dim}]"
            )
        return cls(
            what=what,
            tensor=tensor,
            data=data,
            page_shape=(*part.shape[:-1], dim * DTYPE_BYTES[part.dtype]),
            to_heads_first=(0, 1 + part.axes.index("head"), 1 + part.token_axis, 3),
            page_tokens=layout.page_tokens,
            block_bytes=layout.part_bytes(0, part),
        )

    def block(self, data: Bytes1D) -> npt.NDArray[np.uint8]:
        """The bytes of one block as ``[page, head, token, dim bytes]``."""
        return data.reshape(-1, *self.page_shape).transpose(self.to_heads_first)

    def pairs(
        self, block: npt.NDArray[np.uint8], row: int, first: int, tokens: range
    ) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """Views of the tensor and of the block for ``tokens`` of a block that starts at position ``first``."""
        size = self.page_tokens
        if not tokens:
            return
        for page in range(tokens.start // size, -(-tokens.stop // size)):
            low, high = max(tokens.start, page * size), min(tokens.stop, (page + 1) * size)
            mine = self.data[row, :, first + low : first + high]
            yield mine, block[page, :, low - page * size : high - page * size]


def _side(sides: dict[str, list[Tensor]], group: KVGroup, part: Part) -> list[Tensor]:
    if part.kind not in sides:
        raise ConfigError(f"group {group.name!r}, {part.label}: dense tensors hold keys and values only")
    return sides[part.kind]
