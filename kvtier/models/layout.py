"""How the KV of one model lies: layout, groups, parts, and the slices that records are cut into."""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import ceil
from typing import Any, Final

from kvtier.core.checks import at_least, several
from kvtier.errors import ConfigError
from kvtier.models.families import checked_form, groups_of
from kvtier.models.parts import Axis, KVGroup, Part, checked_axes

MIN_SLICE_BYTES: Final = 256 * 1024
GROWN_SLICE_BYTES: Final = 2 * 1024 * 1024
"""Slices grow to this: the first layers are soon there, and the rest takes few calls (ADR 0004)."""
MAX_SLICES: Final = 64
MAX_SLICE_BYTES: Final = (1 << 32) - 1
MAX_GROUPS: Final = 1 << 16
MAX_BLOCK_TOKENS: Final = (1 << 31) - 1
"""These three are what the header of a record has room to say (docs/format.md)."""


@dataclass(frozen=True, slots=True)
class SliceSpan:
    """A run of whole parts, the unit of reading, checksums and decoding. ``nbytes`` is its size before any codec."""

    parts: range
    nbytes: int


@dataclass(frozen=True)
class KVLayout:
    """The KV of one model on one rank.

    ``block_tokens`` is a multiple of ``page_tokens``, and that of every part's ``tokens_per_entry``: the token axis of
    a part has ``page_tokens / tokens_per_entry`` entries.
    """

    block_tokens: int
    page_tokens: int
    groups: tuple[KVGroup, ...]
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        """Refuse what could not be stored. Integers of numpy become int, lists tuple.

        Equal layouts are then described alike: 64.0 equals 64, but would name another directory.

        Raises:
            ConfigError: naming the field that does not fit.
        """
        sizes = _checked_sizes(self.block_tokens, self.page_tokens)
        ranks = (*_checked_rank("tp", self.tp_rank, self.tp_size), *_checked_rank("pp", self.pp_rank, self.pp_size))
        fields = ("block_tokens", "page_tokens", "tp_rank", "tp_size", "pp_rank", "pp_size")
        for name, value in zip(fields, (*sizes, *ranks), strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "groups", _checked_groups(self.groups))
        for group in self.groups:
            self._check_parts(group)
        for group, spans in zip(self.groups, self.slices, strict=True):
            _check_slices(group, spans)

    @classmethod
    def from_hf_config(
        cls,
        hf_config: Any,
        block_tokens: int = 64,
        dtype: Any = "bfloat16",
        *,
        axes: tuple[Axis, ...] = ("head", "token", "dim"),
        page_tokens: int | None = None,
        index_dtype: Any = None,
        state_dtype: Any = None,
        windows: bool | None = None,
    ) -> KVLayout:
        """The layout of a Hugging Face model; see ``kvtier.models.families`` for the families that are known.

        ``hf_config`` is a ``PretrainedConfig`` or its dict. ``axes`` is the order inside one engine page of keys and
        values; the default is that of transformers' own caches, with pages as long as blocks.

        Dtypes are names or ``torch.dtype``. ``dtype`` may also be ``"fp8_ds_mla"``: FlashMLA's packed entries of
        DeepSeek V3.2 (656 bytes) and V4 (584 bytes, pages padded to a multiple of 576). ``index_dtype`` is that of
        index keys, ``dtype`` by default, and may be ``"fp8_scaled"`` (DeepGEMM's 132 bytes; the default beside packed
        entries) or ``"mxfp4"`` (68 bytes). ``state_dtype`` is that of states, ``dtype`` by default, or bfloat16 where
        that has one byte.

        ``windows`` decides whether layers with a sliding window are kept as windows (True) or whole (False). None
        leaves it to the family: windows beside full layers are kept as such (Gemma 3, gpt-oss), those of Mistral and
        Qwen whole. DeepSeek V4 has its windows in any case.

        Raises:
            ConfigError: the architecture is not known; the message names it and says what to pass instead. Or an
                argument is none that a layout can have, such as a block that ends inside an entry of several tokens.
        """
        sizes = _checked_sizes(block_tokens, block_tokens if page_tokens is None else page_tokens)
        form = checked_form(*sizes, checked_axes("axes", axes), dtype, index_dtype, state_dtype, windows)
        return cls(*sizes, groups_of(hf_config, form))

    @cached_property
    def placement(self) -> str:
        """Hex digest of how the KV lies; it names the directory on disk and is compared on every read."""
        return sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def slices(self) -> tuple[tuple[SliceSpan, ...], ...]:
        """Per group, the slices of its records in layer order."""
        return tuple(self._cut(group, pages) for group, pages in zip(self.groups, self.block_pages, strict=True))

    @cached_property
    def kept_tokens(self) -> tuple[int, ...]:
        """Per group, the last tokens of a block that its records hold.

        All of them, or, where a window is shorter than a block, as many whole pages as cover it: a hit ends with a
        block, so nothing before them is ever needed. 0 for states.
        """
        return tuple(self._kept(group) for group in self.groups)

    @cached_property
    def block_pages(self) -> tuple[int, ...]:
        """Per group, the engine pages that one record holds; one for a state."""
        return tuple(max(1, kept // self.page_tokens) for kept in self.kept_tokens)

    @cached_property
    def window_blocks(self) -> tuple[int, ...]:
        """Per group, the blocks at its end that a hit needs; 0 stands for all of them."""
        return tuple(self._window(group) for group in self.groups)

    @cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """Per group, the payload of one block before any codec."""
        return tuple(sum(span.nbytes for span in spans) for spans in self.slices)

    @cached_property
    def record_pages(self) -> tuple[int, ...]:
        """Per group, the 4 KiB pages of one raw record: a header page, then every slice rounded up."""
        return tuple(1 + sum(ceil(span.nbytes / 4096) for span in spans) for spans in self.slices)

    @cached_property
    def token_bytes(self) -> tuple[float, ...]:
        """Per group, what one more token adds to a long sequence: 0 for windows and states, which grow no more.

        Entries alone are counted, without what pads a page; of an entry that stands for several tokens a share.
        """
        return tuple(
            sum(part.entry_bytes / part.tokens_per_entry for part in group.parts) if group.reuse.rule == "all" else 0.0
            for group in self.groups
        )

    @property
    def bytes_per_token(self) -> float:
        """KV bytes that one more token adds to a long sequence, over all groups; see ``token_bytes``."""
        return sum(self.token_bytes)

    @property
    def page_bytes_per_token(self) -> float:
        """As ``bytes_per_token``, with what pads pages: what an engine's memory really holds."""
        return sum(
            part.page_bytes / self.page_tokens
            for group in self.groups
            if group.reuse.rule == "all"
            for part in group.parts
        )

    def part_bytes(self, group: int, part: Part) -> int:
        """Bytes of one block of ``part``, which is one of group number ``group``."""
        return part.page_bytes * self.block_pages[group]

    def sequence_bytes(self, tokens: int) -> int:
        """What a sequence of ``tokens`` is at its end, without unfinished entries, padding and what left a window."""
        return sum(self.sequence_group_bytes(tokens))

    def sequence_group_bytes(self, tokens: int) -> tuple[int, ...]:
        """Per group, its part of ``sequence_bytes``."""
        return tuple(sum(_sequence_bytes(group, part, tokens) for part in group.parts) for group in self.groups)

    def describe(self) -> dict[str, Any]:
        """The layout as plain values: what the placement digest is over, and what is stored beside the blocks."""
        return {
            "format": 1,
            "block_tokens": self.block_tokens,
            "page_tokens": self.page_tokens,
            "ranks": [self.tp_rank, self.tp_size, self.pp_rank, self.pp_size],
            "groups": [
                {
                    "name": group.name,
                    "reuse": [group.reuse.rule, group.reuse.window_tokens],
                    "parts": [_described(part) for part in group.parts],
                }
                for group in self.groups
            ],
        }

    def _check_parts(self, group: KVGroup) -> None:
        seen: set[str] = set()
        for part in group.parts:
            where = f"group {group.name!r}, {part.label}"
            if not part.is_state:
                self._check_entries(where, part)
            if part.label in seen:
                raise ConfigError(
                    f"{where}: a group holds one part of a kind and name per layer, this one is there twice"
                )
            seen.add(part.label)

    def _check_entries(self, where: str, part: Part) -> None:
        entries, odd = divmod(self.page_tokens, part.tokens_per_entry)
        if odd:
            raise ConfigError(
                f"{where}: tokens_per_entry = {part.tokens_per_entry}: page_tokens ="
                f" {self.page_tokens} must be a multiple of it"
            )
        if part.planes:
            if entries * part.entry_bytes > part.page_bytes:
                raise ConfigError(
                    f"{where}: a page of {part.page_bytes} bytes has no room for {entries} {_of_what(part)} of"
                    f" {part.entry_bytes} bytes"
                )
            return
        if part.shape[part.token_axis] != entries:
            raise ConfigError(
                f"{where}: shape {part.shape} does not have {entries} {_of_what(part)} along its token axis"
            )

    def _kept(self, group: KVGroup) -> int:
        if group.reuse.rule == "last":
            return 0
        if group.reuse.rule == "all":
            return self.block_tokens
        return min(self.block_tokens, ceil(group.reuse.window_tokens / self.page_tokens) * self.page_tokens)

    def _window(self, group: KVGroup) -> int:
        return {"all": 0, "last": 1, "trailing": ceil(group.reuse.window_tokens / self.block_tokens)}[group.reuse.rule]

    def _cut(self, group: KVGroup, pages: int) -> tuple[SliceSpan, ...]:
        fair = ceil(len(group.parts) / MAX_SLICES)
        spans: list[SliceSpan] = []
        first = nbytes = 0
        for number, part in enumerate(group.parts, 1):
            nbytes += part.page_bytes * pages
            if nbytes >= _slice_bytes(len(spans)) and number - first >= fair:
                spans.append(SliceSpan(range(first, number), nbytes))
                first, nbytes = number, 0
        if spans and nbytes < MIN_SLICE_BYTES:
            last = spans.pop()
            first, nbytes = last.parts.start, nbytes + last.nbytes
        if nbytes:
            spans.append(SliceSpan(range(first, len(group.parts)), nbytes))
        return tuple(spans)


def checked_layout(layout: Any) -> KVLayout:
    """``layout``.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(layout, KVLayout):
        raise ConfigError(
            f"layout = {reprlib.repr(layout)}: want a KVLayout; KVLayout.from_hf_config(model.config) makes one, or"
            " describe the model's cache by KVGroup and Part"
        )
    return layout


def _checked_sizes(block_tokens: Any, page_tokens: Any) -> tuple[int, int]:
    block, page = at_least("block_tokens", block_tokens, 1), at_least("page_tokens", page_tokens, 1)
    if block % page:
        raise ConfigError(f"block_tokens = {block}: must be a positive multiple of page_tokens = {page}")
    if block > MAX_BLOCK_TOKENS:
        raise ConfigError(f"block_tokens = {block}: a block has at most {MAX_BLOCK_TOKENS} tokens; use fewer")
    return block, page


def _checked_rank(kind: str, rank: Any, size: Any) -> tuple[int, int]:
    size, rank = at_least(f"{kind}_size", size, 1), at_least(f"{kind}_rank", rank, 0)
    if rank >= size:
        raise ConfigError(f"{kind}_rank = {rank}: must be below {kind}_size = {size}; ranks count from 0")
    return rank, size


def _checked_groups(groups: Any) -> tuple[KVGroup, ...]:
    found = several("groups", groups)
    if len(found) > MAX_GROUPS:
        raise ConfigError(f"groups: got {len(found)}, want at most {MAX_GROUPS}; put parts of one reuse together")
    for at, group in enumerate(found):
        if not isinstance(group, KVGroup):
            raise ConfigError(f"groups[{at}] is a {type(group).__name__}, want a KVGroup")
    if not found or not all(group.parts for group in found):
        raise ConfigError("groups: a layout needs at least one group, and every group at least one part")
    return found


def _check_slices(group: KVGroup, spans: tuple[SliceSpan, ...]) -> None:
    for span in spans:
        if span.nbytes > MAX_SLICE_BYTES:
            first, last = (group.parts[at].label for at in (span.parts.start, span.parts.stop - 1))
            what = first if first == last else f"{first} to {last}"
            raise ConfigError(
                f"group {group.name!r}, {what}: {span.nbytes} bytes of one block in one slice of its record, want at"
                f" most {MAX_SLICE_BYTES}; use fewer tokens per block, or more and smaller parts"
            )


def _of_what(part: Part) -> str:
    return "tokens" if part.tokens_per_entry == 1 else f"entries of {part.tokens_per_entry} tokens"


def _described(part: Part) -> list[Any]:
    """Plain attention parts are described as they always were: their directories keep their names."""
    planes = [list(part.planes)] if part.planes else []
    more = [part.tokens_per_entry, part.name, *planes] if part.tokens_per_entry > 1 or part.name or planes else []
    return [part.layer, part.kind, part.dtype, list(part.axes), list(part.shape), *more]


def _sequence_bytes(group: KVGroup, part: Part, tokens: int) -> int:
    if part.is_state:
        return part.entry_bytes if tokens else 0
    held = min(tokens, group.reuse.window_tokens) if group.reuse.rule == "trailing" else tokens
    return held // part.tokens_per_entry * part.entry_bytes


def _slice_bytes(number: int) -> int:
    """Least size of slice ``number``: 256 KiB, 256 KiB, 512 KiB, 1 MiB, and 2 MiB from then on."""
    return min(MIN_SLICE_BYTES << max(0, number - 1), GROWN_SLICE_BYTES)
