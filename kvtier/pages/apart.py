"""Parts of engine memory that have to lie apart: what is loaded into one would overwrite the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.errors import ConfigError

Named: TypeAlias = tuple[str, npt.NDArray[np.uint8]]
"""What messages call it, and its tensor as bytes, of any strides."""

MAX_WORK: Final = 10_000
"""Steps that numpy may take to tell whether two strided tensors share a byte. Slices and transposes take very few."""


def check_apart(parts: Iterable[Named]) -> None:
    """Refuse tensors that share a byte, over all groups; strided ones may well lie between each other's bytes.

    Raises:
        ConfigError: naming two parts.
    """
    given = [part for part in parts if part[1].size]
    bounds = [_bounds(data) for _, data in given]
    open_ended: list[int] = []  # those that begin before and may reach into what follows
    for number in sorted(range(len(given)), key=bounds.__getitem__):
        start, _ = bounds[number]
        open_ended = [other for other in open_ended if bounds[other][1] > start]
        for other in open_ended:
            if _share_memory(given[other][1], given[number][1]):
                first, second = (given[at][0] for at in sorted((other, number)))
                raise ConfigError(f"{first} and {second} share memory; every part needs a tensor of its own")
        open_ended.append(number)


def _bounds(data: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Addresses of the first byte and of the one behind the last."""
    first: int = data.__array_interface__["data"][0]
    reach = [(size - 1) * stride for size, stride in zip(data.shape, data.strides, strict=True)]
    return first + sum(step for step in reach if step < 0), first + sum(step for step in reach if step > 0) + 1


def _share_memory(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Whether they share a byte. No where that is too hard to tell: memory that may well do is not refused."""
    try:
        return np.shares_memory(one, other, max_work=MAX_WORK)  # type: ignore[arg-type]  # stubs know -1 and 0 only
    except np.exceptions.TooHardError:
        return False
