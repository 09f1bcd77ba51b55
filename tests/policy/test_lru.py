"""Leaf-first LRU: the order is that of a list where a request's blocks move to the end, deepest first."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.policy import EVICTION_POLICIES, LeafFirstLRU
from kvtier.policy.base import Entries
from kvtier.testing.contracts.policies import EvictionPolicyContract, entries_of


class TestLeafFirstLRU(EvictionPolicyContract):
    policy = LeafFirstLRU


class OrderIsThatOfAList(RuleBasedStateMachine):
    """The model is a list from the oldest to the newest."""

    @initialize(capacity=st.integers(1, 30))
    def make(self, capacity: int) -> None:
        self.capacity = capacity
        self.policy = LeafFirstLRU(capacity)
        self.model: list[int] = []

    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        outside = sorted(set(range(self.capacity)) - set(self.model))
        coming = data.draw(st.lists(st.sampled_from(outside), unique=True)) if outside else []
        self.policy.insert(entries_of(coming))
        self.model += coming[::-1]

    def use(self, used: Entries) -> None:
        self.policy.touch(used)
        numbers = used.tolist()
        self.model = [entry for entry in self.model if entry not in numbers] + numbers[::-1]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def touch_any(self, data: st.DataObject) -> None:
        self.use(entries_of(data.draw(st.lists(st.sampled_from(self.model), unique=True))))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), backwards=st.booleans())
    def touch_a_run(self, data: st.DataObject, backwards: bool) -> None:
        """Neighbours are moved with one splice: runs at either end, whole rings, and runs the wrong way round."""
        start = data.draw(st.integers(0, len(self.model) - 1))
        stop = data.draw(st.integers(start, len(self.model)))
        run = entries_of(self.model[start:stop])
        self.use(run if backwards else run[::-1])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.model))
        self.policy.remove(entry)
        self.model.remove(entry)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), in_order=st.booleans())
    def remove_many(self, data: st.DataObject, in_order: bool) -> None:
        entries = data.draw(st.lists(st.sampled_from(self.model), unique=True))
        if in_order:
            entries.sort(key=self.model.index)
        self.policy.remove_many(entries_of(entries))
        self.model = [entry for entry in self.model if entry not in entries]

    @rule(data=st.data())
    def evict_while_it_runs(self, data: st.DataObject) -> None:
        kept = []
        for entry in self.policy.candidates():
            if data.draw(st.booleans()):
                self.policy.remove(entry)
            else:
                kept.append(entry)
        self.model = [entry for entry in self.model if entry in kept]

    @invariant()
    def same_order(self) -> None:
        if hasattr(self, "policy"):
            assert list(self.policy.candidates()) == self.model
            assert len(self.policy) == len(self.model)


TestOrderIsThatOfAList = OrderIsThatOfAList.TestCase
TestOrderIsThatOfAList.settings = settings(max_examples=200, stateful_step_count=40)


def test_of_one_request_the_deepest_block_goes_first() -> None:
    policy = LeafFirstLRU(10)
    policy.insert(entries_of([4, 5, 6]))
    assert list(policy.candidates()) == [6, 5, 4]


def test_a_shared_prefix_is_never_older_than_what_extends_it() -> None:
    policy = LeafFirstLRU(10)
    policy.insert(entries_of([0, 1, 2, 3]))
    policy.insert(entries_of([4, 5]))
    policy.touch(entries_of([0, 1, 4, 5]))
    assert list(policy.candidates()) == [3, 2, 5, 4, 1, 0]


def test_it_takes_eight_bytes_an_entry() -> None:
    arrays = [value for value in vars(LeafFirstLRU(1000)).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 8 * 1001


def test_every_policy_that_can_be_configured_keeps_the_contract() -> None:
    held = {cls.policy for cls in EvictionPolicyContract.__subclasses__()}
    assert set(EVICTION_POLICIES.values()) <= held
