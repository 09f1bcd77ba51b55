"""Nothing takes room in a memory tier that no hit can reach: told by a plain look at all sequences, block by block."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kvtier.core.keys import Keys
from kvtier.core.plan import Tier
from tests.planner.bench import BLOCK, ROOT, Bench, windowed_layout

WINDOW_BLOCKS = {1: 2, 2: 1}


def there(bench: Bench, key: bytes, group: int) -> bool:
    entry = bench.index.table.find_one(key, group)
    return entry >= 0 and bool(bench.index.readable(np.array([entry]))[0])


def ends(bench: Bench, keys: Keys) -> list[int]:
    """Blocks of ``keys`` that a hit could end with: block by block, as the definition says."""
    found = []
    for block, key in enumerate(keys.digests):
        if not there(bench, key, 0):
            break
        needed = [(g, b) for g, reach in WINDOW_BLOCKS.items() for b in range(max(0, block + 1 - reach), block + 1)]
        if all(there(bench, keys.digests[b], g) for g, b in needed):
            found.append(block)
    return found


def dead_share(bench: Bench, sequences: list[Keys], tier: Tier, groups: tuple[int, ...] = (0, 1, 2)) -> float:
    """Of the pages taken in ``tier``, the share of ``groups`` that no end of any sequence needs."""
    alive = set[tuple[int, bytes]]()
    for keys in sequences:
        for end in ends(bench, keys):
            alive |= {(0, key) for key in keys.digests[: end + 1]}
            for group, reach in WINDOW_BLOCKS.items():
                alive |= {(group, key) for key in keys.digests[max(0, end + 1 - reach) : end + 1]}
    index, copies = bench.index, bench.books[tier].copies
    here = [entry for entry in bench.live() if copies.ranks[entry]]
    names = [(int(index.table.groups[entry]), index.table.keys[entry].tobytes()) for entry in here]
    pages = [int(copies.pages[0, entry]) for entry in here]
    dead = [n for name, n in zip(names, pages, strict=True) if name not in alive and name[0] in groups]
    return sum(dead) / max(1, sum(pages))


@pytest.mark.parametrize("device_blocks", [0, 12])
@pytest.mark.parametrize("ttl_s", [0.0, 3.0])
def test_sequences_whose_checkpoints_lose_their_worth_take_no_room(ttl_s: float, device_blocks: int) -> None:
    """A window that goes first cuts off nothing by itself: what only it made reachable has to go with it."""
    rng = random.Random(1)
    how: dict[str, Any] = {"checkpoint_tokens": 0, "checkpoint_ttl_s": ttl_s}
    bench = Bench(layout=windowed_layout(2 * BLOCK), policy=how, host_blocks=40, device_blocks=device_blocks)
    sequences, worst = list[Keys](), 0.0
    for step in range(60):
        bench.now_s = step * 0.5
        keys = Keys(ROOT, BLOCK)
        keys.append([rng.randrange(1000) for _ in range(BLOCK * rng.randint(2, 8) + 1)])
        sequences.append(keys)
        bench.planner.release(bench.lookup(keys))
        bench.stored(keys)
        bench.planner.release(bench.lookup(rng.choice(sequences[-6:])))
        bench.planner.follow_up()
        bench.run()
        worst = max(worst, *(dead_share(bench, sequences, tier) for tier in bench.books))
    assert bench.planner.counters()["dropped_dead_blocks"], "nothing died: there is too much room for this test"
    assert worst < 0.02
    bench.check_at_rest()
