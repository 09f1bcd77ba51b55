"""Room in a memory tier against a bitmap: nothing overlaps, nothing is lost, neighbours are joined."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.index.space import NO_ROOM, Space


class SpaceAndBitmap(RuleBasedStateMachine):
    """Extents are painted on a bitmap; free runs are read off it."""

    @initialize(capacity=st.integers(0, 300))
    def make(self, capacity: int) -> None:
        self.space = Space(capacity)
        self.taken = np.zeros(capacity, np.bool_)
        self.extents: list[tuple[int, int]] = []

    def runs(self) -> list[tuple[int, int]]:
        edges = np.flatnonzero(np.diff(np.concatenate(([1], self.taken.view(np.int8), [1]))))
        return [(int(a), int(b - a)) for a, b in edges.reshape(-1, 2)]

    def paint(self, start: int, pages: int) -> None:
        assert start >= 0
        assert start + pages <= self.space.capacity_pages
        assert not self.taken[start : start + pages].any(), "two extents overlap"
        self.taken[start : start + pages] = True
        self.extents.append((start, pages))

    @rule(pages=st.integers(1, 320))
    def take(self, pages: int) -> None:
        longest = max((length for _, length in self.runs()), default=0)
        start = self.space.take(pages)
        if start == NO_ROOM:
            assert longest < pages, "there was room"
        else:
            self.paint(start, pages)

    @rule(pages=st.integers(1, 40), count=st.integers(0, 30))
    def take_many(self, pages: int, count: int) -> None:
        fit = sum(length // pages for _, length in self.runs())
        starts = self.space.take_many(pages, count)
        assert len(starts) == min(count, fit)
        for start in starts:
            self.paint(start, pages)

    @precondition(lambda self: self.extents)
    @rule(data=st.data(), keep=st.integers(0, 20))
    def give_back(self, data: st.DataObject, keep: int) -> None:
        """All of an extent, or what is left when it is trimmed to its first pages."""
        start, pages = self.extents.pop(data.draw(st.integers(0, len(self.extents) - 1)))
        keep = min(keep, pages - 1)
        if keep:
            self.extents.append((start, keep))
        self.space.give_back(start + keep, pages - keep)
        self.taken[start + keep : start + pages] = False

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def give_back_many(self, data: st.DataObject) -> None:
        """Any of them in any order, neighbours and others."""
        several = data.draw(st.lists(st.sampled_from(self.extents), unique=True))
        starts, pages = np.array(several, np.int32).reshape(-1, 2).T
        self.space.give_back_many(starts, pages)
        for start, length in several:
            self.extents.remove((start, length))
            self.taken[start : start + length] = False

    @invariant()
    def the_free_runs_are_those_of_the_bitmap(self) -> None:
        if hasattr(self, "space"):
            assert self.space.free_runs() == self.runs(), "free neighbours are one run"
            assert self.space.used_pages == int(self.taken.sum())
            assert self.space.free_pages == int((~self.taken).sum())

    def teardown(self) -> None:
        if hasattr(self, "space"):
            for start, pages in self.extents:
                self.space.give_back(start, pages)
            assert self.space.used_pages == 0
            capacity = self.space.capacity_pages
            assert self.space.free_runs() == ([(0, capacity)] if capacity else [])


TestSpaceAndBitmap = SpaceAndBitmap.TestCase
TestSpaceAndBitmap.settings = settings(max_examples=200, stateful_step_count=40)


def test_blocks_of_one_size_never_fragment_it() -> None:
    """Whatever the order of coming and going: as long as there are pages for one more block, it fits."""
    rng = random.Random(3)
    space, extents = Space(70 * 9), [0] * 0
    for _ in range(5000):
        if extents and rng.random() < 0.5:
            space.give_back(extents.pop(rng.randrange(len(extents))), 9)
        else:
            start = space.take(9)
            assert (start == NO_ROOM) == (len(extents) == 70)
            if start != NO_ROOM:
                extents.append(start)


def test_a_long_run_is_found_behind_any_number_of_short_ones() -> None:
    """Of runs of the same power of two only some are looked at, but a run of the next power always serves."""
    space = Space(4096)
    for start in range(0, 2048, 16):
        assert space.take(16) == start
    for start in range(0, 2048, 32):
        space.give_back(start, 16)
    rest = space.take(2048)
    space.give_back(rest, 40)
    assert space.take(17) == rest


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 63, 64, 65])
def test_all_of_it_can_be_taken_at_once(pages: int) -> None:
    space = Space(pages)
    assert space.take(pages + 1) == NO_ROOM
    assert space.take(pages) == 0
    assert space.take(1) == NO_ROOM
    assert space.take_many(1, 3) == []
    space.give_back(0, pages)
    assert space.take_many(pages, 2) == [0]


def test_adjacent_extents_come_from_one_run() -> None:
    """Blocks stored together lie together, so that they are spilled with one write."""
    assert Space(100).take_many(7, 5) == [0, 7, 14, 21, 28]
