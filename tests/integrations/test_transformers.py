"""Generation on top of restored KV: the same logits, bit for bit, as on top of KV that never left memory."""

from dataclasses import replace
from warnings import catch_warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    StoppingCriteriaList,
)

from kvtier.cache import TieredCache
from kvtier.errors import ClosedError, ConfigError, KVTierError
from kvtier.integrations.transformers import CachedGenerator
from kvtier.manager import CacheManager
from kvtier.models import KVLayout

BLOCK = 16
VOCABULARY = 128
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config, "mistral": MistralConfig}
GREEDY = {"do_sample": False, "max_new_tokens": 12}
LOGITS = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}


def _model(family="llama", dtype=torch.float32):
    """A tiny random model; the window of Mistral is far shorter than the prompts here."""
    torch.manual_seed(1)
    window = {"sliding_window": 24} if family == "mistral" else {}
    config = FAMILIES[family](
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, **window,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def any_model(request, family):
    return _model(family, request.param)


@pytest.fixture(scope="module")
def model():
    return _model()


def _prompt(tokens, seed=0):
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _layout(model):
    return KVLayout.from_hf_config(model.config, block_tokens=BLOCK, dtype=model.dtype)


def _host_only(model):
    return TieredCache({"host": {"capacity": "8MiB", "staging": "1MiB"}}, _layout(model), "tiny")


class Place:
    """A cache whose blocks are read from one tier: host memory, or disk after it was opened again."""

    def __init__(self, tier, model, directory):
        self.tier = tier
        self._model = model
        self._config = {"host": {"capacity": "8MiB", "staging": "1MiB"}}
        if tier == "disk":
            self._config["disk"] = {"directories": [str(directory)], "capacity": "32MiB"}
        self.cache = self._open()

    def _open(self):
        return TieredCache(self._config, _layout(self._model), "tiny")

    def generator(self):
        """For the next generation; nothing of an earlier one is left in memory where blocks are to come from disk."""
        if self.tier == "disk":
            self.close()
            self.cache = self._open()
        return CachedGenerator(self._model, self.cache)

    def close(self):
        assert self.cache.close()


@pytest.fixture(params=["host", "disk"])
def place(request, any_model, tmp_path):
    opened = Place(request.param, any_model, tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def cache(model):
    with _host_only(model) as opened:
        yield opened


def _copy(past, tokens):
    """The first ``tokens`` of a transformers cache, as plain full layers in memory."""
    return DynamicCache([(layer.keys[:, :, :tokens], layer.values[:, :, :tokens]) for layer in past.layers])


@pytest.mark.parametrize(("prompt_tokens", "hit"), [(15, 0), (16, 0), (17, 16), (47, 32), (48, 32), (49, 48), (72, 64)])
def test_logits_after_restoring_equal_those_with_the_prefix_in_memory(any_model, place, prompt_tokens, hit):
    """Prompts that end before, on and after the end of a block."""
    prompt = _prompt(prompt_tokens)
    place.generator().generate(prompt, max_new_tokens=1)
    generator = place.generator()
    with torch.no_grad(), place.cache.lookup(prompt[0]) as found:
        assert found.num_tokens == hit
        past, loaded = generator.restore(found)
        in_memory = DynamicCache()
        any_model(prompt, past_key_values=in_memory)
        wanted = any_model(prompt[:, hit:], past_key_values=_copy(in_memory, hit)).logits
        assert torch.equal(any_model(prompt[:, hit:], past_key_values=past).logits, wanted)
    if hit:
        assert loaded.by_tier == {"device": 0, "host": 0, "disk": 0} | {place.tier: hit}


def test_a_conversation_is_bit_for_bit_the_one_from_memory(any_model, place):
    """Over turns, on top of KV that was itself computed on restored KV, and of KV of generated tokens."""
    sequence, kept = _prompt(21), DynamicCache()
    for turn in range(4):
        prompt = torch.cat((sequence, _prompt(9 + turn, seed=turn)), 1)
        done = place.generator().generate(prompt, **LOGITS)
        hit = sum(done.report.hit_tokens.values())
        assert hit == (kept.get_seq_length() // BLOCK * BLOCK)
        assert done.report.hit_tokens[place.tier] == hit
        kept = _copy(kept, hit)
        wanted = any_model.generate(prompt, past_key_values=kept, **LOGITS)
        assert torch.equal(torch.cat(done.outputs[0].logits), torch.cat(wanted.logits))
        assert torch.equal(done.sequences, wanted.sequences)
        sequence = done.sequences


def test_a_conversation_has_the_tokens_of_plain_generation(family, tmp_path):
    """In float32, where another split of the prompt does not move the choice of a token."""
    model = _model(family)
    place = Place("disk", model, tmp_path)
    sequence = _prompt(21)
    for turn in range(4):
        prompt = torch.cat((sequence, _prompt(9 + turn, seed=turn)), 1)
        sequence = place.generator().generate(prompt, **GREEDY).sequences
        assert torch.equal(sequence, model.generate(prompt, **GREEDY))
    place.close()


@pytest.mark.parametrize(("new_tokens", "blocks"), [(8, 2), (9, 3), (10, 3), (25, 4)])
def test_only_tokens_whose_kv_was_computed_are_stored(model, cache, new_tokens, blocks):
    """The last token that is generated has no KV: 40 + 8 tokens leave 47, one less than three blocks."""
    report = CachedGenerator(model, cache).generate(_prompt(40), do_sample=False, max_new_tokens=new_tokens).report
    assert (report.stored_tokens, report.existing_tokens, report.refused_tokens) == (blocks * BLOCK, 0, 0)
    assert report.stored_bytes == blocks * cache.layout.record_pages[0] * 4096


def test_the_report_counts_what_was_loaded_stored_and_there_already(model, cache):
    generator = CachedGenerator(model, cache)
    first = generator.generate(_prompt(40), **GREEDY).report
    assert first.hit_tokens == {"device": 0, "host": 0, "disk": 0}
    assert (first.prompt_tokens, first.loaded_bytes, first.stored_tokens) == (40, 0, 48)
    again = generator.generate(_prompt(40), **GREEDY).report
    assert again.hit_tokens == {"device": 0, "host": 32, "disk": 0}
    assert again.loaded_bytes == 2 * cache.layout.record_pages[0] * 4096
    assert (again.stored_tokens, again.existing_tokens, again.stored_bytes) == (0, 16, 0)
    assert again.ttft_s > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"prefill_chunk_size": 8, "do_sample": False},
        {"generation_config": GenerationConfig(do_sample=True, num_return_sequences=2, max_new_tokens=10)},
        {"return_dict_in_generate": True, "do_sample": False},
    ],
    ids="-".join,
)
def test_every_way_to_generate_gives_what_it_gives_without_a_cache(model, cache, settings):
    """Twice: when nothing is stored yet, and from a hit."""
    settings = settings if "generation_config" in settings else {**settings, "max_new_tokens": 10}
    prompt = _prompt(45)
    generator = CachedGenerator(model, cache)
    for hit in (0, 32):
        torch.manual_seed(3)
        wanted = model.generate(prompt, **settings)
        torch.manual_seed(3)
        done = generator.generate(prompt, **settings)
        assert sum(done.report.hit_tokens.values()) == hit
        assert torch.equal(done.sequences, wanted if isinstance(wanted, torch.Tensor) else wanted.sequences)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_of_several_sequences_only_the_prompt_is_stored(model, cache, settings):
    report = CachedGenerator(model, cache).generate(_prompt(40), max_new_tokens=20, **settings).report
    assert report.stored_tokens == 32


def test_kv_of_other_tokens_than_expected_is_not_stored(model, cache, monkeypatch):
    """Should transformers ever leave more or less in its cache than one token less than it returns."""
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: generate(*args, **kwargs)[:, :-1])
    with pytest.raises(KVTierError, match="left the KV of 51 tokens for a sequence of 51"):
        CachedGenerator(model, cache).generate(_prompt(40), **GREEDY)
    assert cache.match(_prompt(60)[0]) == 0


def test_rows_of_a_batch_have_hits_of_their_own(model, cache):
    """Padded left and right, of different lengths, one of them known: every row as if it were alone."""
    generator = CachedGenerator(model, cache)
    generator.generate(_prompt(40), **GREEDY)
    rows = [_prompt(40), _prompt(30, seed=1), _prompt(35, seed=2)]
    input_ids = torch.zeros((3, 40), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for number, (row, at) in enumerate(zip(rows, (0, 10, 0), strict=True)):
        input_ids[number, at : at + row.shape[1]] = row
        mask[number, at : at + row.shape[1]] = 1
    done = generator.generate(input_ids, attention_mask=mask, **GREEDY)
    assert done.sequences.shape == (3, 52)
    assert torch.equal(done.sequences[:, :40], input_ids)
    for number, row in enumerate(rows):
        assert torch.equal(done.sequences[number, 40:], model.generate(row, **GREEDY)[0, row.shape[1] :])
    assert [report.hit_tokens["host"] for report in done.reports] == [32, 0, 0]
    assert [report.prompt_tokens for report in done.reports] == [40, 30, 35]


class _Recorder:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_and_stopping_criteria_are_passed_on(model, cache):
    def stop_at_45(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 45)

    streamer = _Recorder()
    criteria = StoppingCriteriaList([stop_at_45])
    done = CachedGenerator(model, cache).generate(
        _prompt(40), streamer=streamer, stopping_criteria=criteria, do_sample=False, max_new_tokens=20
    )
    assert done.sequences.shape == (1, 45)
    assert len(streamer.tokens) == 6
    assert streamer.ended
    assert len(criteria) == 1


def test_tenants_and_adapters_do_not_find_each_others_blocks(model, cache):
    generator = CachedGenerator(model, cache)
    generator.generate(_prompt(40), tenant="a", **GREEDY)
    for names in ({"tenant": "b"}, {}, {"tenant": "a", "adapter": "x"}):
        assert sum(generator.generate(_prompt(40), **names, **GREEDY).report.hit_tokens.values()) == 0
    assert sum(generator.generate(_prompt(40), tenant="a", **GREEDY).report.hit_tokens.values()) == 32


class _Late:
    """A job that does not end in time."""

    cancelled = False

    def result(self, timeout_s):
        raise TimeoutError

    def cancel(self):
        self.cancelled = True


def test_tokens_behind_a_failed_block_are_computed(model, cache, monkeypatch):
    generator = CachedGenerator(model, cache)
    wanted = generator.generate(_prompt(70), **LOGITS)
    load = cache.submit_load
    monkeypatch.setattr(cache, "submit_load", lambda hit, pages: load(hit, pages, stop=32))
    done = generator.generate(_prompt(70), **LOGITS)
    assert done.report.hit_tokens["host"] == 32
    assert torch.equal(done.sequences, wanted.sequences)
    assert done.report.stored_tokens + done.report.existing_tokens == 80 - 32


def test_a_load_that_takes_too_long_is_a_miss(model, cache, monkeypatch):
    generator = CachedGenerator(model, cache)
    wanted = generator.generate(_prompt(70), **GREEDY)
    late = _Late()
    monkeypatch.setattr(cache, "submit_load", lambda hit, pages: late)
    done = generator.generate(_prompt(70), **GREEDY)
    assert late.cancelled
    assert sum(done.report.hit_tokens.values()) == done.report.loaded_bytes == 0
    assert torch.equal(done.sequences, wanted.sequences)


def test_a_store_that_takes_too_long_loses_no_answer(model, cache, monkeypatch):
    late = _Late()
    monkeypatch.setattr(cache, "submit_store", lambda *args, **kwargs: late)
    done = CachedGenerator(model, cache).generate(_prompt(40), **GREEDY)
    assert late.cancelled
    assert done.report.stored_tokens == 0
    assert torch.equal(done.sequences, model.generate(_prompt(40), **GREEDY))


def _closing(cache):
    """Stopping criteria that close the cache after the first token, as another thread might, and stop nothing."""

    def close(input_ids, scores, **kwargs):
        cache.close()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return StoppingCriteriaList([close])


def test_a_cache_that_is_closed_while_the_model_generates_loses_no_answer(model, cache, caplog):
    """Neither that of the row that is generated, nor those before and behind it."""
    generator = CachedGenerator(model, cache)
    generator.generate(_prompt(40), **GREEDY)
    prompts = torch.cat([_prompt(40), _prompt(40, seed=1)])
    done = generator.generate(prompts, stopping_criteria=_closing(cache), **GREEDY)
    wanted = [model.generate(_prompt(40, seed=seed), **GREEDY) for seed in (0, 1)]
    assert torch.equal(done.sequences, torch.cat(wanted))
    assert [report.hit_tokens["host"] for report in done.reports] == [32, 0]
    assert [report.stored_tokens + report.refused_tokens for report in done.reports] == [0, 0]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"the cache was closed while the model generated: {tokens} tokens are not stored" for tokens in (16, 48)
    ]


def test_a_cache_that_is_closed_before_its_hit_is_loaded_loses_no_answer(model, cache, monkeypatch):
    generator = CachedGenerator(model, cache)
    wanted = generator.generate(_prompt(40), **GREEDY)
    load = cache.submit_load
    monkeypatch.setattr(cache, "submit_load", lambda *arguments: (cache.close(), load(*arguments))[1])
    done = generator.generate(_prompt(40), **GREEDY)
    assert torch.equal(done.sequences, wanted.sequences)
    assert sum(done.report.hit_tokens.values()) == 0


def test_a_cache_that_was_closed_before_is_an_error_and_nothing_is_computed(model, cache, monkeypatch):
    generator = CachedGenerator(model, cache)
    cache.close()
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ClosedError):
        generator.generate(_prompt(40), **GREEDY)


def test_kv_comes_back_to_the_model_where_torch_makes_tensors_elsewhere_by_default(model, cache):
    generator = CachedGenerator(model, cache)
    generator.generate(_prompt(40), **GREEDY)
    with cache.lookup(cache.keys(_prompt(40)[0])) as hit, torch.device("meta"):
        past, loaded = generator.restore(hit)
    assert loaded.ok_tokens == hit.num_tokens > 0
    assert past.layers[0].keys.device == model.device


def test_a_model_that_keeps_no_kv_is_refused_before_it_computes_anything(cache, monkeypatch):
    model = _model()
    generator = CachedGenerator(model, cache)
    with catch_warnings(action="ignore"):  # later versions call it activation_checkpointing_enable
        model.train().gradient_checkpointing_enable()
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        generator.generate(_prompt(40), **GREEDY)


async def test_a_generator_goes_on_with_what_its_manager_has_open(model):
    manager = CacheManager({"host": {"capacity": "8MiB", "staging": "1MiB"}}, _layout(model), "tiny")
    async with manager:
        generator = CachedGenerator(model, manager)
    with pytest.raises(ClosedError):
        generator.generate(_prompt(40), **GREEDY)
    async with manager:
        first, again = (generator.generate(_prompt(40), **GREEDY) for _ in range(2))
        assert sum(first.report.hit_tokens.values()) == 0
        assert sum(again.report.hit_tokens.values()) > 0


def test_what_is_computed_on_top_of_a_hit_is_stored_as_derived_from_it(model, cache, monkeypatch):
    generator = CachedGenerator(model, cache)
    generator.generate(_prompt(40), **GREEDY)
    store, given = cache.submit_store, []
    monkeypatch.setattr(
        cache, "submit_store", lambda *args, **kwargs: (given.append(kwargs), store(*args, **kwargs))[1]
    )
    generator.generate(_prompt(40), **GREEDY)
    assert given[0]["derived_from"].num_tokens == given[0]["start"] == 32


def test_a_hit_is_released_when_generation_fails(model, cache, monkeypatch):
    generator = CachedGenerator(model, cache)
    generator.generate(_prompt(40), **GREEDY)
    released = []
    release = cache.release
    monkeypatch.setattr(cache, "release", lambda lease: (released.append(lease), release(lease)))

    def fail(input_ids, scores, **kwargs):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generator.generate(_prompt(40), stopping_criteria=StoppingCriteriaList([fail]), **GREEDY)
    assert len(released) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"inputs_embeds": torch.zeros(1, 40, 32)}, "inputs_embeds"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, "cache_implementation = 'static'"),
        ({"pixel_values": torch.zeros(1)}, "pixel_values: a tensor beside input_ids"),
        ({"position_ids": torch.arange(40)[None]}, "position_ids: a tensor beside input_ids"),
        ({"use_cache": False}, "use_cache = False"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache = False"),
        ({"token_healing": True}, "token_healing: the end of the prompt is replaced"),
        ({"generation_config": GenerationConfig(token_healing=True)}, "token_healing"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation: this way to generate cannot start from a filled"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "assisted_generation"),
    ],
)
def test_arguments_that_a_filled_cache_cannot_serve_are_refused(model, cache, arguments, message):
    with pytest.raises(ConfigError, match=message):
        CachedGenerator(model, cache).generate(_prompt(40), **arguments)


def test_what_was_generated_from_another_prompt_is_not_stored(model, cache, monkeypatch):
    """As by a new kind of arguments of transformers that changes the prompt on the way."""
    generate = model.generate

    def changed(prompt, **arguments):
        return generate(torch.cat((prompt[:, :-1], (prompt[:, -1:] + 1) % VOCABULARY), dim=1), **arguments)

    monkeypatch.setattr(model, "generate", changed)
    with pytest.raises(KVTierError, match="generated from another prompt"):
        CachedGenerator(model, cache).generate(_prompt(40), **GREEDY)
    assert cache.match(_prompt(41)[0]) == 0


def _other_layout(**sizes):
    return KVLayout.from_hf_config({**_model().config.to_dict(), **sizes}, BLOCK, dtype="float32")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_prefixes_depend_on_what_follows_is_refused(model, cache, kind):
    """Its KV of a short prompt is not that of the same tokens in a long one."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **factors}
    other = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**model.config.to_dict(), "max_position_embeddings": 64, "rope_parameters": parameters})
    )
    with pytest.raises(ConfigError, match=f"rope_type = '{kind}'.*model.generate"):
        CachedGenerator(other, cache)


@pytest.mark.parametrize(
    ("what", "message"), [(None, "model: got NoneType"), (torch.nn.Linear(1, 1), "model: got Linear")]
)
def test_what_is_no_model_is_refused(cache, what, message):
    with pytest.raises(ConfigError, match=message):
        CachedGenerator(what, cache)


def test_past_key_values_may_be_none(model, cache):
    with_none = CachedGenerator(model, cache).generate(_prompt(20), past_key_values=None, **GREEDY)
    assert torch.equal(with_none.sequences, model.generate(_prompt(20), **GREEDY))


def _in_training(*, attention_dropout=0.0, dropout=0.0):
    """A model of its own in training mode; ``dropout`` is that of a module in it, as adapters have one."""
    model = _model().train()
    model.model.layers[1].self_attn.attention_dropout = attention_dropout
    model.model.layers[1].mlp.dropout = torch.nn.Dropout(dropout)
    return model


@pytest.mark.parametrize("dropout", [{"attention_dropout": 0.1}, {"dropout": 0.1}], ids=str)
def test_a_model_that_drops_activations_stores_nothing_until_it_is_told_to_evaluate(cache, dropout):
    model = _in_training(**dropout).eval()
    generator = CachedGenerator(model, cache)
    model.train()
    with pytest.raises(ConfigError, match=r"training mode, where model\.layers\.1\..* drops 0\.1 .*model\.eval\(\)"):
        generator.generate(_prompt(40), **GREEDY)
    assert cache.match(_prompt(40)[0]) == 0
    model.eval()
    assert generator.generate(_prompt(40), **GREEDY).report.stored_tokens == 48


def test_a_model_whose_config_says_that_it_drops_activations_is_refused_in_training_mode(cache):
    """It may do so by a function of torch's, without a module that could be found."""
    model = _in_training()
    model.config.hidden_dropout = 0.1
    with pytest.raises(ConfigError, match=r"training mode, where hidden_dropout drops 0\.1 .*model\.eval\(\)"):
        CachedGenerator(model, cache).generate(_prompt(40), **GREEDY)


def test_a_model_in_training_mode_without_dropout_is_served(cache):
    generator = CachedGenerator(_in_training(), cache)
    generator.generate(_prompt(40), **GREEDY)
    assert generator.generate(_prompt(40), **GREEDY).report.hit_tokens["host"] == 32


def test_kv_of_another_precision_than_the_models_is_neither_stored_nor_continued(model, cache):
    """Its key would be that of the model's own, and whoever finds it is told that it is exact."""
    generator = CachedGenerator(model, cache)
    generator.generate(_prompt(40), **GREEDY)
    before = cache.stats()
    message = r"^torch\.autocast\('cpu', dtype=torch\.bfloat16\) is on.*dtype=torch\.bfloat16, or call model\.generate"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match=message):
        generator.generate(_prompt(70), **GREEDY)
    assert cache.stats() == before
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert generator.generate(_prompt(40), **GREEDY).report.hit_tokens["host"] == 32


def test_a_model_that_was_turned_into_another_dtype_is_refused_before_anything_is_computed(cache):
    """Its KV would be found under the same keys, or not fit the layout once the answer is there."""
    model = _model()
    generator = CachedGenerator(model, cache)
    generator.generate(_prompt(40), **GREEDY)
    before = cache.stats()
    model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"^layout: dtype float32, want that of the model, bfloat16"):
        generator.generate(_prompt(40), **GREEDY)
    assert cache.stats() == before


def test_autocast_for_a_device_that_holds_nothing_of_the_model_does_not_matter(model, cache):
    torch.set_autocast_enabled("cuda", True)
    try:
        assert CachedGenerator(model, cache).generate(_prompt(40), **GREEDY).report.stored_tokens == 48
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("value", [None, "x", {}], ids=repr)
def test_what_is_no_cache_is_refused(model, value):
    with pytest.raises(ConfigError, match=r"^cache: got .*TieredCache"):
        CachedGenerator(model, value)


@pytest.mark.parametrize("timeout_s", ["x", None, float("nan"), True], ids=repr)
def test_a_timeout_that_is_no_number_is_refused_before_anything_is_computed(model, cache, timeout_s):
    with pytest.raises(ConfigError, match=r"^timeout_s = "):
        CachedGenerator(model, cache, timeout_s=timeout_s)


@pytest.mark.parametrize("kind", [{"dtype": torch.bfloat16}, {"dtype": torch.complex64}, {"device": "meta"}], ids=str)
def test_a_prompt_is_a_tensor_of_integers_that_are_there(model, cache, kind):
    with pytest.raises(ConfigError, match=r"^(tokens|input_ids): "):
        CachedGenerator(model, cache).generate(torch.ones((1, 20), **kind), **GREEDY)


@pytest.mark.parametrize("value", [[[1, 2]], _prompt(20).numpy(), None], ids=["list", "array", "None"])
def test_a_prompt_is_a_tensor(model, cache, value):
    with pytest.raises(ConfigError, match=r"input_ids.*tensor"):
        CachedGenerator(model, cache).generate(value, **GREEDY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layout: replace(layout, groups=(replace(layout.groups[0], parts=layout.groups[0].parts[:4]),)),
            "2 layers",
        ),
        (lambda layout: KVLayout.from_hf_config(_model().config, BLOCK, dtype="bfloat16"), "dtype bfloat16"),
        (lambda layout: _other_layout(num_key_value_heads=4), "4 heads of 8, want those of the model, 2 of 8"),
        (lambda layout: _other_layout(head_dim=16), "2 heads of 16, want those of the model, 2 of 8"),
    ],
)
def test_a_cache_of_another_layout_is_refused(model, change, message):
    config = {"host": {"capacity": "8MiB", "staging": "1MiB"}}
    with TieredCache(config, change(_layout(model)), "tiny") as cache, pytest.raises(ConfigError, match=message):
        CachedGenerator(model, cache)


def test_the_cache_of_an_asyncio_program_can_be_used(model):
    manager = CacheManager({"host": {"capacity": "8MiB", "staging": "1MiB"}}, _layout(model), "tiny")
    generator = CachedGenerator(model, manager)
    generator.generate(_prompt(40), **GREEDY)
    assert sum(generator.generate(_prompt(40), **GREEDY).report.hit_tokens.values()) == 32
    manager.core.close()
