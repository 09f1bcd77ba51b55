"""What a GPU needs of memory and order; without one, nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from kvtier.errors import TierError
from kvtier.runtime.seam import Buffer

log = logging.getLogger(__name__)


def pin(buffer: Buffer, mode: str) -> Callable[[], None]:
    """Page-lock ``buffer`` for a GPU: ``auto`` where there is one, ``on`` or else fail, ``off`` never.

    Returns what takes the lock off again, to be called once, while the memory is still mapped.

    Raises:
        TierError: CUDA refuses, or there is none and ``mode`` is ``on``.
    """
    if mode == "off" or (mode == "auto" and not torch.cuda.is_available()):
        return lambda: None
    if not torch.cuda.is_available():
        raise TierError('host.pin = "on": there is no CUDA device to pin memory for; set it to "auto" or "off"')
    address = buffer.ctypes.data
    code = int(torch.cuda.cudart().cudaHostRegister(address, buffer.nbytes, 0))  # type: ignore[no-untyped-call]
    if code:
        raise TierError(f"host.pin: CUDA refused to pin {buffer.nbytes} bytes (error {code}): lower host.capacity")
    return partial(_unpin, address)


def _unpin(address: int) -> None:
    """Memory that is unmapped while CUDA has it makes the next registration at its address fail."""
    code = int(torch.cuda.cudart().cudaHostUnregister(address))  # type: ignore[no-untyped-call]
    if code:
        log.warning("host.pin: CUDA did not unpin the memory at %#x (error %d)", address, code)
