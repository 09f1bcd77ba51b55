"""Generation with transformers that finds the KV of known prefixes in a cache, and leaves there what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from kvtier.cache import TieredCache
from kvtier.config import MOST_SECONDS
from kvtier.core.checks import timeout
from kvtier.errors import ConfigError, KVTierError
from kvtier.hits import Hit
from kvtier.integrations.batches import Batch, can_merge
from kvtier.integrations.fit import check_autocast, check_dropout, check_keeps_kv, fit_of
from kvtier.integrations.prompts import joined, without_padding
from kvtier.integrations.sequences import CachedSequence
from kvtier.integrations.settings import check_arguments, decode_together, end_tokens, pad_token, settings_of
from kvtier.jobs import TIER_NAMES, LoadResult, StoreResult
from kvtier.manager import CacheManager
from kvtier.runtime import SystemClock
from kvtier.runtime.seam import Clock


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What the cache did for one prompt.

    ``hit_tokens`` are the prompt tokens that were loaded, by the tier they came from. ``ttft_s`` is the time from the
    call to the choice of the first token, lookup and load included. ``stored``, ``existing`` and ``refused`` count the
    tokens of the full blocks that this call computed; bytes are those of records, headers included.
    """

    prompt_tokens: int
    hit_tokens: Mapping[str, int]
    ttft_s: float
    loaded_bytes: int
    stored_bytes: int
    stored_tokens: int
    existing_tokens: int
    refused_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationWithReport:
    """What ``CachedGenerator.generate`` returns.

    ``sequences`` is ``[rows * num_return_sequences, tokens]``, prompts first, as ``model.generate`` returns it.
    ``outputs`` is what ``model.generate`` returned for each row, of rows in one batch without its ``past_key_values``;
    ``reports`` has one entry for each row.
    """

    sequences: torch.Tensor
    outputs: tuple[Any, ...]
    reports: tuple[GenerationReport, ...]

    @property
    def report(self) -> GenerationReport:
        """The report of the first row, the only one there is for a single prompt."""
        return self.reports[0]


class FirstTokenClock(StoppingCriteria):
    """Notes when the first token has been chosen, and never stops anything."""

    def __init__(self, clock: Clock) -> None:
        """``clock`` tells the time; ``first_token_s`` is not a number until there is a token."""
        self._clock = clock
        self.first_token_s = nan

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called after every token; false for every row."""
        if isnan(self.first_token_s):
            if input_ids.device.type == "cuda":
                torch.cuda.synchronize(input_ids.device)
            self.first_token_s = self._clock.monotonic()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class CachedGenerator:
    """``model.generate`` with prefix reuse: across calls and across processes, from whichever tier holds the prefix.

    KV that a call starts from is bit for bit what was stored; docs/transformers.md says what follows from that for each
    kind of layer. Where the layout keeps sliding windows whole, answers are those of
    ``model.generate(past_key_values=DynamicCache())``, which rounds differently from the cache that such a model makes
    for itself.
    """

    def __init__(self, model: Any, cache: TieredCache | CacheManager, *, timeout_s: float = 60.0) -> None:
        """``timeout_s`` bounds the wait for one load (after which the prompt is computed) and for one store.

        Raises:
            ConfigError: ``cache`` or ``model`` is none, ``timeout_s`` is no number, the layout is not that of the
                model, or the model's KV of a prefix depends on what follows (``rope_type`` dynamic or longrope).
        """
        if not isinstance(cache, (TieredCache, CacheManager)):
            raise ConfigError(f"cache: got {type(cache).__name__}, want a kvtier.TieredCache or a kvtier.CacheManager")
        if not hasattr(model, "config") or not hasattr(model, "generate"):
            raise ConfigError(f"model: got {type(model).__name__}, want a model of transformers that generates")
        self.model = model
        self._opened = cache
        self.timeout_s = timeout(timeout_s, MOST_SECONDS)
        self._clock = SystemClock()
        self.fit = fit_of(self.cache.layout, model)

    @property
    def cache(self) -> TieredCache:
        """What holds the KV: of a manager that was entered again, the cache that it has open now."""
        return self._opened.core if isinstance(self._opened, CacheManager) else self._opened

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        tenant: str = "",
        adapter: str = "",
        session: str | None = None,
        exact: bool = False,
        **kwargs: Any,
    ) -> GenerationWithReport:
        """Generate from ``input_ids`` ``[rows, tokens]``; ``kwargs`` are those of ``model.generate``.

        ``exact``: only from KV that is what the model computes.

        Every row is computed up to its last token alone, from a hit of its own; then all are decoded in one batch.
        Where that cannot be (DeepSeek V4, several sequences a row, arguments that look at single rows, a row of one
        token), rows run one by one. ``attention_mask`` marks the padding of rows, on either side; without one every
        token counts.
        A cache that another thread closes meanwhile loses no answer: what is left is computed, and nothing stored.

        Raises:
            ClosedError: the cache was closed before.
            ConfigError: an argument that would make KV depend on more than token ids, a way to generate that cannot
                start from a filled cache, a mask with holes, a model that was turned into another dtype since or is in
                training mode with dropout or gradient checkpointing, or ``torch.autocast``.
        """
        cache = self.cache  # for all of this call
        self.fit = fit_of(cache.layout, self.model)  # by now it may be of another dtype
        check_dropout(self.model)
        check_keeps_kv(self.model)
        check_autocast(self.model)
        settings = settings_of(self.model, kwargs)
        check_arguments(kwargs, settings)
        copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        if (settings.num_beams or 1) > 1 and not self.fit.reorders:
            raise ConfigError(
                f"num_beams = {settings.num_beams}: transformers does not reorder the linear states of this model, so"
                " that beams would go on from each other's; use greedy search or sampling"
            )
        prompts = without_padding(input_ids, attention_mask)
        cache.match(())  # a closed cache is an error here, where nothing has been computed, and only here
        names = {"tenant": tenant, "adapter": adapter, "session": session, "exact": exact}
        started_s = self._clock.monotonic()
        if (
            len(prompts) > 1 and copies == 1 and min(map(len, prompts)) > 1
            and can_merge(self.fit) and decode_together(kwargs, settings)
        ):  # fmt: skip
            done = self._generate_rows(cache, prompts, names, settings, kwargs, started_s)
        else:
            done = [self._generate_row(cache, prompt, names, copies, kwargs, started_s) for prompt in prompts]
        new = [_sequences(output)[:, len(prompt) :] for prompt, (output, _) in zip(prompts, done, strict=True)]
        return GenerationWithReport(
            sequences=joined(input_ids, new, pad_token(settings)),
            outputs=tuple(output for output, _ in done),
            reports=tuple(report for _, report in done),
        )

    def restore(self, hit: Hit) -> tuple[DynamicCache, LoadResult | None]:
        """A cache of transformers with the tokens of ``hit``, or as many of them as could be loaded.

        ``generate`` starts from it; so can a loop of one's own. The result is None where nothing was loaded, as from a
        hit whose windows would have to be computed again: that takes the tokens, which a ``PrefixCache`` has.
        """
        sequence = self._sequence(self.cache, torch.empty(0, dtype=torch.long, device="cpu"))
        sequence.restore_from(hit)
        return sequence.past, sequence.loaded

    def _sequence(self, cache: TieredCache, prompt: torch.Tensor, **names: Any) -> CachedSequence:
        return CachedSequence(self.model, self.fit, cache, prompt, timeout_s=self.timeout_s, **names)

    def _generate_row(
        self,
        cache: TieredCache,
        prompt: torch.Tensor,
        names: Mapping[str, Any],
        copies: int,
        kwargs: dict[str, Any],
        started_s: float,
    ) -> tuple[Any, GenerationReport]:
        first_token = FirstTokenClock(self._clock)
        criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), first_token])
        sequence = self._sequence(cache, prompt, **names)
        try:
            sequence.restore()
            sequence.prefill()
            sequence.expand(copies)
            with sequence.watched(prompt_only=copies > 1):
                output = self.model.generate(
                    prompt[None],
                    attention_mask=torch.ones_like(prompt)[None],
                    **{**kwargs, "past_key_values": sequence.past, "stopping_criteria": criteria},
                )
        finally:
            sequence.release()  # its blocks may make room
        sequences = _sequences(output)
        _check_prompts(prompt.expand(len(sequences), -1), sequences)
        if copies == 1:  # of several sequences only the prompt is known to be alike
            sequence.keys.append(_computed(sequences[0], sequence.past)[len(prompt) :])
        stored = sequence.store()
        ttft_s = first_token.first_token_s - started_s
        return output, _report(len(prompt), ttft_s, sequence.loaded, stored)

    def _generate_rows(
        self,
        cache: TieredCache,
        prompts: Sequence[torch.Tensor],
        names: Mapping[str, Any],
        settings: GenerationConfig,
        kwargs: dict[str, Any],
        started_s: float,
    ) -> list[tuple[Any, GenerationReport]]:
        first_token = FirstTokenClock(self._clock)
        sequences = [self._sequence(cache, prompt, **names) for prompt in prompts]
        try:
            for sequence in sequences:
                sequence.restore()
                sequence.prefill_whole()
            batch = Batch(sequences, end_tokens(settings), pad_token(settings))
            with batch.watched():
                output = self.model.generate(
                    batch.input_ids,
                    attention_mask=batch.attention_mask,
                    **{
                        **kwargs,
                        "past_key_values": batch.past,
                        "stopping_criteria": StoppingCriteriaList([first_token]),
                    },
                )
        finally:
            for sequence in sequences:
                sequence.release()
        generated = _sequences(output)
        _check_prompts(batch.input_ids, generated)
        _check_length(generated[0], batch.past)
        outputs = []
        for number, (sequence, new) in enumerate(zip(sequences, batch.split(generated), strict=True)):
            whole = torch.cat((sequence.prompt, new))
            sequence.keys.append(whole[len(sequence.prompt) : -1])
            outputs.append(_row_of(output, number, whole, len(new)))
        ttft_s = first_token.first_token_s - started_s
        return [
            (own, _report(len(sequence.prompt), ttft_s, sequence.loaded, sequence.store()))
            for own, sequence in zip(outputs, sequences, strict=True)
        ]


def _check_prompts(prompts: torch.Tensor, sequences: torch.Tensor) -> None:
    """Refuse ``sequences`` that do not begin with ``prompts``, both ``[rows, tokens]``."""
    if not torch.equal(sequences[:, : prompts.shape[1]], prompts):
        raise KVTierError(
            "transformers generated from another prompt than the one that was passed: nothing of it is stored, because"
            " KV under the wrong tokens would be found again"
        )


def _computed(sequence: torch.Tensor, past: DynamicCache) -> torch.Tensor:
    """The tokens of ``sequence`` whose KV is in ``past``: all but the last one, which was chosen and never fed back."""
    _check_length(sequence, past)
    return sequence[:-1]


def _check_length(sequence: torch.Tensor, past: DynamicCache) -> None:
    tokens = past.get_seq_length()
    if tokens != len(sequence) - 1:
        raise KVTierError(
            f"transformers left the KV of {tokens} tokens for a sequence of {len(sequence)}, want {len(sequence) - 1}: "
            f"nothing of it is stored, because KV under the wrong tokens would be found again"
        )


def _row_of(output: Any, row: int, sequence: torch.Tensor, new_tokens: int) -> Any:
    """What ``model.generate`` would have returned for one row: without padding, and without what came after its end."""
    if isinstance(output, torch.Tensor):
        return sequence[None]
    own: dict[str, Any] = {
        name: tuple(step[row : row + 1] for step in steps[:new_tokens])
        for name in ("scores", "logits")
        if (steps := getattr(output, name)) is not None
    }
    whole: Any = sequence[None]
    return GenerateDecoderOnlyOutput(sequences=whole, **own)


def _sequences(output: Any) -> torch.Tensor:
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.sequences
    return found


def _report(
    prompt_tokens: int, ttft_s: float, loaded: LoadResult | None, stored: StoreResult | None
) -> GenerationReport:
    return GenerationReport(
        prompt_tokens=prompt_tokens,
        hit_tokens=loaded.by_tier if loaded else dict.fromkeys(TIER_NAMES, 0),
        ttft_s=ttft_s,
        loaded_bytes=loaded.nbytes if loaded else 0,
        stored_bytes=stored.nbytes if stored else 0,
        stored_tokens=stored.stored if stored else 0,
        existing_tokens=stored.existing if stored else 0,
        refused_tokens=stored.refused if stored else 0,
    )
