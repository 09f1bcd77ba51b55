"""Generation with transformers that finds the KV of known prefixes in a cache, and leaves there what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, Final

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from kvtier.cache import TieredCache
from kvtier.config import MOST_SECONDS
from kvtier.core.checks import timeout
from kvtier.errors import ConfigError, KVTierError
from kvtier.hits import Hit
from kvtier.integrations.fit import check_autocast, check_dropout, check_keeps_kv, fit_of
from kvtier.integrations.prompts import joined, without_padding
from kvtier.integrations.sequences import CachedSequence
from kvtier.jobs import TIER_NAMES, LoadResult, StoreResult
from kvtier.manager import CacheManager
from kvtier.runtime import SystemClock
from kvtier.runtime.seam import Clock

REFUSED_ARGUMENTS: Final = frozenset({"past_key_values", "inputs_embeds", "cache_implementation", "custom_generate"})
HARMLESS_TENSORS: Final = frozenset({"negative_prompt_ids", "negative_prompt_attention_mask"})
"""Tensor arguments that leave the KV of the prompt as it is; any other makes it depend on more than token ids."""
MODES: Final = frozenset(
    {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}
)
"""Ways to generate that start from a filled cache. Assisted ones do not: they feed it the whole prompt again."""


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
    ``outputs`` is what ``model.generate`` returned for each row; ``reports`` has one entry for each row.
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

        Rows run one by one, each from a hit of its own. ``attention_mask`` marks the padding of rows, on either side;
        without one every token counts.
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
        settings = self._settings(kwargs)
        _check(kwargs, settings)
        copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        if (settings.num_beams or 1) > 1 and not self.fit.reorders:
            raise ConfigError(
                f"num_beams = {settings.num_beams}: transformers does not reorder the linear states of this model, so"
                " that beams would go on from each other's; use greedy search or sampling"
            )
        prompts = without_padding(input_ids, attention_mask)
        cache.match(())  # a closed cache is an error here, where nothing has been computed, and only here
        names = {"tenant": tenant, "adapter": adapter, "session": session, "exact": exact}
        done = [self._generate_row(cache, prompt, names, copies, kwargs) for prompt in prompts]
        new = [_sequences(output)[:, len(prompt) :] for prompt, (output, _) in zip(prompts, done, strict=True)]
        return GenerationWithReport(
            sequences=joined(input_ids, new, _pad_token(settings)),
            outputs=tuple(output for output, _ in done),
            reports=tuple(report for _, report in done),
        )

    def restore(self, hit: Hit) -> tuple[DynamicCache, LoadResult | None]:
        """A cache of transformers with the tokens of ``hit``, or as many of them as could be loaded.

        ``generate`` starts from it; so can a loop of one's own. The result is None where nothing was loaded.
        """
        sequence = self._sequence(self.cache, torch.empty(0, dtype=torch.long, device="cpu"))
        sequence.restore_from(hit)
        return sequence.past, sequence.loaded

    def _sequence(self, cache: TieredCache, prompt: torch.Tensor, **names: Any) -> CachedSequence:
        return CachedSequence(self.model, self.fit, cache, prompt, timeout_s=self.timeout_s, **names)

    def _generate_row(
        self, cache: TieredCache, prompt: torch.Tensor, names: Mapping[str, Any], copies: int, kwargs: dict[str, Any]
    ) -> tuple[Any, GenerationReport]:
        started_s = self._clock.monotonic()
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
        _check_prompt(prompt, sequences)
        if copies == 1:  # of several sequences only the prompt is known to be alike
            sequence.keys.append(_computed(sequences[0], sequence.past)[len(prompt) :])
        stored = sequence.store()
        ttft_s = first_token.first_token_s - started_s
        return output, _report(len(prompt), ttft_s, sequence.loaded, stored)

    def _settings(self, kwargs: dict[str, Any]) -> GenerationConfig:
        """What ``model.generate`` will find: arguments, else the config that is passed, else that of the model."""
        given = kwargs.get("generation_config")
        settings: Any = deepcopy(given) if given else GenerationConfig()  # type: ignore[no-untyped-call]
        settings.update(**self.model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        settings.update(**kwargs)
        resolved: GenerationConfig = settings
        return resolved


def _check_prompt(prompt: torch.Tensor, sequences: torch.Tensor) -> None:
    if not torch.equal(sequences[:, : len(prompt)], prompt.expand(len(sequences), -1)):
        raise KVTierError(
            "transformers generated from another prompt than the one that was passed: nothing of it is stored, because"
            " KV under the wrong tokens would be found again"
        )


def _computed(sequence: torch.Tensor, past: DynamicCache) -> torch.Tensor:
    """The tokens of ``sequence`` whose KV is in ``past``: all but the last one, which was chosen and never fed back."""
    tokens = past.get_seq_length()
    if tokens != len(sequence) - 1:
        raise KVTierError(
            f"transformers left the KV of {tokens} tokens for a sequence of {len(sequence)}, want {len(sequence) - 1}: "
            f"nothing of it is stored, because KV under the wrong tokens would be found again"
        )
    return sequence[:tokens]


def _check(kwargs: dict[str, Any], settings: GenerationConfig) -> None:
    for name, value in kwargs.items():
        if name in REFUSED_ARGUMENTS and value is not None:
            raise ConfigError(f"{name}: the cache fills in past_key_values from input_ids; leave it out")
        if isinstance(value, torch.Tensor) and name not in HARMLESS_TENSORS:
            raise ConfigError(f"{name}: a tensor beside input_ids; a prefix is known by its token ids alone")
    if settings.cache_implementation is not None:
        raise ConfigError(
            f"cache_implementation = {settings.cache_implementation!r}: the cache fills in past_key_values;"
            " leave it out"
        )
    if settings.use_cache is False:
        raise ConfigError("use_cache = False: generation without KV has nothing to reuse; call model.generate")
    if settings.token_healing:
        raise ConfigError(
            "token_healing: the end of the prompt is replaced, and KV under the wrong tokens would be found again; heal"
            " the prompt first, or call model.generate"
        )
    mode = settings.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in MODES:
        raise ConfigError(
            f"{mode.value}: this way to generate cannot start from a filled cache; use greedy search, sampling or "
            f"beam search, or call model.generate"
        )


def _pad_token(settings: GenerationConfig) -> int:
    """What fills up rows that ended early: as in ``model.generate`` the end-of-sequence token where none is set."""
    for token in (settings.pad_token_id, settings.eos_token_id):
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0


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
