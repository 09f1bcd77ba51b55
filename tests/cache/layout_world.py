"""A cache of a random layout on a simulated machine, beside a plain model of what is in it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from kvtier import Hit, TieredCache
from kvtier.core.keys import Keys
from kvtier.models import KVGroup, KVLayout, Part, Reuse
from kvtier.testing import Simulation
from kvtier.testing.contents import LayoutEngine

BLOCKS = 12
MODEL = "model"


def draw_part(rng: random.Random, layer: int, name: str, page_tokens: int, *, is_state: bool) -> Part:
    """A tensor of a few hundred bytes a page, axes in any order, perhaps of compressed entries."""
    dtype = rng.choice(["uint8", "float16", "float32"])
    if is_state:
        return Part(layer, "state", dtype, ("head", "state"), (rng.randint(1, 3), rng.randint(1, 9)), name=name)
    ratio = rng.choice([divisor for divisor in range(1, page_tokens + 1) if page_tokens % divisor == 0])
    if rng.random() < 0.25:
        planes = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 3)))
        page_bytes = page_tokens // ratio * sum(planes) + rng.randint(0, 7)
        return Part(layer, "kv", "uint8", ("page",), (page_bytes,), ratio, name, planes)
    sizes = {"token": page_tokens // ratio, "head": rng.randint(1, 2), "dim": rng.randint(1, 5)}
    axes = rng.choice([("token", "head", "dim"), ("head", "token", "dim"), ("token", "dim")])
    return Part(layer, "kv", dtype, axes, tuple(sizes[axis] for axis in axes), ratio, name)


def draw_layout(rng: random.Random) -> KVLayout:
    """One to four groups with any rules, in any order."""
    page_tokens = rng.choice([1, 2, 4, 6])
    block_tokens = page_tokens * rng.randint(1, 4)
    groups = []
    for number in range(rng.randint(1, 4)):
        rule = rng.choice(["all", "all", "trailing", "trailing", "last"])
        window = rng.randint(1, 3 * block_tokens) if rule == "trailing" else 0
        replay = rng.choice([0, 2 * window]) if rule == "trailing" else 0
        parts = [
            draw_part(rng, layer, str(layer), page_tokens, is_state=rule == "last")
            for layer in range(rng.randint(1, 3))
        ]
        groups.append(KVGroup(f"g{number}", tuple(parts), Reuse(rule, window, replay)))
    return KVLayout(block_tokens, page_tokens, tuple(groups))


class PlainModel:
    """What a cache that never runs out of room holds, told block by block: no arrays, no shortcuts."""

    def __init__(self, layout: KVLayout, policy: dict[str, Any]) -> None:
        self.layout = layout
        self.windows = policy["windows"]
        self.every = policy["checkpoint_tokens"]
        self.kept: dict[tuple[int, bytes], bool] = {}
        """Whether the block is exact, by group and key."""

    def reach(self, group: int) -> int:
        """Blocks before its end that a hit needs of a group that needs no whole prefix."""
        reuse = self.layout.groups[group].reuse
        return 1 if reuse.rule == "last" else -(-reuse.window_tokens // self.layout.block_tokens)

    def is_whole(self, group: int) -> bool:
        return self.layout.groups[group].reuse.rule == "all"

    def can_be_replayed(self, group: int) -> bool:
        return self.windows in ("zero", "replay") and self.layout.groups[group].reuse.replay_tokens > 0

    def store(
        self, keys: Keys, start: int, checkpoints: list[int] | None, missing: set[tuple[int, int]], *, exact: bool
    ) -> None:
        size = self.layout.block_tokens
        first, stop = -(-start // size), len(keys)
        tokens = [stop * size] if checkpoints is None else checkpoints
        ends = {token // size for token in tokens}
        if self.every:
            ends |= {token // size for token in range(0, stop * size + 1, self.every) if token > first * size}
        ends = {end for end in ends if first < end <= stop}
        for group in range(len(self.layout.groups)):
            for block in range(stop):
                if self.is_whole(group):
                    wanted = block >= first
                else:
                    wanted = any(end - self.reach(group) <= block < end for end in ends)
                    wanted = wanted or (self.windows == "full" and block >= first)
                    wanted = wanted and (group, block) not in missing
                    wanted = wanted and not (self.windows == "zero" and self.can_be_replayed(group))
                if wanted:
                    self.kept[group, keys.digests[block]] = exact or self.kept.get((group, keys.digests[block]), False)

    def has(self, keys: Keys, group: int, first: int, end: int, *, exact: bool) -> bool:
        """Whether a hit of blocks [first, end) finds all that it needs of ``group``."""
        held = [self.kept.get((group, keys.digests[block])) for block in self.needed(group, first, end)]
        return all(held) if exact else None not in held

    def needed(self, group: int, first: int, end: int) -> range:
        """Blocks of ``group`` that a hit of blocks [first, end) needs, if the engine is not to compute them again."""
        return range(first if self.is_whole(group) else max(first, end - self.reach(group)), end)

    def hit(self, keys: Keys, start: int, *, exact: bool) -> tuple[int, int]:
        """Where the hit ends that leaves least to compute, in blocks, and how many of its tokens are computed again.

        Where two leave as much it is the one that leaves nothing before its end.
        """
        first, size = start // keys.block_tokens, keys.block_tokens
        best = (first * size, True, first, 0)
        for end in range(first + 1, (keys.num_tokens - 1) // size + 1):
            replay = self.replay_behind(keys, first, end, exact=exact)
            if replay is not None:
                best = max(best, (end * size - replay, not replay, end, replay))
        return best[2:]

    def replay_behind(self, keys: Keys, first: int, end: int, *, exact: bool) -> int | None:
        """How many tokens before ``end`` have to be computed again if a hit ends there; None if none may."""
        groups = range(len(self.layout.groups))
        lacking = [group for group in groups if not self.has(keys, group, first, end, exact=exact)]
        if not lacking:
            return 0
        if not all(self.can_be_replayed(group) for group in lacking) or (exact and self.windows == "replay"):
            return None
        optional = [self.layout.groups[group].reuse for group in groups if self.can_be_replayed(group)]
        return max(reuse.replay_tokens if self.windows == "zero" else reuse.window_tokens for reuse in optional)

    def loaded(self, group: int, first: int, end: int, replay_tokens: int) -> range:
        """Blocks of ``group`` that a load of such a hit brings."""
        return range(0) if replay_tokens and self.can_be_replayed(group) else self.needed(group, first, end)

    def is_exact(self, keys: Keys, first: int, end: int, replay_tokens: int) -> bool:
        """Whether such a hit is what the model computes."""
        blocks = [(group, block) for group in range(len(self.layout.groups))
                  for block in self.loaded(group, first, end, replay_tokens)]  # fmt: skip
        is_replayed = replay_tokens > 0 and self.windows == "replay"
        return not is_replayed and all(self.kept[group, keys.digests[block]] for group, block in blocks)


class LayoutWorld:
    """Random requests of one cache, whose sequences share beginnings."""

    def __init__(
        self, seed: int, *, host: str = "4MiB", windows: str | None = None, disk: bool = True, device_blocks: int = 0
    ) -> None:
        """``device_blocks`` blocks of all groups fit the device tier."""
        self.rng = rng = random.Random(seed)
        self.layout = draw_layout(rng)
        self.simulation = Simulation(seed)
        self.policy: dict[str, Any] = {
            "windows": windows or rng.choice(["full", "checkpoint", "zero", "replay"]),
            "checkpoint_tokens": rng.choice([0, rng.randint(1, 4 * self.layout.block_tokens)]),
        }
        device_bytes = device_blocks * sum(self.layout.record_pages) * 4096
        self.config = {
            "device": {"capacity": device_bytes, "device": "cpu", "verify": True},
            "host": {"capacity": host, "staging": "1MiB"},
            "disk": {"directories": ["/kv"] if disk else [], "capacity": "64MiB", "segment": "1MiB"},
            "policy": self.policy,
        }
        self.model = PlainModel(self.layout, self.policy)
        self.engine = LayoutEngine(self.layout, BLOCKS, rng)
        self.cache = self.open()

    def open(self) -> TieredCache:
        return TieredCache(self.config, self.layout, MODEL, machine=self.simulation.machine())

    def some_keys(self) -> Keys:
        size = self.layout.block_tokens
        length = self.rng.randint(1, BLOCKS * size)
        return self.cache.keys([token // size % 3 and self.rng.randrange(2) for token in range(length)])

    def some_start(self, keys: Keys) -> int:
        return self.rng.choice([0, 0, self.rng.randint(0, keys.num_tokens)])

    def some_hit(self) -> Hit:
        """What tokens were computed on top of, for all anybody knows: an approximate hit, if there seems to be one."""
        for _ in range(4 if self.policy["windows"] == "replay" else 0):
            hit = self.cache.lookup(self.some_keys())
            if not hit.exact:
                return hit
            hit.release()
        return self.cache.lookup(self.some_keys())

    def store(self, *, complete: bool = True) -> None:
        """Keep some of a sequence; ``complete``: the model is told."""
        keys, rng = self.some_keys(), self.rng
        start = self.some_start(keys)
        checkpoints = rng.choice([None, [rng.randint(0, keys.num_tokens) for _ in range(rng.randint(0, 3))]])
        partial = [group for group in range(len(self.layout.groups)) if not self.model.is_whole(group)]
        missing = {(g, b) for g in partial for b in range(BLOCKS) if rng.random() < 0.15}
        if rng.random() < 0.5:
            missing.clear()
        self.engine.wipe()
        self.engine.write(keys, range(len(keys)))
        for group, block in missing:  # whatever is there now is of somebody else
            for page in self.engine._pages_of(group, block):
                page[...] = 1
        durability = rng.choice(["memory", "process", "durable"]) if self.config["disk"]["directories"] else "memory"
        with self.some_hit() as hit:
            derived_from = hit if rng.random() < 0.5 else None
            exact = derived_from is None or hit.exact
            job = self.cache.submit_store(
                keys, self.engine.pages(missing), start=start, checkpoints=checkpoints, durability=durability,
                derived_from=derived_from,
            )  # fmt: skip
        result = job.result(600)
        blocks = max(0, len(keys) - -(-start // keys.block_tokens))
        assert result.stored + result.existing + result.refused == blocks * keys.block_tokens
        if complete:
            assert not result.refused
            self.model.store(keys, start, checkpoints, missing, exact=exact)

    def load(self, *, complete: bool = True) -> None:
        """Look up, compare with the model (where nothing is ever evicted), load, compare every byte."""
        keys, exact = self.some_keys(), self.rng.random() < 0.3
        start = self.some_start(keys)
        matched = self.cache.match(keys, start=start, exact=exact)
        with self.cache.lookup(keys, start=start, exact=exact) as hit:
            assert hit.num_tokens == matched
            if complete:
                end, replay = self.model.hit(keys, start, exact=exact)
                assert (hit.num_tokens // keys.block_tokens, hit.replay_tokens) == (end, replay)
                assert hit.exact == self.model.is_exact(keys, start // keys.block_tokens, end, replay)
            self.check_load(hit, keys)

    def check_load(self, hit: Hit, keys: Keys) -> None:
        size, rng = keys.block_tokens, self.rng
        low, stop = hit.start // size * size, hit.num_tokens
        if stop <= low:
            return
        start = rng.choice([hit.start, low]) if hit.start < stop else low
        cut = rng.choice([stop, stop, rng.randint(start, stop)])
        groups = range(len(self.layout.groups))
        needed = [self.model.loaded(group, low // size, stop // size, hit.replay_tokens) for group in groups]
        spare = {
            (group, block)
            for group, blocks in enumerate(needed) if not self.model.is_whole(group)
            for block in range(BLOCKS) if block not in blocks and rng.random() < 0.5
        }  # fmt: skip
        self.engine.wipe()
        job = self.cache.submit_load(hit, self.engine.pages(spare), start=start, stop=cut)
        ok_tokens = job.result(600).ok_tokens
        assert ok_tokens == cut
        wrong = []
        for group in range(len(self.layout.groups)):
            for block in range(BLOCKS):
                span = (start, cut) if block in needed[group] else (0, 0)
                wrong += self.engine.wrong(keys, group, block, *span)
        assert wrong == []

    def restart(self) -> None:
        """What is on disk is found again; what was in memory only is not."""
        self.cache.flush("process", 600)
        assert self.cache.close(600)
        self.cache = self.open()
        self.cache.wait_attached(600)

    def dead_share(self) -> float:
        """Of the bytes in memory, those of blocks that no hit can have any more."""
        state = self.cache._planner._state
        index, windows = state.index, state.windows
        dead = total = 0
        for book in state.books.values():
            pages, here = book.copies.pages[0], np.flatnonzero(book.copies.ranks[: index.table.touched])
            total += int(pages[here].sum())
            for entry in here.tolist():
                key = index.table.keys[entry].tobytes()
                found = [index.table.find_one(key, group) for group in windows.whole]
                if not all(e >= 0 and index.readable(np.array([e]))[0] for e in found):
                    dead += int(pages[entry])
        return dead / max(1, total)
