"""Tests here run with the compiled kernels and without them."""

import pytest

from kvtier.kernels import compiled, fast_pages

COMPILED = compiled()
WITHOUT = pytest.mark.skipif(COMPILED is None, reason="numba is not installed: pip install 'kvtier[fast]'")


@pytest.fixture(
    autouse=True,
    scope="module",
    params=["numpy", pytest.param("numba", marks=WITHOUT)],
)
def kernels(request):
    """Engine memory that is made meanwhile uses them, or does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_pages, "compiled", lambda: COMPILED if request.param == "numba" else None)
        yield
