"""The pieces that a layout is made of: parts, and groups of parts with one reuse rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, Literal, TypeAlias

from kvtier.errors import ConfigError

PartKind: TypeAlias = Literal["k", "v", "kv", "latent", "rope", "index", "state"]
Axis: TypeAlias = Literal["token", "head", "dim"]

DTYPE_BYTES: Final = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "uint8": 1, "int8": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of one layer: ``shape`` is one engine page of it, ``axes`` says what each dimension is.

    The bytes of a block are the bytes of its pages in token order, as the engine has them.
    """

    layer: int
    kind: PartKind
    dtype: str
    axes: tuple[Axis, ...]
    shape: tuple[int, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one engine page of this part."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def token_axis(self) -> int:
        """Which dimension of ``shape`` counts tokens."""
        return self.axes.index("token")

    @property
    def label(self) -> str:
        """How messages name it: ``layer 3 k``."""
        return f"layer {self.layer} {self.kind}"


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a hit needs of a group: ``all`` prefix blocks, those of a ``trailing`` window, or the ``last`` position."""

    rule: Literal["all", "trailing", "last"] = "all"
    window_tokens: int = 0


@dataclass(frozen=True)
class KVGroup:
    """Parts that are cached, evicted and aged together, in layer order."""

    name: str
    parts: tuple[Part, ...]
    reuse: Reuse = field(default_factory=Reuse)


def dtype_name(dtype: Any) -> str:
    """The plain name of a dtype: ``"bfloat16"`` for ``"bfloat16"``, ``torch.bfloat16`` and ``numpy.dtype`` alike.

    Raises:
        ConfigError: it is none that KV is kept in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype = {dtype!r}: not one of {', '.join(DTYPE_BYTES)}")
    return name
