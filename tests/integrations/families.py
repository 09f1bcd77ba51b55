"""Tiny random models of every family, and a plain reference: caches that keep all that passes, and can be cut."""

import copy
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache
from transformers.models.minimax.modeling_minimax import MiniMaxCache
from transformers.utils import logging

from kvtier.models import KVLayout

BLOCK = 16
WINDOW = 24
VOCABULARY = 128
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "max_position_embeddings": 4096,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_SPARSE_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_INDEX = {"index_topk": 32, "index_head_dim": 16, "index_n_heads": 16}
"""With few heads, scores tie at zero, and which token is chosen would be a matter of chance."""
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = {
    "llama": {"num_hidden_layers": 2, "head_dim": 8},
    "qwen3": {"num_hidden_layers": 2, "head_dim": 8},
    "mistral": {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": WINDOW},
    "glm4_moe": dict(num_hidden_layers=2, head_dim=8, **_EXPERTS),
    "minimax_m2": {"num_hidden_layers": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"num_hidden_layers": 3, "head_dim": 8, "sliding_window": WINDOW, "layer_types": _MIXED},
    "gpt_oss": {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": dict(
        num_hidden_layers=2, head_dim=8, **_MLA, **_EXPERTS, topk_method="greedy", norm_topk_prob=False
    ),
    "deepseek_v3": dict(num_hidden_layers=2, **_MLA, **_EXPERTS),
    "deepseek_v32": dict(num_hidden_layers=2, **_MLA, **_EXPERTS, **_INDEX),
    "glm_moe_dsa": dict(num_hidden_layers=3, **_MLA, **_EXPERTS, **_INDEX, indexer_types=["full", "shared", "full"]),
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 24,
        "sliding_window": WINDOW,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 16,
        "index_head_dim": 8,
        "index_topk": 8,
        "hc_mult": 2,
        "num_hash_layers": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": BLOCK},
    },
    "qwen3_next": dict(**_LINEAR, **_SPARSE_EXPERTS),
    "qwen3_5_text": dict(**_LINEAR),
    "qwen3_5_moe_text": dict(**_LINEAR, **_SPARSE_EXPERTS),
    "minimax": {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "block_size": BLOCK,
        "num_local_experts": 4,
        "layer_types": ["full_attention", "linear_attention"] * 2,
    },
}


@dataclass(frozen=True)
class Variant:
    """A family in another form: other settings of its config, of its layout, or as released files are loaded."""

    family: str
    settings: dict[str, Any]
    windows: bool | None = None
    block_tokens: int = BLOCK
    is_released: bool = False


VARIANTS = {
    "mistral_windows": Variant("mistral", {}, windows=True),
    "qwen3_windows": Variant(
        "qwen3",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        windows=True,
    ),
    "deepseek_v4_released": Variant("deepseek_v4", {}, is_released=True),
    "deepseek_v4_128": Variant(
        "deepseek_v4",
        {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}},
        block_tokens=128,
    ),
}


@dataclass(frozen=True)
class Case:
    """A model, its layout, and whether that keeps sliding windows whole."""

    model: Any
    layout: KVLayout
    whole: bool

    @property
    def block(self) -> int:
        return self.layout.block_tokens


def case_of(name, dtype=torch.float32):
    """One of ``FAMILIES`` or ``VARIANTS``."""
    variant = VARIANTS.get(name) or Variant(name, {})
    model = model_of(variant.family, dtype, **variant.settings)
    if variant.is_released:
        model = _released(model, dtype)
    layout = KVLayout.from_hf_config(model.config, variant.block_tokens, dtype=model.dtype, windows=variant.windows)
    return Case(model, layout, whole=name == "mistral")


def model_of(family, dtype=torch.float32, **settings):
    """A model of two to four layers. What its initialiser leaves at zero would hide mistakes, and is filled."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**_BASE, **FAMILIES[family], **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    if family == "deepseek_v4":
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("position_bias", "sinks")):
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.randint(0, 4, tensor.shape))
    return model


def _released(model, dtype):
    """As it comes from files: what transformers keeps in float32 stays so in a model of bfloat16."""
    logging.disable_progress_bar()
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().requires_grad_(False)


def layout_of(model, block_tokens=BLOCK):
    return KVLayout.from_hf_config(model.config, block_tokens, dtype=model.dtype)


def prompt_of(tokens, seed=0):
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def has_states(model):
    """Whether the model has states that are there at the end of a forward only."""
    return "linear_attention" in (getattr(model.config, "layer_types", None) or ())


class _Seen:
    """A window of which everything is kept beside it."""

    _layer_type = None

    def update(self, keys, values, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append((keys, values))
        return super().update(keys, values, *args, **kwargs)


class _Window(_Seen, DynamicSlidingWindowLayer):
    _layer_type = None


class _HCA(_Seen, DeepseekV4HCACache):
    _layer_type = None


class _CSA(_Seen, DeepseekV4CSACache):
    _layer_type = None

    def update_overlap_state(self, name, kv, gate, dim):
        self.__dict__.setdefault("over", {}).setdefault(name, []).append((kv[..., :dim], gate[..., :dim]))
        return super().update_overlap_state(name, kv, gate, dim)


def _watching(layer, config):
    if isinstance(layer, DeepseekV4CSACache):
        return _CSA(config)
    if isinstance(layer, DeepseekV4HCACache):
        return _HCA(config)
    return _Window(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else layer


class Reference:
    """What a model keeps in its own cache, with all that its layers forget, so that it can be cut at the end of a
    block; states are copied after every forward."""

    def __init__(self, model, *, whole=False):
        """``whole``: windows are kept whole, as full attention."""
        self.model = model
        self.whole = whole
        if model.config.model_type == "minimax":
            self.past = MiniMaxCache()
        elif whole:
            self.past = DynamicCache()
        else:
            self.past = DynamicCache(config=model.config)
            self.past.layers = [_watching(layer, model.config) for layer in self.past.layers]
        self.states = {}

    def prefill(self, prompt, ends):
        """One forward up to each of ``ends``."""
        for end in ends:
            self.model(prompt[:, self.past.get_seq_length() : end], past_key_values=self.past, logits_to_keep=1)
            self._note()

    def generate(self, prompt, **settings):
        hook = self.model.register_forward_hook(lambda *_: self._note())
        try:
            return self.model.generate(prompt, past_key_values=self.past, **settings)
        finally:
            hook.remove()

    def cut(self, tokens):
        """The first ``tokens`` of it, as if nothing had come behind them."""
        if tokens == 0:
            return Reference(self.model, whole=self.whole)
        other = Reference(self.model, whole=self.whole)
        states = self.states.get(tokens, {})
        other.states = {at: kept for at, kept in self.states.items() if at <= tokens}
        if isinstance(self.past, MiniMaxCache):
            for number, layer in enumerate(self.past.layers):
                if number in states:
                    other.past.set_linear_cache(number, states[number].clone())
                else:
                    other.past.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], number)
                    other.past.set_linear_cache(number, [])
            for number in set(states) - set(range(len(self.past.layers))):
                other.past.set_linear_cache(number, states[number].clone())
            return other
        for number, layer in enumerate(self.past.layers):
            _cut_layer(layer, other.past, number, tokens, states.get(number))
        return other

    def _note(self):
        past = self.past
        if isinstance(past, MiniMaxCache):
            found = {
                number: state.clone()
                for number, state in enumerate(past.linear_cache)
                if isinstance(state, torch.Tensor)
            }
        else:
            found = {
                number: copy.deepcopy((layer.conv_states[0], layer.recurrent_states[0]))
                for number, layer in enumerate(past.layers)
                if isinstance(layer, LinearAttentionCacheLayerMixin)
            }
        self.states[past.get_seq_length()] = found


def _cut_layer(layer, past, number, tokens, state):
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        past.update_conv_state(state[0], number, conv_kernel_size=state[0].shape[-1])
        past.update_recurrent_state(state[1], number)
        return
    if not isinstance(layer, DynamicSlidingWindowLayer):
        past.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], number)
        if isinstance(layer, DynamicIndexedLayer) and layer.is_indexer_initialized:
            past.update_indexer(layer.indexer_keys[:, :tokens], number)
        return
    keys, values = (torch.cat(side, 2)[:, :, :tokens] for side in zip(*layer.seen, strict=True))
    mine = past.layers[number]
    held = min(tokens, layer.sliding_window - 1)
    mine.update(keys[:, :, tokens - held :], values[:, :, tokens - held :])
    mine.cumulative_length = tokens
    mine.seen = [(keys, values)]
    if not isinstance(layer, DeepseekV4HCACache):
        return
    for name, entries in layer.compressed_kv.items():
        count = tokens // layer.compress_rate
        mine.update_compressor_states(name, entries[:, :count])
        if isinstance(layer, DeepseekV4CSACache):
            kv, gate = (torch.cat(side, 1)[:, :count] for side in zip(*layer.over[name], strict=True))
            DeepseekV4CSACache.update_overlap_state(mine, name, kv[:, -1:], gate[:, -1:], kv.shape[-1])
            mine.over = {**getattr(mine, "over", {}), name: [(kv, gate)]}
