"""Settings that hold for every test."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "kvtier", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kvtier")
