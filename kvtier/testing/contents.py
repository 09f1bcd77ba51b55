"""Blocks whose bytes are a function of their key, so that foreign, stale or torn bytes give themselves away."""

from __future__ import annotations

from hashlib import shake_128

import numpy as np

from kvtier.core.keys import Keys
from kvtier.core.memory import Bytes1D, KVPages
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
