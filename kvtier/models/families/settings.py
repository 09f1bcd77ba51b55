"""What a Hugging Face config says, read field by field: a field that cannot be used is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from kvtier.errors import ConfigError

Settings: TypeAlias = Mapping[str, Any]
"""The text part of a model's config, as a plain mapping."""

_MOST: Final = 1 << 16
"""Of anything that a configuration counts: more is a mistake, and would take all memory to describe."""
_OTHER_NAMES: Final = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "deepseek_sparse_attention": "indexed_attention",
}
"""Kinds of layers that transformers renamed; files on the hub keep the names that they were written with."""


def text_settings(hf_config: Any) -> Settings:
    """The language model's part of ``hf_config``, a ``PretrainedConfig`` or its dict.

    Raises:
        ConfigError: it is neither.
    """
    settings = hf_config
    if not isinstance(hf_config, (Mapping, type)) and hasattr(hf_config, "to_dict"):
        settings = hf_config.to_dict()
    if not isinstance(settings, Mapping):
        raise ConfigError(f"hf_config is a {type(hf_config).__name__}: pass a PretrainedConfig or its dict")
    nested = settings.get("text_config")
    return nested if isinstance(nested, Mapping) else settings


def count(settings: Settings, key: str, *, default: int | None = None) -> int:
    """A positive integer.

    Raises:
        ConfigError: it is none, or there is none and no ``default``.
    """
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST:
        raise wrong(settings, key, value, f"a positive integer, at most {_MOST}")
    return value


def layer_kinds(settings: Settings, known: Sequence[str], default: Callable[[int], str] | None = None) -> list[str]:
    """Which of the ``known`` kinds each layer is, by ``layer_types``, else by ``default`` of the layer's number.

    Raises:
        ConfigError: the list is missing without a ``default``, too short, or has a kind that is not known.
    """
    layers, found = count(settings, "num_hidden_layers"), settings.get("layer_types")
    if found is None and default is not None:
        return [default(layer) for layer in range(layers)]
    return kinds_in(settings, "layer_types", found, layers, known)


def kinds_in(settings: Settings, key: str, found: Any, layers: int, known: Sequence[str]) -> list[str]:
    """``found``, under ``key``, as a list of one of ``known`` for each of the ``layers``; what lies beyond is left out.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(found, (list, tuple)) or len(found) < layers:
        raise wrong(settings, key, found, f"a list of {layers}, one of {', '.join(known)} for each layer")
    kinds = []
    for layer, kind in enumerate(found[:layers]):
        name = _OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else ""
        if name not in known:
            raise wrong(settings, f"{key}[{layer}]", kind, f"one of {', '.join(known)}")
        kinds.append(name)
    return kinds


def wrong(settings: Settings, key: str, value: Any, want: str) -> ConfigError:
    """That ``value`` is not what ``key`` has to be."""
    return ConfigError(f"config of {settings.get('model_type')!r}: {key} = {value!r}, want {want}")
