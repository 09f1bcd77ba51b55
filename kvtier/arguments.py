"""What callers pass in words and numbers, checked before anything is planned."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtier.core.keys import Keys
from kvtier.core.plan import Priority
from kvtier.errors import ConfigError
from kvtier.planner import Durability

_PRIORITIES: Final = {"demand": Priority.DEMAND, "prefetch": Priority.PREFETCH}
_DURABILITIES: Final = {level.name.lower(): level for level in Durability}


def checked_model_id(model_id: str) -> str:
    """``model_id``.

    Raises:
        ConfigError: it is no string, or empty.
    """
    if not isinstance(model_id, str) or not model_id:
        raise ConfigError(
            f"model_id = {model_id!r}: must be a non-empty string that changes whenever the model's KV would;"
            " kvtier.model_id(model) makes one"
        )
    return model_id


def checked_deadline_s(deadline_s: float | None, default_s: float) -> float:
    """Seconds from now.

    Raises:
        ConfigError: not a number above zero.
    """
    if deadline_s is None:
        return default_s
    if not isinstance(deadline_s, (int, float)) or not deadline_s > 0:
        raise ConfigError(f"deadline_s = {deadline_s!r}: must be a number of seconds above 0, or None")
    return deadline_s


def checked_version(version: str) -> str:
    """``version``.

    Raises:
        ConfigError: it is no string.
    """
    if not isinstance(version, str):
        raise ConfigError(f"weights_version = {version!r}: must be a string")
    return version


def check_start(keys: Keys, start: int) -> None:
    """Refuse a ``start`` outside the sequence.

    Raises:
        ConfigError: it is not in [0, num_tokens].
    """
    stop = keys.num_tokens
    if not isinstance(start, (int, np.integer)) or not 0 <= start <= stop:
        raise ConfigError(f"start = {start}: must lie in [0, {stop}], the length of the sequence")


def priority_of(word: str) -> Priority:
    """The class of service called ``word``; ConfigError for any other."""
    try:
        return _PRIORITIES[word]
    except KeyError:
        raise ConfigError(f"priority = {word!r}: one of 'demand', 'prefetch'") from None


def durability_of(word: str) -> Durability:
    """The level of acknowledgement called ``word``; ConfigError for any other."""
    try:
        return _DURABILITIES[word]
    except KeyError:
        raise ConfigError(f"durability = {word!r}: one of 'memory', 'process', 'durable'") from None
