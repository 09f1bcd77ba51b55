"""Keys and values of every head: multi-head and grouped-query attention, dense or with experts, full or in a window."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from kvtier.models.families.form import Form
from kvtier.models.families.settings import Settings, count, layer_kinds, wrong
from kvtier.models.parts import KVGroup, Part, PartKind, Reuse

FULL, SLIDING = "full_attention", "sliding_attention"
Slides: TypeAlias = Callable[[Settings, int], bool]
"""Whether a layer has a window where the config has no ``layer_types``, as transformers' config classes say."""

_KEYS_AND_VALUES: tuple[PartKind, ...] = ("k", "v")


def full(settings: Settings, form: Form) -> tuple[KVGroup, ...]:
    """Keys then values of every layer, in one group."""
    return (attention_group(settings, form, range(count(settings, "num_hidden_layers"))),)


def windowed(settings: Settings, form: Form, *, slides: Slides, optional: bool = False) -> tuple[KVGroup, ...]:
    """Layers that see all tokens, and layers that see a window, in groups of their own.

    Windows that are ``optional`` are kept whole unless ``form.windows`` is True: a longer cache changes no result, and
    every prefix of it can be reused. So it is where a model has windows only, or in some releases only. Beside full
    layers windows are a small part of a long sequence, and are groups of their own unless ``form.windows`` is False.
    """
    kinds = layer_kinds(settings, (FULL, SLIDING), lambda layer: SLIDING if slides(settings, layer) else FULL)
    if form.windows is False or (optional and form.windows is None):
        kinds = [FULL] * len(kinds)
    groups = []
    if FULL in kinds:
        groups.append(attention_group(settings, form, which(kinds, FULL)))
    if SLIDING in kinds:
        layers, tokens = which(kinds, SLIDING), count(settings, "sliding_window")
        groups.append(KVGroup("window", keys_and_values(settings, form, layers), window_of(tokens, len(layers))))
    return tuple(groups)


def window_of(tokens: int, layers: int) -> Reuse:
    """A window of ``tokens`` in each of ``layers`` layers.

    Every one of them sees ``tokens`` further back, through those below: after as many tokens for each, a window that is
    computed again from nothing is what it was. Layers that see all tokens add none, as theirs are loaded.
    """
    return Reuse("trailing", tokens, tokens * layers)


def attention_group(settings: Settings, form: Form, layers: Iterable[int]) -> KVGroup:
    """Keys then values of ``layers``, needed of the whole prefix."""
    return KVGroup("attention", keys_and_values(settings, form, layers))


def keys_and_values(settings: Settings, form: Form, layers: Iterable[int]) -> tuple[Part, ...]:
    """Two parts for each of ``layers``."""
    key = "num_attention_heads" if settings.get("num_key_value_heads") is None else "num_key_value_heads"
    heads = count(settings, key)
    dim = head_dim(settings)
    return tuple(form.heads(layer, kind, heads, dim) for layer in layers for kind in _KEYS_AND_VALUES)


def head_dim(settings: Settings) -> int:
    """Values in one head."""
    if settings.get("head_dim") is not None:
        return count(settings, "head_dim")
    return count(settings, "hidden_size") // count(settings, "num_attention_heads")


def which(kinds: list[str], kind: str) -> list[int]:
    """The layers that are of ``kind``."""
    return [layer for layer, own in enumerate(kinds) if own == kind]


def all_slide(settings: Settings, layer: int) -> bool:
    """Mistral, Mixtral."""
    return bool(settings.get("sliding_window"))


def all_slide_if_told(settings: Settings, layer: int) -> bool:
    """Qwen 3 with experts."""
    return bool(settings.get("use_sliding_window") and settings.get("sliding_window"))


def upper_layers_slide(settings: Settings, layer: int) -> bool:
    """Qwen 2 and 3."""
    return all_slide_if_told(settings, layer) and layer >= _max_window_layers(settings)


def even_lower_layers_slide(settings: Settings, layer: int) -> bool:
    """Qwen 2 with experts."""
    return all_slide_if_told(settings, layer) and layer % 2 == 0 and layer < _max_window_layers(settings)


def even_layers_slide(settings: Settings, layer: int) -> bool:
    """gpt-oss."""
    return layer % 2 == 0


def all_but_every_sixth_slide(settings: Settings, layer: int) -> bool:
    """Gemma 3; some files have another number than six."""
    return (layer + 1) % count(settings, "sliding_window_pattern", default=6) > 0


def _max_window_layers(settings: Settings) -> int:
    found = settings.get("max_window_layers", 28)
    if not isinstance(found, int) or found < 0:
        raise wrong(settings, "max_window_layers", found, "a number of layers")
    return found
