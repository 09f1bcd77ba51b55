"""Records on their way: sealed when they land in host memory, verified and decoded when they leave it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvtier.codecs.base import pages_of
from kvtier.codecs.chain import chain_of
from kvtier.codecs.checksums import content_sum
from kvtier.codecs.record import (
    RecordHeader,
    Slice,
    check_content,
    check_stored,
    raw_slice,
    restamp,
    zero_padding,
)
from kvtier.core.memory import KVMemory
from kvtier.core.plan import PAGE_BYTES, Plan, Reason
from kvtier.errors import ConfigError, CorruptBlockError
from kvtier.runtime.seam import Buffer
from kvtier.tiers.disk import DiskTier, Place
from kvtier.transfer.parts import Equipment


def seal_record(equipment: Equipment, plan: Plan, row: int, group: int, record: Buffer) -> None:
    """Checksum the slices that were gathered into ``record`` and write its header page: the record is whole."""
    slices = tuple(raw_slice(record[at : at + span.nbytes]) for span, at in equipment.raw_spans[group])
    item = plan.rows[row]
    RecordHeader(
        key=item["key"].tobytes(), parent=item["parent"].tobytes(), placement=equipment.placement, group=group,
        depth=int(item["depth"]), tokens=int(item["tokens"]), lineage=int(item["lineage"]), error=0.0, chain="raw",
        slices=slices,
    ).pack_into(record[:PAGE_BYTES])  # fmt: skip


def deliver_record(
    equipment: Equipment,
    plan: Plan,
    row: int,
    record: Buffer,
    memory: KVMemory | None,
    *,
    place: dict[str, int | bytes] | None,
    verify: bool,
) -> Reason:
    """Check ``record`` against what row ``row`` asks for and write its tokens to ``memory``, slice by slice.

    Without ``memory`` it is only checked. ``place`` is where on disk it was read from, to be found in its header; None
    for a record in host memory.
    """
    try:
        header = RecordHeader.unpack(record[:PAGE_BYTES])
        group = int(plan.rows["group"][row])
        if not _is_wanted(equipment, header, plan.rows["key"][row].tobytes(), group, place):
            return Reason.DAMAGED
        _deliver_slices(equipment, plan, row, header, record, memory, verify=verify)
    except (CorruptBlockError, ConfigError):
        return Reason.DAMAGED
    return Reason.NONE


def _is_wanted(
    equipment: Equipment, header: RecordHeader, key: bytes, group: int, place: dict[str, int | bytes] | None
) -> bool:
    if place is not None:
        return header.matches(key=key, group=group, placement=equipment.placement, **place)  # type: ignore[arg-type]
    return header.key == key and header.group == group and header.placement == equipment.placement


def _deliver_slices(
    equipment: Equipment,
    plan: Plan,
    row: int,
    header: RecordHeader,
    record: Buffer,
    memory: KVMemory | None,
    *,
    verify: bool,
) -> None:
    layout, group = equipment.layout, header.group
    header.check_sizes(equipment.sizes_of(header.chain, group))
    if header.pages * PAGE_BYTES > record.nbytes:
        raise CorruptBlockError(f"a record of {header.pages} pages in {record.nbytes} bytes")
    first_token = int(plan.rows["block"][row]) * layout.block_tokens
    for span, item, at in zip(layout.slices[group], header.slices, header.slice_offsets(), strict=True):
        stored = record[at : at + item.stored_bytes]
        if verify:
            check_stored(item, stored)
        if not item.coded:
            _scatter(plan, group, first_token, span.parts, stored, memory)
            continue
        codec = chain_of(header.chain).byte
        if codec is None:
            raise CorruptBlockError(f"a slice of chain {header.chain!r} is stored shorter than its content")
        content = equipment.take_scratch()
        try:
            codec.decode(stored, content[: item.content_bytes])
            check_content(item, content[: item.content_bytes])
            _scatter(plan, group, first_token, span.parts, content[: item.content_bytes], memory)
        finally:
            equipment.scratch.append(content)


def _scatter(plan: Plan, group: int, first_token: int, parts: range, raw: Buffer, memory: KVMemory | None) -> None:
    if memory is not None and plan.pages is not None:
        memory.scatter(plan.pages, group, first_token, parts, raw, plan.start, plan.stop)


def encode_record(record: Buffer, chain_name: str, out: Buffer) -> tuple[int, bool]:
    """Write ``record`` to ``out``, raw slices byte-coded where that wins; returns its pages, and whether any was.

    Raises:
        CorruptBlockError: the record in host memory is damaged.
    """
    header, chain = RecordHeader.unpack(record[:PAGE_BYTES]), chain_of(chain_name)
    at, rows = PAGE_BYTES, []
    for item, start in zip(header.slices, header.slice_offsets(), strict=True):
        stored = record[start : start + item.stored_bytes]
        row, room = item, out[at : at + item.stored_bytes]
        nbytes = None if item.coded or chain.byte is None else chain.byte.encode(stored, room)
        if nbytes is None:
            np.copyto(room, stored)
        else:
            row = Slice(nbytes, item.content_bytes, item.content_sum, content_sum(out[at : at + nbytes]))
        rows.append(row)
        at += pages_of(row.stored_bytes) * PAGE_BYTES
    coded = any(row.coded for row in rows)
    header = replace(header, slices=tuple(rows), chain=chain_name if coded else chain.tensor.name)
    zero_padding(header, out)
    header.pack_into(out[:PAGE_BYTES])
    return header.pages, coded


def stamp(page: Buffer, tier: DiskTier, place: Place) -> None:
    """Write into a header page where on disk its record goes."""
    restamp(
        page, nonce=tier.nonce, segment=place.segment, generation=place.generation, page_number=place.page,
        sequence=place.sequence,
    )  # fmt: skip
