"""Rows with different hits, decoded in one batch: bit for bit what the same merge gives without a cache."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from kvtier.cache import TieredCache
from kvtier.errors import KVTierError
from kvtier.integrations import transformers as integration
from kvtier.integrations.batches import merged
from kvtier.integrations.transformers import CachedGenerator
from tests.integrations.families import BLOCK, FAMILIES, Reference, case_of, prompt_of
from tests.integrations.places import splits

NAMES = sorted([*(set(FAMILIES) - {"deepseek_v4"}), "mistral_windows", "qwen3_windows"])
SETTINGS = {"do_sample": False, "max_new_tokens": 17, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def case(request, name):
    return case_of(name, request.param)


@pytest.fixture
def cache(case):
    with _opened(case) as opened:
        yield opened


def _opened(case):
    config = {"host": {"capacity": "8MiB", "staging": "1MiB"}, "policy": {"checkpoint_tokens": 0}}
    return TieredCache(config, case.layout, "tiny")


def left(tensor, tokens, dim):
    return pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [tokens - tensor.shape[dim], 0])


def plainly_merged(found, pasts):
    """Caches of one row each in one cache, by hand: zeros on the left of all that has a length."""
    longest = max(past.get_seq_length() for past in pasts)
    for number in range(len(pasts[0])):
        if isinstance(found, MiniMaxCache):
            states = [past.linear_cache[number] for past in pasts]
            found.set_linear_cache(number, [] if isinstance(states[0], list) else torch.cat(states))
            if not isinstance(states[0], list):
                continue
        rows = [past.layers[number] for past in pasts]
        if isinstance(rows[0], LinearAttentionCacheLayerMixin):
            conv = torch.cat([row.conv_states[0] for row in rows])
            found.update_conv_state(conv, number, conv_kernel_size=conv.shape[-1])
            found.update_recurrent_state(torch.cat([row.recurrent_states[0] for row in rows]), number)
            continue
        slides = isinstance(rows[0], DynamicSlidingWindowLayer)
        width = min(longest, rows[0].sliding_window - 1) if slides else longest
        keys, values = (torch.cat([left(getattr(row, side), width, 2) for row in rows]) for side in ("keys", "values"))
        found.update(keys, values, number)
        if slides:
            found.layers[number].cumulative_length = longest
        if isinstance(rows[0], DynamicIndexedLayer) and rows[0].is_indexer_initialized:
            found.update_indexer(torch.cat([left(row.indexer_keys, longest, 1) for row in rows]), number)


def wanted_of(case, rows, kept, **settings):
    """What the model generates from ``rows``, each computed alone, on top of what is kept of it."""
    place = SimpleNamespace(case=case, policy="checkpoint")
    for row, own in zip(rows, kept, strict=True):
        start = own.past.get_seq_length()
        ends = [end for end in splits(place, start, row) if end < row.shape[1]]
        own.prefill(row, dict.fromkeys([*ends, *([row.shape[1] - 1] if row.shape[1] - 1 > start else [])]))
    longest = max(row.shape[1] for row in rows)
    batch = Reference(case.model, whole=case.whole)
    plainly_merged(batch.past, [own.past for own in kept])
    mask = torch.cat([left(torch.ones_like(row), longest, 1) for row in rows])
    return batch.generate(torch.cat([left(row, longest, 1) for row in rows]), attention_mask=mask, **settings), batch


def padded(rows, sides):
    """A batch with padding on the side that is said, and its mask."""
    longest = max(row.shape[1] for row in rows)
    gaps = [longest - row.shape[1] for row in rows]
    shapes = [(gap, 0) if side == "left" else (0, gap) for gap, side in zip(gaps, sides, strict=True)]
    return tuple(
        torch.cat([pad(each, shape) for each, shape in zip(tensors, shapes, strict=True)])
        for tensors in (rows, [torch.ones_like(row) for row in rows])
    )


def known(case, generator):
    """The first turn of two rows, and a reference that holds the same."""
    first = prompt_of(3 * BLOCK + 5, seed=7)
    generator.generate(first, **SETTINGS)
    kept = Reference(case.model, whole=case.whole)
    kept.prefill(first, splits(SimpleNamespace(case=case, policy="checkpoint"), 0, first))
    sequence = kept.generate(first, **SETTINGS).sequences
    return sequence, kept


def test_rows_with_no_hit_part_of_one_and_a_whole_one_decode_as_without_a_cache(case, cache):
    """Row 0 begins with a known sequence, row 1 ends one token behind its last block, rows 2 and 3 are new."""
    generator = CachedGenerator(case.model, cache)
    sequence, kept = known(case, generator)
    hit = (sequence.shape[1] - 1) // BLOCK * BLOCK
    rows = [
        torch.cat((sequence, prompt_of(30, seed=8)), 1), sequence[:, : hit + 1], prompt_of(21, seed=9), prompt_of(2),
    ]  # fmt: skip
    new = [kept.cut(hit), kept.cut(hit), *(Reference(case.model, whole=case.whole) for _ in range(2))]
    input_ids, mask = padded(rows, ["left", "right", "right", "left"])
    done = generator.generate(input_ids, attention_mask=mask, **SETTINGS)
    wanted, batch = wanted_of(case, rows, new, **SETTINGS)
    assert [sum(report.hit_tokens.values()) for report in done.reports] == [hit, hit, 0, 0]
    assert [report.prompt_tokens for report in done.reports] == [row.shape[1] for row in rows]
    assert torch.equal(done.sequences[:, : input_ids.shape[1]], input_ids)
    assert torch.equal(done.sequences[:, input_ids.shape[1] :], wanted.sequences[:, input_ids.shape[1] :])
    for number, output in enumerate(done.outputs):
        assert torch.equal(torch.cat(output.logits), torch.stack(wanted.logits)[:, number])
    assert len({report.ttft_s for report in done.reports}) == 1
    check_stored(generator, done, rows, batch)


def check_stored(generator, done, rows, batch):
    """Of each row all full blocks that were computed are found again, and are what the reference has of them."""
    longest = max(row.shape[1] for row in rows)
    for number, (row, output) in enumerate(zip(rows, done.outputs, strict=True)):
        sequence = output.sequences[0]
        assert torch.equal(sequence[: row.shape[1]], row[0])
        with generator.cache.lookup(torch.cat((sequence, sequence[:1]))) as hit:
            assert hit.num_tokens == (len(sequence) - 1) // BLOCK * BLOCK
            if hit.num_tokens:
                past, _ = generator.restore(hit)
                check_row(past, hit.num_tokens, batch, number, longest - row.shape[1])


def check_row(past, tokens, batch, row, gap):
    """``past`` has what row ``row`` of ``batch`` has, where there are ``gap`` tokens of padding before it."""
    for number in range(len(past)):
        states = batch.states[tokens + gap].get(number) if tokens + gap in batch.states else None
        if isinstance(past, MiniMaxCache) and isinstance(past.linear_cache[number], torch.Tensor):
            assert states is None or torch.equal(past.linear_cache[number], states[row : row + 1])
            continue
        own, common = past.layers[number], batch.past.layers[number]
        if isinstance(own, LinearAttentionCacheLayerMixin):
            for mine, theirs in zip((own.conv_states[0][..., 1:], own.recurrent_states[0]), states or (), strict=False):
                assert torch.equal(mine, theirs[row : row + 1, ..., -mine.shape[-1] :])
            continue
        slides = isinstance(own, DynamicSlidingWindowLayer)
        sides = (
            (torch.cat(side, 2) for side in zip(*common.seen, strict=True)) if slides else (common.keys, common.values)
        )
        for mine, theirs in zip((own.keys, own.values), sides, strict=True):
            stop = tokens + gap - (batch.past.get_seq_length() - theirs.shape[2])
            count = min(stop, mine.shape[2])
            assert count > 0
            assert torch.equal(mine[:, :, mine.shape[2] - count :], theirs[row : row + 1, :, stop - count : stop])
        if isinstance(own, DynamicIndexedLayer) and own.is_indexer_initialized:
            assert torch.equal(own.indexer_keys, common.indexer_keys[row : row + 1, gap : gap + tokens])


SOME = ["deepseek_v32", "gpt_oss", "qwen3_next"]
"""One for each kind of layer."""


@pytest.mark.parametrize("some", SOME)
def test_a_row_that_ends_before_the_others_is_stored_up_to_its_end(some):
    case, rows = case_of(some), [prompt_of(3 * BLOCK - 3, seed=3), prompt_of(20, seed=4), prompt_of(29, seed=5)]
    settings = {**SETTINGS, "max_new_tokens": 40}
    free, _ = wanted_of(case, rows, [Reference(case.model) for _ in rows], **settings)
    new = free.sequences[:, 3 * BLOCK - 3 :].tolist()
    at, token = next((at, each) for at, each in enumerate(new[0]) if at > 3 and each not in new[0][:at] + new[1])
    settings |= {"eos_token_id": token, "pad_token_id": 0}
    wanted, batch = wanted_of(case, rows, [Reference(case.model) for _ in rows], **settings)
    input_ids, mask = padded(rows, ["left"] * 3)
    with _opened(case) as cache:
        generator = CachedGenerator(case.model, cache)
        done = generator.generate(input_ids, attention_mask=mask, **settings)
        assert torch.equal(done.sequences, wanted.sequences)
        for number, output in enumerate(done.outputs):
            steps = len(output.logits)
            assert torch.equal(torch.cat(output.logits), torch.stack(wanted.logits)[:steps, number])
            assert output.sequences.shape[1] == rows[number].shape[1] + steps
        assert len(done.outputs[0].logits) == at + 1 < len(done.outputs[1].logits) == 40
        check_stored(generator, done, rows, batch)


@pytest.mark.parametrize("some", SOME)
def test_rows_that_are_sampled_together_are_those_of_the_plain_merge(some):
    case, rows = case_of(some), [prompt_of(40, seed=3), prompt_of(20, seed=4)]
    settings = {**SETTINGS, "do_sample": True, "top_k": 20}
    input_ids, mask = padded(rows, ["right"] * 2)
    with _opened(case) as cache:
        torch.manual_seed(5)
        done = CachedGenerator(case.model, cache).generate(input_ids, attention_mask=mask, **settings)
    torch.manual_seed(5)
    wanted, _ = wanted_of(case, rows, [Reference(case.model) for _ in rows], **settings)
    assert torch.equal(done.sequences[:, 40:], wanted.sequences[:, 40:])


class _Streamer:
    def __repr__(self):
        return "streamer"

    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize(
    ("some", "shortest", "settings", "calls"),
    [
        ("llama", 20, {}, 1),
        ("llama", 1, {}, 2),
        ("llama", 20, {"streamer": _Streamer()}, 2),
        ("llama", 20, {"num_beams": 2}, 2),
        ("llama", 20, {"do_sample": True, "num_return_sequences": 2}, 2),
        ("llama", 20, {"repetition_penalty": 1.3}, 2),
        ("llama", 20, {"max_new_tokens": None, "max_length": 60}, 2),
        ("llama", 20, {"prefill_chunk_size": 8}, 2),
        ("deepseek_v4", 20, {}, 2),
    ],
    ids=str,
)
def test_rows_that_cannot_be_merged_run_one_by_one(some, shortest, settings, calls, monkeypatch):
    case, rows = case_of(some), [prompt_of(30, seed=3), prompt_of(shortest, seed=4)]
    generate, called = case.model.generate, []
    monkeypatch.setattr(
        case.model, "generate", lambda ids, **kwargs: (called.append(len(ids)), generate(ids, **kwargs))[1]
    )
    input_ids, mask = padded(rows, ["left"] * 2)
    settings = {"do_sample": False, "max_new_tokens": 3, **settings}
    with _opened(case) as cache:
        torch.manual_seed(5)
        done = CachedGenerator(case.model, cache).generate(input_ids, attention_mask=mask, **settings)
    assert called == ([2] if calls == 1 else [1, 1])
    torch.manual_seed(5)
    wanted = [generate(row, **settings)[:, row.shape[1] :] for row in rows]
    for number, tokens in enumerate(wanted):
        own = done.sequences[number * len(tokens) : (number + 1) * len(tokens), 30:]
        assert torch.equal(own[:, : tokens.shape[1]], tokens)


def test_one_row_runs_as_it_does_alone(monkeypatch):
    case = case_of("llama")
    monkeypatch.setattr(integration, "Batch", None)
    with _opened(case) as cache:
        done = CachedGenerator(case.model, cache).generate(prompt_of(20), max_new_tokens=3, do_sample=False)
    assert torch.equal(done.sequences, case.model.generate(prompt_of(20), max_new_tokens=3, do_sample=False))


def test_layers_with_compressed_entries_are_not_merged():
    case, pasts = case_of("deepseek_v4"), []
    for tokens in (20, 30):
        pasts.append(DynamicCache(config=case.model.config))
        case.model(prompt_of(tokens), past_key_values=pasts[-1])
    with pytest.raises(TypeError, match="Cache cannot be merged"):
        merged(pasts)


def test_what_a_batch_was_generated_from_is_checked_before_it_is_stored(monkeypatch):
    case = case_of("llama")
    generate = case.model.generate
    monkeypatch.setattr(case.model, "generate", lambda ids, **kwargs: generate((ids + 1) % 128, **kwargs))
    with _opened(case) as cache:
        with pytest.raises(KVTierError, match="generated from another prompt"):
            CachedGenerator(case.model, cache).generate(prompt_of(20).expand(2, -1), **SETTINGS)
        assert cache.match(prompt_of(20)[0]) == 0
