"""Time to first token: a prefix of 4,000 tokens from disk, against computing it.

A real model of transformers through ``CachedGenerator``. For every pair the cache is opened anew on its directory, so
that the prefix is on disk and nowhere else; what is loaded is compared with the KV that was stored, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import numpy as np
import torch

from benchmarks.llama import VOCABULARY, llama_80m, parameters
from benchmarks.machine import DeviceCounters
from benchmarks.pairs import Contestant, Times, alternate, ratio_of
from benchmarks.rows import AT_LEAST, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import KVLayout, TieredCache, model_id
from kvtier.integrations.transformers import CachedGenerator, GenerationReport

PREFIX_TOKENS: Final = 4000
SUFFIX_TOKENS: Final = 32
BLOCK_TOKENS: Final = 64
THREADS: Final = 2
TARGET: Final = 10.0


def run(settings: Settings) -> Iterator[Row]:
    """One prefix, another question each time."""
    torch.set_num_threads(THREADS)
    with closing(_Bench(settings)) as bench:
        bench.store_prefix()
        yield from bench.rows(alternate(bench.contestants(), settings.pairs_of(10, 3)))


class _Bench:
    """The model, and the cache that is on disk."""

    def __init__(self, settings: Settings) -> None:
        self.model = llama_80m()
        self.model_id = model_id(self.model)
        self.layout = KVLayout.from_hf_config(self.model.config, BLOCK_TOKENS, "bfloat16")
        self.directory = settings.directory / "cache"
        self.device = DeviceCounters.under(settings.directory)
        self.random = torch.Generator().manual_seed(0)
        self.prefix = self._tokens(PREFIX_TOKENS)
        self.cache = self._open()
        self.cold: list[float] = []
        self.cached_s: list[float] = []

    def close(self) -> None:
        """Close the cache."""
        self.cache.close()

    def store_prefix(self) -> None:
        """Compute the prefix once and keep its KV, here for comparing and on disk."""
        report = self._generate(self.prefix)
        if report.refused_tokens or report.stored_tokens < PREFIX_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS:
            raise BenchmarkError(f"the prefix was not stored: {report}")
        with self.cache.lookup(self._with_suffix()[0]) as hit:
            self.kept = self._kv(hit)

    def contestants(self) -> list[Contestant]:
        """From disk, and computed twice."""
        compute = {"prepare": self._ask, "run": self._compute}
        return [
            Contestant("kvtier", self._restore, self._reopen, check=self._check),
            Contestant("prefill", **compute),
            Contestant("again", **compute),
        ]

    # --- from disk --------------------------------------------------------------------------------------------------

    def _reopen(self, number: int) -> None:
        self.cache.close()
        self.cache = self._open()
        self._ask(number)
        self.before = self.device.read_bytes()

    def _restore(self, _: int) -> None:
        self.report = self._generate(self.prompt)

    def _check(self, _: int) -> None:
        if self.report.hit_tokens["disk"] != PREFIX_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS:
            raise BenchmarkError(f"the prefix should have come from disk: {self.report}")
        pairs = zip(self.device.read_bytes(), self.before, strict=True)
        self.cold.append(min((now - before) / self.report.loaded_bytes for now, before in pairs))
        if self.cold[-1] < 1.0:
            raise BenchmarkError(f"only {self.cold[-1]:.3f} of the prefix came from the device: it was not cold")
        self.cached_s.append(self.report.ttft_s)
        with self.cache.lookup(self.prompt[0, : PREFIX_TOKENS + 1]) as hit:
            if not _same(self.kept, self._kv(hit)):
                raise BenchmarkError("KV that was loaded is not the KV that was stored")

    # --- computed ---------------------------------------------------------------------------------------------------

    def _ask(self, _: int) -> None:
        self.prompt = self._with_suffix()

    def _compute(self, _: int) -> None:
        self._first_token(self.prompt)

    def _first_token(self, prompt: torch.Tensor) -> None:
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)

    # --- both -------------------------------------------------------------------------------------------------------

    def rows(self, times: dict[str, Times]) -> Iterator[Row]:
        """Cached and computed time to first token; the cached one ends before what is new is stored."""
        computed = times["prefill"]
        cached_s = np.array(self.cached_s[-len(computed.wall_s) :])
        name = f"prefill of a Llama of {parameters(self.model) / 1e6:.0f} M parameters"
        config: dict[str, Any] = {
            "prefix_tokens": PREFIX_TOKENS,
            "suffix_tokens": SUFFIX_TOKENS,
            "block_tokens": BLOCK_TOKENS,
            "kv_bytes_per_token": self.layout.bytes_per_token,
            "torch_threads": THREADS,
            "dtype": "bfloat16",
            "includes": "hashing, lookup, cold read, checksums, copies, prefill of what is not cached, first token",
            "kvtier_device_bytes_per_byte": round(min(self.cold), 4),
        }
        yield Row.of(
            "ttft.disk",
            float(np.median(cached_s)) * 1e3,
            "ms",
            baseline=computed.median_s * 1e3,
            baseline_name=name,
            ratio=ratio_of(cached_s, computed.wall_s),
            target=TARGET,
            ok_if=AT_LEAST,
            data_checked=True,
            config=config,
        )
        yield itself(
            "ttft.itself",
            times["again"].median_s * 1e3,
            "ms",
            baseline=computed.median_s * 1e3,
            baseline_name=name,
            ratio=ratio_of(times["again"].wall_s, computed.wall_s),
            config=config,
        )

    def _generate(self, prompt: torch.Tensor) -> GenerationReport:
        generator = CachedGenerator(self.model, self.cache)
        return generator.generate(prompt, max_new_tokens=1, do_sample=False).report

    def _kv(self, hit: Any) -> list[torch.Tensor]:
        past: Any = CachedGenerator(self.model, self.cache).restore(hit)[0]
        return [tensor.clone() for layer in past.layers for tensor in (layer.keys, layer.values)]

    def _with_suffix(self) -> torch.Tensor:
        return torch.cat((self.prefix, self._tokens(SUFFIX_TOKENS)), 1)

    def _tokens(self, count: int) -> torch.Tensor:
        return torch.randint(VOCABULARY, (1, count), generator=self.random)

    def _open(self) -> TieredCache:
        return TieredCache(
            {"host": {"capacity": "256MiB"}, "disk": {"directories": [str(self.directory)], "capacity": "2GiB"}},
            self.layout,
            self.model_id,
        )


def _same(kept: list[torch.Tensor], loaded: list[torch.Tensor]) -> bool:
    return len(kept) == len(loaded) and all(torch.equal(one, other) for one, other in zip(kept, loaded, strict=True))
