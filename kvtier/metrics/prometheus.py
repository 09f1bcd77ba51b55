"""Prometheus reads a cache: ``prometheus_client.REGISTRY.register(PrometheusCollector(cache.samples))``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import attrgetter

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvtier.metrics.registry import Sample


class PrometheusCollector(Collector):
    """Turns one cache's series into metric families, anew at every scrape."""

    def __init__(self, read: Callable[[], Iterable[Sample]], *, prefix: str = "kvtier_") -> None:
        """``read`` gives the series as they are now, sorted by name; ``prefix`` goes before every name."""
        self._read = read
        self._prefix = prefix

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """One family per name; a label that a series does not have is empty."""
        for name, group in groupby(self._read(), key=attrgetter("name")):
            samples = list(group)
            labels = sorted({label for sample in samples for label in sample.labels})
            kind = CounterMetricFamily if samples[0].kind == "counter" else GaugeMetricFamily
            family = kind(self._prefix + name, name.replace("_", " "), labels=labels)
            for sample in samples:
                family.add_metric([sample.labels.get(label, "") for label in labels], sample.value)
            yield family
