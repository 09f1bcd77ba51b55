"""Counters and gauges, cheap enough for every block.

A name with its labels is one series. Their number is bounded, because label values may come from outside (tenants,
say): once ``max_series`` exist, a further combination is counted under its name with every label value ``other``.
Names and label names come from the code, never from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from kvtier.runtime.seam import Lock

OTHER: Final = "other"
"""The label value of what came after the bound was reached."""

Kind: TypeAlias = Literal["counter", "gauge"]


@dataclass(slots=True)
class Sample:
    """One series and its value."""

    kind: Kind
    name: str
    labels: dict[str, str]
    value: float = 0

    def __str__(self) -> str:
        """``name``, or ``name{label=value,...}``."""
        labels = ",".join(f"{label}={value}" for label, value in self.labels.items())
        return f"{self.name}{{{labels}}}" if labels else self.name


class Metrics:
    """The series of one cache; safe to call from every thread that shares ``lock``."""

    def __init__(self, lock: Lock, *, max_series: int = 1024) -> None:
        """``lock`` is held for an addition, a new series or a copy of all, never longer."""
        self._lock = lock
        self._max_series = max_series
        self._by_call: dict[tuple[Any, ...], Sample] = {}  # labels in the order of the call: no sorting when counting
        self._series: dict[tuple[Any, ...], Sample] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Count ``value`` (not negative) more of the counter ``name``."""
        call = (name, *labels.items())
        with self._lock:
            series = self._by_call.get(call) or self._new("counter", name, labels)
            series.value += value

    def set(self, name: str, value: float, **labels: str) -> None:
        """Say what the gauge ``name`` is now."""
        call = (name, *labels.items())
        with self._lock:
            series = self._by_call.get(call) or self._new("gauge", name, labels)
            series.value = value

    def samples(self) -> list[Sample]:
        """A copy of every series, sorted by name and labels."""
        with self._lock:
            found = [Sample(one.kind, one.name, one.labels, one.value) for one in self._series.values()]
        return sorted(found, key=lambda sample: (sample.name, list(sample.labels.items())))

    def snapshot(self) -> dict[str, float]:
        """Every series as text with its value: ``{"loads": 2, "tokens{tier=host}": 128}``."""
        return {str(sample): sample.value for sample in self.samples()}

    def _new(self, kind: Kind, name: str, labels: dict[str, str]) -> Sample:
        canonical = {label: str(labels[label]) for label in sorted(labels)}
        if (name, *canonical.items()) not in self._series and len(self._series) >= self._max_series:
            canonical = dict.fromkeys(canonical, OTHER)
        series = self._series.setdefault((name, *canonical.items()), Sample(kind, name, canonical))
        if len(self._by_call) < 4 * self._max_series:
            self._by_call[(name, *labels.items())] = series
        return series
