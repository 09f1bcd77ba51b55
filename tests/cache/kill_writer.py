"""A process that stores blocks with ``process`` durability and says so, block by block, until it is killed."""

from __future__ import annotations

import random
from multiprocessing.connection import Connection
from typing import Any

from kvtier import TieredCache
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
BLOCKS = 8


def settings(directories: list[str]) -> dict[str, Any]:
    """12 MiB in all."""
    return {
        "host": {"capacity": "512KiB", "staging": "1MiB"},
        "disk": {"directories": directories, "capacity": "12MiB", "segment": "1MiB", "clean_segments": 2},
    }


def write_until_killed(directories: list[str], seed: int, acknowledged: Connection) -> None:
    """Every message is a list of keys that were acknowledged just now."""
    rng, engine = random.Random(seed), PseudoEngine(LAYOUT, BLOCKS)
    cache = TieredCache(settings(directories), LAYOUT, "kill")
    acknowledged.send([])
    while True:
        tokens = [rng.randrange(1 << 20) for _ in range(SIZE * rng.randint(1, BLOCKS))]
        keys = cache.keys(tokens)
        engine.write(keys, range(len(keys)))
        result = cache.submit_store(keys, engine.pages, durability="process").result(60)
        if result.refused == 0:
            acknowledged.send(keys.digests)
