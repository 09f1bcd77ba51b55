"""Torch tensors and numpy arrays as bytes, without a copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvtier.errors import ConfigError

Tensor: TypeAlias = Any
"""A ``torch.Tensor`` or a ``numpy.ndarray``."""


def listed(name: str, given: Any) -> list[Any]:
    """``given``, called ``name``, one after another.

    Raises:
        ConfigError: there is nothing to go through.
    """
    try:
        return list(given)
    except TypeError as error:
        raise ConfigError(f"{name}: got a {type(given).__name__}, want a list") from error


def dtype_of(tensor: Tensor) -> str:
    """``"bfloat16"`` and the like."""
    return str(tensor.dtype).removeprefix("torch.")


def bytes_of(tensor: Tensor, what: str) -> npt.NDArray[np.uint8]:
    """``tensor`` as uint8 of the same shape, the last dimension counted in bytes. It shares and keeps the memory alive.

    Raises:
        ConfigError: naming ``what``, if it is no tensor in CPU memory whose last dimension is contiguous, or its bytes
            are not its values.
    """
    if not isinstance(tensor, (torch.Tensor, np.ndarray)):
        raise ConfigError(f"{what}: got a {type(tensor).__name__}, want a torch tensor or a numpy array")
    if isinstance(tensor, torch.Tensor):
        _check_plain(tensor, what)
    elif tensor.dtype.hasobject:
        raise ConfigError(f"{what}: is an array of Python objects, want numbers")
    elif not tensor.size:  # its strides say nothing
        return np.empty((*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize), np.uint8)
    unit = 1 if isinstance(tensor, torch.Tensor) else tensor.itemsize
    strides = tensor.stride() if isinstance(tensor, torch.Tensor) else tensor.strides
    if not tensor.shape or strides[-1] != unit:
        raise ConfigError(f"{what}: strides {tuple(strides)}, want the elements of the last dimension side by side")
    _check_elements_apart(what, tuple(tensor.shape), tuple(strides), unit)
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().view(torch.uint8).numpy()
    if not tensor.flags.writeable:
        raise ConfigError(f"{what}: is read-only, want an array that blocks can be loaded into")
    return tensor.view(np.uint8)


def _check_elements_apart(what: str, shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> None:
    """Refuse strides by which one place belongs to two elements, and those that no cut of a dense tensor has.

    ``unit`` is the size of one element, in what ``strides`` count.
    """
    steps = sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    if 0 in shape or not steps:
        return
    if not steps[0][0]:
        raise ConfigError(f"{what}: is an expanded view, in which several elements share one place; pass the original")
    reach = unit
    for step, size in steps:
        if step < reach:
            raise ConfigError(
                f"{what}: strides {strides} of shape {list(shape)}: elements overlap, as in what unfold() and"
                " as_strided() return; pass a tensor in which each has a place of its own"
            )
        reach += (size - 1) * step


class Moored:
    """Torch tensors whose bytes have to stay where they were found: torch frees the place that a tensor leaves.

    Memory that numpy has needs no look: it stays in its place while there is a view of it.
    """

    def __init__(self, maker: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """``tensors`` with what messages call them; ``maker`` is the class that made memory of them."""
        self._maker = maker
        owned = [(what, _owner(tensor)) for what, tensor in tensors]
        self._names = [what for what, owner in owned if isinstance(owner, torch.Tensor)]
        self._tensors = [owner for _, owner in owned if isinstance(owner, torch.Tensor)]
        self._addresses = _addresses(self._tensors)

    def check(self) -> None:
        """Refuse tensors that lie elsewhere by now.

        Raises:
            ConfigError: naming one of them.
        """
        now = _addresses(self._tensors)
        if now == self._addresses:
            return
        moved = zip(self._names, self._addresses, now, strict=True)
        what, before, after = next(each for each in moved if each[1] != each[2])
        raise ConfigError(
            f"{what}: lies at {after:#x}, and lay at {before:#x} when this {self._maker} was made: share_memory_(), a "
            f"queue of torch.multiprocessing or an assignment to .data has moved it; make a new {self._maker} of the "
            "tensors, once they stay where they are"
        )


def _owner(tensor: Tensor) -> Any:
    """What has the memory of ``tensor``: for an array that ``numpy()`` of a torch tensor returned that is a tensor."""
    while isinstance(tensor, np.ndarray):
        tensor = tensor.base
    return tensor


def _addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, tensors)]  # a sixth faster than to call each in turn, and it is for every job


def _check_plain(tensor: torch.Tensor, what: str) -> None:
    if tensor.device.type != "cpu":
        raise ConfigError(
            f"{what}: is on {tensor.device}, want a tensor in CPU memory; on a GPU it is for kvtier.pages.DeviceTensors"
        )
    check_dense(tensor, what)


def check_dense(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor whose bytes are not its values, or do not lie in one place.

    Raises:
        ConfigError: naming ``what``.
    """
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ConfigError(f"{what}: is a tensor of layout {kind}, want a dense one, such as to_dense() returns")
    if tensor.is_conj():
        raise ConfigError(f"{what}: is a conjugated view of other numbers; pass what resolve_conj() returns")
    if tensor.is_neg():
        raise ConfigError(f"{what}: is a negated view of other numbers; pass what resolve_neg() returns")
