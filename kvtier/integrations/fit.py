"""Whether a layout is that of a model of transformers, and whether a prefix of the model's KV means anything alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.nn.modules.dropout import _DropoutNd

from kvtier.errors import ConfigError
from kvtier.models import KVLayout, Part

LENGTH_DEPENDENT_ROPE: Final = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies change with the length of the whole sequence, and so all KV before its end."""


def layers_of(layout: KVLayout, model: Any) -> list[tuple[Part, Part]]:
    """The parts (keys, values) of every layer, as ``model`` computes them.

    Raises:
        ConfigError: the layout has another number of layers, heads or dimensions than the model, another dtype, or
            other kinds of parts; or the KV of a prefix depends on what follows.
    """
    config = model.config.get_text_config(decoder=True)
    _check_rope(config)
    by_layer: dict[int, dict[str, Part]] = {}
    for group in layout.groups:
        for part in group.parts:
            by_layer.setdefault(part.layer, {})[part.kind] = part
    want = int(config.num_hidden_layers)
    if sorted(by_layer) != list(range(want)) or any(set(kinds) != {"k", "v"} for kinds in by_layer.values()):
        raise ConfigError(f"layout: has {len(by_layer)} layers, want keys and values of the {want} layers of the model")
    parts = [part for kinds in by_layer.values() for part in kinds.values()]
    wanted = str(model.dtype).removeprefix("torch.")
    if dtypes := {part.dtype for part in parts} - {wanted}:
        raise ConfigError(f"layout: dtype {', '.join(sorted(dtypes))}, want that of the model, {wanted}")
    _check_sizes(parts, config)
    return [(by_layer[layer]["k"], by_layer[layer]["v"]) for layer in range(want)]


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
