"""The pieces that a layout is made of: parts, and groups of parts with one reuse rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, Literal, TypeAlias, get_args

from kvtier.core.checks import at_least, one_of, several, whole
from kvtier.errors import ConfigError

PartKind: TypeAlias = Literal["k", "v", "kv", "latent", "rope", "index", "state"]
Axis: TypeAlias = Literal["token", "head", "dim", "state", "page"]
"""What a dimension counts.

``state`` is an inner dimension of a state, such as the taps of a convolution; ``page`` counts the bytes of a page whose
entries lie in planes.
"""
ReuseRule: TypeAlias = Literal["all", "trailing", "last"]

DTYPE_BYTES: Final = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "uint8": 1, "int8": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of one layer: ``shape`` is one engine page of it, ``axes`` says what each dimension is.

    The bytes of a block are the bytes of its pages in token order, as the engine has them. Where one entry stands for
    ``tokens_per_entry`` tokens (compressed attention), the token axis counts entries. A part without a token axis is a
    state: the page is all of it, at one position. ``name`` tells parts of one kind in one layer apart.

    Kernels that read quantised entries keep a page in ``planes``: the values of all its entries, then their scales.
    ``planes`` are the bytes that one entry has in each; the page is uint8 ``(bytes,)`` with the axis ``page``, and what
    the entries leave of it is padding.
    """

    layer: int
    kind: PartKind
    dtype: str
    axes: tuple[Axis, ...]
    shape: tuple[int, ...]
    tokens_per_entry: int = 1
    name: str = ""
    planes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no tensor of a layer. Integers of numpy become int, lists tuple.

        Raises:
            ConfigError: naming the field that does not fit.
        """
        one_of("kind", self.kind, get_args(PartKind))
        object.__setattr__(self, "layer", at_least("layer", self.layer, 0))
        one_of(f"{self.label}: dtype", self.dtype, tuple(DTYPE_BYTES))
        object.__setattr__(self, "axes", checked_axes(f"{self.label}: axes", self.axes))
        sizes = several(f"{self.label}: shape", self.shape)
        shape = tuple(at_least(f"{self.label}: shape[{at}]", size, 1) for at, size in enumerate(sizes))
        object.__setattr__(self, "shape", shape)
        if not shape or len(self.axes) != len(shape) or len(set(self.axes)) != len(self.axes):
            raise ConfigError(f"{self.label}: axes {self.axes} do not describe shape {shape}")
        _check_name(f"{self.label}: name", self.name, least=0)
        ratio = at_least(f"{self.label}: tokens_per_entry", self.tokens_per_entry, 1)
        object.__setattr__(self, "tokens_per_entry", ratio)
        self._check_planes()
        if ratio > 1 and self.is_state:
            raise ConfigError(f"{self.label}: tokens_per_entry = {ratio}, but its axes {self.axes} count no tokens")

    @property
    def is_state(self) -> bool:
        """Whether it is one value at one position, not one for every token or entry."""
        return not self.planes and "token" not in self.axes

    @property
    def page_bytes(self) -> int:
        """Bytes of one engine page of this part."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry, without what pads a page; of a state all of it."""
        if self.planes:
            return sum(self.planes)
        return self.page_bytes if self.is_state else self.page_bytes // self.shape[self.token_axis]

    @property
    def token_axis(self) -> int:
        """Which dimension of ``shape`` counts tokens, or entries of several; a page in planes has none."""
        return self.axes.index("token")

    @property
    def label(self) -> str:
        """How messages name it: ``layer 3 k``."""
        return f"layer {self.layer} {self.kind} {self.name}".rstrip()

    def _check_planes(self) -> None:
        found = several(f"{self.label}: planes", self.planes)
        planes = tuple(at_least(f"{self.label}: planes[{at}]", width, 1) for at, width in enumerate(found))
        object.__setattr__(self, "planes", planes)
        if bool(planes) != ("page" in self.axes):
            raise ConfigError(
                f"{self.label}: axes {self.axes} with planes {planes}: a page in planes has the one axis 'page', and"
                " only such a page"
            )
        if planes and (self.axes != ("page",) or self.dtype != "uint8"):
            raise ConfigError(
                f"{self.label}: a {self.dtype} page of axes {self.axes} in planes {planes}: want uint8 and ('page',)"
            )


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a hit needs of a group: ``all`` prefix blocks, those of a ``trailing`` window, or the ``last`` position.

    A window is that of the last ``window_tokens`` tokens before the hit's end. ``replay_tokens`` is how many tokens at
    the hit's end have to be computed again to have exactly what the group would have held there, from the groups with
    rule ``all`` alone; 0 where that cannot be done. That says nothing of how KV lies: equal layouts may differ in it.
    """

    rule: ReuseRule = "all"
    window_tokens: int = 0
    replay_tokens: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        """Refuse an unknown rule, and a window that is missing or means nothing.

        Raises:
            ConfigError: naming the field that does not fit.
        """
        one_of("rule", self.rule, get_args(ReuseRule))
        object.__setattr__(self, "window_tokens", whole("window_tokens", self.window_tokens))
        if self.rule == "trailing":
            at_least("window_tokens", self.window_tokens, 1)
        elif self.window_tokens:
            raise ConfigError(
                f"window_tokens = {self.window_tokens}: rule {self.rule!r} has no window, only 'trailing'"
            )
        object.__setattr__(self, "replay_tokens", at_least("replay_tokens", self.replay_tokens, 0))
        if self.replay_tokens and self.rule == "all":
            raise ConfigError(f"replay_tokens = {self.replay_tokens}: rule 'all' has nothing to be computed again from")


@dataclass(frozen=True)
class KVGroup:
    """Parts that are cached, evicted and aged together, in layer order."""

    name: str
    parts: tuple[Part, ...]
    reuse: Reuse = field(default_factory=Reuse)

    def __post_init__(self) -> None:
        """Refuse what is no group. A list of parts becomes a tuple.

        Raises:
            ConfigError: naming the field that does not fit.
        """
        _check_name("name", self.name, least=1)
        parts = several(f"group {self.name!r}: parts", self.parts)
        for at, part in enumerate(parts):
            if not isinstance(part, Part):
                raise ConfigError(f"group {self.name!r}: parts[{at}] is a {type(part).__name__}, want a Part")
        if not isinstance(self.reuse, Reuse):
            raise ConfigError(f"group {self.name!r}: reuse = {self.reuse!r}, want a Reuse, such as Reuse('all')")
        object.__setattr__(self, "parts", parts)
        for part in parts:
            if part.is_state != (self.reuse.rule == "last"):
                raise ConfigError(
                    f"group {self.name!r}, {part.label}: axes {part.axes} under rule {self.reuse.rule!r}: states, which"
                    " have no token axis, belong into a group with Reuse('last'), all other parts into another one"
                )


def _check_name(what: str, name: Any, *, least: int) -> None:
    if not isinstance(name, str) or len(name) < least or not name.isprintable():
        raise ConfigError(f"{what} = {name!r}: want a string of printable characters")


def checked_axes(name: str, axes: Any) -> tuple[Axis, ...]:
    """``axes``, called ``name``, as a tuple.

    Raises:
        ConfigError: one of them is not known.
    """
    found: tuple[Axis, ...] = several(name, axes)
    for at, axis in enumerate(found):
        one_of(f"{name}[{at}]", axis, get_args(Axis))
    return found


def dtype_name(dtype: Any, *, name: str = "dtype", others: tuple[str, ...] = ()) -> str:
    """The plain name of a dtype: ``"bfloat16"`` for ``"bfloat16"``, ``torch.bfloat16`` and ``numpy.dtype`` alike.

    ``name`` is what messages call it; ``others`` would have been allowed besides.

    Raises:
        ConfigError: it is none that KV is kept in.
    """
    plain = str(dtype).removeprefix("torch.")
    if plain not in DTYPE_BYTES:
        raise ConfigError(f"{name} = {dtype!r}: not one of {', '.join((*DTYPE_BYTES, *others))}")
    return plain
