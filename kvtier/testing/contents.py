"""Blocks whose bytes are a function of their key, so that foreign, stale or torn bytes give themselves away."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from hashlib import shake_128
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.core.keys import Keys
from kvtier.core.memory import NO_PAGE, Bytes1D, KVPages
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.models.parts import PartKind
from kvtier.pages import PagedTensors


def tiny_layout(*, block_tokens: int = 16, page_tokens: int = 16, layers: int = 1, dim: int = 8) -> KVLayout:
    """A layout of a few hundred bytes a block: one head of ``dim`` float16 values for key and value."""
    shape = (page_tokens, 1, dim)
    kinds: tuple[PartKind, ...] = ("k", "v")
    parts = tuple(
        Part(layer, kind, "float16", ("token", "head", "dim"), shape) for layer in range(layers) for kind in kinds
    )
    return KVLayout(block_tokens, page_tokens, (KVGroup("attention", parts),))


def content_of(key: bytes, nbytes: int) -> Bytes1D:
    """What the block of ``key`` holds, over all parts in order."""
    return np.frombuffer(shake_128(key).digest(nbytes), np.uint8)


class PseudoEngine:
    """Engine pages of one request after another, with contents that belong to keys. One group, one page per block."""

    def __init__(self, layout: KVLayout, num_pages: int) -> None:
        """``num_pages`` pages of every part."""
        self.layout = layout
        self.tensors = [np.zeros((num_pages, *part.shape), np.dtype(part.dtype)) for part in layout.groups[0].parts]
        self.memory = PagedTensors(layout, self.tensors)
        self.ids = np.arange(num_pages, dtype=np.int32)

    @property
    def pages(self) -> KVPages:
        """All pages as one request's table."""
        return self.memory.pages(self.ids)

    def write(self, keys: Keys, blocks: range) -> None:
        """Fill the pages of ``blocks`` with what ``keys`` say."""
        for block in blocks:
            content, at = content_of(keys.digests[block], self.layout.block_bytes[0]), 0
            for tensor in self.tensors:
                page = tensor[block].reshape(-1).view(np.uint8)
                page[:] = content[at : at + page.nbytes]
                at += page.nbytes

    def wipe(self) -> None:
        """Make sure that nothing that was there before can be taken for loaded."""
        for tensor in self.tensors:
            tensor[...] = 0

    def wrong_blocks(self, keys: Keys, blocks: range) -> list[int]:
        """Those of ``blocks`` whose pages do not hold what ``keys`` say."""
        wrong = []
        for block in blocks:
            found = np.concatenate([tensor[block].reshape(-1).view(np.uint8) for tensor in self.tensors])
            if not np.array_equal(found, content_of(keys.digests[block], found.nbytes)):
                wrong.append(block)
        return wrong


class LayoutEngine:
    """Engine pages of one request after another for any layout; contents belong to (key, group).

    A block's pages lie anywhere in their pool, those of a request in an order that ``rng`` draws.
    """

    def __init__(self, layout: KVLayout, max_blocks: int, rng: Random) -> None:
        """Room for a sequence of ``max_blocks`` blocks in every group."""
        self.layout = layout
        self.max_blocks = max_blocks
        self._a_block = [1 if not kept else layout.block_tokens // layout.page_tokens for kept in layout.kept_tokens]
        self.tensors = [
            [np.zeros((max_blocks * count, *part.shape), np.dtype(part.dtype)) for part in group.parts]
            for group, count in zip(layout.groups, self._a_block, strict=True)
        ]
        self.memory = PagedTensors(layout, [tensor for own in self.tensors for tensor in own])
        self._ids = [rng.sample(range(max_blocks * count), max_blocks * count) for count in self._a_block]

    def pages(self, missing: Collection[tuple[int, int]] = ()) -> KVPages:
        """The request's table, without a page for any (group, block) of ``missing``."""
        ids = [list(own) for own in self._ids]
        for group, block in missing:
            ids[group][(block + 1) * self._a_block[group] - 1] = NO_PAGE
        return self.memory.pages(ids if len(ids) > 1 else ids[0])

    def write(self, keys: Keys, blocks: range) -> None:
        """Fill the pages of ``blocks`` with what ``keys`` say, in every group."""
        for group in range(len(self.layout.groups)):
            for block in blocks:
                for page, content in zip(self._pages_of(group, block), self._content(keys, group, block), strict=True):
                    page[...] = content

    def wipe(self) -> None:
        """Make sure that nothing that was there before can be taken for loaded."""
        for own in self.tensors:
            for tensor in own:
                tensor.view(np.uint8)[...] = 0

    def wrong(self, keys: Keys, group: int, block: int, start: int, stop: int) -> list[str]:
        """Where the pages of a block do not hold what ``keys`` say for tokens in [start, stop), and nothing else.

        An entry of several tokens belongs to its last one, a state to the last token before it.
        """
        return [
            f"group {group}, block {block}, {label}, token {end - 1}"
            for label, end, found, content in self._entries(keys, group, block)
            if found != (content if start < end <= stop else bytes(len(content)))
        ]

    def _entries(self, keys: Keys, group: int, block: int) -> Iterator[tuple[str, int, bytes, bytes]]:
        """Of every entry its part, the token behind its last one, what the engine has, and what belongs there."""
        layout, count = self.layout, self.layout.block_pages[group]
        behind = (block + 1) * layout.block_tokens
        parts = [(part, page) for part in layout.groups[group].parts for page in range(count)]
        pages = zip(parts, self._pages_of(group, block), self._content(keys, group, block), strict=True)
        for (part, page), found, content in pages:
            if part.is_state:
                yield part.label, behind, found.tobytes(), content.tobytes()
                continue
            end = behind - (count - page) * layout.page_tokens
            entries = layout.page_tokens // part.tokens_per_entry
            for own, wanted in zip(_entries_of(part, found, entries), _entries_of(part, content, entries), strict=True):
                end += part.tokens_per_entry
                yield part.label, end, own, wanted

    def _pages_of(self, group: int, block: int) -> Iterator[npt.NDArray[Any]]:
        """Of every part, the pages that a record of the block holds."""
        end, count = (block + 1) * self._a_block[group], self.layout.block_pages[group]
        for tensor in self.tensors[group]:
            for number in self._ids[group][end - count : end]:
                yield tensor[number]

    def _content(self, keys: Keys, group: int, block: int) -> Iterator[npt.NDArray[Any]]:
        key = keys.digests[block] if block < len(keys) else b"nothing is stored of what is no full block"
        content, at = content_of(key + bytes((group,)), self.layout.block_bytes[group]), 0
        for part, tensor in zip(self.layout.groups[group].parts, self.tensors[group], strict=True):
            for _ in range(self.layout.block_pages[group]):
                yield content[at : at + part.page_bytes].view(tensor.dtype).reshape(part.shape)
                at += part.page_bytes


def _entries_of(part: Part, page: npt.NDArray[Any], count: int) -> list[bytes]:
    """The ``count`` entries of a page of ``part``; what pads it belongs to none."""
    if not part.planes:
        return [entry.tobytes() for entry in np.moveaxis(page, part.token_axis, 0)]
    ends = [count * width for width in part.planes]
    planes = np.split(page, np.cumsum(ends))[:-1]
    rows = [plane.reshape(count, width) for plane, width in zip(planes, part.planes, strict=True)]
    return [b"".join(row[number].tobytes() for row in rows) for number in range(count)]
