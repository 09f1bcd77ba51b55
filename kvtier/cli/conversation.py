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

import numpy as np
import torch
from transformers import DynamicCache, StoppingCriteriaList

import kvtier
from kvtier.cache import TieredCache
from kvtier.cli.families import FAMILIES, random_model
from kvtier.integrations.sequences import CachedSequence
from kvtier.integrations.transformers import CachedGenerator, FirstTokenClock
from kvtier.integrations.transit import Arrival
from kvtier.integrations.weights import model_id
from kvtier.models import KVLayout
from kvtier.runtime import SystemClock

PASSAGE_BYTES: Final = (1600, 850, 850, 850, 32, 32)
"""Of the document that each turn quotes; a byte is a token. The last is for the second process."""
NEW_TOKENS: Final = 16
_DEVICE_SHARE: Final = 0.15
"""Of the conversation, in the device tier: on a GPU, or in memory that stands in for one."""
_HOST_SHARE: Final = 0.4
"""Of the conversation, in host memory: most of it is read from disk."""
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

    def __init__(self, directory: str, tenant: str, family: str = "llama") -> None:
        """``tenant`` keeps the blocks of this run apart from those of earlier ones."""
        self.tenant = tenant
        self.model: Any = random_model(family)
        self._share = FAMILIES[family].document_share
        layout = KVLayout.from_hf_config(self.model.config, FAMILIES[family].block_tokens, dtype=self.model.dtype)
        config = {
            "device": {"capacity": _bytes_of(layout, _DEVICE_SHARE * self._share)},
            "host": {"capacity": _bytes_of(layout, _HOST_SHARE * self._share), "staging": "64MiB"},
            "disk": {"directories": [directory], "capacity": "512MiB"},
        }
        self.cache = TieredCache(config, layout, model_id(self.model))
        self._generator = CachedGenerator(self.model, self.cache)
        self._clock = SystemClock()
        self._remembered = Remembered(layout)

    def warm_up(self) -> None:
        """Run both ways twice on a text of their own, so that neither pays for what only a first run costs."""
        text = torch.tensor([list(_text()[-int(512 * self._share) :])])
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
        sequence = CachedSequence(self.model, self._generator.fit, self.cache, prompt[0])
        if tokens:
            self._remembered.fill(sequence, tokens)
        sequence.prefill()
        with sequence.watched():
            answer = self.without_cache(prompt, sequence.past)
        self._remembered.note(sequence, sequence.past.get_seq_length() // self._remembered.block_tokens)
        return answer

    def close(self) -> None:
        """Close the cache; what it holds stays in its directory."""
        self.cache.close()


class Remembered:
    """Blocks of the conversation as plain bytes in memory, which no tier has touched."""

    def __init__(self, layout: KVLayout) -> None:
        """Nothing yet."""
        self.block_tokens = layout.block_tokens
        self._layout = layout
        self._blocks: dict[tuple[int, int], np.ndarray[Any, np.dtype[np.uint8]]] = {}  # by group and number

    def note(self, sequence: CachedSequence, blocks: int) -> None:
        """Take what ``sequence`` computed of its first ``blocks`` blocks."""
        first = sequence.start // self.block_tokens
        pages = sequence.departure(blocks * self.block_tokens)
        for group, parts in enumerate(self._layout.groups):
            numbers = np.arange(first, blocks)
            if parts.reuse.rule != "all":
                numbers = numbers[pages.memory.held(pages.table, group, numbers)]  # type: ignore[attr-defined]
            out = np.empty((len(numbers), self._layout.block_bytes[group]), np.uint8)
            starts = numbers * self.block_tokens
            pages.memory.gather(pages.table, group, starts, range(len(parts.parts)), out)
            self._blocks.update({(group, int(number)): row for number, row in zip(numbers, out, strict=True)})

    def fill(self, sequence: CachedSequence, tokens: int) -> None:
        """Let ``sequence`` begin with the first ``tokens`` of the conversation."""
        arrival = Arrival.of(sequence.fit, tokens)
        memory, table = arrival.pages.memory, arrival.pages.table
        for group, parts in enumerate(self._layout.groups):
            reach = self._layout.window_blocks[group]
            stop = tokens // self.block_tokens
            for number in range(max(0, stop - reach) if reach else 0, stop):
                row, begin = self._blocks[group, number][None], np.array([number * self.block_tokens])
                memory.scatter(table, group, begin, range(len(parts.parts)), row, 0, tokens)
        sequence.begin_with(arrival, tokens)


def _bytes_of(layout: KVLayout, share: float) -> int:
    """Room for ``share`` of the conversation, and for the windows and states of a few turns."""
    said = sum(PASSAGE_BYTES) + len(PASSAGE_BYTES) * NEW_TOKENS
    whole = int(share * said * layout.bytes_per_token)
    ends = sum(
        pages * 4096 * (blocks or 2) * 2
        for pages, blocks in zip(layout.record_pages, layout.window_blocks, strict=True)
    )
    return whole + ends


def messages(share: float = 1.0) -> list[torch.Tensor]:
    """What the user says turn by turn: ``[1, tokens]`` each, a piece of a document and a question about it.

    ``share`` of the passages is quoted.
    """
    text = _text()
    cuts = pairwise(accumulate((int(size * share) for size in PASSAGE_BYTES), initial=0))
    said = (b"\nUser: %s\nWhat does this say?\nAssistant:" % text[start:stop] for start, stop in cuts)
    return [torch.tensor([list(message)]) for message in said]


def _text() -> bytes:
    """Documents of this repository, where it is at hand, and of the Python installation."""
    repository = Path(kvtier.__file__).resolve().parent.parent
    ours = [path for path in (repository / "README.md", repository / "docs" / "architecture.md") if path.is_file()]
    return b"\n".join([path.read_bytes()[:1200] for path in ours] + [topics[name].encode() for name in sorted(topics)])
