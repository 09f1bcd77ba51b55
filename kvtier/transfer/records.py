"""Records on their way into host memory and to disk: gathered, sealed, encoded, stamped with their place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvtier.codecs.base import pages_of
from kvtier.codecs.chain import chain_of
from kvtier.codecs.checksums import content_sum, content_sums
from kvtier.codecs.headers import Pages, Places
from kvtier.codecs.headers import stamp as stamp_pages
from kvtier.codecs.record import RecordHeader, Slice, zero_padding
from kvtier.core.memory import Tokens
from kvtier.core.plan import PAGE_BYTES, Plan
from kvtier.runtime.seam import Buffer
from kvtier.tiers.disk import DiskTier, Place
from kvtier.transfer.endpoint import Endpoint, Rows, table_of
from kvtier.transfer.images import Extents
from kvtier.transfer.shapes import RecordShape


def move_records(plan: Plan, source: Endpoint, shape: RecordShape, rows: Rows, tokens: Tokens, out: Extents) -> bool:
    """Copy blocks, which begin at ``tokens``, from engine pages and make whole records of them, reading each byte once.

    False, and nothing done, where the memory has no kernels for it.
    """
    sums = source.gather_records(shape.group, tokens, shape.slice_table, out.addresses())
    if sums is None:
        return False
    shape.headers.write(out.headers(), table_of(plan, rows), sums)
    return True


def fill_records(plan: Plan, source: Endpoint, shape: RecordShape, rows: Rows, tokens: Tokens, out: Extents) -> None:
    """Copy small blocks, which begin at ``tokens``, from engine pages and make whole records of them, all at once."""
    content = np.empty((len(rows), shape.nbytes), np.uint8)
    source.gather(shape.group, tokens, shape.parts, content)
    out.write_payloads(content)
    shape.headers.write(out.headers(), table_of(plan, rows), content_sums(content))


def gather_record(source: Endpoint, shape: RecordShape, tokens: Tokens, record: Buffer) -> None:
    """Copy the one block that begins at ``tokens`` from engine pages to ``record``, whose header page is left alone."""
    for run in shape.payload:
        source.gather(shape.group, tokens, run.parts, record[run.at : run.at + run.nbytes][None])
    for start, stop in shape.padding:
        record[start:stop] = 0


def seal_records(plan: Plan, shape: RecordShape, rows: Rows, records: Extents) -> None:
    """Checksum the slices that were gathered into ``records`` and write their header pages: they are whole."""
    images = [records.one(at) for at in range(len(rows))]
    sums = b"".join([content_sum(image[at : at + nbytes]) for image in images for at, nbytes in shape.slices])
    table = np.frombuffer(sums, np.uint8).reshape(len(rows), -1)
    shape.headers.write(records.headers(), table_of(plan, rows), table)


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


def stamp(headers: Pages, tier: DiskTier, place: Place) -> None:
    """Write into header pages, which are whole, where on disk their records go."""
    places = Places(
        tier.nonce,
        segment=np.full(place.count, place.segment, np.int32),
        page=place.first_pages().astype(np.int32),
        generation=np.full(place.count, place.generation, np.int64),
    )
    stamp_pages(headers, places, place.sequences())
