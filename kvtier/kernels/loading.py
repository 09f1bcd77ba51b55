"""Whether compiled kernels are there. They take numba; without it everything runs in numpy, and says so nowhere."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any


@cache
def compiled() -> Any:
    """The module ``kernels.numba_kernels``, or None without numba, or where numbers lie the other way round.

    The first call compiles, or takes what was compiled from numba's cache. Meanwhile other threads stall, so opening a
    cache makes it, as does naming engine memory, and no copy thread ever does.
    """
    if sys.byteorder != "little":
        return None
    try:
        return import_module("kvtier.kernels.numba_kernels")
    except ImportError:
        return None
