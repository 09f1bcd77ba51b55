"""Pairs, medians and their bounds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pairs import Contestant, Times, alternate, order_of, ratio_of, summary

ratios = st.lists(st.floats(0.01, 100), min_size=2, max_size=40).map(np.array)


def test_a_ratio_is_how_many_times_as_fast_the_subject_is() -> None:
    assert ratio_of(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])).ratio == 2.0


def test_a_ratio_is_taken_within_rounds_so_that_one_disturbed_round_does_not_decide() -> None:
    """The ratio of the medians would say 10 here."""
    assert ratio_of(np.array([1.0, 1.0, 10.0]), np.array([1.0, 10.0, 10.0])).ratio == 1.0


def test_the_bound_falls_with_noise_and_not_with_the_median() -> None:
    steady = summary(np.full(30, 1.0))
    noisy = summary(np.array([0.5, 1.5] * 15 + [1.0]))
    assert steady.low == 1.0
    assert noisy.ratio == 1.0
    assert noisy.low == 0.5


def test_the_bound_is_the_five_percent_quantile_of_resampled_medians() -> None:
    """Against the binomial: the median of 3 draws is 0 when at least two are, 1/9 + 2 * 2/27 = 7/27 > 5 %."""
    assert summary(np.array([0.0, 1.0, 1.0])).low == 0.0
    assert summary(np.array([0.0] + [1.0] * 30)).low == 1.0


@given(ratios)
def test_the_bound_is_not_above_the_largest_nor_below_the_smallest_ratio(values: np.ndarray) -> None:
    result = summary(values)
    assert values.min() <= result.low <= values.max()
    assert result.pairs == len(values)


@given(ratios)
def test_the_same_numbers_always_give_the_same_answer(values: np.ndarray) -> None:
    assert summary(values) == summary(values.copy())


@pytest.mark.parametrize("count", [2, 3, 6])
def test_everybody_runs_in_every_place_equally_often(count: int) -> None:
    contestants = [Contestant(str(number), print) for number in range(count)]
    places = Counter(
        (place, contestant.name)
        for number in range(2 * count)
        for place, contestant in enumerate(order_of(contestants, number))
    )
    assert set(places.values()) == {2}
    assert len(places) == count * count


def test_everybody_follows_everybody_else_equally_often() -> None:
    """What one side leaves behind (in caches, in the background) is not always the same one's burden."""
    contestants = [Contestant(name, print) for name in "ABC"]
    orders = ["".join(contestant.name for contestant in order_of(contestants, number)) for number in range(6)]
    follows = Counter(order[at : at + 2] for order in orders for at in (0, 1))
    assert follows == {"AB": 2, "BC": 2, "CA": 2, "BA": 2, "CB": 2, "AC": 2}


def test_two_sides_take_turns_at_going_first() -> None:
    names = ["".join(c.name for c in order_of([Contestant(n, print) for n in "AB"], number)) for number in range(4)]
    assert names.count("AB") == names.count("BA") == 2


def test_each_side_is_prepared_run_settled_and_checked_in_every_round() -> None:
    calls: list[tuple[str, int]] = []

    def step(name: str):
        return lambda number: calls.append((name, number))

    contestant = Contestant("one", step("run"), step("prepare"), step("settle"), step("check"))
    alternate([contestant], pairs=2, warmup=1)
    assert calls == [(name, number) for number in range(3) for name in ("prepare", "run", "settle", "check")]


def test_rounds_of_the_warm_up_do_not_count() -> None:
    rounds: list[int] = []
    times = alternate([Contestant("one", rounds.append)], pairs=3, warmup=2)
    assert rounds == [0, 1, 2, 3, 4]
    assert len(times["one"].wall_s) == len(times["one"].cpu_s) == 3


def test_what_settles_counts_as_cpu_time_but_not_as_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 0.0, "cpu": 0.0}

    def work(wall: float, cpu: float):
        def step(_: int) -> None:
            clock["wall"] += wall
            clock["cpu"] += cpu

        return step

    monkeypatch.setattr("benchmarks.pairs.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("benchmarks.pairs.time.process_time", lambda: clock["cpu"])
    contestant = Contestant("one", work(1, 2), prepare=work(10, 10), settle=work(4, 8), check=work(10, 10))
    times = alternate([contestant], pairs=1, warmup=0)["one"]
    assert times.wall_s.tolist() == [1.0]
    assert times.cpu_s.tolist() == [10.0]


def test_cpu_time_is_per_gib_of_what_a_round_moves() -> None:
    assert Times(np.ones(3), np.full(3, 0.5)).cpu_s_per_gib(256 << 20) == 2.0
