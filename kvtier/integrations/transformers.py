"""Generation with transformers that finds the KV of known prefixes in a cache, and leaves there what it computes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, Final

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.generation.configuration_utils import GenerationMode

from kvtier.cache import TieredCache
from kvtier.config import MOST_SECONDS
from kvtier.core.checks import timeout
from kvtier.core.keys import Keys
from kvtier.errors import ClosedError, ConfigError, KVTierError
from kvtier.hits import Hit
from kvtier.integrations.fit import check_autocast, check_dropout, check_keeps_kv, layers_of, sizes_of
from kvtier.integrations.prompts import joined, without_padding
from kvtier.jobs import TIER_NAMES, Job, LoadResult, R, StoreResult
from kvtier.manager import CacheManager
from kvtier.models import Part
from kvtier.pages import DenseKV
from kvtier.runtime import SystemClock
from kvtier.runtime.seam import Clock

log = logging.getLogger(__name__)

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

    KV that a call starts from is bit for bit what was stored. Every layer keeps its whole KV, also in models that
    attend to a sliding window only, so that a prefix can be cut after every block. Their answers are those of
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
        self._layers = layers_of(self.cache.layout, model)

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
        **kwargs: Any,
    ) -> GenerationWithReport:
        """Generate from ``input_ids`` ``[rows, tokens]``; ``kwargs`` are those of ``model.generate``.

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
        self._layers = layers_of(cache.layout, self.model)  # by now it may be of another dtype
        check_dropout(self.model)
        check_keeps_kv(self.model)
        check_autocast(self.model)
        settings = self._settings(kwargs)
        _check(kwargs, settings)
        copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        prompts = without_padding(input_ids, attention_mask)
        cache.match(())  # a closed cache is an error here, where nothing has been computed, and only here
        done = [self._generate_row(cache, prompt, tenant, adapter, session, copies, kwargs) for prompt in prompts]
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
        return self._restore(self.cache, hit)

    def _restore(self, cache: TieredCache, hit: Hit) -> tuple[DynamicCache, LoadResult | None]:
        past = DynamicCache()
        if not hit.num_tokens:
            return past, None
        layers = [(_room(k, hit.num_tokens), _room(v, hit.num_tokens)) for k, v in self._layers]
        memory = DenseKV(cache.layout, [keys for keys, _ in layers], [values for _, values in layers])
        loaded = self._result(cache.submit_load(hit, memory.row()))
        if loaded and loaded.ok_tokens:
            past.layers = [_filled(keys, values, loaded.ok_tokens, self.model.device) for keys, values in layers]
        return past, loaded

    def _generate_row(
        self,
        cache: TieredCache,
        prompt: torch.Tensor,
        tenant: str,
        adapter: str,
        session: str | None,
        copies: int,
        kwargs: dict[str, Any],
    ) -> tuple[Any, GenerationReport]:
        started_s = self._clock.monotonic()
        first_token = FirstTokenClock(self._clock)
        criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), first_token])
        keys = cache.keys(prompt, tenant=tenant, adapter=adapter)
        with _lookup(cache, keys, session) as hit:
            past, loaded = self._begin(cache, hit)
            start = loaded.ok_tokens if loaded else 0
            if copies > 1:
                past.batch_repeat_interleave(copies)
            output = self.model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt)[None],
                **{**kwargs, "past_key_values": past, "stopping_criteria": criteria},
            )
        sequences = _sequences(output)
        _check_prompt(prompt, sequences)
        if copies == 1:  # of several sequences only the prompt is known to be alike
            keys.append(_computed(sequences[0], past)[len(prompt) :])
        stored = self._store(cache, keys, past, start, hit, session)  # the hit is let go: its blocks may make room
        ttft_s = first_token.first_token_s - started_s
        return output, _report(len(prompt), ttft_s, loaded, stored)

    def _begin(self, cache: TieredCache, hit: Hit | None) -> tuple[DynamicCache, LoadResult | None]:
        """What a row begins with, as ``restore``; nothing where the cache was closed since the call began."""
        if hit is not None:
            with suppress(ClosedError):
                return self._restore(cache, hit)
        return DynamicCache(), None

    def _store(
        self, cache: TieredCache, keys: Keys, past: DynamicCache, start: int, hit: Hit | None, session: str | None
    ) -> StoreResult | None:
        """Offer the full blocks of ``keys`` from ``start`` on; the KV of every token of ``keys`` is in ``past``."""
        stop = len(keys) * keys.block_tokens
        if stop <= start:
            return None
        layers: list[Any] = past.layers
        memory = DenseKV(
            cache.layout,
            [layer.keys[:1, :, start:stop].cpu() for layer in layers],
            [layer.values[:1, :, start:stop].cpu() for layer in layers],
        )
        pages = memory.row(first_token=start)
        try:
            job = cache.submit_store(keys, pages, start=start, derived_from=hit, session=session)
        except ClosedError:
            log.warning("the cache was closed while the model generated: %d tokens are not stored", stop - start)
            return None
        return self._result(job)

    def _result(self, job: Job[R]) -> R | None:
        try:
            return job.result(self.timeout_s)
        except TimeoutError:
            job.cancel()  # the memory stays alive as long as the job holds it; nobody reads it any more
            return None

    def _settings(self, kwargs: dict[str, Any]) -> GenerationConfig:
        """What ``model.generate`` will find: arguments, else the config that is passed, else that of the model."""
        given = kwargs.get("generation_config")
        settings: Any = deepcopy(given) if given else GenerationConfig()  # type: ignore[no-untyped-call]
        settings.update(**self.model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        settings.update(**kwargs)
        resolved: GenerationConfig = settings
        return resolved


def _lookup(cache: TieredCache, keys: Keys, session: str | None) -> AbstractContextManager[Hit | None]:
    """A hit; None where the cache was closed since the call began."""
    try:
        return cache.lookup(keys, session=session)
    except ClosedError:
        return nullcontext()


def _room(part: Part, tokens: int) -> torch.Tensor:
    sizes = sizes_of(part)
    shape, dtype = (1, sizes["head"], tokens, sizes["dim"]), getattr(torch, part.dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch's default device is


def _filled(keys: torch.Tensor, values: torch.Tensor, tokens: int, device: torch.device) -> DynamicLayer:
    layer: DynamicLayer = DynamicLayer()  # type: ignore[no-untyped-call]
    keys, values = keys[:, :, :tokens].to(device), values[:, :, :tokens].to(device)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


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
