"""Ratios that mean something on a shared machine: everybody runs once a round, in another order each time.

A ratio is taken inside a round and the median over all rounds is reported, so that a machine that is slow for a while
is slow for both sides. Its lower bound is the 5 % quantile of the bootstrapped median.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Step: TypeAlias = Callable[[int], Any]

RESAMPLES: Final = 10_000
LOW_QUANTILE: Final = 0.05


def _nothing(_: int) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Contestant:
    """One side of a comparison; every step gets the number of the round.

    ``run`` is timed. ``settle`` ends what ``run`` left under way: its CPU time counts, its duration does not.
    ``prepare`` and ``check`` count for nothing.
    """

    name: str
    run: Step
    prepare: Step = _nothing
    settle: Step = _nothing
    check: Step = _nothing


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """Per round: seconds on the clock, and CPU seconds of the whole process."""

    wall_s: Floats
    cpu_s: Floats

    @property
    def median_s(self) -> float:
        """Median over the rounds."""
        return float(np.median(self.wall_s))

    def cpu_s_per_gib(self, nbytes: int) -> float:
        """CPU seconds that a GiB takes where every round moves ``nbytes``."""
        return float(np.median(self.cpu_s)) * (1 << 30) / nbytes


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as the baseline: the median over ``pairs``, and its lower 5 % bound."""

    ratio: float
    low: float
    pairs: int


def alternate(contestants: Sequence[Contestant], pairs: int, *, warmup: int = 1) -> dict[str, Times]:
    """Run ``warmup`` rounds that do not count, then ``pairs`` rounds; the times of each contestant by name."""
    measured: dict[str, list[tuple[float, float]]] = {contestant.name: [] for contestant in contestants}
    for number in range(warmup + pairs):
        gc.collect()
        for contestant in order_of(contestants, number):
            sample = _measure(contestant, number)
            if number >= warmup:
                measured[contestant.name].append(sample)
    return {name: Times(*np.array(samples, np.float64).T) for name, samples in measured.items()}


def freeze_heap() -> None:
    """What is there already is not looked at again when garbage is collected, as servers do once they are up.

    Otherwise a collection that a measured call happens to set off walks through all of torch: tens of milliseconds.
    """
    gc.collect()
    gc.freeze()


def order_of(contestants: Sequence[Contestant], number: int) -> list[Contestant]:
    """Who runs when in round ``number``: another one begins each time, and every second cycle runs backwards."""
    count = len(contestants)
    first = number % count
    order = [*contestants[first:], *contestants[:first]]
    return order[::-1] if number // count % 2 else order


def ratio_of(subject_s: Floats, baseline_s: Floats) -> Ratio:
    """How many times as fast ``subject_s`` is as ``baseline_s``; seconds of the same rounds."""
    ratios = np.asarray(baseline_s, np.float64) / np.asarray(subject_s, np.float64)
    return summary(ratios)


def summary(ratios: Floats) -> Ratio:
    """Median of ``ratios`` and its lower bound; the same numbers always give the same answer."""
    draws = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    return Ratio(float(np.median(ratios)), float(np.quantile(medians, LOW_QUANTILE)), len(ratios))


def _measure(contestant: Contestant, number: int) -> tuple[float, float]:
    contestant.prepare(number)
    cpu_s, began_s = time.process_time(), time.perf_counter()
    contestant.run(number)
    wall_s = time.perf_counter() - began_s
    contestant.settle(number)
    cpu_s = time.process_time() - cpu_s
    contestant.check(number)
    return wall_s, cpu_s
