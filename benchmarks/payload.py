"""What is moved: the KV of Llama 8B in an engine's pages, half of it to store from, the rest to load into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvtier import KVLayout, PagedTensors
from kvtier.core.memory import KVPages

Ids: TypeAlias = npt.NDArray[np.int64]

LLAMA_8B: Final[dict[str, Any]] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "head_dim": 128,
}
PAGE_TOKENS: Final = 16
VOCABULARY: Final = 128_256


def llama_8b(block_tokens: int) -> KVLayout:
    """128 KiB a token in bf16; engine pages of 16 tokens, ``[16, 8, 128]`` for keys and for values of each layer."""
    return KVLayout.from_hf_config(
        LLAMA_8B, block_tokens, "bfloat16", axes=("token", "head", "dim"), page_tokens=PAGE_TOKENS
    )


class EngineMemory:
    """Pages of random KV, and as many others as loads need, in one tensor ``[parts, pages, *page]``.

    Requests take random pages. What was loaded is compared, byte for byte, with the pages that it was stored from.
    """

    def __init__(self, layout: KVLayout, source_pages: int, target_pages: int) -> None:
        self.layout = layout
        parts = layout.groups[0].parts
        shape = (len(parts), source_pages + target_pages, *parts[0].shape)
        self.tensor = torch.zeros(shape, dtype=getattr(torch, parts[0].dtype))
        for part in self.tensor:
            part[:source_pages].view(torch.int64).random_(generator=torch.Generator().manual_seed(len(parts)))
        self.memory = PagedTensors(layout, list(self.tensor))
        self._random = np.random.default_rng(0)
        self._source_pages = source_pages
        self._target_pages = target_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all parts."""
        return self.tensor[:, 0].nbytes

    @property
    def rows(self) -> torch.Tensor:
        """All pages of all parts, one below the other: ``[parts * pages, elements of a page]``."""
        return self.tensor.view(self.tensor.shape[0] * self.tensor.shape[1], -1)

    def sources(self, count: int) -> Ids:
        """``count`` random pages with content."""
        return self._random.permutation(self._source_pages)[:count]

    def targets(self, count: int) -> Ids:
        """``count`` random pages to load into."""
        return self._source_pages + self._random.permutation(self._target_pages)[:count]

    def pages(self, ids: Ids) -> KVPages:
        """A request's pages."""
        return self.memory.pages(ids)

    def row_numbers(self, ids: Ids) -> torch.Tensor:
        """Where in ``rows`` the pages ``ids`` lie, in the order of kvtier's records: block, part, page."""
        blocks = ids.reshape(-1, 1, self.layout.block_tokens // PAGE_TOKENS)
        parts = np.arange(self.tensor.shape[0]).reshape(1, -1, 1) * self.tensor.shape[1]
        return torch.from_numpy((blocks + parts).reshape(-1))

    def clear(self, ids: Ids) -> None:
        """Fill pages with zeros."""
        for part in self.tensor:
            part.index_fill_(0, torch.from_numpy(ids), 0)

    def same(self, ids: Ids, others: Ids) -> bool:
        """Whether the pages hold the same bytes, page by page."""
        both = [torch.empty((len(ids), *self.tensor.shape[2:]), dtype=self.tensor.dtype) for _ in range(2)]
        for part in self.tensor:
            for copy, wanted in zip(both, (ids, others), strict=True):
                torch.index_select(part, 0, torch.from_numpy(wanted), out=copy)
            if not torch.equal(*(copy.view(torch.int16) for copy in both)):
                return False
        return True


class Prompts:
    """Sequences of random tokens, each another one."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def take(self, tokens: int) -> npt.NDArray[np.int32]:
        """``tokens`` token ids."""
        return self._random.integers(0, VOCABULARY, tokens, dtype=np.int32)


@dataclass(slots=True)
class Request:
    """One store: its tokens, and the pages that they came from."""

    tokens: npt.NDArray[np.int32]
    sources: Ids
