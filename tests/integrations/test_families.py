"""Every family: what is generated on top of restored KV is bit for bit what it is on top of KV that never left."""

from shutil import rmtree

import pytest
import torch

from kvtier.cache import TieredCache
from kvtier.errors import ConfigError
from kvtier.integrations.prefix import PrefixCache
from kvtier.integrations.transformers import CachedGenerator
from kvtier.models import KVLayout
from tests.integrations.families import BLOCK, FAMILIES, VARIANTS, Reference, case_of, layout_of, model_of, prompt_of
from tests.integrations.places import LOGITS, NEW, Place, turn_of, wanted_of

ODD = (
    "deepseek_v32", "deepseek_v4", "deepseek_v4_128", "deepseek_v4_released", "gemma3_text", "minimax",
    "mistral_windows", "qwen3_next", "qwen3_windows",
)  # fmt: skip
"""One family for each kind of layer, which sees prompts of every length; the others see one."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


EVERY = sorted([*FAMILIES, *VARIANTS])


def cases(names, dtypes=DTYPES):
    """As parameters of the fixture ``case``."""
    return [(name, dtype) for name in names for dtype in sorted(dtypes)]


@pytest.fixture(scope="module")
def case(request):
    name, dtype = request.param
    return case_of(name, DTYPES[dtype])


def of_cases(name, *groups):
    """Each of ``groups`` is some cases, and the values of ``name`` that go with all of them."""
    pairs = [(case, value) for some, values in groups for case in some for value in values]
    names = ["-".join((*case, value)) for case, value in pairs]
    return pytest.mark.parametrize(("case", name), pairs, indirect=["case"], ids=names)


@pytest.fixture
def directory(tmp_path):
    yield tmp_path
    rmtree(tmp_path)  # there are very many of them


@of_cases("place", (cases(EVERY), ("host-full", "disk-checkpoint")), (cases(ODD), ("device-full",)))
def test_a_conversation_is_bit_for_bit_the_one_from_memory(case, place, directory):
    """On top of KV that was itself computed on restored KV, and of KV of generated tokens."""
    first = 31 if case.block == BLOCK else 250
    sequence, kept, known = prompt_of(first), Reference(case.model, whole=case.whole), 0
    with Place(case, *place.split("-"), directory) as opened:
        for turn, more in enumerate((0, 9, case.block)):
            prompt = torch.cat((sequence, prompt_of(more, seed=turn + 1)), 1)
            hit, sequence, kept = turn_of(opened, kept, prompt)
            assert hit == known
            known = (sequence.shape[1] - 1) // case.block * case.block


@pytest.mark.parametrize("case", cases(EVERY), indirect=True, ids="-".join)
def test_a_prompt_comes_from_disk_after_a_restart_then_from_host_memory_and_from_the_device(case, directory):
    policy = "full" if case.model.dtype == torch.float32 else "checkpoint"
    prompt = prompt_of(case.block * 3 - 5)
    with Place(case, "disk", policy, directory, promotes=True) as place:
        _, _, kept = turn_of(place, Reference(case.model, whole=case.whole), prompt)
        longer = torch.cat((prompt, prompt_of(3, seed=1)), 1)
        generator = place.generator()
        wanted = wanted_of(place, kept.cut(case.block * 2), longer)
        for tier in ("disk", "host", "device"):
            if tier == "device":
                place.promote(longer)
            done = generator.generate(longer, **LOGITS)
            assert {at: tokens for at, tokens in done.report.hit_tokens.items() if tokens} == {tier: case.block * 2}
            assert torch.equal(torch.cat(done.outputs[0].logits), torch.cat(wanted.logits))


@of_cases("policy", (cases(ODD), ("checkpoint",)), (cases(ODD, ["float32"]), ("full",)))
def test_prompts_may_end_anywhere(case, policy, directory):
    """Before, on and after the end of a block, a window and an entry."""
    lengths = (15, 16, 17, 23, 24, 25, 50) if case.block == BLOCK else (127, 128, 129, 256)
    with Place(case, "host", policy, directory) as place:
        for length in lengths:
            kept = Reference(case.model, whole=case.whole)
            none, sequence, kept = turn_of(place, kept, prompt_of(length, seed=length))
            hit, _, _ = turn_of(place, kept, torch.cat((sequence, prompt_of(1)), 1))
            assert (none, hit) == (0, (length + NEW - 1) // case.block * case.block)


def _branch():
    """A prompt that leaves another one of 100 tokens after 85 of them, where no checkpoint is."""
    return torch.cat((prompt_of(100)[:, :85], prompt_of(75, seed=5)), 1)


def _with_windows(windows, case):
    policy = {"windows": windows, "checkpoint_tokens": 0}
    config = {"host": {"capacity": "8MiB", "staging": "1MiB"}, "policy": policy}
    return TieredCache(config, case.layout, "tiny")


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "deepseek_v4"])
def test_windows_that_are_never_stored_are_computed_again(family):
    """From the keys, values and entries that were loaded: in float32 the windows are those from the beginning."""
    case = case_of(family)
    model = case.model
    with _with_windows("zero", case) as cache:
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


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "deepseek_v4", "deepseek_v4_released"])
def test_a_window_that_is_replayed_is_approximate_and_so_is_what_follows_it(name, capsys):
    case, branch, tokens = case_of(name), _branch(), 40
    with _with_windows("replay", case) as cache:
        generator = CachedGenerator(case.model, cache)
        generator.generate(prompt_of(100), **LOGITS)
        exact = generator.generate(branch, exact=True, **{**LOGITS, "max_new_tokens": tokens})
        assert sum(exact.report.hit_tokens.values()) == 0
    with _with_windows("replay", case) as cache:
        generator = CachedGenerator(case.model, cache)
        generator.generate(prompt_of(100), **LOGITS)
        with PrefixCache(case.model, cache, branch) as past:
            assert past.hit_tokens == 80
            read = case.model(exact.sequences[:, 80:-1], past_key_values=past).logits[0, -tokens:]
        done = generator.generate(branch, **LOGITS)
        with cache.lookup(done.sequences[0]) as hit:
            assert hit.num_tokens > 80
            assert not hit.exact
        assert cache.match(done.sequences[0], exact=True) == 0
        assert sum(generator.generate(branch, exact=True, **LOGITS).report.hit_tokens.values()) == 0
    agreement = float((read.argmax(-1) == exact.sequences[0, -tokens:]).float().mean())
    with capsys.disabled():
        print(f"\n{name}: top-1 agreement of {tokens} tokens behind a replayed window: {agreement:.2f}")


def test_of_a_hit_without_its_windows_and_without_tokens_nothing_is_restored():
    case = case_of("gpt_oss")
    with _with_windows("zero", case) as cache:
        generator = CachedGenerator(case.model, cache)
        generator.generate(prompt_of(140), **LOGITS)
        with cache.lookup(prompt_of(140)[0]) as hit:
            assert hit.num_tokens == 128 > hit.replay_tokens > 0
            past, loaded = generator.restore(hit)
    assert (past.get_seq_length(), loaded) == (0, None)


@pytest.mark.parametrize("windows", ["full", "checkpoint"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_a_prompt_that_branches_off_finds_what_the_policy_keeps(family, windows):
    """Every block has its windows and states, or checkpoints have, of which there is none in the middle."""
    case = case_of(family)
    model = case.model
    with _with_windows(windows, case) as cache:
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
