"""Layers of transformers' caches that keep what a window forgets, as far as the end of some block may need it.

They only look: what they hand to the model is what the classes they are made from do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache

from kvtier.config import PolicyConfig

Tensors: TypeAlias = tuple[torch.Tensor, ...]


class Ends:
    """Which block ends of one sequence hits are likely to end at: as ``policy.windows`` says of a store."""

    def __init__(self, block_tokens: int, policy: PolicyConfig, prompt_tokens: int) -> None:
        """``prompt_tokens``: the first checkpoint; the last is the end of all that comes."""
        self.block_tokens = block_tokens
        self._every_block = policy.windows == "full"
        self._every = policy.checkpoint_tokens
        self._prompt_end = prompt_tokens // block_tokens * block_tokens

    def is_fixed(self, end: int) -> bool:
        """Whether ``end``, a multiple of ``block_tokens``, is one whatever follows."""
        if self._every_block or end == self._prompt_end:
            return True
        if not self._every:
            return False
        checkpoint = max(1, -(-end // self._every)) * self._every  # the first one that is not before it
        return checkpoint < end + self.block_tokens

    def within(self, start: int, stop: int) -> list[int]:
        """Those in (start, stop] that are fixed."""
        size = self.block_tokens
        return [end for end in range((start // size + 1) * size, stop + 1, size) if self.is_fixed(end)]


class Marks:
    """What there is at some positions: at every fixed end, and at the last one."""

    def __init__(self, ends: Ends) -> None:
        """Nothing yet."""
        self._ends = ends
        self.found: dict[int, Tensors] = {}

    def put(self, end: int, make: Callable[[], Tensors]) -> None:
        """``make`` returns copies of what is at ``end``, behind all that were put before."""
        self.found = {at: value for at, value in self.found.items() if self._ends.is_fixed(at)}
        self.found[end] = make()


class Recorded:
    """Entries of tokens that passed, along dimension -2: the last blocks of them, and those that fixed ends need."""

    def __init__(self, ends: Ends, blocks: int) -> None:
        """``blocks``: how many a hit needs before its end."""
        self._ends = ends
        self._blocks = blocks
        self._kept: dict[int, Tensors] = {}  # by number of the block
        self._recent: list[Tensors] = []
        self._first = 0  # token where they begin
        self._stop = 0

    @classmethod
    def like(cls, other: Recorded) -> Recorded:
        """An empty one for the same sequence."""
        return cls(other._ends, other._blocks)

    def add(self, first: int, entries: Tensors) -> None:
        """``entries`` of the tokens from ``first`` on, right behind those before."""
        if not self._recent:
            self._first = first
        self._recent.append(entries)
        size, before = self._ends.block_tokens, self._stop
        self._stop = first + entries[0].shape[-2]
        if self._stop // size > before // size:
            self._sort_out()

    def block(self, number: int) -> Tensors | None:
        """The entries of all tokens of a block; None where some are not there."""
        size = self._ends.block_tokens
        if number in self._kept:
            return self._kept[number]
        if number * size < self._first or (number + 1) * size > self._stop or not self._recent:
            return None
        return self._cut(self._joined(), number * size, (number + 1) * size)

    def blocks(self) -> list[int]:
        """Numbers of the blocks that are there."""
        size = self._ends.block_tokens
        recent = range(-(-self._first // size), self._stop // size) if self._recent else ()
        return sorted({*self._kept, *recent})

    def _sort_out(self) -> None:
        """Put the blocks aside that fixed ends need, and drop what lies before the last ones."""
        size, entries = self._ends.block_tokens, self._joined()
        oldest = max(self._stop // size - self._blocks, -(-self._first // size))
        for number in range(-(-self._first // size), oldest):
            if any(self._ends.is_fixed((number + ahead) * size) for ahead in range(1, self._blocks + 1)):
                self._kept[number] = tuple(
                    part.clone() for part in self._cut(entries, number * size, number * size + size)
                )
        rest = self._cut(entries, max(oldest * size, self._first), self._stop)
        self._first = max(oldest * size, self._first)
        self._recent = [tuple(part.clone() for part in rest)]

    def _joined(self) -> Tensors:
        if len(self._recent) > 1:
            self._recent = [tuple(torch.cat(side, dim=-2) for side in zip(*self._recent, strict=True))]
        return self._recent[0]

    def _cut(self, entries: Tensors, start: int, stop: int) -> Tensors:
        return tuple(part[..., start - self._first : stop - self._first, :] for part in entries)


class RecordingWindow(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding window that records keys and values of the first row of its batch."""

    _layer_type = None
    sides = 2
    recorded: Recorded

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class above."""
        self.recorded.add(self.cumulative_length, (key_states[:1], value_states[:1]))
        return super().update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the class above, which takes for granted that a window behind that many tokens is whole."""
        return _mask_sizes(self, query_length)


class _Compressed:
    """Of layers with compressed entries: keys are values, so one of them is recorded."""

    _layer_type = None
    """transformers makes a subclass the class for everybody who asks for layers of its type, unless it says so."""
    sides = 1
    recorded: Recorded
    cumulative_length: int
    entry_count: dict[str, int]
    known: dict[str, torch.Tensor]
    """In a replay: all entries of the prefix."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class above."""
        self.recorded.add(self.cumulative_length, (key_states[:1],))
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As ``RecordingWindow``."""
        return _mask_sizes(self, query_length)

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        """As the class above; in a replay, entries that are known take the place of those that are computed again."""
        known = self.known.get(name)
        if known is None:
            found: torch.Tensor = super().update_compressor_states(name, compressed)  # type: ignore[misc]
            return found
        self.entry_count[name] += compressed.shape[1]
        return known[:, : self.entry_count[name]]


class RecordingHCA(_Compressed, DeepseekV4HCACache):  # type: ignore[no-untyped-call]
    """Entries of many tokens, and a window."""

    _layer_type = None  # type: ignore[assignment]


class RecordingCSA(_Compressed, DeepseekV4CSACache):  # type: ignore[no-untyped-call]
    """Entries of few tokens, which overlap, and a window: what overlaps is recorded at the ends of blocks."""

    _layer_type = None  # type: ignore[assignment]
    overlaps: dict[str, Marks]
    ends: Ends

    def update_overlap_state(
        self, name: str, chunk_kv: torch.Tensor, chunk_gate: torch.Tensor, head_dim: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As the class above; ``chunk_kv`` and ``chunk_gate`` are ``[batch, entries, tokens of an entry, dim]``."""
        entries, rate, size = chunk_kv.shape[1], self.compress_rate, self.ends.block_tokens
        first = self.entry_count[name]
        begin, stop = first * rate, (first + entries) * rate
        last = stop // size * size
        for end in sorted({*self.ends.within(begin, stop), *([last] if last > begin else ())}):
            at = end // rate - 1 - first
            self.overlaps[name].put(
                end,
                lambda at=at: (  # type: ignore[misc]
                    chunk_kv[:1, at, :, :head_dim].clone(),
                    chunk_gate[:1, at, :, :head_dim].clone(),
                ),
            )
        found: tuple[torch.Tensor | None, torch.Tensor | None] = super().update_overlap_state(
            name, chunk_kv, chunk_gate, head_dim
        )
        return found


class ReplayedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Full attention whose keys and values are known, while its tokens are computed again for windows elsewhere."""

    _layer_type = None

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """As if ``tokens`` of them had been computed."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._tokens = tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What is known of the tokens so far; what was computed of the new ones is dropped."""
        self._tokens += key_states.shape[-2]
        keys: Any = self.keys
        values: Any = self.values
        return keys[:, :, : self._tokens], values[:, :, : self._tokens]

    def get_seq_length(self) -> int:
        """Tokens that were computed."""
        return self._tokens


def _mask_sizes(layer: Any, query_length: int) -> tuple[int, int]:
    held = layer.keys.shape[-2] if layer.is_initialized else 0
    return held + query_length, layer.cumulative_length - held
