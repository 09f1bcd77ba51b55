import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from kvtier.errors import ConfigError
from kvtier.models import KVLayout, Part, Reuse
from kvtier.models.families import FAMILIES
from tests.models import configs

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
CLASSES = [LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig]


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_known_family_has_keys_then_values_per_layer(config_class):
    config = config_class(**SIZES, head_dim=24)
    (group,) = KVLayout.from_hf_config(config, block_tokens=16).groups
    assert [(part.layer, part.kind) for part in group.parts] == [(layer, kind) for layer in range(3) for kind in "kv"]
    assert {part.shape for part in group.parts} == {(2, 16, 24)}
    assert group.reuse == Reuse("all")


def test_head_dim_defaults_to_hidden_size_over_heads_and_kv_heads_to_heads():
    config = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    (group,) = KVLayout.from_hf_config(config, block_tokens=8).groups
    assert group.parts[0].shape == (4, 8, 24)


def test_fields_that_others_make_needless_may_be_missing():
    config = {"model_type": "llama", "num_hidden_layers": 1, "head_dim": 24, "num_key_value_heads": 2}
    (group,) = KVLayout.from_hf_config(config, block_tokens=8).groups
    assert group.parts[0].shape == (2, 8, 24)


def test_a_config_its_dict_and_a_nesting_config_give_the_same_layout():
    config = Qwen3Config(**SIZES)
    wanted = KVLayout.from_hf_config(config)
    assert KVLayout.from_hf_config(config.to_dict()) == wanted
    assert KVLayout.from_hf_config({"model_type": "some_vision_model", "text_config": config.to_dict()}) == wanted


def test_axes_and_page_tokens_shape_a_page():
    layout = KVLayout.from_hf_config(
        LlamaConfig(**SIZES), block_tokens=32, dtype="float16", axes=("token", "head", "dim"), page_tokens=8
    )
    assert layout.groups[0].parts[1] == Part(0, "v", "float16", ("token", "head", "dim"), (8, 2, 16))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_a_name_or_a_torch_dtype(dtype):
    assert KVLayout.from_hf_config(LlamaConfig(**SIZES), dtype=dtype).groups[0].parts[0].dtype == "bfloat16"


def test_an_unknown_architecture_is_named_and_told_what_to_do():
    with pytest.raises(ConfigError, match=r"model_type = 'gpt2'.*KVGroup\(.*Part\("):
        KVLayout.from_hf_config(GPT2Config())


@pytest.mark.parametrize(
    ("model_type", "left_out"),
    [
        ("qwen2", ["layer_types"]),
        ("qwen2_moe", ["layer_types"]),
        ("qwen3", ["head_dim", "layer_types"]),
        ("minimax_m2", ["head_dim"]),
        ("gemma3_text", ["head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window", "layer_types"]),
        ("gpt_oss", ["head_dim", "num_key_value_heads", "sliding_window", "layer_types"]),
        ("deepseek_v32", ["index_head_dim"]),
        ("glm_moe_dsa", ["index_head_dim", "indexer_types"]),
        ("minimax_m3_vl_text", ["head_dim", "index_head_dim", "layer_types"]),
        ("deepseek_v4", ["head_dim", "index_head_dim", "sliding_window", "compress_rates"]),
        ("qwen3_next", ["head_dim", "layer_types"]),
        ("qwen3_5_text", ["head_dim", "layer_types"]),
        ("qwen3_5_moe_text", ["head_dim", "layer_types"]),
        ("minimax", ["head_dim", "layer_types"]),
    ],
)
def test_a_file_may_leave_out_what_its_config_class_fills_in(model_type, left_out):
    config = AutoConfig.for_model(model_type)
    file = {key: value for key, value in config.to_dict().items() if key not in left_out}
    assert KVLayout.from_hf_config(file, 128, windows=True) == KVLayout.from_hf_config(config, 128, windows=True)


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"kimi_k2", "minimax_m1"}))
def test_transformers_has_a_config_class_of_every_family_and_it_is_read(model_type):
    """Of two families files on the hub bring their own."""
    config = AutoConfig.for_model(model_type)
    layers = {part.layer for group in KVLayout.from_hf_config(config, 128).groups for part in group.parts}
    assert layers == set(range(config.get_text_config().num_hidden_layers))


def groups(config, block_tokens=64, **arguments):
    """Name, reuse and layers of each group."""
    layout = KVLayout.from_hf_config(config, block_tokens, **arguments)
    return [(group.name, group.reuse, sorted({part.layer for part in group.parts})) for group in layout.groups]


WINDOW = Reuse("trailing", 128)


def test_layers_with_a_window_beside_full_ones_are_a_group_of_their_own():
    config = configs.attention("gpt_oss", 4, 8, 64, sliding_window=128)
    assert groups(config) == [("attention", Reuse("all"), [1, 3]), ("window", WINDOW, [0, 2])]


def test_every_sixth_layer_of_gemma_3_is_full_unless_the_file_has_another_pattern():
    config = configs.attention("gemma3_text", 13, 4, 64, sliding_window=128)
    assert groups(config)[0][2] == [5, 11]
    assert groups({**config, "sliding_window_pattern": 4})[0][2] == [3, 7, 11]
    assert groups({**config, "layer_types": ["full_attention"] * 13}) == [("attention", Reuse("all"), [*range(13)])]


@pytest.mark.parametrize(
    ("config", "windowed"),
    [
        (configs.attention("mistral", 4, 8, 64, sliding_window=128), [0, 1, 2, 3]),
        (configs.attention("mixtral", 4, 8, 64, sliding_window=None), []),
        (configs.attention("qwen2", 4, 8, 64, sliding_window=128, max_window_layers=1), []),
        (
            configs.attention("qwen2", 4, 8, 64, sliding_window=128, max_window_layers=1, use_sliding_window=True),
            [1, 2, 3],
        ),
        (configs.attention("qwen3", 4, 8, 64, sliding_window=128, max_window_layers=3, use_sliding_window=True), [3]),
        (configs.attention("qwen2_moe", 4, 8, 64, sliding_window=128, use_sliding_window=True), [0, 2]),
        (configs.attention("qwen3_moe", 4, 8, 64, sliding_window=128, use_sliding_window=True), [0, 1, 2, 3]),
    ],
)
def test_windows_of_families_that_mostly_have_none_are_kept_whole_unless_asked_for(config, windowed):
    every = [("attention", Reuse("all"), [0, 1, 2, 3])]
    full = [layer for layer in range(4) if layer not in windowed]
    assert groups(config) == groups(config, windows=False) == every
    assert groups(config, windows=True) == (
        [("attention", Reuse("all"), full)] * bool(full) + [("window", WINDOW, windowed)] * bool(windowed)
    )


def test_windows_beside_full_layers_are_kept_whole_if_asked_for():
    assert groups(configs.GPT_OSS_120B, windows=False) == [("attention", Reuse("all"), [*range(36)])]


def test_the_parts_of_latent_attention_are_latent_rope_and_index_key_in_one_group():
    (group,) = KVLayout.from_hf_config(configs.V32, 32, page_tokens=16).groups
    assert group.parts[:3] == (
        Part(0, "latent", "bfloat16", ("token", "dim"), (16, 512)),
        Part(0, "rope", "bfloat16", ("token", "dim"), (16, 64)),
        Part(0, "index", "bfloat16", ("token", "dim"), (16, 128)),
    )
    assert len(group.parts) == 3 * 61


@pytest.mark.parametrize(
    "change", [{"index_topk_pattern": "FSSF"}, {"indexer_types": ["full", "shared", "shared", "full"]},
               {"index_topk_freq": 3, "index_skip_topk_offset": 1}]
)  # fmt: skip
def test_layers_that_share_the_choice_of_another_have_no_index_keys(change):
    (group,) = KVLayout.from_hf_config({**configs.latent("glm_moe_dsa", 4), **change}).groups
    assert [part.layer for part in group.parts if part.kind == "index"] == [0, 3]


def test_v4_is_entries_and_index_keys_a_window_in_every_layer_and_overlaps():
    config = configs.v4(4, [0, 4, 128, 4])
    entries, window, state = KVLayout.from_hf_config(config, 256, page_tokens=128).groups
    rows = ("token", "dim")
    assert entries.reuse == Reuse("all")
    assert entries.parts == (
        Part(1, "kv", "bfloat16", rows, (32, 512), 4),
        Part(1, "index", "bfloat16", rows, (32, 128), 4),
        Part(2, "kv", "bfloat16", rows, (1, 512), 128),
        Part(3, "kv", "bfloat16", rows, (32, 512), 4),
        Part(3, "index", "bfloat16", rows, (32, 128), 4),
    )
    assert (window.reuse, len(window.parts)) == (WINDOW, 4)
    assert window.parts[0] == Part(0, "kv", "bfloat16", rows, (128, 512), name="window")
    assert state.reuse == Reuse("last")
    assert [(part.layer, part.name, part.shape) for part in state.parts[:4]] == [
        (1, "overlap_kv", (4, 512)),
        (1, "overlap_gate", (4, 512)),
        (1, "index_overlap_kv", (4, 128)),
        (1, "index_overlap_gate", (4, 128)),
    ]


def test_v4_reads_ratios_and_kinds_alike_and_leaves_out_draft_layers():
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    ratios = configs.v4(3, [0, 4, 128])
    named = {**ratios, "compress_ratios": None, "layer_types": kinds}
    assert KVLayout.from_hf_config(ratios, 128) == KVLayout.from_hf_config(named, 128)


def test_v4_without_compressed_layers_is_a_window_only():
    assert groups(configs.v4(2, [0, 0])) == [("window", WINDOW, [0, 1])]


def test_a_window_can_be_computed_again_from_as_many_tokens_for_every_layer_that_has_one():
    """Full layers see no further back, as theirs are loaded; a recurrent state takes all tokens."""
    config = configs.attention("gpt_oss", 4, 8, 64, sliding_window=128)
    _, window = KVLayout.from_hf_config(config).groups
    assert window.reuse.replay_tokens == 2 * 128
    v4 = KVLayout.from_hf_config(configs.v4(2, [0, 4]), 128).groups
    assert [group.reuse.replay_tokens for group in v4] == [0, 2 * 128, 2 * 128]
    assert KVLayout.from_hf_config(configs.gated_delta("qwen3_next", 4, 32)).groups[1].reuse.replay_tokens == 0


def test_states_keep_the_inputs_of_a_convolution_that_the_next_token_needs_and_a_float32_recurrence():
    attention, state = KVLayout.from_hf_config(configs.gated_delta("qwen3_next", 4, 32)).groups
    assert [part.layer for part in attention.parts] == [3, 3]
    assert (state.reuse, len(state.parts)) == (Reuse("last"), 6)
    assert state.parts[:2] == (
        Part(0, "state", "bfloat16", ("dim", "state"), (8192, 3), name="conv"),
        Part(0, "state", "float32", ("head", "state", "dim"), (32, 128, 128), name="recurrent"),
    )


def test_a_lightning_layer_has_one_state_a_head():
    config = configs.attention("minimax", 3, 2, 64, heads=8)
    attention, state = KVLayout.from_hf_config(config, state_dtype="float32").groups
    assert [part.layer for part in attention.parts] == [0, 0, 2, 2]
    assert state.parts == (Part(1, "state", "float32", ("head", "state", "dim"), (8, 64, 64), name="recurrent"),)


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [("float32", "float32"), ("float8_e4m3fn", "bfloat16"), ("fp8_ds_mla", "bfloat16")]
)
def test_states_are_not_quantised_with_the_kv(dtype, state_dtype):
    layout = KVLayout.from_hf_config(configs.V4_FLASH, 128, dtype)
    assert {part.name: part.dtype for part in layout.groups[-1].parts}["overlap_kv"] == state_dtype


def test_gates_of_v4_are_float32_whatever_else_is_kept_in():
    state = KVLayout.from_hf_config(configs.V4_FLASH, 128, "bfloat16").groups[-1]
    assert {part.dtype for part in state.parts if part.name.endswith("gate")} == {"float32"}


@pytest.mark.parametrize("index_dtype", ["fp8_scaled", "mxfp4"])
def test_packed_index_keys_lie_in_planes_beside_entries_of_any_kind(index_dtype):
    width = {"fp8_scaled": 128, "mxfp4": 64}[index_dtype]
    layout = KVLayout.from_hf_config(configs.V32, index_dtype=index_dtype)
    part = Part(0, "index", "uint8", ("page",), (64 * (width + 4),), planes=(width, 4))
    assert layout.groups[0].parts[2] == part


def test_packed_entries_of_v3_2_are_rows_and_those_of_v4_planes():
    (latents,) = KVLayout.from_hf_config(configs.V32, 64, "fp8_ds_mla").groups
    assert latents.parts[0] == Part(0, "latent", "uint8", ("token", "dim"), (64, 656))
    entries, window, _ = KVLayout.from_hf_config(configs.V4_PRO, 256, "fp8_ds_mla", page_tokens=256).groups
    assert entries.parts[0] == Part(0, "kv", "uint8", ("page",), (1728,), 128, planes=(576, 8))
    assert window.parts[0] == Part(0, "kv", "uint8", ("page",), (149_760,), 1, "window", planes=(576, 8))


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (configs.V4_PRO, {"block_tokens": 64}, "^block_tokens = 64: .* 128 tokens into one entry.*block_tokens=128$"),
        (configs.V4_PRO, {"block_tokens": 200}, "^block_tokens = 200: .*such as block_tokens=256$"),
        (configs.V4_PRO, {"block_tokens": 256, "page_tokens": 64}, "^page_tokens = 64: .*such as page_tokens=128$"),
        (configs.LLAMA_8B, {"dtype": "fp8_ds_mla"}, "^dtype = 'fp8_ds_mla': packs latents .* use one of float32"),
        (configs.LLAMA_8B, {"dtype": "mxfp4"}, "^dtype = 'mxfp4': not one of .*uint8, int8, fp8_ds_mla$"),
        (configs.V32, {"index_dtype": "fp8_ds_mla"}, "^index_dtype = 'fp8_ds_mla': not one of .*fp8_scaled, mxfp4$"),
        (configs.QWEN3_NEXT, {"state_dtype": "int4"}, "^state_dtype = 'int4': not one of"),
        (configs.LLAMA_8B, {"windows": "yes"}, "^windows = 'yes': must be True, False, or None"),
        ({**configs.V32, "kv_lora_rank": 500}, {"dtype": "fp8_ds_mla"}, "kv_lora_rank = 500, want a multiple of 128"),
        ({**configs.GPT_OSS_120B, "layer_types": ["full_attention"]}, {}, "layer_types = .*want a list of 36"),
        (
            {**configs.GPT_OSS_120B, "layer_types": ["conv"] * 36},
            {},
            r"'gpt_oss': layer_types\[0\] = 'conv', want one of full_attention, sliding_attention",
        ),
        ({**configs.GPT_OSS_120B, "layer_types": [["full_attention"]] * 36}, {}, r"layer_types\[0\] = \['full"),
        ({**configs.GPT_OSS_120B, "sliding_window": -1}, {}, "sliding_window = -1, want a positive integer"),
        ({**configs.V4_PRO, "compress_ratios": None}, {}, "layer_types = None, want a list of 61"),
        ({**configs.V4_PRO, "compress_ratios": [8] * 61}, {}, "compress_ratios = .*0, 4 or 128 for each layer"),
        ({**configs.V4_PRO, "compress_rates": 4}, {}, "compress_rates = 4"),
        ({**configs.V32, "kv_lora_rank": None}, {}, "'deepseek_v32': kv_lora_rank = None"),
        ({**configs.GLM_5, "index_topk_pattern": "FXS"}, {}, "indexer_types = .*want a list of 78"),
        ({**configs.MINIMAX_M1, "attn_type_list": [1]}, {}, "attn_type_list = .*want a list of 80 flags"),
        ({**configs.QWEN3_NEXT, "linear_conv_kernel_dim": 0}, {}, "linear_conv_kernel_dim = 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_family_is_named_with_a_way_out(config, arguments, message):
    with pytest.raises(ConfigError, match=message):
        KVLayout.from_hf_config(config, **{"block_tokens": 128, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, want a positive integer, at most 65536"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
        ({"head_dim": "64"}, "head_dim = '64'"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        KVLayout.from_hf_config({**LlamaConfig(**SIZES).to_dict(), **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int64"}, "dtype = 'int64'"),
        ({"axes": ("token", "dim")}, "axes = "),
        ({"page_tokens": 48}, "block_tokens = 64"),
        ({"page_tokens": 0}, "page_tokens = 0"),
        ({"page_tokens": 16.0}, "page_tokens = 16.0"),
        ({"block_tokens": 64.0}, "block_tokens = 64.0"),
        ({"block_tokens": "64"}, "block_tokens = '64'"),
        ({"block_tokens": True}, "block_tokens = True"),
        ({"block_tokens": -64}, "^block_tokens = -64: must be at least 1"),
        ({"axes": None}, "axes = None"),
        ({"axes": "token"}, "axes = 'token'"),
        ({"axes": ("head", "token", "foo")}, "'foo': one of 'token', 'head', 'dim'"),
        ({"axes": (["head"], "token", "dim")}, "axes"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        KVLayout.from_hf_config(LlamaConfig(**SIZES), **arguments)


@pytest.mark.parametrize("wrong", ["meta-llama/Llama-3-8B", None, LlamaConfig])
def test_something_that_is_no_config_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"is a {type(wrong).__name__}"):
        KVLayout.from_hf_config(wrong)


def test_numbers_of_numpy_give_the_same_layout():
    config = LlamaConfig(**SIZES)
    odd = KVLayout.from_hf_config(config, np.int64(64), axes=["head", "token", "dim"], page_tokens=np.int32(16))
    assert odd == KVLayout.from_hf_config(config, 64, page_tokens=16)
    assert odd.placement == KVLayout.from_hf_config(config, 64, page_tokens=16).placement


def test_layouts_need_neither_torch_nor_transformers():
    code = """
import sys
from kvtier.models import KVLayout
KVLayout.from_hf_config({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2})
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
