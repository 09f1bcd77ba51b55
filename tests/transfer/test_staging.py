"""Staging buffers: the share of each class of service."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.core.plan import PAGE_BYTES, Priority
from kvtier.testing.simulation import SimArena
from kvtier.transfer.staging import Staging

COUNT = 16
SHARES = {Priority.DEMAND: 16, Priority.PREFETCH: 8, Priority.SPILL: 4}


@pytest.fixture
def staging() -> Staging:
    return Staging(SimArena(COUNT * PAGE_BYTES), 1)


def take_all(staging: Staging, priority: Priority) -> list[int]:
    """Buffers until there is none for ``priority``."""
    taken: list[int] = []
    while buffers := staging.take(priority):
        taken += buffers
    return taken


@pytest.mark.parametrize("priority", list(Priority))
def test_a_class_has_its_share_and_no_more_also_where_nobody_else_wants_any(
    staging: Staging, priority: Priority
) -> None:
    for _ in range(2):
        taken = take_all(staging, priority)
        assert len(set(taken)) == len(taken) == SHARES[priority]
        assert not staging.room_for(priority)
        staging.give_back(taken, priority)
        assert staging.free == COUNT


def test_what_lower_classes_have_taken_is_of_the_share_of_the_higher_ones(staging: Staging) -> None:
    assert [len(take_all(staging, priority)) for priority in reversed(Priority)] == [4, 4, 8]


def test_what_higher_classes_have_taken_leaves_the_lower_ones_their_share_while_there_is_any(staging: Staging) -> None:
    for _ in range(COUNT - 2):
        assert staging.take(Priority.DEMAND)
    assert len(take_all(staging, Priority.SPILL)) == 2


def test_without_shares_any_class_may_have_all() -> None:
    staging = Staging(SimArena(COUNT * PAGE_BYTES), 1, shares=False)
    assert len(take_all(staging, Priority.SPILL)) == COUNT


def test_of_several_buffers_as_many_are_taken_as_the_share_has_left(staging: Staging) -> None:
    assert len(staging.take(Priority.SPILL, 3)) == 3
    assert len(staging.take(Priority.SPILL, 3)) == 1
    assert staging.take(Priority.SPILL, 3) == []
    assert staging.free == COUNT - 4


def test_records_lie_at_the_beginning_of_their_buffers() -> None:
    arena = SimArena(COUNT * PAGE_BYTES)
    staging = Staging(arena, 4)
    buffers = staging.take(Priority.DEMAND, 2)
    for number, buffer in enumerate(buffers):
        staging.view(buffer)[:] = number + 1
    records = staging.records(buffers, np.array([1, 3]))
    assert [(one.nbytes, int(one[0])) for one in map(records.one, range(2))] == [
        (PAGE_BYTES, 1), (3 * PAGE_BYTES, 2),
    ]  # fmt: skip
