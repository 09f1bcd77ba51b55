"""Configs of tiny models of every family, by the names that transformers has for the fields."""

from typing import Any

from transformers import AutoConfig

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROUTED = {
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    **ROUTED, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
INDEX = {"index_topk": 32, "index_head_dim": 16, "index_n_heads": 2}
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "head_dim": 8, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3, "head_dim": 24},
    "mistral": {"num_hidden_layers": 3, "head_dim": 24, "sliding_window": 24},
    "mixtral": {"num_hidden_layers": 3, "head_dim": 24, "sliding_window": 24, "num_local_experts": 4},
    "qwen2": {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen2_moe": {
        "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 3, **EXPERTS,
    },
    "qwen3": {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 3, "head_dim": 24, **EXPERTS},
    "glm4_moe": {**ROUTED, "head_dim": 24},
    "minimax_m2": {"num_hidden_layers": 3, "head_dim": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"num_hidden_layers": 7, "head_dim": 24, "sliding_window": 24},
    "gpt_oss": {
        "num_hidden_layers": 4, "head_dim": 24, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v3": LATENT,
    "deepseek_v32": {**LATENT, **INDEX},
    "glm_moe_dsa": {**LATENT, **INDEX, "indexer_types": ["full", "shared", "full"]},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 3, "head_dim": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 2,
        "index_head_dim": 16, "index_block_size": 16, "rotary_dim": 8, "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    },
    "deepseek_v4": {
        "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 24,
        "sliding_window": 24, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 8,
        "index_topk": 8, "hc_mult": 2, "num_hash_layers": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "compress_ratios": [0, 4, 128, 4],
    },
    "qwen3_next": {**LINEAR, **EXPERTS},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS},
    "minimax": {"num_hidden_layers": 4, "head_dim": 24, "block_size": 64, "num_local_experts": 4},
}  # fmt: skip


def tiny_config(family: str) -> Any:
    """A ``PretrainedConfig``."""
    return AutoConfig.for_model(family, **{**BASE, **FAMILIES[family]})
