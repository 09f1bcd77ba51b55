"""A Llama of about 80 million parameters with random weights, the same every time, for a CPU."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY: Final = 4096
MAX_TOKENS: Final = 8192


def llama_80m() -> Any:
    """The model, in bfloat16 and ready to generate. KV: 12 layers of 4 heads of 64, 12 KiB a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def parameters(model: Any) -> int:
    """How many the model has."""
    return sum(parameter.numel() for parameter in model.parameters())
