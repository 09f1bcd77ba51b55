"""That the groups of a family are what transformers' caches really hold, layer by layer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MiniMaxM3VLTextModel

from kvtier.models import KVLayout
from tests.models.tiny import FAMILIES, tiny_config

TOKENS = 256
"""Two blocks: buffers of unfinished entries are empty, and windows are full."""


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def filled(request, tmp_path_factory):
    """A config, and the cache that its model fills with two blocks, loaded from a directory as released ones are."""
    torch.manual_seed(0)
    config = tiny_config(request.param)
    path = tmp_path_factory.mktemp("model")
    if request.param == "minimax_m3_vl_text":
        MiniMaxM3VLTextModel(config).save_pretrained(path)
        model = MiniMaxM3VLTextModel.from_pretrained(path, dtype=torch.bfloat16)
    else:
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        return config, model(torch.arange(TOKENS)[None] % 64, use_cache=True).past_key_values


def parts_of(layout):
    """(layer, name) -> the shape of all its tokens or entries, and the dtype."""
    found = {}
    for group in layout.groups:
        for part in group.parts:
            shape = list(part.shape)
            if group.reuse.rule == "trailing":
                shape[part.token_axis] = min(TOKENS, group.reuse.window_tokens - 1)
            elif not part.is_state:
                shape[part.token_axis] *= TOKENS // layout.page_tokens
            found[part.layer, part.name or part.kind] = (tuple(shape), part.dtype)
    return found


def observed(cache):
    """The same of a cache of transformers. A window has one token fewer: the next token is in it, too."""
    found = {}
    for number, layer in enumerate(cache.layers):
        found.update({(number, name): tensor for name, tensor in held_by(layer) if tensor is not None})
    for number, state in enumerate(getattr(cache, "linear_cache", ())):
        if len(state):
            found[number, "recurrent"] = state
    return {name: (tuple(tensor.shape[1:]), str(tensor.dtype)[6:]) for name, tensor in found.items()}


def held_by(layer):
    """Names of parts, and the tensors of one layer of a cache. Latents are in the places of keys and values."""
    if hasattr(layer, "conv_states"):
        yield "conv", layer.conv_states[0][..., 1:]  # the oldest input is read by no later token
        yield "recurrent", layer.recurrent_states[0]
        return
    yield "k", layer.keys
    yield "v", layer.values
    yield "index", getattr(layer, "indexer_keys", None)
    yield "index", None if getattr(layer, "idx_keys", None) is None else layer.idx_keys[:, 0]
    for prefix, name, own in (("", "kv", "compressor"), ("index_", "index", "indexer")):
        yield name, getattr(layer, "compressed_kv", {}).get(own)
        for what in ("kv", "gate"):
            yield f"{prefix}overlap_{what}", getattr(layer, f"overlap_{what}", {}).get(own)


def of_one_head(found, **names):
    """``found`` with keys and values by other names and without their head, of which there is one."""
    renamed = {}
    for (layer, name), (shape, dtype) in found.items():
        if name not in names:
            renamed[layer, name] = (shape, dtype)
        elif names[name]:
            assert shape[0] == 1
            renamed[layer, names[name]] = (shape[1:], dtype)
    return renamed


def test_every_tensor_of_the_cache_is_a_part_and_every_part_a_tensor(filled):
    config, cache = filled
    found = observed(cache)
    if config.model_type == "deepseek_v4":  # its keys are its values
        assert all(torch.equal(layer.keys, layer.values) for layer in cache.layers)
        found = of_one_head(found, k="window", v=None)
    elif hasattr(config, "kv_lora_rank"):
        found = of_one_head(found, k="latent", v="rope")
    assert parts_of(KVLayout.from_hf_config(config, 128, windows=True)) == found


def test_windows_that_are_kept_whole_are_what_a_cache_without_a_config_holds():
    config = tiny_config("mistral")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = model(torch.arange(TOKENS)[None] % 64, past_key_values=DynamicCache()).past_key_values
    assert parts_of(KVLayout.from_hf_config(config, 128)) == observed(cache)


def test_of_a_convolution_the_oldest_input_that_transformers_keeps_is_never_read_again():
    """So a state restores what comes next bit for bit without it."""
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_next")).eval()
    tokens = torch.arange(TOKENS + 9)[None] % 64
    for count in (1, 9):
        answers = []
        for forgotten in (False, True):
            cache = model(tokens[:, :TOKENS], use_cache=True).past_key_values
            for layer in cache.layers:
                if forgotten and hasattr(layer, "conv_states"):
                    layer.conv_states[0][..., 0] = 1e4
            answers.append(model(tokens[:, TOKENS : TOKENS + count], past_key_values=cache).logits)
        assert torch.equal(*answers)
