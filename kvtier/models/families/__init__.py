"""The groups of a model family, read from its Hugging Face config. A new family is one line in ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeAlias

from kvtier.errors import ConfigError
from kvtier.models.families import attention, compressed, latent, recurrent
from kvtier.models.families.form import Form, checked_form
from kvtier.models.families.settings import Settings, text_settings
from kvtier.models.parts import KVGroup

__all__ = ["EXAMPLE", "FAMILIES", "Form", "checked_form", "groups_of"]

Family: TypeAlias = Callable[[Settings, Form], tuple[KVGroup, ...]]

EXAMPLE: Final = (
    'Part(layer=0, kind="k", dtype="bfloat16", axes=("head", "token", "dim"), shape=(kv_heads, page_tokens, head_dim))'
)

FAMILIES: Final[Mapping[str, Family]] = {
    "llama": attention.full,
    "glm4_moe": attention.full,
    "minimax_m2": attention.full,
    "mistral": partial(attention.windowed, slides=attention.all_slide, optional=True),
    "mixtral": partial(attention.windowed, slides=attention.all_slide, optional=True),
    "qwen2": partial(attention.windowed, slides=attention.upper_layers_slide, optional=True),
    "qwen2_moe": partial(attention.windowed, slides=attention.even_lower_layers_slide, optional=True),
    "qwen3": partial(attention.windowed, slides=attention.upper_layers_slide, optional=True),
    "qwen3_moe": partial(attention.windowed, slides=attention.all_slide_if_told, optional=True),
    "gemma3": partial(attention.windowed, slides=attention.all_but_every_sixth_slide),
    "gemma3_text": partial(attention.windowed, slides=attention.all_but_every_sixth_slide),
    "gpt_oss": partial(attention.windowed, slides=attention.even_layers_slide),
    "deepseek_v2": latent.latent,
    "deepseek_v3": latent.latent,
    "kimi_k2": latent.latent,
    "deepseek_v32": latent.indexed_latent,
    "glm_moe_dsa": latent.indexed_latent,
    "minimax_m3_vl_text": latent.indexed_attention,
    "deepseek_v4": compressed.compressed,
    "qwen3_next": recurrent.gated_delta,
    "qwen3_5": recurrent.gated_delta,
    "qwen3_5_text": recurrent.gated_delta,
    "qwen3_5_moe": recurrent.gated_delta,
    "qwen3_5_moe_text": recurrent.gated_delta,
    "minimax": recurrent.lightning,
    "minimax_m1": recurrent.lightning,
}
"""By ``model_type``. transformers 5.23 has a config class for all but ``kimi_k2`` and ``minimax_m1``: files on the hub
bring their own, whose fields are those of ``deepseek_v3`` and ``minimax``, with ``attn_type_list`` for ``layer_types``.
"""

_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096},
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128},
    "minimax_m2": {"head_dim": 128},
    "minimax_m3_vl_text": {"head_dim": 128, "index_head_dim": 128},
    "qwen3_next": {"head_dim": 256},
    "qwen3_5_text": {"head_dim": 256},
    "qwen3_5_moe_text": {"head_dim": 256},
    "deepseek_v32": {"index_head_dim": 128},
    "glm_moe_dsa": {"index_head_dim": 128},
    "deepseek_v4": {"head_dim": 512, "index_head_dim": 128, "sliding_window": 128},
}
"""What the config classes fill in where a file leaves it out, and what is no function of other fields."""


def groups_of(hf_config: Any, form: Form) -> tuple[KVGroup, ...]:
    """The groups of the model that ``hf_config`` (a ``PretrainedConfig`` or its dict) describes, kept as ``form`` says.

    A config that nests its language model under ``text_config`` is read there.

    Raises:
        ConfigError: the architecture is not known, or the config lacks a field that the layout needs.
    """
    settings = text_settings(hf_config)
    model_type = settings.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(
            f"model_type = {model_type!r}: no layout is known for this architecture "
            f"(known: {', '.join(sorted(FAMILIES))}). Describe its KV yourself: "
            f"KVLayout(block_tokens=64, page_tokens=64, groups=(KVGroup('attention', parts),)) "
            f"with one Part for every tensor that a layer caches, in layer order, such as {EXAMPLE}"
        )
    given = {key: value for key, value in settings.items() if value is not None}
    return family({**_DEFAULTS.get(str(model_type), {}), **given}, form)
