"""Linear attention beside full attention: states, which are what a layer has at one position, whatever came before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kvtier.models.families.attention import FULL, attention_group, head_dim, which
from kvtier.models.families.form import Form
from kvtier.models.families.settings import Settings, count, layer_kinds, wrong
from kvtier.models.parts import KVGroup, Part, Reuse

LINEAR: Final = "linear_attention"


def gated_delta(settings: Settings, form: Form) -> tuple[KVGroup, ...]:
    """Qwen 3-Next and 3.5: a convolution's last inputs and a recurrent state for each linear layer.

    The recurrent state is float32 whatever the model computes in, as transformers keeps it. Of a convolution over n
    tokens the next one needs the n - 1 before it. transformers keeps one more, which nothing reads again.
    """
    every = count(settings, "full_attention_interval", default=4)
    kinds = layer_kinds(settings, (FULL, LINEAR), lambda layer: LINEAR if (layer + 1) % every else FULL)
    keys = count(settings, "linear_num_key_heads"), count(settings, "linear_key_head_dim")
    values = count(settings, "linear_num_value_heads"), count(settings, "linear_value_head_dim")
    channels = 2 * keys[0] * keys[1] + values[0] * values[1]
    inputs = count(settings, "linear_conv_kernel_dim") - 1
    states: list[Part] = []
    for layer in which(kinds, LINEAR):
        if inputs:
            states.append(form.state(layer, ("dim", "state"), (channels, inputs), "conv"))
        shape = (values[0], keys[1], values[1])
        states.append(form.state(layer, ("head", "state", "dim"), shape, "recurrent", "float32"))
    return _groups(settings, form, which(kinds, FULL), states)


def lightning(settings: Settings, form: Form) -> tuple[KVGroup, ...]:
    """MiniMax M1: keys times values, summed up with decay, for each head of the linear layers."""
    kinds = _lightning_kinds(settings)
    heads, dim = count(settings, "num_attention_heads"), head_dim(settings)
    states = [
        form.state(layer, ("head", "state", "dim"), (heads, dim, dim), "recurrent") for layer in which(kinds, LINEAR)
    ]
    return _groups(settings, form, which(kinds, FULL), states)


def _groups(settings: Settings, form: Form, full: list[int], states: Iterable[Part]) -> tuple[KVGroup, ...]:
    attention = (attention_group(settings, form, full),) if full else ()
    parts = tuple(states)
    return (*attention, KVGroup("state", parts, Reuse("last"))) if parts else attention


def _lightning_kinds(settings: Settings) -> list[str]:
    """By ``layer_types``, else by the flags that files on the hub have (1 is full), else every second layer is full."""
    flags = settings.get("attn_type_list")
    if settings.get("layer_types") is not None or flags is None:
        return layer_kinds(settings, (FULL, LINEAR), lambda layer: LINEAR if layer % 2 else FULL)
    layers = count(settings, "num_hidden_layers")
    if not isinstance(flags, (list, tuple)) or len(flags) < layers:
        raise wrong(settings, "attn_type_list", flags, f"a list of {layers} flags")
    return [FULL if flag else LINEAR for flag in flags[:layers]]
