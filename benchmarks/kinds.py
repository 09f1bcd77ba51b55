"""Layouts that are measured: Llama 8B, and those whose blocks are small or odd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from kvtier import KVGroup, KVLayout, Part

LLAMA_8B: Final[dict[str, Any]] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "head_dim": 128,
}
DEEPSEEK_V32: Final[dict[str, Any]] = {
    "model_type": "deepseek_v32",
    "num_hidden_layers": 61,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
}
DEEPSEEK_V4_FLASH: Final[dict[str, Any]] = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}
PACKED: Final = "fp8_ds_mla"
PAGE_TOKENS: Final = 16


def llama_8b(block_tokens: int) -> KVLayout:
    """128 KiB a token in bf16; engine pages of 16 tokens, ``[16, 8, 128]`` for keys and for values of each layer."""
    return KVLayout.from_hf_config(
        LLAMA_8B, block_tokens, "bfloat16", axes=("token", "head", "dim"), page_tokens=PAGE_TOKENS
    )


def small_blocks() -> KVLayout:
    """64 KiB a block of 16 tokens: 8 layers of one head of 128, keys and values in bfloat16, pages of 4 KiB."""
    keys = [Part(layer, "k", "bfloat16", ("token", "head", "dim"), (16, 1, 128)) for layer in range(8)]
    parts = [part for key in keys for part in (key, replace(key, kind="v"))]
    return KVLayout(16, 16, (KVGroup("attention", tuple(parts)),))


def deepseek_v32() -> KVLayout:
    """In FP8: 61 layers of 656 bytes of latent and 132 of index key a token, pages and blocks of 64 tokens."""
    return KVLayout.from_hf_config(DEEPSEEK_V32, 64, PACKED, page_tokens=64)


def deepseek_v4_flash(block_tokens: int) -> KVLayout:
    """In FP8: compressed entries and index keys of 41 layers, windows of 43, states of 21; a page is a block."""
    return KVLayout.from_hf_config(DEEPSEEK_V4_FLASH, block_tokens, PACKED, page_tokens=block_tokens)
