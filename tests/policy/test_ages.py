"""Two orders of eviction: all of the first goes before any of the rest, and each is that of its own policy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtier.policy import LeafFirstLRU, TwoAges
from kvtier.policy.base import EvictionPolicy
from kvtier.testing.contracts.policies import EvictionPolicyContract, entries_of


class TestTwoAges(EvictionPolicyContract):
    """Where nothing is set apart it is the policy that it is made of."""

    policy = LeafFirstLRU

    def make(self, capacity: int) -> EvictionPolicy:
        return TwoAges(LeafFirstLRU, capacity)


class TestTwoAgesOfWhatGoesFirst(EvictionPolicyContract):
    """So it is where everything goes first."""

    policy = LeafFirstLRU

    def make(self, capacity: int) -> EvictionPolicy:
        ages = TwoAges(LeafFirstLRU, capacity)
        ages.set_apart(entries_of(range(capacity)), goes_first=True)
        return ages


def _aged() -> TwoAges:
    """3, 2, 1 go first in this order, then 6, 5, 4."""
    ages = TwoAges(LeafFirstLRU, 8)
    ages.set_apart(entries_of([1, 2, 3]), goes_first=True)
    ages.insert(entries_of([4, 5, 6]))
    ages.insert(entries_of([1, 2, 3]))
    return ages


def test_what_goes_first_goes_before_what_is_older() -> None:
    assert list(_aged().candidates()) == [3, 2, 1, 6, 5, 4]


def test_what_is_used_stays_in_its_order() -> None:
    ages = _aged()
    ages.touch(entries_of([3, 6]))
    assert list(ages.candidates()) == [2, 1, 3, 5, 4, 6]


def test_what_is_promoted_is_the_newest_of_the_rest() -> None:
    ages = _aged()
    ages.promote(entries_of([2, 5]))
    assert list(ages.candidates()) == [3, 1, 6, 5, 4, 2]


def test_what_is_demoted_goes_behind_those_that_go_first() -> None:
    ages = _aged()
    ages.demote(entries_of([5, 3]))
    assert list(ages.candidates()) == [3, 2, 1, 5, 6, 4]
    assert ages.which_go_first(entries_of([3, 5, 6])).tolist() == [True, True, False]


@given(st.lists(st.integers(0, 7), unique=True), st.data())
def test_a_pass_ends_even_where_everything_is_touched_on_the_way(first: list[int], data: st.DataObject) -> None:
    """What is held is moved out of the way: it comes again at the end of its order, and only once."""
    ages = TwoAges(LeafFirstLRU, 8)
    ages.set_apart(entries_of(first), goes_first=True)
    ages.insert(entries_of(range(8)))
    held = data.draw(st.sets(st.integers(0, 7)))
    seen = []
    for entry in ages.candidates():
        seen.append(entry)
        if entry in held:
            ages.touch(entries_of([entry]))
    assert set(seen) >= set(range(8)) - held
    assert len(seen) <= 8
