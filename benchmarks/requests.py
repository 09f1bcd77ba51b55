"""What kvtier costs a request that finds nothing and is stored: a real model of transformers, on the CPU.

``first_token`` is the time that the request's own thread spends in kvtier before the model begins, beside the time to
first token: from the call of ``CachedGenerator.generate`` until it calls ``model.generate``, so hashing, lookup, checks
and everything else. There is no hit, and so no load to wait for. ``request`` is the whole request, stores included,
beside the same request by ``model.generate`` alone; what copying its KV once takes is measured in the same rounds and
granted. Answers are compared, and what was stored is loaded and compared byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import numpy as np
import torch
from transformers import StoppingCriteriaList

from benchmarks.llama import VOCABULARY, llama_80m, parameters
from benchmarks.pairs import Contestant, Floats, Times, alternate, freeze_heap, ratio_of
from benchmarks.rows import AT_LEAST, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import KVLayout, TieredCache, model_id
from kvtier.integrations.transformers import CachedGenerator, FirstTokenClock
from kvtier.runtime import SystemClock
from kvtier.runtime.seam import Clock

PROMPT_TOKENS: Final = 2048
NEW_TOKENS: Final = 8
BLOCK_TOKENS: Final = 64
THREADS: Final = 2
HOST_BYTES: Final = 1 << 30
ROOMS: Final = 8
"""That copies go to in turn, as stores go to other memory every time."""
FIRST_TOKEN_TARGET: Final = 100.0
REQUEST_TARGET: Final = 1 / 1.02


def rows(settings: Settings) -> Iterator[Row]:
    """Another prompt every round, the same one for everybody in it."""
    torch.set_num_threads(THREADS)
    with closing(_Bench()) as bench:
        freeze_heap()
        times = alternate(bench.contestants(), settings.pairs_of(20, 3))
        yield bench.first_token_row(len(times["plain"].wall_s))
        yield from bench.request_rows(times)


class _Watched:
    """The model as kvtier sees it; notes when it is asked to generate."""

    def __init__(self, model: Any, clock: Clock) -> None:
        self._model, self._clock = model, clock
        self.asked_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *arguments: Any, **named: Any) -> Any:
        """As the model."""
        self.asked_s = self._clock.monotonic()
        return self._model.generate(*arguments, **named)


class _Bench:
    """The model with and without a cache, and memory to copy KV to."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.model = llama_80m().float()  # many a CPU takes five times as long for bfloat16
        self.watched = _Watched(self.model, self.clock)
        self.layout = KVLayout.from_hf_config(self.model.config, BLOCK_TOKENS, self.model.dtype)
        self.cache = TieredCache({"host": {"capacity": HOST_BYTES}}, self.layout, model_id(self.model))
        self.generator = CachedGenerator(self.watched, self.cache)
        self.rooms = [_room(self.layout, PROMPT_TOKENS) for _ in range(ROOMS)]
        self.answers: dict[int, torch.Tensor] = {}
        self.inside_s: list[float] = []
        self.ttft_s: list[float] = []
        self.refused_tokens = 0

    def close(self) -> None:
        """Close the cache."""
        self.cache.close()

    def contestants(self) -> list[Contestant]:
        """With kvtier, twice without, and copies alone, of what kvtier had in the round before if it comes later."""
        return [
            Contestant("kvtier", self._cached, self._ask, check=self._check_cached),
            Contestant("plain", self._plain, self._ask, check=self._check_answer),
            Contestant("again", self._plain, self._ask, check=self._check_answer),
            Contestant("gather", self._gather, lambda _: self.rooms.append(self.rooms.pop(0))),
        ]

    # --- with kvtier ------------------------------------------------------------------------------------------------

    def _cached(self, _: int) -> None:
        self.called_s = self.clock.monotonic()
        self.result = self.generator.generate(self.prompt, **self.settings)
        self.output = self.result.outputs[0]

    def _check_cached(self, number: int) -> None:
        self.inside_s.append(self.watched.asked_s - self.called_s)
        self.ttft_s.append(self.first_token.first_token_s - self.called_s)
        self._check_answer(number)
        report = self.result.report
        if sum(report.hit_tokens.values()) or report.stored_tokens + report.refused_tokens != PROMPT_TOKENS:
            raise BenchmarkError(f"a new prompt of {PROMPT_TOKENS} tokens should have been stored: {report}")
        self.refused_tokens += report.refused_tokens
        self.computed = _kv(self.output.past_key_values)
        with self.cache.lookup(self.output.sequences[0]) as hit:
            if hit.num_tokens != PROMPT_TOKENS or not _same(_kv(self.generator.restore(hit)[0]), self.computed):
                raise BenchmarkError("KV that was loaded is not the KV that was computed")

    # --- without ----------------------------------------------------------------------------------------------------

    def _plain(self, _: int) -> None:
        self.output = self.model.generate(self.prompt, attention_mask=torch.ones_like(self.prompt), **self.settings)

    def _gather(self, _: int) -> None:
        for room, tensor in zip(self.rooms[0], self.computed, strict=True):
            room.copy_(tensor)

    # --- both -------------------------------------------------------------------------------------------------------

    def _ask(self, number: int) -> None:
        random = torch.Generator().manual_seed(number)
        self.prompt = torch.randint(VOCABULARY, (1, PROMPT_TOKENS), generator=random)
        self.first_token = FirstTokenClock(self.clock)
        self.settings: dict[str, Any] = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "return_dict_in_generate": True,
            "stopping_criteria": StoppingCriteriaList([self.first_token]),
        }

    def _check_answer(self, number: int) -> None:
        if not torch.equal(self.answers.setdefault(number, self.output.sequences), self.output.sequences):
            raise BenchmarkError("an answer with kvtier is not the one without it")

    def first_token_row(self, pairs: int) -> Row:
        """Time inside kvtier before the first token, and all of the time until then."""
        inside_s, ttft_s = (np.array(found[-pairs:]) for found in (self.inside_s, self.ttft_s))
        return Row.of(
            "overhead.first_token",
            float(np.median(inside_s)) * 1e3,
            "ms",
            baseline=float(np.median(ttft_s)) * 1e3,
            baseline_name=f"time to first token of the same requests, {self._model()}",
            ratio=ratio_of(inside_s, ttft_s),
            target=FIRST_TOKEN_TARGET,
            ok_if=AT_LEAST,
            data_checked=True,
            refused_tokens=self.refused_tokens,
            config={
                **self._config(),
                "percent_of_ttft": _spread(100 * inside_s / ttft_s),
                "inside_ms": _spread(inside_s * 1e3),
                "includes": "all of CachedGenerator.generate on the request's thread until it calls model.generate",
                "ratio_is": "time to first token to the time inside kvtier that is part of it",
            },
        )

    def request_rows(self, times: dict[str, Times]) -> Iterator[Row]:
        """A whole request with stores, less the time of a copy, against one without kvtier."""
        cached_s, plain_s, gather_s = (times[side].wall_s for side in ("kvtier", "plain", "gather"))
        common: dict[str, Any] = {
            "baseline": times["plain"].median_s * 1e3,
            "baseline_name": f"model.generate alone, {self._model()}",
        }
        yield Row.of(
            "overhead.request",
            times["kvtier"].median_s * 1e3,
            "ms",
            ratio=ratio_of(cached_s - gather_s, plain_s),
            target=round(REQUEST_TARGET, 4),
            ok_if=AT_LEAST,
            data_checked=True,
            refused_tokens=self.refused_tokens,
            config={
                **self._config(),
                "request_ms": _spread(cached_s * 1e3),
                "plain_ms": _spread(plain_s * 1e3),
                "gather_ms": _spread(gather_s * 1e3),
                "longer_percent": _spread(100 * (cached_s / plain_s - 1)),
                "longer_beyond_gather_percent": _spread(100 * ((cached_s - gather_s) / plain_s - 1)),
                "includes": "CachedGenerator.generate with stores that are waited for",
                "ratio_is": "time without kvtier to time with it less that of copying the same KV once",
            },
            **common,
        )
        again = times["again"]
        ratio = ratio_of(again.wall_s, plain_s)
        yield itself("overhead.request.itself", again.median_s * 1e3, "ms", ratio=ratio, **common)

    def _model(self) -> str:
        return f"a Llama of {parameters(self.model) / 1e6:.0f} M parameters"

    def _config(self) -> dict[str, Any]:
        return {
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "block_tokens": BLOCK_TOKENS,
            "stored_bytes": PROMPT_TOKENS * self.layout.bytes_per_token,
            "torch_threads": THREADS,
            "dtype": "float32",
        }


def _room(layout: KVLayout, tokens: int) -> list[torch.Tensor]:
    heads_first = [(1, part.shape[part.axes.index("head")], tokens, part.shape[-1]) for part in layout.groups[0].parts]
    return [torch.zeros(shape) for shape in heads_first]


def _kv(past: Any) -> list[torch.Tensor]:
    """Keys and values of the prompt, layer by layer: ``[1, heads, tokens, dim]``."""
    return [tensor[..., :PROMPT_TOKENS, :] for layer in past.layers for tensor in (layer.keys, layer.values)]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(own, theirs) for own, theirs in zip(one, other, strict=True))


def _spread(samples: Floats) -> dict[str, float]:
    low, median, high = np.quantile(samples, (0.05, 0.5, 0.95))
    return {"median": float(f"{median:.4g}"), "from": float(f"{low:.4g}"), "to": float(f"{high:.4g}")}
