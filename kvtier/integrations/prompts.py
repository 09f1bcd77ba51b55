"""Prompts as transformers passes them around: rows of one batch, padded on either side to one length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from kvtier.errors import ConfigError


def without_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows of ``input_ids`` ``[rows, tokens]`` as one-dimensional tensors, cut to what the mask marks as tokens.

    Raises:
        ConfigError: no tensors with values, the shapes do not fit, a row is empty, or a mask has a hole between two
            tokens.
    """
    _check_tensor("input_ids", input_ids)
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask)
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ConfigError(f"input_ids: shape {list(input_ids.shape)}, want [rows, tokens] with at least one of each")
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ConfigError(
            f"attention_mask: shape {list(attention_mask.shape)}, want that of input_ids {list(input_ids.shape)}"
        )
    return [_tokens_of(number, *row) for number, row in enumerate(zip(input_ids, attention_mask, strict=True))]


def joined(input_ids: torch.Tensor, new_tokens: Sequence[torch.Tensor], pad_token: int) -> torch.Tensor:
    """Every row of ``input_ids``, padding and all, followed by its new tokens, padded on the right to one length.

    ``new_tokens[i]`` is ``[sequences, tokens]``: what row i went on with, once or several times.
    """
    width = max(tokens.shape[1] for tokens in new_tokens)
    return torch.cat(
        [
            torch.cat((row.expand(len(tokens), -1), pad(tokens, (0, width - tokens.shape[1]), value=pad_token)), 1)
            for row, tokens in zip(input_ids, new_tokens, strict=True)
        ]
    )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"{name}: got {type(value).__name__}, want a tensor [rows, tokens]")
    if value.is_meta:
        raise ConfigError(f"{name}: is on the meta device and has no values; want a tensor [rows, tokens] with them")


def _tokens_of(number: int, row: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    marked = torch.nonzero(mask).flatten()
    if not len(marked):
        raise ConfigError(f"attention_mask[{number}]: marks no token")
    first, last = int(marked[0]), int(marked[-1])
    if last - first + 1 != len(marked):
        raise ConfigError(
            f"attention_mask[{number}]: has a hole between positions {first} and {last}; "
            f"a prefix is known by its token ids alone, so only padding at the ends can be masked"
        )
    return row[first : last + 1]
