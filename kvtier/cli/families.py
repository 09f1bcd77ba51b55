"""The models of ``kvtier demo``: one of each family, random but seeded, small enough for two cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SEED: Final = 20260101
_SMALL: Final[dict[str, Any]] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8192, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_MLA: Final[dict[str, Any]] = {
    "kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS: Final[dict[str, Any]] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_FEW: Final[dict[str, Any]] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_INDEX: Final[dict[str, Any]] = {"index_topk": 512, "index_head_dim": 32, "index_n_heads": 16}
_LINEAR: Final[dict[str, Any]] = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
_QWEN_EXPERTS: Final[dict[str, Any]] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128
}  # fmt: skip
_SLIDING: Final[dict[str, Any]] = {
    "sliding_window": 128, "head_dim": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip


_SHORT: Final = 0.25
"""For models whose kernels transformers replaces by slow ones where there is no GPU."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model by the fields of its config, and the block that its layout has."""

    settings: dict[str, Any]
    block_tokens: int = 64
    document_share: float = 0.4
    """Of the document that is talked about."""


FAMILIES: Final[dict[str, Family]] = {
    # 83 million parameters, 24 KiB of KV a token; its weights are wide enough that each answer differs.
    "llama": Family(
        {
            "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_key_value_heads": 4, "initializer_range": 0.06,
        },
        document_share=1.0,
    ),
    "qwen3": Family({"head_dim": 32}),
    "mistral": Family({"head_dim": 32, "sliding_window": 1024}),
    "gemma3_text": Family(_SLIDING),
    "gpt_oss": Family(
        {**_SLIDING, **_FEW, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    ),
    "glm4_moe": Family({"head_dim": 32, **_EXPERTS}),
    "minimax_m2": Family({"head_dim": 32, **_FEW}),
    "minimax": Family(
        {"head_dim": 32, "block_size": 64, **_FEW, "layer_types": ["full_attention", "linear_attention"] * 2}
    ),
    "deepseek_v3": Family({**_MLA, **_EXPERTS}),
    "deepseek_v32": Family({**_MLA, **_EXPERTS, **_INDEX}),
    "glm_moe_dsa": Family({**_MLA, **_EXPERTS, **_INDEX, "indexer_types": ["full", "shared", "full", "shared"]}),
    "deepseek_v4": Family(
        {
            "num_key_value_heads": 1, "head_dim": 64, "qk_rope_head_dim": 32, "q_lora_rank": 128, "sliding_window": 128,
            "o_groups": 2, "o_lora_rank": 64, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 256,
            "hc_mult": 2, "num_hash_layers": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 128, "compress_ratios": [0, 4, 128, 4],
        },
        block_tokens=128,
        document_share=_SHORT,
    ),
    "qwen3_next": Family({**_LINEAR, **_QWEN_EXPERTS}, document_share=_SHORT),
    "qwen3_5_text": Family(_LINEAR, document_share=_SHORT),
}  # fmt: skip
OTHER_NAMES: Final = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}


def random_model(family: str) -> Any:
    """One of ``FAMILIES``, in float32."""
    config = AutoConfig.for_model(family, **{**_SMALL, **FAMILIES[family].settings})
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return model.eval()
