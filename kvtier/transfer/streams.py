"""What a GPU needs of memory and order; without one, nothing."""

from __future__ import annotations

import torch

from kvtier.errors import TierError
from kvtier.runtime.seam import Buffer


def pin(buffer: Buffer, mode: str) -> None:
    """Page-lock ``buffer`` for a GPU: ``auto`` where there is one, ``on`` or else fail, ``off`` never.

    Raises:
        TierError: CUDA refuses, or there is none and ``mode`` is ``on``.
    """
    if mode == "off" or (mode == "auto" and not torch.cuda.is_available()):
        return
    if not torch.cuda.is_available():
        raise TierError('host.pin = "on": there is no CUDA device to pin memory for; set it to "auto" or "off"')
    code = torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
        buffer.ctypes.data, buffer.nbytes, 0
    )
    if int(code):
        raise TierError(f"host.pin: CUDA refused to pin {buffer.nbytes} bytes (error {int(code)}): lower host.capacity")
