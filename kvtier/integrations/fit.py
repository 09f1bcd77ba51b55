"""Whether a layout is that of a model of transformers, and whether a prefix of the model's KV means anything alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxPreTrainedModel

from kvtier.errors import ConfigError
from kvtier.integrations.layers import (
    CompressedEntries,
    Entries,
    IndexKeys,
    KeysValues,
    Kind,
    Lightning,
    LinearAttention,
    Overlap,
    Past,
    Recurrent,
    SlidingWindow,
    recording,
    whole_window,
)
from kvtier.integrations.recording import Ends
from kvtier.models import KVGroup, KVLayout, Part

LENGTH_DEPENDENT_ROPE: Final = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies change with the length of the whole sequence, and so all KV before its end."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How the parts of a layout are found in the cache of a model: by group, each part with what reads and fills it."""

    layout: KVLayout
    config: Any
    groups: tuple[tuple[tuple[Part, Kind], ...], ...]

    @property
    def kinds(self) -> list[Kind]:
        """Each once, in the order in which they fill a cache."""
        return list({kind: None for parts in self.groups for _, kind in parts})

    @property
    def needs_splits(self) -> bool:
        """Whether a state is there at the end of a forward only, so that prompts are computed up to checkpoints."""
        return any(isinstance(kind, Recurrent) for kind in self.kinds)

    @property
    def replays(self) -> bool:
        """Whether windows can be computed again from what the whole prefix has."""
        return any(isinstance(kind, Entries) for kind in self.kinds) and all(kind.replays for kind in self.kinds)

    @property
    def reorders(self) -> bool:
        """Whether ``reorder_cache`` reaches all states, as beams need it."""
        return not any(isinstance(kind, Lightning) for kind in self.kinds)

    @property
    def needs_all(self) -> bool:
        """Whether a hit is of use only as a whole, with the windows and states at its end."""
        return any(group.reuse.rule != "all" for group in self.layout.groups)

    def new_cache(self, ends: Ends) -> Past:
        """An empty one of the model's own layers; windows record what checkpoints need."""
        if any(isinstance(kind, Lightning) for kind in self.kinds):
            return MiniMaxCache()  # type: ignore[no-untyped-call]  # which makes its layers itself
        past: Any = DynamicCache(config=self.config)
        blocks = max(self.layout.window_blocks)
        for kind in self.kinds:
            own = past.layers[kind.layer]
            if isinstance(kind, SlidingWindow):
                past.layers[kind.layer] = recording(own, self.config, ends, blocks)
            elif isinstance(kind, KeysValues) and own.is_sliding:
                past.layers[kind.layer] = whole_window()
        return past


def fit_of(layout: KVLayout, model: Any) -> Fit:
    """How ``layout`` is found in what ``model`` caches.

    Raises:
        ConfigError: the layout has another number of layers, heads or dimensions than the model, another dtype, or
            other parts; or the KV of a prefix depends on what follows.
    """
    config = model.config.get_text_config(decoder=True)
    _check_rope(config)
    _check_geometry(layout, model, config)
    kinds = {name: kind for kind in _kinds_of(layout, model, config) for name in kind_names(kind)}
    return Fit(
        layout,
        config,
        tuple(
            tuple((part, kinds[part.layer, part.name or part.kind]) for part in group.parts) for group in layout.groups
        ),
    )


def kind_names(kind: Kind) -> list[tuple[int, str]]:
    """What the parts of ``kind`` are called: by layer and name."""
    return [(kind.layer, name) for name in kind.names]


def _kinds_of(layout: KVLayout, model: Any, config: Any) -> list[Kind]:
    layers: dict[int, dict[str, tuple[KVGroup, Part]]] = {}
    for group in layout.groups:
        for part in group.parts:
            layers.setdefault(part.layer, {})[part.name or part.kind] = (group, part)
    is_minimax = isinstance(model, MiniMaxPreTrainedModel)
    own = [] if is_minimax else DynamicCache(config=config).layers
    found: list[Kind] = []
    for layer, parts in layers.items():
        kinds = _of_layer(layer, parts, is_minimax=is_minimax)
        left = set(parts) - {name for kind in kinds for name in kind.names}
        if left or not (is_minimax or layer < len(own)):
            label = parts[min(left or parts)][1].label
            raise ConfigError(
                f"layout: {label}: transformers keeps nothing of this kind in a cache that can be filled again;"
                " call model.generate"
            )
        for kind in () if is_minimax else kinds:
            _check_layer(kind, own[layer], parts[kind.names[0]][0])
        found.extend(kinds)
    return found


def _of_layer(layer: int, parts: Mapping[str, tuple[KVGroup, Part]], *, is_minimax: bool) -> list[Kind]:
    names = set(parts)
    kinds: list[Kind] = []
    for pair in (("k", "v"), ("latent", "rope")):
        if names >= set(pair):
            is_window = parts[pair[0]][0].reuse.rule == "trailing"
            kinds.append(SlidingWindow(layer, pair) if is_window else KeysValues(layer, pair))
    ratio = parts["kv"][1].tokens_per_entry if "kv" in names else 1
    if "window" in names:
        kinds.append(SlidingWindow(layer, ("window",)))
    if ratio > 1:
        kinds.append(CompressedEntries(layer, tuple(name for name in ("kv", "index") if name in names), ratio))
    elif "index" in names:
        kinds.append(IndexKeys(layer, ("index",)))
    if "overlap_kv" in names:
        kinds.append(Overlap(layer, ("overlap_kv", "overlap_gate", "index_overlap_kv", "index_overlap_gate")))
    if "recurrent" in names:
        kinds.append(Lightning(layer, ("recurrent",)) if is_minimax else LinearAttention(layer, ("conv", "recurrent")))
    return kinds


_WANTED: Final[Mapping[type[Kind], Any]] = {
    KeysValues: DynamicLayer,
    SlidingWindow: DynamicSlidingWindowLayer,
    IndexKeys: DynamicIndexedLayer,
    CompressedEntries: DeepseekV4HCACache,
    Overlap: DeepseekV4CSACache,
    LinearAttention: LinearAttentionLayer,
}


def _check_layer(kind: Kind, own: Any, group: KVGroup) -> None:
    fits = isinstance(own, _WANTED[type(kind)])
    if not fits:
        raise ConfigError(
            f"layout: group {group.name!r} has {', '.join(kind.names)} of layer {kind.layer}, which transformers keeps"
            f" in a {type(own).__name__}, want a {_WANTED[type(kind)].__name__}:"
            " KVLayout.from_hf_config(model.config) fits"
        )
    if isinstance(kind, SlidingWindow) and group.reuse.window_tokens < own.sliding_window:
        raise ConfigError(
            f"layout: group {group.name!r} has a window of {group.reuse.window_tokens} tokens, want that of layer"
            f" {kind.layer} of the model, {own.sliding_window}"
        )


def _check_geometry(layout: KVLayout, model: Any, config: Any) -> None:
    parts = [part for group in layout.groups for part in group.parts]
    layers = {part.layer for part in parts}
    want = int(config.num_hidden_layers)
    if layers != set(range(want)):
        raise ConfigError(f"layout: has {len(layers)} layers, want keys and values of the {want} layers of the model")
    wanted = str(model.dtype).removeprefix("torch.")
    if dtypes := {part.dtype for part in parts if not part.is_state} - {wanted}:
        raise ConfigError(f"layout: dtype {', '.join(sorted(dtypes))}, want that of the model, {wanted}")
    if all(part.kind in ("k", "v") for part in parts):
        _check_sizes(parts, config)
    else:
        _check_like(layout, KVLayout.from_hf_config(model.config, layout.block_tokens, wanted))


def _check_like(layout: KVLayout, wanted: KVLayout) -> None:
    """Refuse parts other than those of ``wanted``, whatever their pages and the order of their axes."""
    have, want = _by_name(layout), _by_name(wanted)
    for name in sorted(set(have) | set(want)):
        if have.get(name) != want.get(name):
            layer, what = name
            raise ConfigError(
                f"layout: layer {layer} {what} is {have.get(name)}, want that of the model, {want.get(name)}:"
                " KVLayout.from_hf_config(model.config) has it"
            )


def _by_name(layout: KVLayout) -> dict[tuple[int, str], tuple[str, int, tuple[tuple[str, int], ...]]]:
    return {
        (part.layer, part.name or part.kind): (
            part.dtype,
            part.tokens_per_entry,
            tuple(sorted((axis, size) for axis, size in sizes_of(part).items() if axis != "token")),
        )
        for group in layout.groups
        for part in group.parts
    }


_OF_HEADS: Final = ("classifier_", "summary_")
"""Settings of heads that no KV depends on."""


def check_dropout(model: Any) -> None:
    """Refuse a model whose KV is a matter of chance: what is stored of it would be found again as if it were computed.

    Raises:
        ConfigError: it is in training mode, and something in it drops activations.
    """
    if not model.training:
        return
    for what, share in _dropouts(model):
        if isinstance(share, (int, float)) and share > 0:
            raise ConfigError(
                f"model: is in training mode, where {what} drops {share:g} of its activations at random, and random KV"
                " would be found again by later generations; call model.eval() first"
            )


def check_keeps_kv(model: Any) -> None:
    """Refuse a model that computes no KV cache, before it has computed an answer for nothing.

    Raises:
        ConfigError: it is in training mode, with gradient checkpointing.
    """
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ConfigError(
            "model: is in training mode with gradient checkpointing, and keeps no KV then; call model.eval() first"
        )


def check_autocast(model: Any) -> None:
    """Refuse to compute KV in another precision than that of the model: it would be found again as if it were exact.

    Raises:
        ConfigError: ``torch.autocast`` is on for a type of device that holds some of the model.
    """
    for kind in sorted({parameter.device.type for parameter in model.parameters()}):
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            raise ConfigError(
                f"torch.autocast({kind!r}, dtype={dtype}) is on: KV that is computed under it is not that of a model in"
                f" {model.dtype}, and would be found again as if it were; load the model with dtype={dtype}, or call"
                " model.generate"
            )


def _dropouts(model: Any) -> Iterator[tuple[str, Any]]:
    """What may drop activations, and which share; models that do so by a function of torch's say it in their config."""
    for name, module in model.named_modules():
        if module.training:
            share = module.p if isinstance(module, _DropoutNd) else getattr(module, "attention_dropout", 0.0)
            yield name or type(module).__name__, share
    for name, share in vars(model.config).items():
        if "drop" in name and not name.startswith(_OF_HEADS):
            yield name, share


def sizes_of(part: Part) -> dict[str, int]:
    """Size by axis."""
    return {str(axis): size for axis, size in zip(part.axes, part.shape, strict=True)}


def _check_sizes(parts: list[Part], config: Any) -> None:
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    for part in parts:
        sizes = sizes_of(part)
        if (sizes.get("head"), sizes.get("dim")) != (heads, dim):
            raise ConfigError(
                f"layout: {part.label} has {sizes.get('head')} heads of {sizes.get('dim')}, want those of the model,"
                f" {heads} of {dim}: KVLayout.from_hf_config(model.config) has them"
            )


def _check_rope(config: Any) -> None:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = [found, *(table for table in found.values() if isinstance(table, dict))]  # of each kind of layers, or one
    for table in tables:
        kind = table.get("rope_type", table.get("type"))
        if kind in LENGTH_DEPENDENT_ROPE:
            raise ConfigError(
                f"rope_type = {kind!r}: the KV of a prefix depends on how long the whole sequence is, so that it cannot"
                " be reused exactly; call model.generate, or use a rope_type with fixed frequencies, such as 'yarn'"
            )
