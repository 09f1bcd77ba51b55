"""DeepSeek V4: entries that stand for several tokens, a window of uncompressed ones, and what overlaps between entries.

A layer compresses 4 tokens into an entry, with an index key beside it (CSA), or 128 tokens (HCA), or none. Every layer
also sees a window of the last tokens uncompressed. Keys are values in this model, so that both are one vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Final

from kvtier.errors import ConfigError
from kvtier.models.families.attention import SLIDING, which, window_of
from kvtier.models.families.form import Form
from kvtier.models.families.settings import Settings, count, layer_kinds, wrong
from kvtier.models.parts import KVGroup, Part, Reuse

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
_USUAL_RATIOS: Final = {CSA: 4, HCA: 128}
_BY_RATIO: Final = {"0": SLIDING, "4": CSA, "128": HCA}
_VALUES_PER_SCALE: Final = 64
"""In FlashMLA's packed entries of DeepSeek V4; a scale is one byte, and scales are padded to a multiple of eight."""


def compressed(settings: Settings, form: Form) -> tuple[KVGroup, ...]:
    """Entries and index keys; the window of every layer; what the next entry of CSA layers takes of the last one.

    A block is a multiple of every ratio. So it ends with an entry, and nothing of an unfinished one is ever stored: at
    the end of a block the compressors' buffers are empty, and of the tail only the overlap is left.
    """
    kinds = _kinds(settings)
    ratios = {kind: _ratio(settings, kind) for kind in _USUAL_RATIOS}
    entries = tuple(part for layer, kind in enumerate(kinds) for part in _entries(settings, form, layer, kind, ratios))
    window = tuple(_vector(settings, form, layer, 1, "window") for layer in range(len(kinds)))
    overlap = tuple(part for layer in which(kinds, CSA) for part in _overlap(settings, form, layer, ratios[CSA]))
    reuse = window_of(count(settings, "sliding_window"), len(kinds))
    return (
        *((KVGroup("attention", entries),) if entries else ()),
        KVGroup("window", window, reuse),
        *((KVGroup("state", overlap, Reuse("last", replay_tokens=reuse.replay_tokens)),) if overlap else ()),
    )


def _entries(settings: Settings, form: Form, layer: int, kind: str, ratios: Mapping[str, int]) -> tuple[Part, ...]:
    if kind == SLIDING:
        return ()
    entry = _vector(settings, form, layer, ratios[kind], "")
    return (entry, form.index(layer, count(settings, "index_head_dim"), ratio=ratios[CSA])) if kind == CSA else (entry,)


def _vector(settings: Settings, form: Form, layer: int, ratio: int, name: str) -> Part:
    """Keys that are values: uncompressed ones are called by the window's name, as a layer has both."""
    dim = count(settings, "head_dim")
    if not form.is_packed:
        return form.entries(layer, "kv", dim, ratio=ratio, name=name)
    rope = _rope_dim(settings, dim)
    planes = (dim - rope + 2 * rope, ceil((dim - rope) / _VALUES_PER_SCALE / 8) * 8)
    return form.packed_planes(layer, "kv", planes, ratio=ratio, name=name)


def _overlap(settings: Settings, form: Form, layer: int, ratio: int) -> tuple[Part, ...]:
    """Half of what the last tokens of the last entry gave, which the next entry is made of too, and its gates.

    Gates are float32 whatever the model computes in: released weights have a bias of that dtype, which is added.
    """
    sizes = {"": count(settings, "head_dim"), "index_": count(settings, "index_head_dim")}
    return tuple(
        form.state(layer, ("state", "dim"), (ratio, dim), f"{prefix}overlap_{what}", dtype)
        for prefix, dim in sizes.items()
        for what, dtype in (("kv", None), ("gate", "float32"))
    )


def _kinds(settings: Settings) -> list[str]:
    """By ``layer_types``, else by the ratios that files on the hub have; these may go on with draft layers."""
    found = settings.get("compress_ratios")
    if settings.get("layer_types") is not None or found is None:
        return layer_kinds(settings, (SLIDING, CSA, HCA))
    layers = count(settings, "num_hidden_layers")
    if not isinstance(found, (list, tuple)) or len(found) < layers or not set(map(str, found)) <= set(_BY_RATIO):
        raise wrong(settings, "compress_ratios", found, f"a list of {layers}, 0, 4 or 128 for each layer")
    return [_BY_RATIO[str(ratio)] for ratio in found[:layers]]


def _ratio(settings: Settings, kind: str) -> int:
    rates = settings.get("compress_rates") or {}
    if not isinstance(rates, Mapping):
        raise wrong(settings, "compress_rates", rates, "the ratio of each kind of layers")
    old = {CSA: "compress_rate_csa", HCA: "compress_rate_hca"}[kind]
    return count({**settings, **rates}, kind, default=count(settings, old, default=_USUAL_RATIOS[kind]))


def _rope_dim(settings: Settings, dim: int) -> int:
    """How many values of an entry are rotated, and so not quantised."""
    share = settings.get("partial_rotary_factor")
    rope = count(settings, "qk_rope_head_dim", default=int(dim * share) if isinstance(share, float) else 64)
    if rope >= dim:
        raise ConfigError(f"config of {settings.get('model_type')!r}: qk_rope_head_dim = {rope}, want below {dim}")
    return rope
