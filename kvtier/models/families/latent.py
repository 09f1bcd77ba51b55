"""Multi-head latent attention: one latent and one rope vector a token; and sparse attention by index keys."""

from __future__ import annotations

from typing import Final

from kvtier.models.families.attention import FULL, attention_group, which
from kvtier.models.families.form import Form
from kvtier.models.families.settings import Settings, count, kinds_in, layer_kinds, wrong
from kvtier.models.parts import KVGroup, Part

SPARSE: Final = "minimax_m3_sparse"
_VALUES_PER_SCALE: Final = 128
"""In FlashMLA's packed entries of DeepSeek V3.2; a scale is a float32."""


def latent(settings: Settings, form: Form) -> tuple[KVGroup, ...]:
    """DeepSeek V2 and V3: latent, then rope, of every layer; the rope vector carries its position already."""
    layers = range(count(settings, "num_hidden_layers"))
    return (KVGroup("attention", tuple(part for layer in layers for part in _latents(settings, form, layer))),)


def indexed_latent(settings: Settings, form: Form) -> tuple[KVGroup, ...]:
    """DeepSeek V3.2 and GLM 5: as ``latent``, and index keys of the layers that choose tokens themselves."""
    layers, indexed = range(count(settings, "num_hidden_layers")), _indexed(settings)
    dim = count(settings, "index_head_dim")
    parts: list[Part] = []
    for layer in layers:
        parts.extend(_latents(settings, form, layer))
        if indexed[layer]:
            parts.append(form.index(layer, dim))
    return (KVGroup("attention", tuple(parts)),)


def indexed_attention(settings: Settings, form: Form) -> tuple[KVGroup, ...]:
    """MiniMax M3: keys and values of every layer, and index keys, one head of them, of the sparse layers."""
    kinds = _sparse_kinds(settings)
    sparse = set(which(kinds, SPARSE))
    dim = count(settings, "index_head_dim") if sparse else 0
    parts: list[Part] = []
    for layer in range(len(kinds)):
        parts.extend(attention_group(settings, form, [layer]).parts)
        if layer in sparse:
            parts.append(form.index(layer, dim))
    return (KVGroup("attention", tuple(parts)),)


def _latents(settings: Settings, form: Form, layer: int) -> tuple[Part, ...]:
    rank, rope = count(settings, "kv_lora_rank"), count(settings, "qk_rope_head_dim")
    if not form.is_packed:
        return form.entries(layer, "latent", rank), form.entries(layer, "rope", rope)
    if rank % _VALUES_PER_SCALE:
        raise wrong(settings, "kv_lora_rank", rank, f"a multiple of {_VALUES_PER_SCALE} for packed entries")
    return (form.packed_rows(layer, "latent", rank + rank // _VALUES_PER_SCALE * 4 + rope * 2),)


def _indexed(settings: Settings) -> list[bool]:
    """Which layers have index keys of their own; the others go by the choice of the layer before."""
    layers = count(settings, "num_hidden_layers")
    found, pattern = settings.get("indexer_types"), settings.get("index_topk_pattern")
    if found is None and isinstance(pattern, str):
        found = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    elif found is None and pattern is not None:
        found = pattern
    if found is not None:
        return [kind == "full" for kind in kinds_in(settings, "indexer_types", found, layers, ("full", "shared"))]
    every = count(settings, "index_topk_freq", default=1)
    offset = count(settings, "index_skip_topk_offset", default=2)
    return [max(layer - offset + 1, 0) % every == 0 for layer in range(layers)]


def _sparse_kinds(settings: Settings) -> list[str]:
    """By ``layer_types``, else by the flags that files on the hub have, else none is sparse."""
    nested = settings.get("sparse_attention_config")
    flags = nested.get("sparse_attention_freq") if isinstance(nested, dict) else None
    if settings.get("layer_types") is not None or flags is None:
        return layer_kinds(settings, (FULL, SPARSE), lambda layer: FULL)
    layers = count(settings, "num_hidden_layers")
    if not isinstance(flags, (list, tuple)) or len(flags) < layers:
        raise wrong(settings, "sparse_attention_freq", flags, f"a list of {layers} flags")
    return [SPARSE if flag else FULL for flag in flags[:layers]]
