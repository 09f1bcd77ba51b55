"""Random layouts and random histories against a plain model of what a hit needs, and bugs that it has to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtier.models.layout import KVLayout
from kvtier.pages import paged, spans
from kvtier.planner.finding import Finder
from kvtier.planner.state import ControlState
from kvtier.planner.windows import Windows
from kvtier.planner.wishes import Held
from tests.cache.layout_world import LayoutWorld

SEEDS = range(40)
CROWDED = range(100, 112)


def roomy(seed: int, steps: int = 40, device_blocks: int = 0, windows: str | None = None) -> None:
    """Stores, loads and a restart of a cache that never runs out of room: the model knows every hit."""
    world = LayoutWorld(seed, device_blocks=device_blocks, windows=windows)
    for _ in range(steps):
        world.rng.choice([world.store, world.store, world.load, world.load, world.load])()
    world.restart()
    for _ in range(steps // 2):
        world.load()
    assert world.cache.close(600)


def replaying(seed: int) -> None:
    """As ``roomy``, where windows are computed again, roughly: some blocks are approximate."""
    roomy(seed, steps=80, windows="replay")


def crowded(seed: int, steps: int = 150, device_blocks: int = 0) -> None:
    """Too much for host memory, and no disk: what is found is right, and nothing that is kept is of no use."""
    world = LayoutWorld(seed, host="192KiB", disk=False, device_blocks=device_blocks)
    for _ in range(steps):
        world.rng.choice([world.store, world.load])(complete=False)
        if device_blocks:  # what is on its way from there to host memory stays until it is there
            world.simulation.run_idle()
        assert world.dead_share() < 0.02
    assert world.cache.samples()
    assert world.cache.close(600)


@pytest.mark.parametrize("seed", SEEDS)
def test_hits_are_what_every_group_can_serve_and_every_byte_is_right(seed: int) -> None:
    roomy(seed)


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_blocks_computed_on_top_of_a_replayed_window_are_none_that_the_model_computes(seed: int) -> None:
    replaying(seed)


@pytest.mark.parametrize("seed", CROWDED)
def test_what_has_to_go_takes_with_it_what_is_of_no_use_without_it(seed: int) -> None:
    crowded(seed)


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_with_a_device_tier_of_any_size_no_hit_differs(seed: int) -> None:
    roomy(seed, device_blocks=1 + 7 * (seed % 5))


@pytest.mark.parametrize("seed", CROWDED)
def test_with_a_device_tier_nothing_that_is_kept_is_of_no_use(seed: int) -> None:
    crowded(seed, device_blocks=1 + seed % 7)


# --- bugs that were planted ----------------------------------------------------------------------------------------


def _needed_from_the_wrong_end(self: Windows, group: int, first: int, stop: int) -> range:
    reach = self.window_blocks(group)
    return range(first, min(stop, first + reach) if reach else stop)


def _blocks_of_one_too_early(table: Any, group: int, old: Any = spans.BlockPages.of) -> Any:
    pages = old(table, group)
    if table.kept_tokens[group]:
        return pages
    return replace(pages, skipped_tokens=-pages.block_tokens)


def _first_pages_of_a_block(table: Any, group: int, old: Any = spans.BlockPages.of) -> Any:
    return replace(old(table, group), skipped_tokens=0)


def _windows_cut_short(self: KVLayout) -> tuple[int, ...]:
    tokens = [(group.reuse.rule, group.reuse.window_tokens) for group in self.groups]
    return tuple(1 if rule == "last" else window // self.block_tokens for rule, window in tokens)


def _windows_that_hold_the_next_token(self: KVLayout) -> tuple[int, ...]:
    tokens = [(group.reuse.rule, group.reuse.window_tokens) for group in self.groups]
    return tuple(1 if rule == "last" else max(1, -(-(window - 1) // self.block_tokens)) if window else 0
                 for rule, window in tokens)  # fmt: skip


def _planes_but_the_last(part: Any, pages: Any, entries: int, old: Any = paged.cells_of) -> Any:
    return old(part, pages, entries)[: max(1, len(part.planes) - 1)]


def _any_lineage_will_do(self: Finder, keys: Any, group: int, blocks: range, first: int, *, exact: bool) -> Any:
    return _ENDS(self, keys, group, blocks, first, exact=False)


_ENDS = Finder._ends


def _everything_is_held(self: Held, blocks: Any) -> Any:
    return np.ones(len(blocks), np.bool_)


def _only_whole_groups_count(self: Finder, keys: Any, groups: Any, first: int, stop: int, *, exact: bool) -> int:
    return stop


def _ends_before_the_last_block(self: Windows, first: int, stop: int, tokens: Any, old: Any = Windows.ends) -> Any:
    return old(self, first, stop, tokens) - 1


def _the_block_before_is_enough(self: Windows, group: int, first: int, stop: int) -> range:
    return range(first, stop)


PLANTED: dict[str, tuple[Callable[[int], None], object, str, object]] = {
    "a sidecar is evicted apart": (crowded, ControlState, "_drop", lambda self, entries: entries[:0]),
    "a window is counted from the wrong end": (roomy, Windows, "needed", _needed_from_the_wrong_end),
    "a window is a block too short": (roomy, KVLayout, "window_blocks", property(_windows_cut_short)),
    "a window is a token too short": (roomy, KVLayout, "window_blocks", property(_windows_that_hold_the_next_token)),
    "a page is written without its last plane": (roomy, paged, "cells_of", _planes_but_the_last),
    "windows may be approximate": (replaying, Finder, "_ends", _any_lineage_will_do),
    "a state is that of the block before": (roomy, spans.BlockPages, "of", staticmethod(_blocks_of_one_too_early)),
    "a short window lies at the beginning of its block": (
        roomy, spans.BlockPages, "of", staticmethod(_first_pages_of_a_block),
    ),
    "what the engine does not have is stored": (roomy, Held, "those_of", _everything_is_held),
    "a hit ends where a group has nothing": (roomy, Finder, "_last_end", _only_whole_groups_count),
    "checkpoints are a block early": (roomy, Windows, "ends", _ends_before_the_last_block),
    "a store does not reach back for its window": (roomy, Windows, "reach", _the_block_before_is_enough),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_it_finds_what_was_planted(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    history, where, name, broken = PLANTED[bug]
    monkeypatch.setattr(where, name, broken)
    found = 0
    for seed in CROWDED if history is crowded else SEEDS:
        try:
            history(seed)
        except Exception:
            found += 1
            break
    assert found
