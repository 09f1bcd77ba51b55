"""Fields of the config.json of released models, as far as a layout needs them."""

from typing import Any

LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def attention(
    model_type: str, layers: int, kv_heads: int, head_dim: int, heads: int = 64, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type, "num_hidden_layers": layers, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "hidden_size": 4096, "num_attention_heads": heads, **more,
    }  # fmt: skip


def latent(model_type: str, layers: int, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "num_hidden_layers": layers, **LATENT, **more}


def v4(layers: int, ratios: list[int]) -> dict[str, Any]:
    """The ratio of the draft layer stands last."""
    return {
        "model_type": "deepseek_v4", "num_hidden_layers": layers, "num_key_value_heads": 1, "head_dim": 512,
        "qk_rope_head_dim": 64, "index_head_dim": 128, "sliding_window": 128, "compress_ratios": [*ratios, 0],
    }  # fmt: skip


def gated_delta(model_type: str, layers: int, values: int) -> dict[str, Any]:
    """Of 16 key heads and so many value heads, all of 128, and one full layer in four of 2 heads of 256."""
    return attention(
        model_type, layers, 2, 256, heads=16, linear_num_key_heads=16, linear_key_head_dim=128,
        linear_num_value_heads=values, linear_value_head_dim=128, linear_conv_kernel_dim=4, full_attention_interval=4,
    )  # fmt: skip


V4_PRO = v4(61, [128, 128, *[4, 128] * 29, 4])
V4_FLASH = v4(43, [0, 0, *[4, 128] * 20, 4])
V32 = latent("deepseek_v32", 61, index_head_dim=128)
V3 = latent("deepseek_v3", 61)
KIMI_K2 = latent("kimi_k2", 61)
GLM_5 = latent("glm_moe_dsa", 78, index_head_dim=128)
GLM_52 = {**GLM_5, "index_topk_freq": 4, "index_skip_topk_offset": 3}
GLM_45 = attention("glm4_moe", 92, 8, 128, heads=96)
GLM_45_AIR = attention("glm4_moe", 46, 8, 128, heads=96)
QWEN3_235B = attention("qwen3_moe", 94, 4, 128)
QWEN3_32B = attention("qwen3", 64, 8, 128)
QWEN25_32B = {**attention("qwen2", 64, 8, 128, heads=40), "head_dim": None, "hidden_size": 5120}
QWEN3_NEXT = gated_delta("qwen3_next", 48, 32)
QWEN35_397B = {"model_type": "qwen3_5_moe", "text_config": gated_delta("qwen3_5_moe_text", 60, 64)}
MINIMAX_M1 = attention("minimax_m1", 80, 8, 128, attn_type_list=[0, 0, 0, 0, 0, 0, 0, 1] * 10)
MINIMAX_M2 = attention("minimax_m2", 62, 8, 128, heads=48)
MINIMAX_M3 = {
    "model_type": "minimax_m3_vl",
    "text_config": attention(
        "minimax_m3_vl_text", 60, 4, 128, layer_types=["full_attention"] * 3 + ["minimax_m3_sparse"] * 57
    ),
}
LLAMA_8B = attention("llama", 32, 8, 128, heads=32)
LLAMA_70B = attention("llama", 80, 8, 128)
LLAMA_405B = attention("llama", 126, 8, 128, heads=128)
GPT_OSS_120B = attention("gpt_oss", 36, 8, 64, sliding_window=128)
GEMMA3_27B = {
    "model_type": "gemma3",
    "text_config": attention("gemma3_text", 62, 16, 128, heads=32, sliding_window=1024),
}
