# ruff: noqa: D102  (the name of a test is its sentence)
"""What every eviction policy must do. Inherit, name the class ``Test...``, and say which policy.

class TestMine(EvictionPolicyContract):
    policy = Mine
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import ClassVar

import numpy as np
import pytest

from kvtier.policy.base import Entries, EvictionPolicy


def entries_of(numbers: Iterable[int]) -> Entries:
    """Entry numbers as policies take them."""
    return np.fromiter(numbers, np.int32)


class EvictionPolicyContract:
    """Every entry is a candidate exactly once, from ``insert`` to ``remove``; the order is the policy's own."""

    policy: ClassVar[type[EvictionPolicy]]

    def make(self, capacity: int) -> EvictionPolicy:
        """An empty policy; override for one that takes more than a capacity."""
        return self.policy(capacity)

    def test_it_begins_empty(self) -> None:
        policy = self.make(8)
        assert len(policy) == 0
        assert list(policy.candidates()) == []

    def test_what_came_is_a_candidate_once(self) -> None:
        policy = self.make(10)
        policy.insert(entries_of([3, 1, 9]))
        policy.insert(entries_of([0]))
        assert len(policy) == 4
        assert sorted(policy.candidates()) == [0, 1, 3, 9]

    def test_what_left_is_no_candidate(self) -> None:
        policy = self.make(10)
        policy.insert(entries_of(range(10)))
        for entry in (0, 9, 4):
            policy.remove(entry)
        assert len(policy) == 7
        assert sorted(policy.candidates()) == [1, 2, 3, 5, 6, 7, 8]

    def test_many_leave_as_one_after_the_other_would(self) -> None:
        """In any order; what is left stands as it stood before."""
        for gone in ([], [6], [7, 6, 5], [9, 0, 4, 5], range(10)):
            at_once, one_by_one = self.make(10), self.make(10)
            for policy in (at_once, one_by_one):
                policy.insert(entries_of(range(10)))
                policy.touch(entries_of([5, 2]))
            at_once.remove_many(entries_of(gone))
            for entry in gone:
                one_by_one.remove(entry)
            assert len(at_once) == 10 - len(gone)
            assert list(at_once.candidates()) == list(one_by_one.candidates())
            at_once.insert(entries_of(gone))
            assert sorted(at_once.candidates()) == list(range(10))

    def test_use_changes_the_order_at_most(self) -> None:
        policy = self.make(10)
        policy.insert(entries_of(range(10)))
        for used in ([0], [9, 0], [4, 5, 6], range(10), []):
            policy.touch(entries_of(used))
            assert len(policy) == 10
            assert sorted(policy.candidates()) == list(range(10))

    def test_a_number_may_come_again_after_it_left(self) -> None:
        policy = self.make(3)
        for _ in range(5):
            policy.insert(entries_of([2, 0]))
            policy.touch(entries_of([2]))
            policy.remove(2)
            policy.remove(0)
        assert len(policy) == 0
        assert list(policy.candidates()) == []

    def test_nothing_at_all_may_come_and_be_used(self) -> None:
        policy = self.make(4)
        policy.insert(entries_of([]))
        policy.touch(entries_of([]))
        assert len(policy) == 0

    @pytest.mark.parametrize("capacity", [1, 2, 64])
    def test_every_number_below_its_capacity_is_served(self, capacity: int) -> None:
        policy = self.make(capacity)
        policy.insert(entries_of(range(capacity)))
        policy.touch(entries_of(range(capacity)))
        assert sorted(policy.candidates()) == list(range(capacity))

    def test_asking_for_candidates_changes_nothing(self) -> None:
        policy = self.make(10)
        policy.insert(entries_of(range(10)))
        policy.touch(entries_of([5, 2]))
        first = list(policy.candidates())
        next(policy.candidates())
        assert list(policy.candidates()) == first

    @pytest.mark.parametrize("gone", [1, 2, 3])
    def test_entries_that_were_given_may_be_removed_while_it_runs(self, gone: int) -> None:
        """The caller evicts the one that it was just given, and parents that it passed over before."""
        policy = self.make(12)
        policy.insert(entries_of(range(12)))
        policy.touch(entries_of([7, 3, 5]))
        seen: list[int] = []
        held: list[int] = []
        for entry in policy.candidates():
            seen.append(entry)
            held.append(entry)
            if len(held) == gone:
                policy.remove_many(entries_of(held[1:]))
                policy.remove(held[0])
                held.clear()
        assert sorted(seen) == list(range(12))
        assert len(policy) == len(held)

    def test_the_same_calls_give_the_same_order(self) -> None:
        """No clock and no chance: a run can be replayed."""
        orders = []
        for _ in range(2):
            policy, random = self.make(50), Random(7)
            policy.insert(entries_of(range(40)))
            for _ in range(20):
                policy.touch(entries_of(random.sample(range(40), 6)))
            policy.remove(11)
            policy.insert(entries_of([45, 11]))
            orders.append(list(policy.candidates()))
        assert orders[0] == orders[1]

    def test_arrays_are_neither_changed_nor_kept(self) -> None:
        policy = self.make(20)
        numbers = entries_of(range(20))
        policy.insert(numbers[:10])
        policy.insert(numbers[10:])
        policy.touch(numbers[::3])
        assert numbers.tolist() == list(range(20))
        order = list(policy.candidates())
        numbers[:] = 0
        assert list(policy.candidates()) == order

    def test_arrays_may_be_read_only_and_strided(self) -> None:
        policy = self.make(20)
        numbers = entries_of(range(20))
        numbers.flags.writeable = False
        policy.insert(numbers[::-2])
        policy.touch(numbers[1::4])
        assert sorted(policy.candidates()) == list(range(1, 20, 2))

    @pytest.mark.parametrize("seed", range(20))
    def test_after_any_calls_it_holds_what_came_and_did_not_leave(self, seed: int) -> None:
        random, capacity = Random(seed), 40
        policy = self.make(capacity)
        inside: set[int] = set()
        for _ in range(300):
            word = random.choice(["insert", "touch", "remove", "evict"])
            if word == "insert":
                outside = sorted(set(range(capacity)) - inside)
                coming = random.sample(outside, random.randint(0, min(8, len(outside))))
                policy.insert(entries_of(coming))
                inside |= set(coming)
            elif word == "touch":
                policy.touch(entries_of(random.sample(sorted(inside), random.randint(0, len(inside)))))
            elif inside:
                entry = random.choice(sorted(inside)) if word == "remove" else next(policy.candidates())
                policy.remove(entry)
                inside.remove(entry)
            assert len(policy) == len(inside)
            given = list(policy.candidates())
            assert len(given) == len(inside)
            assert set(given) == inside

    @pytest.mark.parametrize("seed", range(5))
    def test_a_tier_can_be_emptied_leaf_by_leaf(self, seed: int) -> None:
        """The caller takes the first candidate without a child, whatever order the policy gives."""
        random = Random(seed)
        policy = self.make(60)
        parents: dict[int, int] = {}
        for first in range(0, 60, 10):
            trunk = [first - 10 + at for at in range(random.randint(0, 5))] if first else []
            chain = trunk + list(range(first, first + 10))
            parents.update({first + at: (chain[len(trunk) + at - 1] if len(trunk) + at else -1) for at in range(10)})
            policy.insert(entries_of(range(first, first + 10)))
            policy.touch(entries_of(chain))
        left = set(range(60))
        while left:
            extended = {parents[entry] for entry in left}
            entry = next(entry for entry in policy.candidates() if entry not in extended)
            policy.remove(entry)
            left.remove(entry)
        assert len(policy) == 0
