"""Whole pages of tensors on one device to blocks and back, on the current stream: by torch, or by triton."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from itertools import accumulate
from typing import Any, Final

import torch

WORD_BYTES: Final = 8


class DevicePages(ABC):
    """The pages of one group's parts: uint8 ``[pages, page_bytes]`` each, contiguous. A block takes some of each."""

    @abstractmethod
    def __init__(self, pages: Sequence[torch.Tensor], block_pages: int) -> None:
        """A block takes ``block_pages`` pages of each of ``pages``, which are all on one device."""

    @abstractmethod
    def gather(self, ids: torch.Tensor, parts: range, out: torch.Tensor) -> None:
        """Copy ``parts`` of blocks to ``out``, uint8 ``[blocks, bytes of parts]``, rows at any distance.

        Part follows part, each in the order of its pages. ``ids``, int64 ``[blocks, block_pages]`` on the device, names
        the pages of each block.
        """

    @abstractmethod
    def scatter(self, ids: torch.Tensor, parts: range, source: torch.Tensor) -> None:
        """Undo ``gather``."""


class TorchPages(DevicePages):
    """One call for each part."""

    def __init__(self, pages: Sequence[torch.Tensor], block_pages: int) -> None:
        """See ``DevicePages``."""
        self._pages = tuple(pages)
        self._begins = list(accumulate((each.shape[1] * block_pages for each in pages), initial=0))

    def gather(self, ids: torch.Tensor, parts: range, out: torch.Tensor) -> None:
        """See ``DevicePages``."""
        for part in parts:
            pages, mine = _in_words(self._pages[part], self._of(part, parts, out))
            mine.copy_(pages.index_select(0, ids.reshape(-1)).view(mine.shape))

    def scatter(self, ids: torch.Tensor, parts: range, source: torch.Tensor) -> None:
        """See ``DevicePages``."""
        for part in parts:
            pages, mine = _in_words(self._pages[part], self._of(part, parts, source))
            pages.index_copy_(0, ids.reshape(-1), mine.reshape(-1, pages.shape[1]))

    def _of(self, part: int, parts: range, blocks: torch.Tensor) -> torch.Tensor:
        first = self._begins[parts.start]
        return blocks[:, self._begins[part] - first : self._begins[part + 1] - first]


def _in_words(pages: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 where they consist of whole words: torch moves elements, whatever their size."""
    places = [(each.shape[1], each.stride(0), each.storage_offset(), each.data_ptr()) for each in (pages, blocks)]
    if blocks.stride(1) != 1 or any(place % WORD_BYTES for own in places for place in own):
        return pages, blocks
    return pages.view(torch.int64), blocks.view(torch.int64)


def pages_on(device: torch.device) -> type[DevicePages]:
    """What moves pages there: triton on a GPU, where it is installed."""
    triton = _triton_copy() if device.type == "cuda" else None
    return TorchPages if triton is None else triton.TritonPages


@cache
def _triton_copy() -> Any:
    """The module ``kernels.triton_copy``, or None without triton."""
    try:
        return import_module("kvtier.kernels.triton_copy")
    except ImportError:
        return None
