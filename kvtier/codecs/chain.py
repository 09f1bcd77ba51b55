"""Chains: one tensor codec and at most one byte codec, named ``raw`` or ``raw+lz4``.

To add a codec: write its class beside ``raw.py`` or ``lz4.py`` and add its line to a registry below.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Final, TypeVar

from kvtier.codecs.base import ByteCodec, TensorCodec, pages_of
from kvtier.codecs.lz4 import Lz4
from kvtier.codecs.raw import Raw
from kvtier.errors import ConfigError
from kvtier.models import KVLayout

Codec = TypeVar("Codec")

TENSOR_CODECS: Final[dict[str, TensorCodec]] = {codec.name: codec for codec in (Raw(),)}
BYTE_CODECS: Final[dict[str, ByteCodec]] = {codec.name: codec for codec in (Lz4(),)}


@dataclass(frozen=True, slots=True)
class Chain:
    """What a slice goes through on its way in: ``tensor`` first, then ``byte`` where it wins."""

    tensor: TensorCodec
    byte: ByteCodec | None = None

    @property
    def name(self) -> str:
        """What is written in records and in plans."""
        return self.tensor.name if self.byte is None else f"{self.tensor.name}+{self.byte.name}"

    def content_sizes(self, layout: KVLayout, group: int) -> tuple[int, ...]:
        """Per slice of ``group``, the bytes after the tensor codec. Every record of this chain has exactly these."""
        parts = layout.groups[group].parts
        return tuple(
            self.tensor.encoded_bytes(parts[span.parts.start : span.parts.stop], span.nbytes)
            for span in layout.slices[group]
        )

    def record_pages(self, layout: KVLayout, group: int) -> int:
        """4 KiB pages of a record of ``group`` when no byte codec wins: the room to reserve."""
        return 1 + sum(map(pages_of, self.content_sizes(layout, group)))


@lru_cache(maxsize=64)
def chain_of(name: str) -> Chain:
    """The chain called ``name``.

    Raises:
        ConfigError: naming the codec that is not known and the nearest that is.
    """
    first, plus, second = name.partition("+")
    return Chain(_known(TENSOR_CODECS, first, name), _known(BYTE_CODECS, second, name) if plus else None)


def chain_names() -> list[str]:
    """All chains that can be made."""
    return [*TENSOR_CODECS, *(f"{tensor}+{byte}" for tensor in TENSOR_CODECS for byte in BYTE_CODECS)]


def _known(registry: dict[str, Codec], codec: str, chain: str) -> Codec:
    if codec in registry:
        return registry[codec]
    nearest = get_close_matches(chain, chain_names(), n=1, cutoff=0.0)[0]
    known = ", ".join(chain_names())
    raise ConfigError(f"codec {chain!r}: {codec!r} is not known; did you mean {nearest!r}? There are: {known}")
