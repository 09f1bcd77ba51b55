"""The queue of events by itself: what it keeps, what it drops, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.plan import Tier
from kvtier.planner.events import MAX_BLOCKS, BlockEvent, ControlEvents

LIMIT = 6
CHANGES: tuple[Literal["stored", "removed"], ...] = ("stored", "removed")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.planner.events.MAX_BLOCKS", LIMIT)


class Followed:
    """The queue, and beside it everything that was added since it was asked last."""

    def __init__(self) -> None:
        self.queue = ControlEvents()
        self.added: list[BlockEvent] = []
        self._numbers: Iterator[int] = count(1)

    def add(self, blocks: int, change: Literal["stored", "removed"] = "stored", tier: Tier = Tier.HOST) -> None:
        numbers = [next(self._numbers) for _ in range(blocks)]
        keys = np.array([[number] * 32 for number in numbers], np.uint8).reshape(-1, 32)
        known = np.array(numbers, np.int64) % 2 == 0
        tokens = np.array(numbers, np.int32) * 64
        self.queue.add(change, tier, keys, keys + np.uint8(100), known, tokens)
        self.added += [
            BlockEvent(change, bytes([n] * 32), b"" if n % 2 else bytes([n + 100] * 32), n * 64, tier.label)
            for n in numbers
        ]

    def take(self) -> list[BlockEvent]:
        self.added.clear()
        return self.queue.take()


@pytest.fixture
def followed() -> Followed:
    return Followed()


def test_events_come_out_as_they_went_in_and_once(followed: Followed) -> None:
    followed.add(2)
    followed.add(1, "removed", Tier.DISK)
    expected = list(followed.added)
    assert followed.take() == expected
    assert followed.take() == []
    assert followed.queue.dropped == 0


def test_of_a_batch_that_is_larger_than_the_limit_the_newest_blocks_are_kept(followed: Followed) -> None:
    followed.add(1)
    followed.add(3 * LIMIT + 2)
    expected = followed.added[-LIMIT:]
    assert followed.take() == expected
    assert followed.queue.dropped == 1 + 2 * LIMIT + 2


def test_a_large_batch_pushes_several_small_ones_out(followed: Followed) -> None:
    for _ in range(LIMIT):
        followed.add(1)
    followed.add(LIMIT - 1, "removed")
    expected = followed.added[-LIMIT:]
    assert followed.take() == expected
    assert followed.queue.dropped == LIMIT - 1


def test_whoever_took_all_leaves_room_for_as_much_again(followed: Followed) -> None:
    for _ in range(3):
        followed.add(LIMIT - 1)
        expected = list(followed.added)
        assert followed.take() == expected
    assert followed.queue.dropped == 0


def test_what_was_taken_does_not_change_when_more_comes(followed: Followed) -> None:
    followed.add(LIMIT)
    (taken,) = followed.queue.take_batches()
    before = taken.keys.tobytes()
    followed.add(LIMIT)
    assert taken.keys.tobytes() == before


@pytest.mark.parametrize("at_once", [1, 1000, 2 * MAX_BLOCKS])
def test_a_block_takes_71_bytes_however_many_came_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Its columns are all that there is: neither objects for each, nor arrays that somebody else made."""
    monkeypatch.setattr("kvtier.planner.events.MAX_BLOCKS", MAX_BLOCKS)
    queue, keys = ControlEvents(), np.zeros((at_once, 32), np.uint8)
    known, tokens = np.ones(at_once, np.bool_), np.full(at_once, 64, np.int32)
    adds = -(-3000 // at_once)
    for _ in range(adds):
        queue.add("stored", Tier.HOST, keys, keys, known, tokens)
    batches = queue.take_batches()
    columns = [
        column
        for batch in batches
        for column in (batch.keys, batch.parents, batch.known, batch.tokens, batch.changes, batch.tiers)
    ]
    kept = min(adds * at_once, MAX_BLOCKS)
    assert sum(column.nbytes for column in columns) == 71 * kept
    owners = {id(column.base): column.base for column in columns if column.base is not None}
    assert sum(owner.nbytes for owner in owners.values()) == 71 * MAX_BLOCKS
    assert len(batches) <= 2


@given(st.lists(st.tuples(st.integers(0, 3 * LIMIT), st.sampled_from(CHANGES), st.booleans()), max_size=12))
def test_the_newest_are_kept_and_the_others_counted_whatever_comes(
    steps: list[tuple[int, Literal["stored", "removed"], bool]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvtier.planner.events.MAX_BLOCKS", LIMIT)
        followed, dropped = Followed(), 0
        followed._numbers = iter(n % 100 for n in count(1))
        for blocks, change, asks in steps:
            followed.add(blocks, change, Tier.DISK)
            if asks:
                expected = followed.added[-LIMIT:]
                dropped += len(followed.added) - len(expected)
                assert followed.take() == expected
                assert followed.queue.dropped == dropped
