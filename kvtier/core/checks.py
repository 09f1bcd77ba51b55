"""Numbers and flags as callers pass them: what is nearly one is refused by name, before anything depends on it."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtier.errors import ConfigError


def whole(name: str, value: Any) -> int:
    """``value``, called ``name``.

    Raises:
        ConfigError: it is no integer; True is none.
    """
    if type(value) is int:
        return value
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ConfigError(f"{name} = {value!r}: must be an integer")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """``value``, called ``name``.

    Raises:
        ConfigError: it is neither True nor False; a word such as "no" would count as True.
    """
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise ConfigError(f"{name} = {value!r}: must be True or False")
    return bool(value)
