"""Values as callers pass them: what is nearly what it should be is refused by name, before anything depends on it."""

from __future__ import annotations

import reprlib
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


def at_least(name: str, value: Any, least: int) -> int:
    """``value``, called ``name``.

    Raises:
        ConfigError: it is no integer, or below ``least``.
    """
    number = whole(name, value)
    if number < least:
        raise ConfigError(f"{name} = {number}: must be at least {least}")
    return number


def is_number(value: Any) -> bool:
    """Whether ``value`` is an integer or a float; True is none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def timeout(value: Any, most_s: float, *, name: str = "timeout_s", or_else: str = "") -> float:
    """``value`` seconds to wait: no longer than ``most_s``, and not at all where it is below 0.

    Raises:
        ConfigError: it is no number; ``or_else`` says what is allowed besides.
    """
    if not is_number(value) or value != value:
        raise ConfigError(f"{name} = {value!r}: must be a number of seconds, 0 to look and not wait{or_else}")
    return float(min(max(value, 0), most_s))


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a ``value``, called ``name``, that is not among ``choices``.

    Raises:
        ConfigError: listing them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} = {value!r}: one of {', '.join(map(repr, choices))}")


def several(name: str, value: Any) -> tuple[Any, ...]:
    """``value``, called ``name``, as a tuple.

    Raises:
        ConfigError: it is neither a tuple nor a list; the letters of a string are no list.
    """
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{name} = {reprlib.repr(value)}: must be a tuple")
    return tuple(value)


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
