"""What a request pays, with a model that takes no time: every answer and every byte of KV compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import requests
from benchmarks.suite import BenchmarkError, Settings


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "llama_80m", tiny_llama)
    monkeypatch.setattr(requests, "PROMPT_TOKENS", 128)
    monkeypatch.setattr(requests, "NEW_TOKENS", 4)
    monkeypatch.setattr(requests, "HOST_BYTES", 64 << 20)
    monkeypatch.setattr(requests, "THREADS", 1)


def test_there_is_a_row_for_the_first_token_and_one_for_the_whole_request() -> None:
    first_token, request, again = requests.rows(Settings(Path(), pairs=2))
    assert [row.bench for row in (first_token, request, again)] == [
        "overhead.first_token", "overhead.request", "overhead.request.itself"
    ]  # fmt: skip
    assert all(row.data_checked and not row.config["refused_tokens"] for row in (first_token, request))
    assert first_token.pairs == request.pairs == 2


def test_time_inside_is_part_of_the_time_to_first_token() -> None:
    first_token, *_ = requests.rows(Settings(Path(), pairs=3))
    assert 0 < first_token.value < first_token.baseline
    assert 0 < first_token.config["percent_of_ttft"]["from"] <= first_token.config["percent_of_ttft"]["to"] < 100


def test_the_time_of_a_copy_is_granted_to_kvtier_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.2 s with kvtier, of which a copy is 0.2 s, against 1 s: as long."""
    took_s = {"kvtier": 1.2, "plain": 1.0, "again": 1.0, "gather": 0.2}

    def alternate(contestants, pairs):
        for contestant in contestants:
            contestant.prepare(0)
            contestant.run(0)
            contestant.check(0)
        return {name: requests.Times(torch.full((2,), time).double().numpy(), None) for name, time in took_s.items()}

    monkeypatch.setattr(requests, "alternate", alternate)
    monkeypatch.setattr(requests._Bench, "first_token_row", lambda *_: None)
    _, request, _ = requests.rows(Settings(Path(), pairs=2))
    assert request.ratio == 1.0
    assert request.ok
    took_s["kvtier"] = 1.23
    _, request, _ = requests.rows(Settings(Path(), pairs=2))
    assert request.ratio < request.target
    assert not request.ok


def test_an_answer_that_is_not_that_of_the_model_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests._Watched, "generate", _other_answer)
    with pytest.raises(BenchmarkError, match="an answer with kvtier is not the one without it"):
        list(requests.rows(Settings(Path(), pairs=2)))


def _other_answer(watched: Any, prompt: torch.Tensor, **named: Any) -> Any:
    output = watched._model.generate(prompt, **named)
    output.sequences[0, -1] ^= 1
    return output
