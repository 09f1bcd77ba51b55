"""How many blocks a second the control plane matches, enters and evicts, at millions of entries.

Keys are hashed before the clock starts: hashing is a row of its own. Beside it a dict of the same keys, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from benchmarks.pairs import Contestant, Times, alternate, ratio_of
from benchmarks.rows import VALUE_AT_LEAST, Row, itself
from benchmarks.suite import BenchmarkError, Settings
from kvtier import Hit, TieredCache
from kvtier.core.keys import Keys

BLOCKS: Final = 1024
"""Of one request: 65,536 tokens."""
REQUESTS: Final = 8
"""That are timed together, so that a dict takes a millisecond."""
MATCH_TARGET: Final = 1e6
CHANGE_TARGET: Final = 2e5


class Control(Protocol):
    """A cache of blocks without bytes."""

    cache: TieredCache

    def some_keys(self, blocks: int) -> Keys:
        """Keys that nobody has used."""

    def store(self, prompt: Any) -> None:
        """All full blocks of ``prompt``, which is tokens or keys."""

    def entries(self) -> int:
        """How many blocks are known."""


def match_and_insert(control: Control, settings: Settings) -> Iterator[Row]:
    """Requests that are known, and new ones, on a cache with room left."""
    known = [control.some_keys(BLOCKS) for _ in range(8 * REQUESTS)]
    for keys in known:
        control.store(keys)
    hits: list[Hit] = []

    def match(number: int) -> None:
        hits.extend(map(control.cache.lookup, _some(known, number)))

    def check(_: int) -> None:
        for hit in hits:
            hit.release()
            if hit.num_tokens != (hit.keys.num_tokens - 1) // hit.keys.block_tokens * hit.keys.block_tokens:
                raise BenchmarkError(f"a lookup found {hit}")
        hits.clear()

    table = {key: number for keys in known for number, key in enumerate(keys.digests)}

    def bare(number: int) -> None:
        for keys in _some(known, number):
            if not all(key in table for key in keys.digests):
                raise BenchmarkError("a dict forgot a key")

    yield from _rows("match", MATCH_TARGET, control, settings, Contestant("own", match, check=check), bare)
    yield from _changes("insert", control, settings)


def evict(control: Control, settings: Settings) -> Iterator[Row]:
    """New requests on a full cache: every block that comes sends another one away."""
    while not control.cache.stats().get("removed_host_blocks", 0):
        control.store(control.some_keys(BLOCKS))
    yield from _changes("evict", control, settings)


def _changes(name: str, control: Control, settings: Settings) -> Iterator[Row]:
    table: dict[bytes, int] = {}

    def bare(number: int) -> None:
        for keys in _some(fresh, number):
            for key in keys.digests:
                table[key] = number

    def own(number: int) -> None:
        for keys in _some(fresh, number):
            control.store(keys)

    fresh = [control.some_keys(BLOCKS) for _ in range(REQUESTS * (settings.pairs_of(40, 8) + 2))]
    yield from _rows(name, CHANGE_TARGET, control, settings, Contestant("own", own), bare)


def _rows(
    name: str, target: float, control: Control, settings: Settings, own: Contestant, bare: Callable[[int], None]
) -> Iterator[Row]:
    contestants = [own, Contestant("bare", bare), Contestant("again", bare)]
    times = alternate(contestants, settings.pairs_of(40, 8), warmup=2)
    config: dict[str, Any] = {
        "index_entries": control.entries(),
        "blocks_per_request": BLOCKS,
        "includes": "TieredCache.lookup with pins, not the release" if name == "match" else
        "TieredCache.submit_store with planning and commit" + (", and what goes for it" if name == "evict" else ""),
    }  # fmt: skip
    yield Row.of(
        f"lookup.{name}",
        **_against(times["own"], times["bare"]),
        target=target,
        ok_if=VALUE_AT_LEAST,
        data_checked=True,
        config=config,
    )
    yield itself(f"lookup.{name}.itself", **_against(times["again"], times["bare"]), config=config)


def _against(own: Times, bare: Times) -> dict[str, Any]:
    return {
        "value": _rate(own),
        "unit": "blocks/s",
        "baseline": _rate(bare),
        "baseline_name": "a dict of the same keys, one by one",
        "ratio": ratio_of(own.wall_s, bare.wall_s),
    }


def _rate(times: Times) -> float:
    return BLOCKS * REQUESTS / times.median_s


def _some(requests: Sequence[Keys], number: int) -> Sequence[Keys]:
    first = number * REQUESTS % len(requests)
    return requests[first : first + REQUESTS]
