"""A cache to pass to model.generate: the same answers as with the model's own cache, in every way to generate."""

import pytest
import torch

from kvtier.cache import TieredCache
from kvtier.errors import ConfigError
from kvtier.integrations.conversation import Conversation
from kvtier.integrations.prefix import PrefixCache
from kvtier.integrations.transformers import CachedGenerator
from tests.integrations.families import layout_of, model_of, prompt_of

FAMILIES = ["llama", "gpt_oss", "deepseek_v32", "deepseek_v4", "qwen3_next"]
GREEDY = {"do_sample": False, "max_new_tokens": 5}
WAYS = [
    {},
    {"prefill_chunk_size": 7},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3},
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return model_of(request.param)


@pytest.fixture
def cache(model):
    config = {"host": {"capacity": "8MiB", "staging": "1MiB"}, "policy": {"checkpoint_tokens": 0}}
    with TieredCache(config, layout_of(model), "tiny") as opened:
        yield opened


class _Recorder:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_to_generate_gives_what_it_gives_without_a_cache(model, cache, way):
    """Float32, where another split of the prompt does not move the choice of a token; from a hit, not without."""
    prompt = prompt_of(50)
    with PrefixCache(model, cache, prompt[:, :45]) as past:
        assert past.hit_tokens == 0
        model.generate(prompt[:, :45], past_key_values=past, **GREEDY)
    settings = {**GREEDY, **way}
    torch.manual_seed(3)
    wanted = model.generate(prompt, **settings)
    torch.manual_seed(3)
    rows = max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
    with PrefixCache(model, cache, prompt, rows=rows) as past:
        assert past.hit_tokens == past.loaded.by_tier["host"] == 32
        assert torch.equal(model.generate(prompt, past_key_values=past, **settings), wanted)


def test_what_was_generated_is_found_again_after_it_was_stored(model, cache):
    prompt, streamer = prompt_of(45), _Recorder()
    with PrefixCache(model, cache, prompt) as past:
        sequences = model.generate(prompt, past_key_values=past, streamer=streamer, **GREEDY)
        stored = past.store(sequences)
    assert streamer.ended
    assert streamer.tokens == sequences[0].tolist()
    assert stored.stored >= 48
    longer = torch.cat((sequences, prompt_of(5, seed=1)), 1)
    assert PrefixCache(model, cache, longer).hit_tokens == 48


def test_what_was_not_computed_is_not_stored(model, cache):
    """Nothing was generated: at most what construction computed of the prompt is there."""
    with PrefixCache(model, cache, prompt_of(45)) as past:
        computed = past.get_seq_length()
    assert cache.match(prompt_of(45)[0]) <= computed


def test_sequences_of_another_prompt_are_refused(model, cache):
    with PrefixCache(model, cache, prompt_of(20)) as past:
        model.generate(prompt_of(20), past_key_values=past, **GREEDY)
        with pytest.raises(ConfigError, match="the wrong tokens"):
            past.store(prompt_of(25, seed=1))


def test_a_prompt_of_several_rows_is_refused(model, cache):
    with pytest.raises(ConfigError, match=r"prompt: shape \[2, 20\]"):
        PrefixCache(model, cache, prompt_of(20).expand(2, -1))


def test_a_model_that_takes_a_cache_of_its_own_class_only_is_refused():
    model = model_of("minimax")
    with (
        TieredCache({"host": {"capacity": "8MiB", "staging": "1MiB"}}, layout_of(model), "tiny") as cache,
        pytest.raises(ConfigError, match="use CachedGenerator"),
    ):
        PrefixCache(model, cache, prompt_of(20))


def test_a_conversation_holds_its_tokens_and_ends_its_session(model, cache):
    with Conversation(CachedGenerator(model, cache), "chat") as chat:
        first = chat.say(prompt_of(30), **GREEDY)
        again = chat.say(prompt_of(5, seed=1)[0], **GREEDY)
        assert sum(first.report.hit_tokens.values()) == 0
        assert sum(again.report.hit_tokens.values()) == 32
        assert chat.tokens.shape == (1, 30 + 5 + 5 + 5)
        assert torch.equal(chat.tokens[:, :35], first.sequences)
    assert cache.session("chat").hints.ended
