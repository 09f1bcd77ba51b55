"""What content a block is: keys chained over tokens, or derived from an engine's own keys.

A key is SHA-256 over length-prefixed fields, so that no two different inputs share an encoding:

    root        = H("kvtier-root-1", model id, weights version, adapter, tenant)
    key of i    = H(key of i-1 or root, token ids of block i as little-endian int32, extra of block i)
    foreign key = H("kvtier-foreign-1", root, engine, raw key)

``extra`` carries what the tokens do not say (multimodal content, say): for every item that overlaps the block,
its position relative to the block and its digest.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from operator import index
from struct import iter_unpack, pack
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.core.checks import flag, whole
from kvtier.errors import ConfigError

KEY_BYTES = 32
MAX_TOKEN_ID = 2**31 - 1
_MAX_POSITION = 2**62

TokenIds: TypeAlias = Any
"""A sequence of ints, a numpy integer array or a torch integer tensor; one-dimensional, ids in [0, 2^31)."""

Extra: TypeAlias = tuple[int, int, bytes]
"""(start, stop, digest): content beyond the token ids at positions [start, stop)."""


@dataclass(frozen=True, slots=True)
class Root:
    """What every key of one model, weights version, adapter and tenant starts from."""

    model_id: str
    weights_version: str = ""
    adapter: str = ""
    tenant: str = ""

    def digest(self) -> bytes:
        """The 32 bytes that take the place of a parent for block 0."""
        fields = (self.model_id, self.weights_version, self.adapter, self.tenant)
        return _digest(b"kvtier-root-1", *(field.encode() for field in fields))


class Keys:
    """The keys of one sequence: hashed once, appended to as the sequence grows.

    ``digests[i]`` identifies tokens [0, (i + 1) * block_tokens); a partial last block has no key until it is full.
    """

    __slots__ = (
        "_reaches",
        "_rows",
        "_starts",
        "_tail",
        "block_tokens",
        "chained",
        "digests",
        "extra",
        "foreign_engine",
        "num_tokens",
        "root",
        "root_digest",
    )

    def __init__(self, root: Root, block_tokens: int, extra: Iterable[Extra] = ()) -> None:
        """No tokens yet.

        Raises:
            ConfigError: an item of ``extra`` is not (start, stop, digest) with 0 <= start < stop.
        """
        if block_tokens < 1:
            raise ConfigError(f"block_tokens = {block_tokens}: must be at least 1")
        self.root = root
        self.root_digest = root.digest()
        self.block_tokens = block_tokens
        items = enumerate(_items("extra", extra))
        self.extra = tuple(sorted(_checked_extra(position, item) for position, item in items))
        self._starts = [start for start, _, _ in self.extra]
        self._reaches = list(accumulate((stop for _, stop, _ in self.extra), max))  # of each item and those before it
        self.foreign_engine: str | None = None
        self.chained = True
        self.digests: list[bytes] = []
        self.num_tokens = 0
        self._tail = np.empty(0, np.int32)
        self._rows: npt.NDArray[np.uint8] | None = None

    @classmethod
    def from_tokens(cls, root: Root, tokens: TokenIds, block_tokens: int, extra: Iterable[Extra] = ()) -> Keys:
        """Keys of all full blocks of ``tokens``."""
        keys = cls(root, block_tokens, extra)
        keys.append(tokens)
        return keys

    @classmethod
    def foreign(
        cls,
        root: Root,
        raw_keys: Sequence[bytes],
        block_tokens: int,
        *,
        engine: str,
        chained: bool,
        num_tokens: int | None = None,
    ) -> Keys:
        """Keys of an engine's own block hashes; ``chained`` says whether block i extends block i - 1.

        ``num_tokens`` is the length of the sequence; without it every block may hit (one token more than the blocks).

        Raises:
            ConfigError: a raw key is no bytes, or comes twice; ``engine`` is no name, ``chained`` neither True nor
                False, or ``num_tokens`` not the length of a sequence of so many full blocks.
        """
        if not isinstance(engine, str) or not engine or not engine.isprintable():
            raise ConfigError(
                f"engine = {engine!r}: must be a string of printable characters that names the engine, such as 'vllm'"
            )
        keys = cls(root, block_tokens)
        keys.foreign_engine = engine
        tag = engine.encode()
        raw = [_checked_raw(position, item) for position, item in enumerate(_items("raw_keys", raw_keys))]
        if len(set(raw)) < len(raw):
            first = {item: at for at, item in reversed(list(enumerate(raw)))}
            twice = next(at for at, item in enumerate(raw) if first[item] != at)
            raise ConfigError(f"raw_keys[{twice}] = {raw[twice].hex()}: comes twice; a sequence has a block only once")
        keys.digests = [_digest(b"kvtier-foreign-1", keys.root_digest, tag, item) for item in raw]
        keys.chained = flag("chained", chained)
        least = len(raw) * block_tokens
        keys.num_tokens = least + 1 if num_tokens is None else _checked_length(num_tokens, least, block_tokens)
        return keys

    def append(self, tokens: TokenIds) -> None:
        """Extend the sequence; only the blocks that become full are hashed.

        Raises:
            ConfigError: a token id is outside [0, 2^31), ``tokens`` is not one-dimensional and integer, the keys are
                an engine's own, or an earlier append was interrupted half-way.
        """
        if self.foreign_engine is not None:
            raise ConfigError(f"append: foreign keys of {self.foreign_engine!r} do not grow by tokens; make them anew")
        if self.num_tokens != len(self.digests) * self.block_tokens + len(self._tail):
            raise ConfigError(f"append: another one was interrupted after {self.num_tokens} tokens; make the keys anew")
        ids = new = token_array(tokens)
        if len(self._tail):
            ids = np.concatenate((self._tail, new))
        hashed = len(ids) // self.block_tokens * self.block_tokens
        digests = self._hash_blocks(ids[:hashed])
        # What Ctrl-C leaves undone from here on, the next append finds out.
        self.digests += digests
        self._tail = ids[hashed:].copy()
        self.num_tokens += len(new)

    def rows(self) -> npt.NDArray[np.uint8]:
        """All keys as one array, uint8 ``[len(self), 32]``."""
        rows = self._rows
        if rows is None or len(rows) != len(self.digests):  # another thread may append meanwhile
            rows = self._rows = np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, KEY_BYTES)
        return rows

    def parent(self, block: int) -> bytes:
        """The key that block ``block`` extends: the root's digest where it extends none."""
        return self.digests[block - 1] if self.chained and block else self.root_digest

    def parents(self, blocks: Iterable[int]) -> bytes:
        """The keys that ``blocks`` extend, one after another."""
        digests, root = self.digests, self.root_digest
        return b"".join([digests[block - 1] if self.chained and block else root for block in blocks])

    def __len__(self) -> int:
        return len(self.digests)

    def __repr__(self) -> str:
        last = self.digests[-1].hex()[:12] if self.digests else "-"
        return f"Keys({len(self)} x {self.block_tokens} tokens, last {last}, {self.num_tokens} tokens)"

    def _hash_blocks(self, ids: npt.NDArray[np.int32]) -> list[bytes]:
        """The keys of the full blocks ``ids``, which follow on those that there are."""
        size = 4 * self.block_tokens
        data = ids.astype("<i4", copy=False).tobytes()
        before, between, after = pack("<Q", KEY_BYTES), pack("<Q", size), pack("<Q", 0)
        parent = self.digests[-1] if self.digests else self.root_digest
        digests: list[bytes] = []
        first = len(self.digests)
        for block, (piece,) in enumerate(iter_unpack(f"{size}s", data), first):
            tail = self._extra_of(block) if self.extra else after
            parent = sha256(b"".join((before, parent, between, piece, tail))).digest()
            digests.append(parent)
        return digests

    def _extra_of(self, block: int) -> bytes:
        start = block * self.block_tokens
        stop = start + self.block_tokens
        near = self.extra[bisect_right(self._reaches, start) : bisect_left(self._starts, stop)]
        items = [pack("<qqQ", a - start, b - start, len(digest)) + digest for a, b, digest in near if b > start]
        joined = b"".join(items)
        return pack("<Q", len(joined)) + joined


def token_array(tokens: TokenIds) -> npt.NDArray[np.int32]:
    """``tokens`` as a contiguous int32 array, checked to lie in [0, 2^31).

    Raises:
        ConfigError: naming the first id that is out of range, or the type or shape that cannot be used.
    """
    if isinstance(tokens, (list, tuple)):
        return _checked(_from_list(tokens))
    try:
        ids = np.asarray(tokens.detach().cpu().numpy() if hasattr(tokens, "detach") else tokens)
    except (TypeError, RuntimeError) as error:  # a dtype that numpy lacks, such as bfloat16; the meta device; nested
        raise ConfigError(f"tokens: want one dimension of integers, got {type(tokens).__name__}: {error}") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(f"tokens: want one dimension of integers, got shape {ids.shape} of {ids.dtype}")
    return _checked(ids)


def _from_list(tokens: Sequence[int]) -> npt.NDArray[Any]:
    try:
        ids = np.frombuffer(array("I", tokens), np.uint32)  # in less than half the time of signed ones
    except (OverflowError, TypeError) as error:
        raise _first_wrong(tokens) or error from error
    # True is 1 to ``array``; looking at types costs too much unless the values are those of a mask.
    if ids.size and not 1 < ids.max() <= MAX_TOKEN_ID and (wrong := _first_wrong(tokens)):
        raise wrong
    return ids.view(np.int32)


def _first_wrong(tokens: Sequence[Any]) -> ConfigError | None:
    for position, token in enumerate(tokens):
        try:
            value = None if isinstance(token, bool) else index(token)
        except TypeError:
            value = None
        if value is None:
            return ConfigError(f"tokens[{position}] = {token!r}: want an integer")
        if not 0 <= value <= MAX_TOKEN_ID:
            return ConfigError(f"tokens[{position}] = {value}: token ids lie in [0, 2^31)")
    return None


def _checked_extra(position: int, item: Any) -> Extra:
    try:
        start, stop, digest = item
        checked = index(start), index(stop), bytes(memoryview(digest))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"extra[{position}] = {item!r}: want (start, stop, digest as bytes)") from error
    if not 0 <= checked[0] < checked[1] <= _MAX_POSITION or isinstance(start, bool) or isinstance(stop, bool):
        raise ConfigError(f"extra[{position}] = {item!r}: want positions 0 <= start < stop <= 2^62")
    return checked


def _items(name: str, given: Iterable[Any]) -> Iterable[Any]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"{name} = {given!r}: want a list")
    return given


def _checked_length(num_tokens: int, least: int, block_tokens: int) -> int:
    num_tokens = whole("num_tokens", num_tokens)
    if not least <= num_tokens < least + block_tokens:
        raise ConfigError(
            f"num_tokens = {num_tokens}: {least // block_tokens} keys of blocks of {block_tokens} tokens are those of"
            f" {least} to {least + block_tokens - 1} tokens; pass one key per full block"
        )
    return num_tokens


def _checked_raw(position: int, raw: Any) -> bytes:
    try:
        return bytes(memoryview(raw))
    except TypeError as error:
        raise ConfigError(f"raw_keys[{position}] = {raw!r}: want bytes") from error


def _checked(ids: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > MAX_TOKEN_ID):
        position = int(np.flatnonzero((ids < 0) | (ids > MAX_TOKEN_ID))[0])
        raise ConfigError(f"tokens[{position}] = {ids[position]}: token ids lie in [0, 2^31)")
    return np.ascontiguousarray(ids, dtype=np.int32)


def _digest(*fields: bytes) -> bytes:
    return sha256(b"".join(pack("<Q", len(field)) + field for field in fields)).digest()
