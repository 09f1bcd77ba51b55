"""Rows of different lengths, each computed alone so far, merged into one cache of transformers and decoded together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HCACache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from kvtier.integrations.fit import Fit
from kvtier.integrations.layers import CompressedEntries, IndexKeys, KeysValues, Past, SlidingWindow
from kvtier.integrations.sequences import CachedSequence


def can_merge(fit: Fit) -> bool:
    """Whether rows of different lengths fit into one cache: not where a layer has compressed entries.

    It counts them once for all rows, closes them for all rows at once, and takes their place from the left.
    """
    return not any(isinstance(kind, CompressedEntries) for kind in fit.kinds)


def merged(pasts: Sequence[Past]) -> Past:
    """One cache of ``len(pasts)`` rows, from caches of one row each that hold at least one token.

    Keys, values, latents and index keys get zeros on the left up to the longest row, and windows up to the widest
    window, so that all rows end alike; states have no length and are put one under the other. Decoding from it needs an
    ``attention_mask`` with zeros for what was added, ``[rows, longest + 1]``, and the positions that follow from it,
    which ``model.generate`` works out. What it holds of a row is what that row's cache held, bit for bit.

    Raises:
        TypeError: a layer is of a class that rows of different lengths cannot be merged in.
    """
    if isinstance(pasts[0], MiniMaxCache):
        return _merged_minimax(pasts)
    past: Any = DynamicCache()
    longest = max(own.get_seq_length() for own in pasts)
    past.layers = [_merged_layer(rows, longest) for rows in zip(*(own.layers for own in pasts), strict=True)]
    return past


class _Window(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding window that keeps what it is given beside it, until each row is told what of it is its own."""

    _layer_type = None
    seen: list[tuple[torch.Tensor, torch.Tensor]]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class above."""
        self.seen.append((key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)


class Batch:
    """Sequences that were computed up to the last token of their prompts, decoded as rows of one cache.

    The journey is ``past``, ``input_ids`` and ``attention_mask`` to ``model.generate`` within ``watched``, then
    ``split``; after that every sequence holds what was computed of it, as if it had been decoded alone.
    """

    def __init__(self, sequences: Sequence[CachedSequence], end_tokens: frozenset[int], pad_token: int) -> None:
        """``end_tokens``: a row ends with the first one that is chosen for it."""
        self._sequences = sequences
        self._end_tokens = end_tokens
        self._held = [len(sequence.prompt) - 1 for sequence in sequences]
        self._longest = max(self._held)
        self.past: Past = merged([sequence.past for sequence in sequences])
        for sequence in sequences:
            _let_go(sequence)
        gaps = [self._longest - held for held in self._held]
        prompts = [sequence.prompt for sequence in sequences]
        self.input_ids = torch.stack(
            [pad(prompt, (gap, 0), value=pad_token) for prompt, gap in zip(prompts, gaps, strict=True)]
        )
        """``[rows, tokens of the longest prompt]``, padded on the left."""
        self.attention_mask = torch.stack(
            [pad(torch.ones_like(prompt), (gap, 0)) for prompt, gap in zip(prompts, gaps, strict=True)]
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the model decodes, keep the states that it leaves where a block of some row ends."""
        model, watch = self._sequences[0].model, _StateWatch(self._sequences, self._held, self._end_tokens)
        handle = model.register_forward_hook(watch, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def split(self, generated: torch.Tensor) -> list[torch.Tensor]:
        """Give each sequence what was computed of it; returns what each row went on with, ``[new tokens]``.

        ``generated`` is ``[rows, tokens]`` as ``model.generate`` returned it.
        """
        new = [self._until_end(row) for row in generated[:, self._longest + 1 :]]
        for number, (sequence, tokens) in enumerate(zip(self._sequences, new, strict=True)):
            self._give_back(sequence, number, self._held[number] + len(tokens))
        return new

    def _until_end(self, tokens: torch.Tensor) -> torch.Tensor:
        ends = [at for at, token in enumerate(tokens.tolist()) if token in self._end_tokens]
        return tokens[: ends[0] + 1] if ends else tokens

    def _give_back(self, sequence: CachedSequence, row: int, tokens: int) -> None:
        first = self._longest - self._held[row]
        for kind in sequence.fit.kinds:
            own, common = _layer_of(sequence.past, kind.layer), _layer_of(self.past, kind.layer)
            if isinstance(kind, SlidingWindow):
                seen = common.seen[: tokens - self._held[row]]  # one token each; what came behind the end is left out
                own.recorded.add(
                    self._held[row],
                    tuple(torch.cat([each[row : row + 1] for each in side], 2) for side in zip(*seen, strict=True)),
                )
                own.cumulative_length = tokens
            elif isinstance(kind, KeysValues):
                own.keys, own.values = (
                    side[row : row + 1, :, first : first + tokens] for side in (common.keys, common.values)
                )
            elif isinstance(kind, IndexKeys):
                own.indexer_keys = common.indexer_keys[row : row + 1, first : first + tokens]


class _StateWatch:
    """A forward hook: one more token of every row has been computed."""

    def __init__(self, sequences: Sequence[CachedSequence], held: Sequence[int], end_tokens: frozenset[int]) -> None:
        self._sequences = sequences
        self._tokens = list(held)
        self._end_tokens = end_tokens
        self._open = set(range(len(sequences)))
        self._is_first = True  # what is fed first belongs to the prompt, and ends nothing

    def __call__(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        """As torch calls it."""
        if not self._is_first:
            fed = kwargs["input_ids"][:, -1].tolist()
            self._open -= {row for row in self._open if fed[row] in self._end_tokens}
        self._is_first = False
        for row in self._open:
            self._tokens[row] += 1
            self._sequences[row].keep_states(self._tokens[row], kwargs["past_key_values"], row)


def _let_go(sequence: CachedSequence) -> None:
    """Of what the merged cache has a copy of: a row gets it back when it is split."""
    for kind in sequence.fit.kinds:
        own = _layer_of(sequence.past, kind.layer)
        if isinstance(kind, KeysValues):
            own.keys, own.values = own.keys[:, :, :0].clone(), own.values[:, :, :0].clone()
        elif isinstance(kind, IndexKeys):
            own.indexer_keys = own.indexer_keys[:, :0].clone()


def _layer_of(past: Past, number: int) -> Any:
    """None where a MiniMax has a state and no layer."""
    return past.layers[number] if number < len(past.layers) else None


def _merged_layer(rows: Sequence[Any], longest: int) -> Any:
    first = rows[0]
    if isinstance(first, LinearAttentionLayer):
        return _merged_states(rows)
    if isinstance(first, DeepseekV4HCACache) or not isinstance(first, DynamicLayer):
        raise TypeError(f"layers of {type(first).__name__} cannot be merged: their rows are of different phases")
    if isinstance(first, DynamicSlidingWindowLayer):
        return _merged_windows(rows, longest)
    of: Any = DynamicIndexedLayer if isinstance(first, DynamicIndexedLayer) else DynamicLayer
    layer = of()
    layer.update(*_padded(rows, longest))
    if isinstance(first, DynamicIndexedLayer) and first.is_indexer_initialized:
        layer.update_indexer(torch.cat([_left(row.indexer_keys, longest, 1) for row in rows]))
    return layer


def _merged_windows(rows: Sequence[Any], longest: int) -> Any:
    layer: Any = _Window(sliding_window=rows[0].sliding_window)
    layer.seen = []
    layer.update(*_padded(rows, max(row.keys.shape[2] for row in rows)))
    layer.seen.clear()
    layer.cumulative_length = longest  # masks go by places from the left, not by positions
    return layer


def _merged_states(rows: Sequence[Any]) -> Any:
    layer: Any = LinearAttentionLayer()
    conv = torch.cat([row.conv_states[0] for row in rows])
    layer.update_conv_state(conv, conv_kernel_size=conv.shape[-1])
    layer.update_recurrent_state(torch.cat([row.recurrent_states[0] for row in rows]))
    return layer


def _merged_minimax(pasts: Sequence[Any]) -> Past:
    past: Any = MiniMaxCache()  # type: ignore[no-untyped-call]
    longest = max(own.get_seq_length() for own in pasts)
    for number in range(len(pasts[0])):
        states = [own.get_linear_cache(number) for own in pasts]
        if isinstance(states[0], torch.Tensor):
            past.set_linear_cache(number, torch.cat(states))
        else:
            past.update(*_padded([own.layers[number] for own in pasts], longest), number)
            past.set_linear_cache(number, [])
    return past


def _padded(rows: Sequence[Any], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.cat([_left(side, tokens, 2) for side in sides]) for sides in _sides(rows))
    return keys, values


def _sides(rows: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [row.keys for row in rows], [row.values for row in rows]


def _left(tensor: torch.Tensor, tokens: int, dim: int) -> torch.Tensor:
    """Zeros on the left of ``dim`` up to ``tokens``."""
    return pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (tokens - tensor.shape[dim], 0))
