"""LZ4 block format, in units short enough that no other thread waits long for the GIL.

    unit | unit | ...        unit = u32 little-endian coded bytes, then that many bytes of one LZ4 block

Every unit but the last decodes to ``UNIT_BYTES``. The library compresses without the GIL but copies its result with it,
which is why a slice is cut: 1 MiB costs others about 0.1 ms, and LZ4 looks back no further than 64 KiB anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

import lz4.block
import numpy as np

from kvtier.codecs.base import wins
from kvtier.core.memory import Bytes1D
from kvtier.errors import CorruptBlockError

UNIT_BYTES: Final = 1024 * 1024
_LENGTH: Final = Struct("<I")


@dataclass(frozen=True, slots=True)
class Lz4:
    """LZ4 at its default level: several GB/s a core in both directions."""

    name: str = "lz4"

    def encode(self, raw: Bytes1D, out: Bytes1D) -> int | None:
        """Units one after another; gives up at the first that makes a win impossible."""
        at = 0
        for start in range(0, raw.nbytes, UNIT_BYTES):
            unit = np.frombuffer(lz4.block.compress(raw[start : start + UNIT_BYTES], store_size=False), np.uint8)
            end = at + _LENGTH.size + unit.nbytes
            if end > out.nbytes or not wins(end, raw.nbytes):
                return None
            _LENGTH.pack_into(out.data, at, unit.nbytes)
            np.copyto(out[at + _LENGTH.size : end], unit)
            at = end
        return at or None

    def decode(self, stored: Bytes1D, out: Bytes1D) -> None:
        """Unit after unit; no length is used before it was compared with what is left.

        Raises:
            CorruptBlockError: a length does not fit, or a unit is not LZ4 of exactly its size.
        """
        at = 0
        for start in range(0, out.nbytes, UNIT_BYTES):
            target = out[start : start + UNIT_BYTES]
            first = at + _LENGTH.size
            end = first + _LENGTH.unpack_from(stored.data, at)[0] if first <= stored.nbytes else first
            if end > stored.nbytes:
                raise CorruptBlockError(f"lz4: the unit at byte {at} ends at {end} of {stored.nbytes}")
            np.copyto(target, _decoded_unit(stored[first:end], target.nbytes))
            at = end
        if at != stored.nbytes:
            raise CorruptBlockError(f"lz4: {stored.nbytes - at} bytes after the last unit")


def _decoded_unit(coded: Bytes1D, nbytes: int) -> Bytes1D:
    try:
        unit = lz4.block.decompress(coded, uncompressed_size=nbytes)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise CorruptBlockError(f"lz4: {error}") from error
    if len(unit) != nbytes:
        raise CorruptBlockError(f"lz4: a unit of {len(unit)} bytes where {nbytes} belong")
    return np.frombuffer(unit, np.uint8)
