"""Which device a slab lies on, and whether it has the memory."""

from __future__ import annotations

import torch

from kvtier.errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device that ``device.device = name`` means: ``auto``, ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises:
        ConfigError: there is no such GPU.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return torch.device("cpu")
    count = torch.cuda.device_count() if has_cuda else 0
    _, _, number = name.partition(":")
    if not count or (number and int(number) >= count):
        raise ConfigError(
            f'device.device = "{name}": torch sees {count} CUDA devices; name one of them, "auto", or "cpu"'
        )
    return torch.device("cuda", int(number) if number else torch.cuda.current_device())


def check_device(nbytes: int, device: torch.device) -> None:
    """Refuse a slab of ``nbytes`` that is more than ``device``, a GPU, has free.

    Raises:
        ConfigError: it is.
    """
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if nbytes > free_bytes:
        raise ConfigError(
            f"device.capacity = {nbytes}: more than the {free_bytes} bytes that {device} has free; make it smaller, or"
            " let the engine take less"
        )


def device_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """``nbytes`` of memory of ``device``, a GPU: uint8, not initialised.

    Raises:
        ConfigError: it has not so much free.
    """
    check_device(nbytes, device)
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"device.capacity = {nbytes}: {device} does not have it in one piece; lower it") from error
