"""The conversation of ``kvtier demo``: every turn generated without a cache, with one, and checked against memory.

The model is random but seeded: it says nothing sensible, and costs and forgets exactly what a trained one of its size
does. It computes in float32, because a reused prefix splits the prompt where a plain run does not, and that moves
logits in their last bits: measured, by 6e-6 at most in float32, where the two best tokens are 4e-3 apart or more, but
by 0.1 in bfloat16, where the choice of a token flips now and then and a plain run is no reference. So two things are
compared: tokens with those of a plain run, and logits, bit for bit, with a run from the same prefix that never left
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

import kvtier
from kvtier.cache import TieredCache
from kvtier.integrations.transformers import CachedGenerator, FirstTokenClock
from kvtier.integrations.weights import model_id
from kvtier.models import KVLayout
from kvtier.runtime import SystemClock

SEED: Final = 20260101
PASSAGE_BYTES: Final = (1600, 850, 850, 850, 32, 32)
"""Of the document that each turn quotes; a byte is a token. The last is for the second process."""
NEW_TOKENS: Final = 16
HOST_CAPACITY: Final = "40MiB"
"""A third of the conversation: most of it is read from disk."""
_SETTINGS: Final[dict[str, Any]] = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn took and gave."""

    prompt_tokens: int
    hit_tokens: dict[str, int]
    without_s: float
    with_s: float
    identical: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One generation: all tokens, time to the first new one, logits ``[new tokens, vocabulary]``."""

    sequence: torch.Tensor
    ttft_s: float
    logits: torch.Tensor

    @property
    def digest(self) -> str:
        """Of every bit of the logits."""
        return sha256(self.logits.contiguous().numpy().tobytes()).hexdigest()


class Talk:
    """One process's part of the conversation: a model, and a cache in ``directory``."""

    def __init__(self, directory: str, tenant: str) -> None:
        """``tenant`` keeps the blocks of this run apart from those of earlier ones."""
        self.tenant = tenant
        self.model: Any = _random_model()
        layout = KVLayout.from_hf_config(self.model.config, dtype=self.model.dtype)
        config = {
            "host": {"capacity": HOST_CAPACITY, "staging": "64MiB"},
            "disk": {"directories": [directory], "capacity": "512MiB"},
        }
        self.cache = TieredCache(config, layout, model_id(self.model))
        self._generator = CachedGenerator(self.model, self.cache)
        self._clock = SystemClock()
        self._remembered = DynamicCache()

    def warm_up(self) -> None:
        """Run both ways twice on a text of their own, so that neither pays for what only a first run costs."""
        text = torch.tensor([list(_text()[-512:])])
        for prompt in (text, torch.cat((text, text), 1)):
            self.without_cache(prompt)
            self._generator.generate(prompt, tenant=f"{self.tenant} warm-up", **_SETTINGS)

    def turn(self, prompt: torch.Tensor) -> tuple[Turn, torch.Tensor]:
        """One turn and the sequence ``[1, tokens]`` it ends with."""
        plain = self.without_cache(prompt)
        cached, hit_tokens = self.with_cache(prompt)
        kept = self.from_memory(prompt, sum(hit_tokens.values()))
        identical = torch.equal(plain.sequence, cached.sequence) and torch.equal(cached.logits, kept.logits)
        turn = Turn(prompt.shape[1], hit_tokens, plain.ttft_s, cached.ttft_s, identical)
        self.cache.flush("process", timeout_s=60.0)  # so that no write of this turn falls into the next
        return turn, cached.sequence

    def without_cache(self, prompt: torch.Tensor, past: DynamicCache | None = None) -> Answer:
        """What ``model.generate`` answers, from nothing or from ``past``."""
        started_s = self._clock.monotonic()
        first_token = FirstTokenClock(self._clock)
        output = self.model.generate(
            prompt, past_key_values=past, stopping_criteria=StoppingCriteriaList([first_token]), **_SETTINGS
        )
        return Answer(output.sequences, first_token.first_token_s - started_s, torch.cat(output.logits))

    def with_cache(self, prompt: torch.Tensor) -> tuple[Answer, dict[str, int]]:
        """What kvtier answers, and how many tokens of the prompt came from which tier."""
        done = self._generator.generate(prompt, tenant=self.tenant, **_SETTINGS)
        report = done.report
        return Answer(done.sequences, report.ttft_s, torch.cat(done.outputs[0].logits)), dict(report.hit_tokens)

    def from_memory(self, prompt: torch.Tensor, tokens: int) -> Answer:
        """What the model answers from the first ``tokens`` of what the last call of this left in memory."""
        layers: list[Any] = self._remembered.layers
        past = DynamicCache([(layer.keys[:, :, :tokens], layer.values[:, :, :tokens]) for layer in layers])
        self._remembered = past
        return self.without_cache(prompt, past)

    def close(self) -> None:
        """Close the cache; what it holds stays in its directory."""
        self.cache.close()


def messages() -> list[torch.Tensor]:
    """What the user says turn by turn: ``[1, tokens]`` each, a piece of a document and a question about it."""
    text = _text()
    cuts = pairwise(accumulate(PASSAGE_BYTES, initial=0))
    said = (b"\nUser: %s\nWhat does this say?\nAssistant:" % text[start:stop] for start, stop in cuts)
    return [torch.tensor([list(message)]) for message in said]


def _text() -> bytes:
    """Documents of this repository, where it is at hand, and of the Python installation."""
    repository = Path(kvtier.__file__).resolve().parent.parent
    ours = [path for path in (repository / "README.md", repository / "docs" / "architecture.md") if path.is_file()]
    return b"\n".join([path.read_bytes()[:1200] for path in ours] + [topics[name].encode() for name in sorted(topics)])


def _random_model() -> Any:
    """83 million parameters, 24 KiB of KV a token. Its weights are wide enough that each answer differs."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: Any = LlamaForCausalLM(config)
    return model.eval()
