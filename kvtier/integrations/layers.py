"""How each kind of layer of transformers' caches is filled and read: one small class for each kind of parts.

All go by the methods and attributes that the docstrings of transformers describe. Where there is none, a comment says
so. ``Pieces`` are tensors as transformers has them, batch first, of one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from kvtier.integrations.recording import (
    Ends,
    Marks,
    Recorded,
    RecordingCSA,
    RecordingHCA,
    RecordingWindow,
    ReplayedLayer,
)

Pieces: TypeAlias = Mapping[str, torch.Tensor]
"""By the names of parts of one layer."""

Past: TypeAlias = Any
"""A ``DynamicCache``, whose layers are of many classes, or a ``MiniMaxCache``."""

COMPRESSOR: Final = "compressor"
"""What transformers calls the entries of a layer, beside the ``indexer``'s."""


class Kind(ABC):
    """What one layer has of one kind: the parts ``names``."""

    def __init__(self, layer: int, names: tuple[str, ...]) -> None:
        """``layer`` counts from 0, as the layers of the cache do."""
        self.layer = layer
        self.names = names

    @abstractmethod
    def fill(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """Put what a prefix of ``tokens`` tokens has into ``past``."""

    replays = False
    """Whether windows can be computed again beside it."""

    def begin_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """Prepare ``past`` for computing again what comes behind ``tokens``; ``pieces`` as ``fill`` takes them."""
        raise NotImplementedError(f"{type(self).__name__} does not replay")

    def end_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """Make ``past``, with ``tokens`` computed again, what ``fill`` would have made it."""
        raise NotImplementedError(f"{type(self).__name__} does not replay")


class Entries(Kind):
    """What a hit needs of the whole prefix."""

    @abstractmethod
    def taken(self, past: Past, name: str, start: int, stop: int) -> torch.Tensor:
        """Of the first row, what ``past`` holds of part ``name`` for tokens [start, stop)."""


class Window(Kind):
    """What a hit needs of the last tokens only; recorded as it passes."""

    @abstractmethod
    def recorded(self, past: Past) -> Recorded:
        """What passed, its tensors in the order of ``names``."""


class States(Kind):
    """What a layer has at one position."""


class KeysValues(Entries):
    """Keys and values of every head, or latents and rope vectors, of a layer that sees all tokens."""

    def fill(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """Hand over both; nothing is copied, where an update would."""
        keys, values = (pieces[name] for name in self.names)
        if isinstance(past, MiniMaxCache):
            past.update(keys, values, self.layer)  # its layers are made by and by
            past.set_linear_cache(self.layer, [])  # type: ignore[no-untyped-call]
            return
        layer = past.layers[self.layer]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values

    replays = True

    def begin_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``."""
        keys, values = (pieces[name] for name in self.names)
        past.layers[self.layer] = ReplayedLayer(keys, values, tokens)

    def end_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``."""
        past.layers[self.layer] = whole_window()
        self.fill(past, pieces, tokens)

    def taken(self, past: Past, name: str, start: int, stop: int) -> torch.Tensor:
        """See ``Entries``."""
        layer = past.layers[self.layer]
        found: torch.Tensor = layer.keys if name == self.names[0] else layer.values
        return found[:1, :, start:stop]


class IndexKeys(Entries):
    """Index keys of a layer that chooses which tokens it sees."""

    def fill(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``."""
        past.update_indexer(pieces[self.names[0]], self.layer)

    def taken(self, past: Past, name: str, start: int, stop: int) -> torch.Tensor:
        """See ``Entries``."""
        found: torch.Tensor = past.layers[self.layer].indexer_keys
        return found[:1, start:stop]


class CompressedEntries(Entries):
    """Entries that stand for several tokens, and their index keys. At the end of a block no entry is unfinished."""

    _CALLED: Final = {"kv": COMPRESSOR, "index": "indexer"}

    def __init__(self, layer: int, names: tuple[str, ...], ratio: int) -> None:
        """``ratio``: tokens of an entry."""
        super().__init__(layer, names)
        self._ratio = ratio

    def fill(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``; the count of entries grows with them."""
        for name in self.names:
            past.layers[self.layer].update_compressor_states(self._CALLED[name], pieces[name])

    replays = True

    def begin_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``: where a block ends no entry is unfinished, so that the count is all that is needed."""
        layer = past.layers[self.layer]
        for name in self.names:
            layer.known[self._CALLED[name]] = pieces[name]
            layer.entry_count[self._CALLED[name]] = tokens // self._ratio

    def end_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``."""
        layer = past.layers[self.layer]
        layer.known.clear()
        layer.entry_count = dict.fromkeys(layer.entry_count, 0)
        self.fill(past, pieces, tokens)

    def taken(self, past: Past, name: str, start: int, stop: int) -> torch.Tensor:
        """See ``Entries``."""
        found: torch.Tensor = past.layers[self.layer].compressed_kv[self._CALLED[name]]
        return found[:1, start // self._ratio : stop // self._ratio]


class SlidingWindow(Window):
    """Keys and values of the last tokens; or the one vector that is both, which layers with entries have."""

    def fill(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``: what was loaded is recorded, the layer gets as much as it keeps itself."""
        layer = past.layers[self.layer]
        keys, values = pieces[self.names[0]], pieces[self.names[-1]]
        held = min(tokens, layer.sliding_window - 1)
        layer.update(keys[:, :, keys.shape[2] - held :], values[:, :, values.shape[2] - held :])
        layer.cumulative_length = tokens  # a public attribute without a setter: only an update of all tokens would do
        recorded = Recorded.like(layer.recorded)
        recorded.add(tokens - keys.shape[2], (keys, values)[: layer.sides])
        layer.recorded = recorded

    replays = True

    def begin_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``: nothing is held, whatever came before."""
        past.layers[self.layer].cumulative_length = tokens

    def end_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``: what was computed again is the window."""

    def recorded(self, past: Past) -> Recorded:
        """See ``Window``."""
        found: Recorded = past.layers[self.layer].recorded
        return found


class Overlap(States):
    """Of layers with entries of few tokens: what the next entry takes of the last one, values and gates."""

    _CALLED: Final = {COMPRESSOR: ("overlap_kv", "overlap_gate"), "indexer": ("index_overlap_kv", "index_overlap_gate")}

    def fill(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``; gates come as float32, which the layer turns into what it computes in."""
        layer = past.layers[self.layer]
        for called, names in self._CALLED.items():
            values, gates = (pieces[name] for name in names)
            DeepseekV4CSACache.update_overlap_state(layer, called, values[:, None], gates[:, None], values.shape[-1])
            layer.overlaps[called].put(tokens, lambda values=values, gates=gates: (values, gates))

    replays = True

    def begin_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``: only entries are made of it, and those are known."""

    def end_replay(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``: that of the last entry was computed again."""

    def at(self, past: Past) -> dict[int, Pieces]:
        """By position, what was recorded there."""
        marks: dict[str, Marks] = past.layers[self.layer].overlaps
        both = set(marks[COMPRESSOR].found) & set(marks["indexer"].found)
        return {
            end: {
                name: piece.float() if "gate" in name else piece
                for called, names in self._CALLED.items()
                for name, piece in zip(names, marks[called].found[end], strict=True)
            }
            for end in both
        }


class Recurrent(States):
    """A state that every token changes in place, so that it is there at the end of a forward only."""

    @abstractmethod
    def now(self, past: Past, row: int = 0) -> Pieces:
        """Copies of what there is of one row."""


class LinearAttention(Recurrent):
    """A recurrent state, and the last inputs of the convolution before it."""

    def fill(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``: the convolution first, as that is what tells the layer that there is something before."""
        conv = pad(pieces["conv"], (1, 0))  # transformers keeps one more input, which nothing reads again
        past.update_conv_state(conv, self.layer, conv_kernel_size=conv.shape[-1])
        past.update_recurrent_state(pieces["recurrent"], self.layer)

    def now(self, past: Past, row: int = 0) -> Pieces:
        """See ``Recurrent``."""
        layer = past.layers[self.layer]
        conv, recurrent = layer.conv_states[0][row : row + 1, :, 1:], layer.recurrent_states[0][row : row + 1]
        return {"conv": conv.clone(), "recurrent": recurrent.clone()}


class Lightning(Recurrent):
    """The sum of keys times values of a layer of MiniMax, which has a cache of its own for them."""

    def fill(self, past: Past, pieces: Pieces, tokens: int) -> None:
        """See ``Kind``."""
        past.set_linear_cache(self.layer, pieces["recurrent"])

    def now(self, past: Past, row: int = 0) -> Pieces:
        """See ``Recurrent``."""
        return {"recurrent": past.get_linear_cache(self.layer)[row : row + 1].clone()}


def recording(own: Any, config: Any, ends: Ends, blocks: int) -> Any:
    """A layer like ``own`` that records its window; ``blocks`` as ``Recorded`` wants it."""
    layer: Any
    if isinstance(own, DeepseekV4CSACache):
        layer = RecordingCSA(config)
        layer.known = {}
        layer.overlaps, layer.ends = {name: Marks(ends) for name in layer.overlap_kv}, ends
    elif isinstance(own, DeepseekV4HCACache):
        layer = RecordingHCA(config)
        layer.known = {}
    elif isinstance(own, DynamicSlidingWindowLayer):
        layer = RecordingWindow(sliding_window=own.sliding_window)
    else:
        raise TypeError(f"a {type(own).__name__} has no window")
    layer.recorded = Recorded(ends, blocks)
    return layer


def whole_window() -> DynamicLayer:
    """In place of a sliding window that is kept whole: masks see to it that no token sees further."""
    layer: DynamicLayer = DynamicLayer()  # type: ignore[no-untyped-call]
    return layer
