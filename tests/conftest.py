"""Settings that hold for every test."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "kvtier", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("kvtier"), derandomize=False, print_blob=True)
settings.load_profile("kvtier")  # pytest --hypothesis-profile=explore: other examples every time


@pytest.fixture(scope="session", autouse=True)
def tensors_in_cpu_memory_go_through_triton_where_its_interpreter_runs() -> Iterator[None]:
    """What `make test-triton` sets makes `DeviceTensors` on the CPU move as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from kvtier.kernels.triton_copy import TritonPages  # triton is optional

            patch.setattr("kvtier.pages.on_device.pages_on", lambda device: TritonPages)
        yield
