"""Every family: what is generated on top of restored KV is bit for bit what it is on top of KV that never left."""

from shutil import rmtree

import pytest
import torch

from kvtier.cache import TieredCache
from kvtier.errors import ConfigError
from kvtier.integrations.transformers import CachedGenerator
from kvtier.models import KVLayout
from tests.integrations.families import BLOCK, FAMILIES, Reference, has_states, layout_of, model_of, prompt_of

NEW = 4
LOGITS = {
    "do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


ODD = ("deepseek_v32", "deepseek_v4", "gemma3_text", "minimax", "qwen3_next")
"""One family for each kind of layer, which sees prompts of every length; the others see one."""


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module", params=sorted(DTYPES))
def model(request, family):
    return model_of(family, DTYPES[request.param])


class Place:
    """A cache, and what is left of it when it is opened again."""

    def __init__(self, tier, model, policy, directory):
        self.tier = tier
        self.policy = policy
        self._model = model
        self._config = {
            "host": {"capacity": "8MiB", "staging": "1MiB"},
            "policy": {"windows": policy, "checkpoint_tokens": 0},
        }
        if tier == "disk":
            self._config["disk"] = {"directories": [str(directory)], "capacity": "32MiB"}
        self.cache = self._open()

    def _open(self):
        return TieredCache(self._config, layout_of(self._model), "tiny")

    def generator(self):
        """For the next turn; nothing of an earlier one is left in memory where blocks are to come from disk."""
        if self.tier == "disk":
            self.close()
            self.cache = self._open()
        return CachedGenerator(self._model, self.cache)

    def close(self):
        assert self.cache.close()


@pytest.fixture(params=["host-full", "disk-checkpoint"])
def place(request, model, tmp_path):
    tier, policy = request.param.split("-")
    opened = Place(tier, model, policy, tmp_path)
    yield opened
    opened.close()
    rmtree(tmp_path)  # there are very many of them


def splits(model, policy, start, prompt):
    """Where forwards have to end, so that states are there: at checkpoints inside the prompt."""
    if not has_states(model):
        return []
    ends = range((start // BLOCK + 1) * BLOCK, prompt.shape[1], BLOCK)
    return [end for end in ends if policy == "full" or end == prompt.shape[1] // BLOCK * BLOCK]


def turn_of(model, place, kept, prompt):
    """One turn with the cache and with the reference; how many tokens were found, and the reference after it."""
    done = place.generator().generate(prompt, **LOGITS)
    hit = sum(done.report.hit_tokens.values())
    assert done.report.hit_tokens[place.tier] == hit
    kept = kept.cut(hit)
    kept.prefill(prompt, splits(model, place.policy, hit, prompt))
    wanted = kept.generate(prompt, **LOGITS)
    assert torch.equal(torch.cat(done.outputs[0].logits), torch.cat(wanted.logits))
    assert torch.equal(done.sequences, wanted.sequences)
    return hit, done.sequences, kept


def whole(model):
    """Whether windows are kept whole by the layout."""
    return model.config.model_type == "mistral"


@pytest.mark.parametrize("first", [31, 15, 48, 57])
def test_a_conversation_is_bit_for_bit_the_one_from_memory(family, model, place, first):
    """Prompts that end before, on and after the ends of blocks, windows and entries, over three turns."""
    if first != 31 and (family not in ODD or (first != 48 and model.dtype == torch.bfloat16)):
        pytest.skip("one length is enough where the layers are those of another family")
    sequence, kept, known = prompt_of(first), Reference(model, whole=whole(model)), 0
    for turn, more in enumerate((0, 9, BLOCK)):
        prompt = torch.cat((sequence, prompt_of(more, seed=turn + 1)), 1)
        hit, sequence, kept = turn_of(model, place, kept, prompt)
        assert hit == known
        known = (sequence.shape[1] - 1) // BLOCK * BLOCK


def _branch():
    """A prompt that leaves another one of 100 tokens after 85 of them, where no checkpoint is."""
    return torch.cat((prompt_of(100)[:, :85], prompt_of(75, seed=5)), 1)


def _with_windows(windows, model):
    policy = {"windows": windows, "checkpoint_tokens": 0}
    config = {"host": {"capacity": "8MiB", "staging": "1MiB"}, "policy": policy}
    return TieredCache(config, layout_of(model), "tiny")


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "deepseek_v4"])
def test_windows_that_are_never_stored_are_computed_again(family):
    """From the keys, values and entries that were loaded: in float32 the windows are those from the beginning."""
    model = model_of(family)
    with _with_windows("zero", model) as cache:
        generator = CachedGenerator(model, cache)
        generator.generate(prompt_of(140), **LOGITS)
        longer = torch.cat((prompt_of(140), prompt_of(20, seed=5)), 1)
        done = generator.generate(longer, exact=True, **LOGITS)
        wanted = model.generate(longer, **LOGITS)
        assert sum(done.report.hit_tokens.values()) == 128
        assert torch.equal(done.sequences, wanted.sequences)
        assert torch.allclose(torch.cat(done.outputs[0].logits), torch.cat(wanted.logits), atol=1e-3)
        with cache.lookup(done.sequences[0]) as hit:
            assert hit.exact


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "deepseek_v4"])
def test_a_window_that_is_replayed_is_approximate_and_so_is_what_follows_it(family, capsys):
    model, branch = model_of(family), _branch()
    with _with_windows("replay", model) as cache:
        generator = CachedGenerator(model, cache)
        generator.generate(prompt_of(100), **LOGITS)
        exact = generator.generate(branch, exact=True, tenant="other", **LOGITS)
        done = generator.generate(branch, **LOGITS)
        assert sum(done.report.hit_tokens.values()) == 80
        with cache.lookup(done.sequences[0]) as hit:
            assert hit.num_tokens > 80
            assert not hit.exact
        assert cache.match(done.sequences[0], exact=True) == 0
        found = (torch.cat(each.outputs[0].logits) for each in (done, exact))
        agreement = float(torch.eq(*(logits.argmax(-1) for logits in found)).float().mean())
    with capsys.disabled():
        print(f"\n{family}: top-1 agreement of {NEW} tokens behind a replayed window: {agreement:.2f}")


@pytest.mark.parametrize("windows", ["full", "checkpoint"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_a_prompt_that_branches_off_finds_what_the_policy_keeps(family, windows):
    """Every block has its windows and states, or checkpoints have, of which there is none in the middle."""
    model = model_of(family)
    with _with_windows(windows, model) as cache:
        generator = CachedGenerator(model, cache)
        generator.generate(prompt_of(100), **LOGITS)
        done = generator.generate(_branch(), **LOGITS)
        assert sum(done.report.hit_tokens.values()) == (80 if windows == "full" else 0)
        assert torch.equal(done.sequences, model.generate(_branch(), **LOGITS).sequences)


def _host_only(model):
    return TieredCache({"host": {"capacity": "8MiB", "staging": "1MiB"}}, layout_of(model), "tiny")


def test_beams_are_refused_where_transformers_does_not_reorder_states():
    model = model_of("minimax")
    with _host_only(model) as cache, pytest.raises(ConfigError, match=r"num_beams = 3: .* linear states"):
        CachedGenerator(model, cache).generate(prompt_of(20), num_beams=3)


@pytest.mark.parametrize(
    ("family", "other", "message"),
    [
        ("deepseek_v3", {"kv_lora_rank": 32}, "layer 0 latent is .*32.* want that of the model, .*16"),
        ("deepseek_v4", {"index_head_dim": 16}, "layer 1 index"),
        ("qwen3_next", {"linear_conv_kernel_dim": 3}, "layer 0 conv"),
        ("gpt_oss", {"sliding_window": 8}, "a window of 8 tokens, want that of layer 0 of the model, 24"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "of layer 1, which"),
    ],
)
def test_a_layout_of_another_model_is_refused_by_name(family, other, message):
    model = model_of(family)
    layout = KVLayout.from_hf_config({**model.config.to_dict(), **other}, BLOCK, dtype="float32")
    with (
        TieredCache({"host": {"capacity": "8MiB", "staging": "1MiB"}}, layout, "tiny") as cache,
        pytest.raises(ConfigError, match=message),
    ):
        CachedGenerator(model, cache)


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_a_load_that_fails_is_tried_once_more_where_a_part_of_it_is_of_no_use(family, monkeypatch):
    model = model_of(family)
    with _host_only(model) as cache:
        generator = CachedGenerator(model, cache)
        wanted = generator.generate(prompt_of(60), **LOGITS)
        load, loads = cache.submit_load, []

        def fails_at_first(hit, pages):
            loads.append(hit.num_tokens)
            return load(hit, pages, stop=16) if len(loads) == 1 else load(hit, pages)

        monkeypatch.setattr(cache, "submit_load", fails_at_first)
        done = generator.generate(prompt_of(60), **LOGITS)
        assert torch.equal(done.sequences, wanted.sequences)
        assert (len(loads), done.report.hit_tokens["host"]) == ((2, 48) if family == "gpt_oss" else (1, 16))
