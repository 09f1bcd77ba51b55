"""How the caller keeps a model's KV: the dtypes, the order of axes and the pages that every family's parts share."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from kvtier.errors import ConfigError
from kvtier.models.parts import DTYPE_BYTES, Axis, Part, PartKind, dtype_name

DS_MLA: Final = "fp8_ds_mla"
"""FlashMLA's packed entries: fp8 values, bfloat16 rope and scales in one row of bytes; vLLM calls them so."""
INDEX_PLANES: Final = {"fp8_scaled": (8, 4), "mxfp4": (4, 4)}
"""DeepGEMM's packed index keys: bits a value, then bytes of scales a key, in two planes of a page."""
_ALIGNED_BYTES: Final = 576
"""FlashMLA pads the pages of DeepSeek V4 to a multiple of this."""


@dataclass(frozen=True, slots=True)
class Form:
    """What ``KVLayout.from_hf_config`` was asked for.

    ``windows`` says whether layers with a sliding window keep their windows only: None leaves it to the family.
    """

    block_tokens: int
    page_tokens: int
    axes: tuple[Axis, ...]
    dtype: str
    index_dtype: str
    state_dtype: str
    windows: bool | None

    @property
    def is_packed(self) -> bool:
        """Whether latents are FlashMLA's packed entries."""
        return self.dtype == DS_MLA

    def heads(self, layer: int, kind: PartKind, heads: int, dim: int) -> Part:
        """Keys or values of ``heads`` heads, in the caller's order of axes.

        Raises:
            ConfigError: the order lacks an axis, or the dtype is that of latents.
        """
        sizes: dict[Axis, int] = {"head": heads, "token": self.page_tokens, "dim": dim}
        if set(self.axes) != set(sizes) or len(self.axes) != len(sizes):
            raise ConfigError(f"axes = {self.axes}: want an order of ('head', 'token', 'dim')")
        return Part(layer, kind, self.plain_dtype, self.axes, tuple(sizes[axis] for axis in self.axes))

    def entries(self, layer: int, kind: PartKind, dim: int, *, ratio: int = 1, name: str = "") -> Part:
        """One vector of ``dim`` for every ``ratio`` tokens."""
        return self._rows(layer, kind, self.plain_dtype, dim, ratio, name)

    def index(self, layer: int, dim: int, *, ratio: int = 1) -> Part:
        """One index key of ``dim`` for every ``ratio`` tokens; packed ones as values, then scales of the whole page."""
        if self.index_dtype not in INDEX_PLANES:
            return self._rows(layer, "index", self.index_dtype, dim, ratio, "")
        bits, scales = INDEX_PLANES[self.index_dtype]
        return self._planes(layer, "index", (dim * bits // 8, scales), ratio, "")

    def packed_rows(self, layer: int, kind: PartKind, entry_bytes: int) -> Part:
        """Packed entries one after another, of DeepSeek V3.2."""
        return self._rows(layer, kind, "uint8", entry_bytes, 1, "")

    def packed_planes(
        self, layer: int, kind: PartKind, planes: tuple[int, int], *, ratio: int = 1, name: str = ""
    ) -> Part:
        """Packed entries of DeepSeek V4: values of all entries of a page, then their scales, then padding."""
        return self._planes(layer, kind, planes, ratio, name, _ALIGNED_BYTES)

    def state(
        self, layer: int, axes: tuple[Axis, ...], shape: tuple[int, ...], name: str, dtype: str | None = None
    ) -> Part:
        """What a layer has at one position, under ``name``; ``dtype`` is that of states unless it is given."""
        return Part(layer, "state", dtype or self.state_dtype, axes, shape, name=name)

    @property
    def plain_dtype(self) -> str:
        """The dtype of values that are not packed.

        Raises:
            ConfigError: they are to be packed, and only latents can be.
        """
        if self.is_packed:
            raise ConfigError(
                f"dtype = {DS_MLA!r}: packs latents of DeepSeek models and the like; this model caches keys and"
                f" values: use one of {', '.join(DTYPE_BYTES)}"
            )
        return self.dtype

    def _rows(self, layer: int, kind: PartKind, dtype: str, dim: int, ratio: int, name: str) -> Part:
        return Part(layer, kind, dtype, ("token", "dim"), (self._page_entries(ratio), dim), ratio, name)

    def _planes(
        self, layer: int, kind: PartKind, planes: tuple[int, ...], ratio: int, name: str, multiple: int = 1
    ) -> Part:
        nbytes = ceil(self._page_entries(ratio) * sum(planes) / multiple) * multiple
        return Part(layer, kind, "uint8", ("page",), (nbytes,), ratio, name, planes)

    def _page_entries(self, ratio: int) -> int:
        for name, tokens in (("block_tokens", self.block_tokens), ("page_tokens", self.page_tokens)):
            if tokens % ratio:
                raise ConfigError(
                    f"{name} = {tokens}: this model compresses {ratio} tokens into one entry, and a block and a page"
                    f" hold whole entries: use a multiple of {ratio}, such as {name}={ceil(tokens / ratio) * ratio}"
                )
        return self.page_tokens // ratio


def checked_form(
    block_tokens: int,
    page_tokens: int,
    axes: tuple[Axis, ...],
    dtype: Any,
    index_dtype: Any,
    state_dtype: Any,
    windows: Any,
) -> Form:
    """The form, with what was left to default filled in.

    Index keys are kept like all else, beside packed entries in eight bits with scales. States are not quantised with
    the KV: beside values of one byte they are bfloat16.

    Raises:
        ConfigError: a dtype is not known, or ``windows`` is neither of True, False and None.
    """
    kept = _packed_or_plain("dtype", dtype, (DS_MLA,))
    index = "fp8_scaled" if kept == DS_MLA else kept
    state = kept if DTYPE_BYTES.get(kept, 0) > 1 else "bfloat16"
    if windows not in (None, True, False):
        raise ConfigError(f"windows = {windows!r}: must be True, False, or None to leave it to the family")
    return Form(
        block_tokens=block_tokens,
        page_tokens=page_tokens,
        axes=axes,
        dtype=kept,
        index_dtype=index if index_dtype is None else _packed_or_plain("index_dtype", index_dtype, (*INDEX_PLANES,)),
        state_dtype=state if state_dtype is None else _packed_or_plain("state_dtype", state_dtype, ()),
        windows=windows,
    )


def _packed_or_plain(name: str, dtype: Any, packed: tuple[str, ...]) -> str:
    return dtype if isinstance(dtype, str) and dtype in packed else dtype_name(dtype, name=name, others=packed)
