"""Counters and gauges, their bound, and what Prometheus sees of them."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from kvtier.metrics import Metrics
from kvtier.metrics.prometheus import PrometheusCollector


def metrics(max_series: int = 1024) -> Metrics:
    return Metrics(threading.Lock(), max_series=max_series)


def test_counters_add_up_and_gauges_keep_the_last_value() -> None:
    m = metrics()
    m.add("loads")
    m.add("tokens", 64, tier="host")
    m.add("tokens", 64, tier="host")
    m.add("tokens", 1, tier="disk")
    m.set("bytes_used", 7)
    m.set("bytes_used", 5)
    assert m.snapshot() == {"bytes_used": 5, "loads": 1, "tokens{tier=disk}": 1, "tokens{tier=host}": 128}


def test_the_order_of_labels_does_not_matter() -> None:
    m = metrics()
    m.add("failed", tier="disk", reason="damaged")
    m.add("failed", reason="damaged", tier="disk")
    assert m.snapshot() == {"failed{reason=damaged,tier=disk}": 2}


def test_two_registries_share_nothing() -> None:
    one, two = metrics(), metrics()
    one.add("loads")
    assert two.snapshot() == {}


def test_past_the_bound_further_combinations_are_counted_together() -> None:
    m = metrics(max_series=2)
    for tenant in ("a", "b", "c", "d"):
        m.add("hits", tenant=tenant)
        m.add("hits", tenant=tenant)
    assert m.snapshot() == {"hits{tenant=a}": 2, "hits{tenant=b}": 2, "hits{tenant=other}": 4}


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3), st.integers(0, 9)), max_size=50))
def test_the_number_of_series_is_bounded_and_nothing_is_lost(calls: list[tuple[str, str, int]]) -> None:
    m = metrics(max_series=3)
    for tenant, tier, value in calls:
        m.add("bytes", value, tenant=tenant, tier=tier)
    assert len(m.samples()) <= 4
    assert sum(m.snapshot().values()) == sum(value for *_, value in calls)


def test_a_snapshot_does_not_change_afterwards() -> None:
    m = metrics()
    m.add("loads")
    before = m.samples()
    m.add("loads")
    assert [sample.value for sample in before] == [1]


def test_no_addition_is_lost_between_threads() -> None:
    m = metrics()

    def count() -> None:
        for _ in range(20_000):
            m.add("loads", tier="host")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert m.snapshot() == {"loads{tier=host}": 80_000}


def test_prometheus_sees_counters_and_gauges_with_their_labels() -> None:
    m = metrics()
    m.add("tokens", 128, tier="host")
    m.add("tokens", 1)
    m.set("bytes_used", 5, tier="disk")
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(m.samples))
    text = generate_latest(registry).decode()
    assert 'kvtier_tokens_total{tier="host"} 128.0' in text
    assert 'kvtier_tokens_total{tier=""} 1.0' in text
    assert 'kvtier_bytes_used{tier="disk"} 5.0' in text
    assert text.count("# TYPE kvtier_tokens_total counter") == 1
