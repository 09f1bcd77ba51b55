import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
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

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
CLASSES = [LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig]


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_known_family_has_keys_then_values_per_layer(config_class):
    config = config_class(**SIZES, head_dim=24)
    (group,) = KVLayout.from_hf_config(config, block_tokens=16).groups
    assert [(part.layer, part.kind) for part in group.parts] == [(layer, kind) for layer in range(3) for kind in "kv"]
    assert {part.shape for part in group.parts} == {(2, 16, 24)}
    assert group.reuse == Reuse("all")


@pytest.mark.parametrize("config_class", CLASSES)
def test_the_layout_matches_the_cache_that_the_model_really_fills(config_class):
    """The shape of a page, without its token axis, is what transformers keeps per token."""
    from transformers import AutoModelForCausalLM

    config = config_class(
        **SIZES, intermediate_size=32, moe_intermediate_size=16, vocab_size=32, use_cache=True, num_experts=2,
        num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    filled = model(torch.arange(16)[None]).past_key_values
    layout = KVLayout.from_hf_config(config, block_tokens=16, dtype=model.dtype)
    observed = [tensor for layer in filled.layers for tensor in (layer.keys, layer.values)]
    assert [tuple(tensor.shape[1:]) for tensor in observed] == [part.shape for part in layout.groups[0].parts]
    assert {str(tensor.dtype) for tensor in observed} == {"torch.bfloat16"}


def test_head_dim_defaults_to_hidden_size_over_heads_and_kv_heads_to_heads():
    config = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    (group,) = KVLayout.from_hf_config(config, block_tokens=8).groups
    assert group.parts[0].shape == (4, 8, 24)


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
