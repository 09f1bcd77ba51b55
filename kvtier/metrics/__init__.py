"""What is counted: counters and gauges without global state. ``kvtier.metrics.prometheus`` shows them to Prometheus."""

from kvtier.metrics.registry import Metrics, Sample

__all__ = ["Metrics", "Sample"]
