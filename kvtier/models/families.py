"""The groups of a model family, read from its Hugging Face config. A new family is one line in ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from kvtier.errors import ConfigError
from kvtier.models.parts import Axis, KVGroup, Part, PartKind

Settings: TypeAlias = Mapping[str, Any]
"""The text part of a model's config, as a plain mapping."""

PageShape: TypeAlias = tuple[tuple[Axis, ...], int]
"""Order of the axes in one engine page, and its tokens."""

_MOST: Final = 1 << 16
"""Of anything that a configuration counts: more is a mistake, and would take all memory to describe."""
EXAMPLE: Final = (
    'Part(layer=0, kind="k", dtype="bfloat16", axes=("head", "token", "dim"), shape=(kv_heads, page_tokens, head_dim))'
)


def groups_of(hf_config: Any, dtype: str, axes: tuple[Axis, ...], page_tokens: int) -> tuple[KVGroup, ...]:
    """The groups of the model that ``hf_config`` (a ``PretrainedConfig`` or its dict) describes.

    A config that nests its language model under ``text_config`` is read there.

    Raises:
        ConfigError: the architecture is not known, or the config lacks a field that the layout needs.
    """
    settings = _text_settings(hf_config)
    model_type = settings.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(
            f"model_type = {model_type!r}: no layout is known for this architecture "
            f"(known: {', '.join(sorted(FAMILIES))}). Describe its KV yourself: "
            f"KVLayout(block_tokens=64, page_tokens=64, groups=(KVGroup('attention', parts),)) "
            f"with one Part for every tensor that a layer caches, in layer order, such as {EXAMPLE}"
        )
    return family(settings, dtype, (axes, page_tokens))


def _attention(settings: Settings, dtype: str, page: PageShape) -> tuple[KVGroup, ...]:
    """Keys then values of every layer: multi-head and grouped-query attention, dense or with experts.

    Models that attend to a sliding window only are kept whole: a longer cache changes no result, and every prefix of
    it can be reused.
    """
    heads = _count(settings, "num_attention_heads")
    kv_heads = _count(settings, "num_key_value_heads", default=heads)
    dim = _count(settings, "head_dim", default=_count(settings, "hidden_size") // heads)
    axes, page_tokens = page
    sizes: dict[Axis, int] = {"head": kv_heads, "token": page_tokens, "dim": dim}
    if set(axes) != set(sizes) or len(axes) != len(sizes):
        raise ConfigError(f"axes = {axes}: want an order of ('head', 'token', 'dim')")
    shape = tuple(sizes[axis] for axis in axes)
    kinds: tuple[PartKind, ...] = ("k", "v")
    layers = range(_count(settings, "num_hidden_layers"))
    return (KVGroup("attention", tuple(Part(layer, kind, dtype, axes, shape) for layer in layers for kind in kinds)),)


FAMILIES: Final[Mapping[str, Callable[[Settings, str, PageShape], tuple[KVGroup, ...]]]] = {
    "llama": _attention,
    "mistral": _attention,
    "mixtral": _attention,
    "qwen2": _attention,
    "qwen2_moe": _attention,
    "qwen3": _attention,
    "qwen3_moe": _attention,
}


def _text_settings(hf_config: Any) -> Settings:
    settings = hf_config
    if not isinstance(hf_config, (Mapping, type)) and hasattr(hf_config, "to_dict"):
        settings = hf_config.to_dict()
    if not isinstance(settings, Mapping):
        raise ConfigError(f"hf_config is a {type(hf_config).__name__}: pass a PretrainedConfig or its dict")
    nested = settings.get("text_config")
    return nested if isinstance(nested, Mapping) else settings


def _count(settings: Settings, key: str, *, default: int | None = None) -> int:
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST:
        raise ConfigError(
            f"config of {settings.get('model_type')!r}: {key} = {value!r}, want a positive integer, at most {_MOST}"
        )
    return value
