"""Deadlines: what several steps have left, and that it is always a time which a thread can wait for."""

from __future__ import annotations

import threading

import pytest

from kvtier.config import MOST_SECONDS
from kvtier.runtime.deadline import Deadline
from kvtier.testing.simulation import VirtualClock


def test_each_step_gets_what_the_earlier_ones_left_and_never_less_than_nothing() -> None:
    clock = VirtualClock()
    deadline = Deadline(clock, 3.0)
    assert deadline.left_s() == 3.0
    clock.now_s += 2.0
    assert deadline.left_s() == 1.0
    clock.now_s += 2.0
    assert deadline.left_s() == 0.0


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e10, 1e308])
def test_an_endless_one_is_thirty_years_which_a_thread_can_wait_for(timeout_s: float) -> None:
    ended = threading.Thread(target=bool)
    ended.start()
    left_s = Deadline(VirtualClock(), timeout_s).left_s()
    ended.join(left_s)
    assert left_s == MOST_SECONDS


@pytest.mark.parametrize("timeout_s", [-1.0, float("-inf"), float("nan")])
def test_one_that_is_no_time_at_all_has_passed(timeout_s: float) -> None:
    assert Deadline(VirtualClock(), timeout_s).left_s() == 0.0
