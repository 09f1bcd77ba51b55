"""Settings that hold for every test."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "kvtier", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("kvtier"), derandomize=False, print_blob=True)
settings.load_profile("kvtier")  # pytest --hypothesis-profile=explore: other examples every time
