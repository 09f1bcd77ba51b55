"""The kernels that numba compiles: pages to records and back, checksums made on the way. Needs numba; see ``loading``.

Importing this module compiles everything for the signatures below, or takes it from numba's cache: seconds the first
time, a third of one later, during which other threads stall for up to 50 ms. The intrinsics stand in the same file as
the kernels because numba looks at the age of a kernel's own file only when it decides whether its cache is stale.

Addresses are int64. They are trusted: whoever calls has checked the page table and keeps the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# --- what LLVM can do and Python cannot say --------------------------------------------------------------------------

_I32, _I64, _I128 = ir.IntType(32), ir.IntType(64), ir.IntType(128)
_BYTES: Final = ir.IntType(8).as_pointer()
_LANES: Final = ir.VectorType(_I64, 8)
_NEIGHBOURS: Final = ir.Constant(ir.VectorType(_I32, 8), [ir.Constant(_I32, lane ^ 1) for lane in range(8)])
_AHEAD: Final = 16
"""How many lines ahead are asked for: the hardware stops at every 4 KiB, and cannot know which page comes next.

4 to 32 differ by less than noise.
"""


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_LANES, [ir.Constant(_I64, value)] * 8)


def _pointer(builder: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    return builder.inttoptr(address, to.as_pointer())


def _load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """64 bytes from anywhere."""
    loaded = builder.load(_pointer(builder, address, _LANES))
    loaded.align = 1
    return loaded


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, *, streams: bool = False) -> None:
    """64 bytes to anywhere; past the cache to an address that is a multiple of 64."""
    stored = builder.store(value, _pointer(builder, address, _LANES))
    stored.align = 64 if streams else 1
    if streams:
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """For one use: what is read once leaves the caches to others. Never faults, wherever ``address`` is."""
    kind = ir.FunctionType(ir.VoidType(), (_BYTES, _I32, _I32, _I32))
    function = builder.module.declare_intrinsic("llvm.prefetch", (_BYTES,), kind)
    builder.call(function, [builder.inttoptr(address, _BYTES), _I32(0), _I32(0), _I32(1)])


def _accumulate(builder: ir.IRBuilder, sums: ir.Value, data: ir.Value, secret: ir.Value) -> ir.Value:
    """One stripe of xxh3: ``sums[i] += data[i ^ 1] + low32(data[i] ^ secret[i]) * high32(data[i] ^ secret[i])``."""
    mixed = builder.xor(data, secret)
    product = builder.mul(builder.and_(mixed, _splat(0xFFFFFFFF)), builder.lshr(mixed, _splat(32)))
    swapped = builder.shuffle_vector(data, data, _NEIGHBOURS)
    return builder.add(sums, builder.add(swapped, product))


def _stripes(*, copies: bool) -> Any:
    """An intrinsic that takes ``count`` stripes into the sums at ``sums``, and streams them to ``target`` as well.

    Meanwhile as many lines at ``ahead`` are asked for.
    """

    @intrinsic
    def stripes(context, sums, secret, source, target, ahead, count):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            sums, secret, source, target, ahead, count = arguments
            before = builder.block
            begun = _load(builder, sums)
            body, after = builder.append_basic_block("stripe"), builder.append_basic_block("stripes_done")
            builder.cbranch(builder.icmp_signed(">", count, _I64(0)), body, after)
            builder.position_at_end(body)
            number, running = builder.phi(_I64), builder.phi(_LANES)
            number.add_incoming(_I64(0), before)
            running.add_incoming(begun, before)
            offset = builder.shl(number, _I64(6))
            here = builder.add(source, offset)
            _prefetch(builder, builder.add(ahead, offset))
            data = _load(builder, here)
            if copies:
                _store(builder, data, builder.add(target, offset), streams=True)
            total = _accumulate(
                builder, running, data, _load(builder, builder.add(secret, builder.shl(number, _I64(3))))
            )
            following = builder.add(number, _I64(1))
            number.add_incoming(following, builder.block)
            running.add_incoming(total, builder.block)
            builder.cbranch(builder.icmp_signed("<", following, count), body, after)
            builder.position_at_end(after)
            ended = builder.phi(_LANES)
            ended.add_incoming(begun, before)
            ended.add_incoming(total, body)
            _store(builder, ended, sums)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return stripes


_sum_stripes: Final = _stripes(copies=False)
_stream_stripes: Final = _stripes(copies=True)


@intrinsic
def _scramble(context, sums, secret):  # type: ignore[no-untyped-def]
    """What xxh3 does to its sums after every 16 stripes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        sums, secret = arguments
        value = _load(builder, sums)
        value = builder.xor(builder.xor(value, builder.lshr(value, _splat(47))), _load(builder, secret))
        low = builder.mul(builder.and_(value, _splat(0xFFFFFFFF)), _splat(_PRIME32_1))
        high = builder.mul(builder.lshr(value, _splat(32)), _splat(_PRIME32_1))
        _store(builder, builder.add(low, builder.shl(high, _splat(32))), sums)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _folded_product(context, one, other):  # type: ignore[no-untyped-def]
    """The 128-bit product of two uint64, its halves xored."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        product = builder.mul(*(builder.zext(argument, _I128) for argument in arguments))
        return builder.trunc(builder.xor(product, builder.lshr(product, _I128(64))), _I64)

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _word(context, address):  # type: ignore[no-untyped-def]
    """The uint64 at ``address``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        loaded = builder.load(_pointer(builder, arguments[0], _I64))
        loaded.align = 1
        return loaded

    return types.uint64(types.int64), generate


@intrinsic
def _big_endian(context, value):  # type: ignore[no-untyped-def]
    """``value`` with its bytes turned around."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bswap(arguments[0])

    return types.uint64(types.uint64), generate


@intrinsic
def _copy(context, target, source, nbytes):  # type: ignore[no-untyped-def]
    """``memcpy``, by LLVM's own name for it: calls through ctypes could not be cached."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, source, nbytes = arguments
        cgutils.raw_memcpy(builder, builder.inttoptr(target, _BYTES), builder.inttoptr(source, _BYTES), nbytes, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _clear(context, target, nbytes):  # type: ignore[no-untyped-def]
    """``memset`` to zero."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, nbytes = arguments
        cgutils.memset(builder, builder.inttoptr(target, _BYTES), nbytes, 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _stream_line(context, target, source):  # type: ignore[no-untyped-def]
    """64 bytes past the cache; ``target`` is a multiple of 64."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, source = arguments
        _store(builder, _load(builder, source), target, streams=True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _fence(context):  # type: ignore[no-untyped-def]
    """What was streamed is visible before anything that follows: x86 promises that for ordinary stores only."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if builder.module.triple.startswith("x86_64"):
            kind = ir.FunctionType(ir.VoidType(), ())
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse.sfence", (), kind), [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


# --- kernels ----------------------------------------------------------------------------------------------------------

LEAST_SUMMED_BYTES: Final = 241
"""Of shorter data xxh3 makes its sums in other ways, which are not worth compiling."""
_LINE: Final = 64
_PAGE_BYTES: Final = 4096

# Constants of xxHash's XXH3 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md).
_PRIME32_1: Final = 0x9E3779B1
_PRIME64_1: Final = np.uint64(0x9E3779B185EBCA87)
_PRIME64_2: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_AVALANCHE: Final = np.uint64(0x165667919E3779F9)
_BEGIN: Final = np.array(
    [
        0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
        0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1,
    ],
    np.uint64,
)  # fmt: skip
_SECRET: Final = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
_STRIPES_A_BLOCK: Final = 16
_SCRAMBLE_AT: Final = 128
_LAST_STRIPE_AT: Final = 121
_LOW_AT: Final = 11
_HIGH_AT: Final = 117

_TABLE = types.Array(types.int64, 2, "C", readonly=True)
_NUMBERS = types.Array(types.int64, 1, "C", readonly=True)
_IDS = types.Array(types.int32, 1, "C", readonly=True)
_SUMS = types.Array(types.uint64, 3, "C")
_ADDRESS = _INT = types.int64
_WORD, _NOTHING = types.uint64, types.void


def _compiled(signature: Any, *, inner: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile now, without the interpreter lock at run time; cached on disk where numba finds a place for it."""
    options = {"nogil": True, "no_cpython_wrapper": inner, "no_cfunc_wrapper": True}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, cache=True, **options)(function)
        except RuntimeError:  # no directory that it may write to
            return njit(signature, **options)(function)

    return decorate


@_compiled(_NOTHING(_ADDRESS, _ADDRESS, _INT, _INT), inner=True)
def _move(target: int, source: int, nbytes: int, streams: int) -> None:
    """``nbytes`` from ``source`` to ``target``, past the cache where it is asked for and ``target`` allows it."""
    if not streams or target % _LINE:
        _copy(target, source, nbytes)
        return
    lines = nbytes // _LINE * _LINE
    for at in range(0, lines, _LINE):
        _stream_line(target + at, source + at)
    if lines < nbytes:
        _copy(target + lines, source + lines, nbytes - lines)


@_compiled(_INT(_IDS, _INT, _INT), inner=True)
def _adjacent(ids: Any, at: int, stop: int) -> int:
    """Where the run of pages that lie one after another, and begins at ``ids[at]``, ends; at most at ``stop``."""
    end = at + 1
    while end < stop and ids[end] == ids[end - 1] + 1:
        end += 1
    return end


@_compiled(_WORD(_ADDRESS, _ADDRESS, _WORD), inner=True)
def _merged(sums: int, secret: int, start: Any) -> Any:
    total = start
    for at in range(0, 64, 16):
        total += _folded_product(_word(sums + at) ^ _word(secret + at), _word(sums + at + 8) ^ _word(secret + at + 8))
    total ^= total >> np.uint64(37)
    total *= _AVALANCHE
    return total ^ (total >> np.uint64(32))


@_compiled(_INT(_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT, _INT), inner=True)
def _absorb(sums: int, source: int, target: int, following: int, stripes: int, done: int, whole: int) -> int:
    """Take in ``stripes`` at ``source``, of which ``done`` of all ``whole`` came before; stream them to ``target``.

    ``target`` 0: nothing is copied. ``following`` is where the next ones will be. Returns what is done now. The stripe
    after the ``whole`` ones is the last.
    """
    at, secret = 0, _SECRET.ctypes.data
    while at < stripes:
        place = done % _STRIPES_A_BLOCK
        count, key = 1, secret + _LAST_STRIPE_AT
        if done < whole:
            count, key = min(_STRIPES_A_BLOCK - place, stripes - at, whole - done), secret + 8 * place
        ahead = source + (at + _AHEAD) * _LINE
        if at + _AHEAD >= stripes:
            ahead = following + (at + _AHEAD - stripes) * _LINE
        if target:
            _stream_stripes(sums, key, source + at * _LINE, target + at * _LINE, ahead, count)
        else:
            _sum_stripes(sums, key, source + at * _LINE, 0, ahead, count)
        if done < whole and place + count == _STRIPES_A_BLOCK:
            _scramble(sums, secret + _SCRAMBLE_AT)
        at += count
        done += count
    return done


@_compiled(_NOTHING(_ADDRESS), inner=True)
def _begin(sums: int) -> None:
    _copy(sums, _BEGIN.ctypes.data, _LINE)


@_compiled(_NOTHING(_ADDRESS, _INT, _SUMS, _INT, _INT), inner=True)
def _finish(sums: int, nbytes: int, out: Any, row: int, column: int) -> None:
    """Write the digest, which is big-endian, high half first."""
    length, secret = np.uint64(nbytes), _SECRET.ctypes.data
    out[row, column, 0] = _big_endian(_merged(sums, secret + _HIGH_AT, ~(length * _PRIME64_2)))
    out[row, column, 1] = _big_endian(_merged(sums, secret + _LOW_AT, length * _PRIME64_1))


@_compiled(_NOTHING(_ADDRESS, _ADDRESS, _INT, _SUMS, _INT, _INT), inner=True)
def _sum(sums: int, source: int, nbytes: int, out: Any, row: int, column: int) -> None:
    """xxh3-128 of ``nbytes`` at ``source``; at least ``LEAST_SUMMED_BYTES``."""
    _begin(sums)
    whole = (nbytes - 1) // _LINE
    last = source + nbytes - _LINE
    _absorb(sums, source, 0, last, whole, 0, whole)
    _absorb(sums, last, 0, last, 1, whole, whole)
    _finish(sums, nbytes, out, row, column)


@_compiled(_INT(_IDS, _NUMBERS, _INT, _INT), inner=True)
def _fits(ids: Any, bases: Any, block_pages: int, num_pages: int) -> int:
    """Whether all pages that the blocks name are there: 1 or 0. Nothing is copied before that is known."""
    for block in range(bases.shape[0]):
        if bases[block] < 0 or bases[block] + block_pages > ids.shape[0]:
            return 0
        for at in range(bases[block], bases[block] + block_pages):
            if ids[at] < 0 or ids[at] >= num_pages:
                return 0
    return 1


@_compiled(_ADDRESS(_TABLE, _IDS, _INT, _INT, _INT, _INT, _ADDRESS, _INT), inner=True)
def _gather(parts: Any, ids: Any, base: int, stop: int, first: int, last: int, target: int, streams: int) -> int:
    """Pages ``ids[base:stop]`` of parts [first, last), part after part, to ``target``; returns where that ends."""
    for part in range(first, last):
        at = base
        while at < stop:
            end = _adjacent(ids, at, stop)
            nbytes = (end - at) * parts[part, 1]
            _move(target, parts[part, 0] + ids[at] * parts[part, 1], nbytes, streams)
            target += nbytes
            at = end
    return target


@_compiled(_NOTHING(_TABLE, _IDS, _INT, _INT, _INT, _INT, _ADDRESS, _ADDRESS, _INT, _SUMS, _INT, _INT), inner=True)
def _gather_summed(
    parts: Any, ids: Any, base: int, stop: int, first: int, last: int, target: int, sums: int, nbytes: int, out: Any,
    row: int, column: int,
) -> None:  # fmt: skip
    """As ``_gather`` where all pages are lines of 64 bytes, summed on the way: each byte is read once."""
    _begin(sums)
    done, whole = 0, nbytes // _LINE - 1
    for part in range(first, last):
        at = base
        while at < stop:
            end = _adjacent(ids, at, stop)
            length = (end - at) * parts[part, 1]
            after, page = part, end
            if end == stop:
                after, page = min(part + 1, parts.shape[0] - 1), base
            following = parts[after, 0] + ids[page] * parts[after, 1]
            source = parts[part, 0] + ids[at] * parts[part, 1]
            done = _absorb(sums, source, target, following, length // _LINE, done, whole)
            target += length
            at = end
    _finish(sums, nbytes, out, row, column)


@_compiled(_NOTHING(_NUMBERS, _TABLE, _SUMS))
def sum_records(records: Any, slices: Any, out: Any) -> None:
    """xxh3-128 of every slice of the records at the addresses ``records``, to ``out[record, slice]``.

    A row of ``slices`` begins with where it begins in a record, and its bytes.
    """
    space = np.empty(8, np.uint64)
    sums = space.ctypes.data
    for row in range(records.shape[0]):
        for column in range(slices.shape[0]):
            _sum(sums, records[row] + slices[column, 0], slices[column, 1], out, row, column)


@_compiled(_ADDRESS(_TABLE, _IDS, _INT, _INT, _INT, _INT, _ADDRESS, _INT), inner=True)
def _scatter(parts: Any, ids: Any, base: int, stop: int, first: int, last: int, source: int, streams: int) -> int:
    """Undoes ``_gather``; returns where in ``source`` the parts end."""
    for part in range(first, last):
        at = base
        while at < stop:
            end = _adjacent(ids, at, stop)
            nbytes = (end - at) * parts[part, 1]
            _move(parts[part, 0] + ids[at] * parts[part, 1], source, nbytes, streams)
            source += nbytes
            at = end
    return source


@_compiled(_INT(_TABLE, _IDS, _NUMBERS, _INT, _INT, _INT, _INT, _NUMBERS, _INT))
def gather_parts(
    parts: Any, ids: Any, bases: Any, block_pages: int, num_pages: int, first: int, last: int, targets: Any,
    streams: int,
) -> int:  # fmt: skip
    """Parts [first, last) of the blocks whose pages are ``ids[base:]``, one after another, to each of ``targets``.

    A row of ``parts`` is the address of page 0, and the bytes of a page. Returns 0 where a page is not there.
    """
    if not _fits(ids, bases, block_pages, num_pages):
        return 0
    for block in range(bases.shape[0]):
        _gather(parts, ids, bases[block], bases[block] + block_pages, first, last, targets[block], streams)
    if streams:
        _fence()
    return 1


@_compiled(_INT(_TABLE, _IDS, _NUMBERS, _INT, _INT, _INT, _INT, _NUMBERS, _INT))
def scatter_parts(
    parts: Any, ids: Any, bases: Any, block_pages: int, num_pages: int, first: int, last: int, sources: Any,
    streams: int,
) -> int:  # fmt: skip
    """Undoes ``gather_parts``: from each of the addresses ``sources`` to the pages of a block."""
    if not _fits(ids, bases, block_pages, num_pages):
        return 0
    for block in range(bases.shape[0]):
        _scatter(parts, ids, bases[block], bases[block] + block_pages, first, last, sources[block], streams)
    if streams:
        _fence()
    return 1


@_compiled(_INT(_TABLE, _IDS, _NUMBERS, _INT, _INT, _TABLE, _NUMBERS, _INT, _SUMS))
def gather_records(
    parts: Any, ids: Any, bases: Any, block_pages: int, num_pages: int, slices: Any, records: Any, in_lines: int,
    out: Any,
) -> int:  # fmt: skip
    """Copy whole blocks to the records at the addresses ``records``, and make the sums ``out[record, slice]``.

    A row of ``slices`` is where it begins in a record, its bytes, its first part, and the part behind its last. What
    is left of its last 4 KiB page is filled with zeros. ``in_lines``: all pages and records are lines of 64 bytes.
    Returns 0 where a page is not there.
    """
    if not _fits(ids, bases, block_pages, num_pages):
        return 0
    space = np.empty(8, np.uint64)
    sums = space.ctypes.data
    for block in range(records.shape[0]):
        base, stop = bases[block], bases[block] + block_pages
        for column in range(slices.shape[0]):
            target, nbytes = records[block] + slices[column, 0], slices[column, 1]
            first, last = slices[column, 2], slices[column, 3]
            if in_lines:
                _gather_summed(parts, ids, base, stop, first, last, target, sums, nbytes, out, block, column)
            else:
                _gather(parts, ids, base, stop, first, last, target, 0)
                _sum(sums, target, nbytes, out, block, column)
            _clear(target + nbytes, -nbytes % _PAGE_BYTES)
    _fence()
    return 1


@_compiled(_INT(_TABLE, _IDS, _NUMBERS, _INT, _INT, _TABLE, _NUMBERS, _INT, _SUMS, _INT, _SUMS))
def scatter_records(
    parts: Any, ids: Any, bases: Any, block_pages: int, num_pages: int, slices: Any, records: Any, verifies: int,
    wanted: Any, streams: int, found: Any,
) -> int:  # fmt: skip
    """Undoes ``gather_records``; with ``verifies`` no slice whose sum is not ``wanted`` touches a page.

    What follows such a slice in its record is not written either. ``found`` holds the sums up to there: whoever calls
    compares it with ``wanted``. Returns 0 where a page is not there.
    """
    if not _fits(ids, bases, block_pages, num_pages):
        return 0
    space = np.empty(8, np.uint64)
    sums = space.ctypes.data
    for block in range(records.shape[0]):
        base, stop = bases[block], bases[block] + block_pages
        for column in range(slices.shape[0]):
            source, nbytes = records[block] + slices[column, 0], slices[column, 1]
            if verifies:
                _sum(sums, source, nbytes, found, block, column)
                if (
                    found[block, column, 0] != wanted[block, column, 0]
                    or found[block, column, 1] != wanted[block, column, 1]
                ):
                    break
            _scatter(parts, ids, base, stop, slices[column, 2], slices[column, 3], source, streams)
    _fence()
    return 1
