"""KV between caches of transformers and a cache: memory that a hit is loaded into, and memory of what was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtier.core.memory import NO_PAGE, KVPages
from kvtier.integrations.fit import Fit
from kvtier.integrations.layers import Entries, Kind, Overlap, Past, Pieces, Window
from kvtier.models import Part
from kvtier.pages import SequenceTensors

Ids = npt.NDArray[np.int32]
StatesAt = Mapping[int, Mapping[Kind, Pieces]]
"""By position: what each layer with a state has there."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Room for the first ``tokens`` tokens of a sequence, whole blocks, with the windows and states at their end."""

    fit: Fit
    tokens: int
    tensors: tuple[tuple[torch.Tensor, ...], ...]  # by group and part
    pages: KVPages

    @classmethod
    def of(cls, fit: Fit, tokens: int) -> Arrival:
        """Empty, in CPU memory, whatever torch's default device is."""
        layout = fit.layout
        ids = [_ids_at_end(fit, group, tokens) for group in range(len(layout.groups))]
        tensors = tuple(
            tuple(_room(part, int((own != NO_PAGE).sum())) for part in group.parts)
            for group, own in zip(layout.groups, ids, strict=True)
        )
        memory = SequenceTensors(layout, [tensor for own in tensors for tensor in own])
        return cls(fit, tokens, tensors, memory.pages(ids, [0] * len(ids)))

    def fill(self, past: Past, tokens: int, device: torch.device) -> None:
        """Put the first ``tokens`` of what was loaded into ``past``; less than all only where no group is a window."""
        for kind, found in self._pieces(tokens, device, range(len(self.tensors))).items():
            kind.fill(past, found, tokens)

    def replay(self, past: Past, start: int, device: torch.device, compute: Callable[[], None]) -> None:
        """As ``fill``, where windows were not loaded: ``compute`` computes all tokens from ``start`` on once more."""
        groups = [number for number, group in enumerate(self.fit.layout.groups) if group.reuse.rule == "all"]
        pieces = self._pieces(self.tokens, device, groups)
        for kind in self.fit.kinds:
            kind.begin_replay(past, pieces.get(kind, {}), start)
        compute()
        for kind in self.fit.kinds:
            kind.end_replay(past, pieces.get(kind, {}), self.tokens)

    def _pieces(self, tokens: int, device: torch.device, groups: Iterable[int]) -> dict[Kind, dict[str, torch.Tensor]]:
        pieces: dict[Kind, dict[str, torch.Tensor]] = {}
        for group in groups:
            is_whole = self.fit.layout.groups[group].reuse.rule == "all"
            for (part, kind), tensor in zip(self.fit.groups[group], self.tensors[group], strict=True):
                own = tensor.narrow(part.token_axis, 0, tokens // part.tokens_per_entry) if is_whole else tensor
                pieces.setdefault(kind, {})[part.name or part.kind] = _as_piece(part, own).to(device)
        return pieces


def departure(fit: Fit, past: Past, states: StatesAt, start: int, stop: int) -> KVPages:
    """What ``past`` holds of tokens [start, stop), whole blocks, and what was recorded of windows and states there."""
    layout = fit.layout
    size = layout.block_tokens
    ids, firsts, tensors = list[Ids](), list[int](), list[torch.Tensor]()
    for number, group in enumerate(layout.groups):
        parts = fit.groups[number]
        if group.reuse.rule == "all":
            ids.append(np.arange((stop - start) // layout.page_tokens, dtype=np.int32))
            tensors += [_of_entries(part, kind, past, start, stop) for part, kind in parts]
        elif group.reuse.rule == "trailing":
            first = max(0, start // size + 1 - layout.window_blocks[number])
            blocks = [block for block in _recorded(parts, past) if first <= block < stop // size]
            ids.append(_scattered(fit, number, blocks, stop))
            tensors += [_of_window(part, kind, past, blocks, layout.kept_tokens[number]) for part, kind in parts]
        else:
            ends = sorted(end for end in states if start < end <= stop)
            ids.append(_scattered(fit, number, [end // size - 1 for end in ends], stop))
            tensors += [_of_states(part, [states[end][kind] for end in ends]) for part, kind in parts]
        firsts.append(start if group.reuse.rule == "all" else 0)
    return SequenceTensors(layout, tensors).pages(ids, firsts)


def overlaps(fit: Fit, past: Past) -> dict[int, dict[Kind, Pieces]]:
    """States that layers recorded themselves, where all have them."""
    kinds = [kind for kind in fit.kinds if isinstance(kind, Overlap)]
    found = [kind.at(past) for kind in kinds]
    ends = set.intersection(*(set(own) for own in found)) if found else set()
    return {end: {kind: own[end] for kind, own in zip(kinds, found, strict=True)} for end in ends}


def _ids_at_end(fit: Fit, group: int, tokens: int) -> Ids:
    blocks = tokens // fit.layout.block_tokens
    reach = fit.layout.window_blocks[group]
    return _scattered(fit, group, range(max(0, blocks - reach) if reach else 0, blocks), tokens)


def _scattered(fit: Fit, group: int, blocks: Any, tokens: int) -> Ids:
    """Ids of pages of the first ``tokens`` tokens: those of ``blocks`` are numbered through, the others not there."""
    layout = fit.layout
    pages = layout.block_pages[group]
    unit = layout.block_tokens if layout.groups[group].reuse.rule == "last" else layout.page_tokens
    ids = np.full(tokens // unit, NO_PAGE, np.int32)
    for number, block in enumerate(blocks):
        end = (block + 1) * layout.block_tokens // unit
        ids[end - pages : end] = range(number * pages, (number + 1) * pages)
    return ids


def _room(part: Part, pages: int) -> torch.Tensor:
    if part.is_state:
        shape = [pages, *part.shape]
    else:
        shape = [size * pages if at == part.token_axis else size for at, size in enumerate(part.shape)]
    return torch.empty(shape, dtype=getattr(torch, part.dtype), device="cpu")


def _as_piece(part: Part, tensor: torch.Tensor) -> torch.Tensor:
    """As transformers has it. One vector a token is a head of its own where it is kept by ``update``."""
    if part.is_state:
        return tensor[:1]
    if len(part.axes) == 3:
        return tensor.permute([part.axes.index(axis) for axis in ("head", "token", "dim")])[None]
    return tensor[None, None] if part.kind in ("latent", "rope") or part.name == "window" else tensor[None]


def _as_part(part: Part, piece: torch.Tensor) -> torch.Tensor:
    """The opposite, of a part with a token axis."""
    tensor = piece[0]
    if len(part.axes) == 3:
        return tensor.permute([("head", "token", "dim").index(axis) for axis in part.axes])
    return tensor[0] if tensor.ndim == 3 else tensor


def _of_entries(part: Part, kind: Kind, past: Past, start: int, stop: int) -> torch.Tensor:
    assert isinstance(kind, Entries)
    return _as_part(part, kind.taken(past, part.name or part.kind, start, stop).cpu())


def _recorded(parts: tuple[tuple[Part, Kind], ...], past: Past) -> list[int]:
    found = [set(kind.recorded(past).blocks()) for _, kind in parts if isinstance(kind, Window)]
    return sorted(set.intersection(*found))


def _of_window(part: Part, kind: Kind, past: Past, blocks: list[int], kept: int) -> torch.Tensor:
    assert isinstance(kind, Window)
    at, recorded = kind.names.index(part.name or part.kind), kind.recorded(past)
    found = [entries[at][..., -kept:, :] for block in blocks if (entries := recorded.block(block)) is not None]
    return _as_part(part, torch.cat(found, dim=-2).cpu()) if found else _room(part, 0)


def _of_states(part: Part, states: list[Pieces]) -> torch.Tensor:
    found = [own[part.name or part.kind] for own in states]
    return torch.cat(found).cpu() if found else _room(part, 0)
