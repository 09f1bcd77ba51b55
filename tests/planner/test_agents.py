"""Agents that come back turn after turn, on a DeepSeek-V4-Flash layout: what windows cost, and what that buys."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest

from kvtier.core.keys import Keys, Root
from kvtier.models import KVLayout
from kvtier.models.families.settings import Settings
from tests.models import configs
from tests.planner.bench import Bench

BLOCK = 128
PAGE = 4096
AGENTS, TURNS = 10, 24
APPEND, OUTPUT = 429, 176
"""Tokens that a turn adds, and that it generates: means of DualPath's 64K trace (arXiv 2602.21548, table 2)."""
CHECKPOINT_TOKENS = 2048


def v4_flash() -> Settings:
    return configs.v4(43, [0, 0] + [4, 128] * 20 + [4])


LAYOUT = KVLayout.from_hf_config(v4_flash(), BLOCK, "fp8_ds_mla")
GLOBAL, WINDOW = LAYOUT.record_pages[0], LAYOUT.record_pages[1]


class Agents:
    """Each turn sends all tokens so far and a few more, and leaves behind what it computed."""

    def __init__(self, policy: str, capacity_pages: int) -> None:
        self.rng = Random(7)
        pages = sum(LAYOUT.record_pages)
        self.bench = Bench(
            layout=LAYOUT, host_blocks=-(-capacity_pages // pages),
            policy={"windows": policy, "checkpoint_tokens": CHECKPOINT_TOKENS},
            host={"capacity": "8GiB", "high_watermark": 1.0, "low_watermark": 0.99},
        )  # fmt: skip
        self.tokens: list[list[int]] = [[] for _ in range(AGENTS)]
        self.hits: list[int] = []
        self.dead = 0.0

    def run(self) -> Agents:
        turns = [agent for agent in range(AGENTS) for _ in range(TURNS)]
        self.rng.shuffle(turns)
        for agent in turns:
            self.turn(agent)
        return self

    def turn(self, agent: int) -> None:
        tokens, rng = self.tokens[agent], self.rng
        tokens += [rng.randrange(1 << 16) for _ in range(int(rng.expovariate(1 / APPEND)) + 1)]
        prompt = len(tokens)
        keys = Keys.from_tokens(Root("v4"), tokens, BLOCK)
        lease = self.bench.lookup(keys)
        self.hits.append(lease.blocks)
        tokens += [rng.randrange(1 << 16) for _ in range(int(rng.expovariate(1 / OUTPUT)) + 1)]
        keys.append(tokens[prompt:])
        start = lease.blocks * BLOCK
        self.bench.planner.release(lease)
        self.bench.stored(keys, start=start, checkpoints=(prompt, len(tokens)))
        if not len(self.hits) % 8:
            self.dead = max(self.dead, self.dead_share())

    def dead_share(self) -> float:
        """Of the bytes in host memory, those behind the last place where a hit can end."""
        index, alive = self.bench.index, set[bytes]()
        for tokens in self.tokens:
            keys = Keys.from_tokens(Root("v4"), [*tokens, 0], BLOCK)
            alive.update(keys.digests[: self.bench.match(keys)])
        host = np.flatnonzero(index.host_ranks[: index.table.touched])
        pages = index.host_pages[0, host]
        dead = [index.table.keys[entry].tobytes() not in alive for entry in host.tolist()]
        return float(pages[dead].sum() / max(1, pages.sum()))

    @property
    def total_tokens(self) -> int:
        return sum(map(len, self.tokens))


@pytest.fixture(scope="module")
def unlimited() -> Agents:
    """Nothing ever goes."""
    return Agents("full", (GLOBAL + 2 * WINDOW + LAYOUT.record_pages[2]) * AGENTS * TURNS * 16).run()


def pages_for(tokens: int, windows: int) -> int:
    """Entries of so many tokens, and so many windows and states beside them."""
    return -(-tokens // BLOCK) * GLOBAL + windows * (WINDOW + LAYOUT.record_pages[2])


def test_every_turn_but_the_first_is_a_hit_where_nothing_has_to_go(unlimited: Agents) -> None:
    assert sum(hit > 0 for hit in unlimited.hits) >= AGENTS * (TURNS - 2)
    assert unlimited.dead == 0


@pytest.mark.parametrize("policy", ["checkpoint", "full"])
def test_a_window_every_2048_tokens_gives_the_hits_of_a_window_at_every_block(policy: str, unlimited: Agents) -> None:
    """Room for 3,514 bytes of entries a token and one window for 2,048 tokens: 5.2 kB a token, where a window at every
    block takes 28.6 kB (DeepSeek V4, report section 3.5; Flash has 43 layers of 584 bytes a token)."""
    tokens = unlimited.total_tokens
    agents = Agents(policy, pages_for(tokens, tokens // CHECKPOINT_TOKENS + 2 * AGENTS)).run()
    assert agents.hits == unlimited.hits
    assert agents.dead < 0.02


def test_under_pressure_nothing_is_kept_that_cannot_be_hit(unlimited: Agents) -> None:
    """With room for half of it turns miss, and what is left can all be hit."""
    tokens = unlimited.total_tokens // 2
    agents: dict[str, Any] = {
        policy: Agents(policy, pages_for(tokens, tokens // CHECKPOINT_TOKENS + AGENTS)).run()
        for policy in ("checkpoint", "full")
    }
    assert all(own.dead < 0.02 for own in agents.values())
    found = {policy: sum(own.hits) for policy, own in agents.items()}
    assert 0.95 < found["full"] / found["checkpoint"] < 1.05
    assert found["checkpoint"] < sum(unlimited.hits)
