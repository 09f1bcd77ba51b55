"""Staging buffers: the share of each class of service."""

from __future__ import annotations

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
    while (buffer := staging.take(priority)) is not None:
        taken.append(buffer)
    return taken


@pytest.mark.parametrize("priority", list(Priority))
def test_a_class_has_its_share_and_no_more_also_where_nobody_else_wants_any(
    staging: Staging, priority: Priority
) -> None:
    for _ in range(2):
        taken = take_all(staging, priority)
        assert len(set(taken)) == len(taken) == SHARES[priority]
        assert not staging.has_room(priority)
        for buffer in taken:
            staging.give_back(buffer, priority)
        assert staging.free == COUNT


def test_what_lower_classes_have_taken_is_of_the_share_of_the_higher_ones(staging: Staging) -> None:
    assert [len(take_all(staging, priority)) for priority in reversed(Priority)] == [4, 4, 8]


def test_what_higher_classes_have_taken_leaves_the_lower_ones_their_share_while_there_is_any(staging: Staging) -> None:
    for _ in range(COUNT - 2):
        assert staging.take(Priority.DEMAND) is not None
    assert len(take_all(staging, Priority.SPILL)) == 2


def test_without_shares_any_class_may_have_all() -> None:
    staging = Staging(SimArena(COUNT * PAGE_BYTES), 1, shares=False)
    assert len(take_all(staging, Priority.SPILL)) == COUNT
