"""Finding a prefix: keys and lookup of a million tokens, what a miss adds to a prefill, and the longest pause.

All of it is control plane, so the data plane is one that answers at once and the blocks have no bytes. Lookups are
those of ``TieredCache``, with hashing and with pins; a hit is released outside the clock.
"""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from benchmarks import rates
from benchmarks.instant import NO_PAGES, InstantChannel
from benchmarks.llama import VOCABULARY, llama_80m, parameters
from benchmarks.pairs import Contestant, alternate, freeze_heap, ratio_of, summary
from benchmarks.payload import Prompts
from benchmarks.rows import AT_LEAST, AT_MOST, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import Hit, KVGroup, KVLayout, Part, TieredCache
from kvtier.core.keys import Keys

BLOCK_TOKENS: Final = 64
TOKENS: Final = 1_000_000
ENTRIES: Final = 1_000_000
GROWN_ENTRIES: Final = 4_000_000
QUICK_GROWN_ENTRIES: Final = 400_000
REQUEST_BLOCKS: Final = 64
RECORD_BYTES: Final = 8192
MISS_TOKENS: Final = 1024
ARRAY_TARGET_MS: Final = 25.0
LIST_TARGET_MS: Final = 50.0
MISS_TARGET: Final = 100 / 101
PAUSE_TARGET_MS: Final = 5.0
THREADS: Final = 2


def run(settings: Settings) -> Iterator[Row]:
    """Growth first, while the process is small, then hits and misses."""
    grown = QUICK_GROWN_ENTRIES if settings.quick else GROWN_ENTRIES
    with closing(_Control(grown)) as control:
        yield _pause(control, grown)
        yield from rates.match_and_insert(control, settings)
    with closing(_Control(grown, crowded=True)) as control:
        yield from rates.evict(control, settings)
    with closing(_Control(ENTRIES)) as control:
        yield from _hits(control, settings)
        yield from _misses(control, settings)


class _Control:
    """A cache with room for ``entries`` blocks that have no bytes; a ``crowded`` one has room for no more."""

    def __init__(self, entries: int, *, crowded: bool = False) -> None:
        part = Part(0, "kv", "uint8", ("token", "dim"), (BLOCK_TOKENS, 1))
        layout = KVLayout(BLOCK_TOKENS, BLOCK_TOKENS, (KVGroup("attention", (part,)),))
        # Below the high watermark nothing is evicted.
        capacity = entries * RECORD_BYTES if crowded else entries * RECORD_BYTES * 5 // 4
        channel = InstantChannel(layout, capacity // 4096)
        self.cache = TieredCache({"host": {"capacity": capacity}}, layout, "lookup-benchmark", channels=[channel])
        self.prompts = Prompts()

    def store(self, prompt: Any) -> None:
        """All full blocks of ``prompt``, which is tokens or keys."""
        tokens = prompt.num_tokens if isinstance(prompt, Keys) else len(prompt)
        result = self.cache.submit_store(prompt, NO_PAGES).result(0)
        if result.stored != tokens // BLOCK_TOKENS * BLOCK_TOKENS:
            raise BenchmarkError(f"a store was not taken: {result}")

    def some_keys(self, blocks: int) -> Keys:
        """Keys that nobody has used."""
        return self.cache.keys(self.prompts.take(blocks * BLOCK_TOKENS + 1))

    def entries(self) -> int:
        """How many blocks are known."""
        return int(self.cache.stats()["entries"])

    def close(self) -> None:
        """Forget everything."""
        self.cache.close()


# --- pause ----------------------------------------------------------------------------------------------------------


def _pause(control: _Control, entries: int) -> Row:
    """The longest single call while the index grows; beside it the longest pause of a loop that does nothing."""
    freeze_heap()
    resident_before = _resident_bytes()
    calls = entries // REQUEST_BLOCKS
    longest, idle = _Longest(), _Longest()
    longest.time("first store", partial(control.store, control.prompts.take(REQUEST_BLOCKS * BLOCK_TOKENS)))
    first_store_s = longest.wall_s
    for _ in range(calls - 1):
        tokens = control.prompts.take(REQUEST_BLOCKS * BLOCK_TOKENS + 1)
        longest.time("store", partial(control.store, tokens))
        hit = longest.time("lookup", partial(control.cache.lookup, tokens))
        if hit.num_tokens != REQUEST_BLOCKS * BLOCK_TOKENS:
            raise BenchmarkError(f"a lookup found {hit.num_tokens} of {REQUEST_BLOCKS * BLOCK_TOKENS} tokens")
        longest.time("release", hit.release)
        idle.time("idle", partial(sum, range(20_000)))
    known = control.entries()
    return Row.of(
        "lookup.pause",
        longest.wall_s * 1e3,
        "ms",
        baseline=idle.wall_s * 1e3,
        baseline_name="longest run of a short loop, as often",
        ratio=summary(np.array([idle.wall_s / longest.wall_s])),
        target=PAUSE_TARGET_MS,
        ok_if=AT_MOST,
        data_checked=known == calls * REQUEST_BLOCKS,
        config={
            "index_entries": known,
            "calls": 3 * calls - 2,
            "blocks_per_store": REQUEST_BLOCKS,
            "first_store_ms": round(first_store_s * 1e3, 3),
            "longest_call": longest.name,
            "longest_by_cpu_ms": round(longest.cpu_s * 1e3, 3),
            "idle_longest_by_cpu_ms": round(idle.cpu_s * 1e3, 3),
            "resident_bytes_per_entry": round((_resident_bytes() - resident_before) / known, 1),
            "includes": "TieredCache.submit_store with its commit, lookup with hashing and pins, release; nothing is "
            "evicted, spilled or reclaimed, and what was made before is frozen for the garbage collector",
        },
    )


class _Longest:
    """The longest call so far, by the clock and by the CPU time of its thread: others preempt, they do not compute."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0
        self.name = ""

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """Call and note how long it took."""
        cpu_s, began_s = time.thread_time(), time.perf_counter()
        result = call()
        wall_s = time.perf_counter() - began_s
        self.cpu_s = max(self.cpu_s, time.thread_time() - cpu_s)
        if wall_s > self.wall_s:
            self.wall_s, self.name = wall_s, name
        return result


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as line:
        return int(line.read().split()[1]) * resource.getpagesize()


# --- hits -----------------------------------------------------------------------------------------------------------


def _hits(control: _Control, settings: Settings) -> Iterator[Row]:
    tokens = control.prompts.take(TOKENS)
    control.store(tokens)
    while (left := ENTRIES - control.entries()) > 0:
        control.store(control.prompts.take(min(left, TOKENS // BLOCK_TOKENS) * BLOCK_TOKENS))
    forms = {"int32 array": (tokens, ARRAY_TARGET_MS), "list": (tokens.tolist(), LIST_TARGET_MS)}
    contestants = [_lookup(control, name, form) for name, (form, _) in forms.items()]
    bare = _bare_hashing(tokens)
    contestants += [Contestant("bare", bare), Contestant("again", bare)]
    times = alternate(contestants, settings.pairs_of(30, 8), warmup=2)
    config = {
        "tokens": TOKENS,
        "block_tokens": BLOCK_TOKENS,
        "index_entries": control.entries(),
        "includes": "token ids to int32, SHA-256 chain, lookup, pins; not the release",
    }
    baseline_ms = times["bare"].median_s * 1e3
    name = "SHA-256 of the same tokens, block by block"
    for form, (_, target) in forms.items():
        yield Row.of(
            f"lookup.{form.replace(' ', '_')}",
            times[form].median_s * 1e3,
            "ms",
            baseline=baseline_ms,
            baseline_name=name,
            ratio=ratio_of(times[form].wall_s, times["bare"].wall_s),
            target=target,
            ok_if=AT_MOST,
            data_checked=True,
            config={**config, "slowest_ms": round(float(times[form].wall_s.max()) * 1e3, 2)},
        )
    yield itself(
        "lookup.itself",
        times["again"].median_s * 1e3,
        "ms",
        baseline=baseline_ms,
        baseline_name=name,
        ratio=ratio_of(times["again"].wall_s, times["bare"].wall_s),
        config=config,
    )


def _lookup(control: _Control, name: str, tokens: Any) -> Contestant:
    found: list[Hit] = []

    def check(_: int) -> None:
        with found.pop() as hit:
            if hit.num_tokens != (TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS:
                raise BenchmarkError(f"a lookup found {hit.num_tokens} of {TOKENS} tokens")

    return Contestant(name, lambda _: found.append(control.cache.lookup(tokens)), check=check)


def _bare_hashing(tokens: Any) -> Callable[[int], None]:
    data, size = tokens.tobytes(), 4 * BLOCK_TOKENS

    def run(_: int) -> None:
        parent = bytes(32)
        for at in range(0, len(data), size):
            parent = hashlib.sha256(parent + data[at : at + size]).digest()

    return run


# --- misses ---------------------------------------------------------------------------------------------------------


def _misses(control: _Control, settings: Settings) -> Iterator[Row]:
    """A prompt that is not there: what looking for it adds to computing it."""
    torch.set_num_threads(THREADS)
    model = llama_80m()
    prompt = torch.randint(VOCABULARY, (1, MISS_TOKENS), generator=torch.Generator().manual_seed(0))

    def miss(_: int) -> None:
        with control.cache.lookup(control.prompts.take(MISS_TOKENS)) as hit:
            if hit.num_tokens:
                raise BenchmarkError(f"a lookup of a new prompt found {hit.num_tokens} tokens")

    def prefill(_: int) -> None:
        with torch.inference_mode():
            model(prompt, use_cache=True, logits_to_keep=1)

    contestants = [Contestant("miss", miss), Contestant("prefill", prefill), Contestant("again", prefill)]
    times = alternate(contestants, settings.pairs_of(10, 4))
    alone, with_miss = times["prefill"].wall_s, times["prefill"].wall_s + times["miss"].wall_s
    name = f"prefill of a Llama of {parameters(model) / 1e6:.0f} M parameters on the CPU"
    config = {"tokens": MISS_TOKENS, "index_entries": control.entries(), "torch_threads": THREADS, "dtype": "bfloat16"}
    yield Row.of(
        "lookup.miss",
        times["miss"].median_s * 1e3,
        "ms",
        baseline=times["prefill"].median_s * 1e3,
        baseline_name=name,
        ratio=ratio_of(with_miss, alone),
        target=round(MISS_TARGET, 4),
        ok_if=AT_LEAST,
        data_checked=True,
        config={**config, "ratio_is": "speed of a prefill with a miss before it, to that of the prefill alone"},
    )
    yield itself(
        "lookup.miss.itself",
        times["again"].median_s * 1e3,
        "ms",
        baseline=times["prefill"].median_s * 1e3,
        baseline_name=name,
        ratio=ratio_of(times["again"].wall_s, alone),
        config=config,
    )
