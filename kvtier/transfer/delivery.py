"""Records on their way out of host memory: known again, verified, and written to engine pages.

What is raw and as it should be, which is nearly everything, goes many blocks or many slices a call. Anything else goes
record by record through ``RecordHeader``, which finds out what it is or what is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier.codecs.chain import chain_of
from kvtier.codecs.checksums import content_sum, content_sums
from kvtier.codecs.headers import SUM_BYTES, Places
from kvtier.codecs.record import RecordHeader, check_content, check_stored
from kvtier.core.memory import Tokens
from kvtier.core.plan import PAGE_BYTES, Plan, Reason
from kvtier.errors import ConfigError, CorruptBlockError
from kvtier.runtime.seam import Buffer
from kvtier.transfer.endpoint import Endpoint, first_tokens, table_of
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.images import Extents
from kvtier.transfer.shapes import RecordShape

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Rows of one plan and one group, with a record for each. Runs on a copy thread, without a lock."""

    equipment: Equipment
    plan: Plan
    shape: RecordShape
    rows: list[int]
    records: Extents
    places: Places | None
    """Where on disk the records were read from; None for records of host memory."""
    target: Endpoint | None
    """Engine memory; without it the records are only checked."""
    verify: bool
    """Whether the checksums of the slices are compared as well."""

    def deliver(self) -> list[Reason]:
        """How it went, row by row: NONE or DAMAGED.

        Raises:
            EngineMemoryError: engine memory would not take one of them.
        """
        tokens = first_tokens(self.equipment, self.plan, self.rows)
        done = self._raw(tokens)
        if done.all():
            return [Reason.NONE] * len(self.rows)
        return [Reason.NONE if done[at] else self._one(at, tokens[at : at + 1]) for at in range(len(self.rows))]

    # --- what is raw ------------------------------------------------------------------------------------------------

    def _raw(self, tokens: Tokens) -> Mask:
        """Which rows were raw and sound, and are delivered."""
        if not self.records.are_long(self.shape.pages):
            return np.zeros(len(self.rows), np.bool_)
        if self.target is not None and self.target.moves_records:
            done = self._at_once(self.target, tokens)
            if done is not None:
                return done
        return self._batch(tokens) if self.shape.batch > 1 else self._large(tokens)

    def _at_once(self, target: Endpoint, tokens: Tokens) -> Mask | None:
        """All blocks by one call of a kernel, which compares every slice before it writes it."""
        shape, addresses = self.shape, self.records.addresses()
        known, sums = shape.headers.read(self.records.headers(), self._keys(), self.places)
        whole = known.all()
        if not whole:
            tokens, addresses, sums = tokens[known], addresses[known], sums[known]
        if not len(tokens):
            return known
        sound = target.scatter_records(shape.group, tokens, shape.slice_table, addresses, sums if self.verify else None)
        if sound is None:
            return None
        if whole:
            return sound
        known[known] = sound
        return known

    def _batch(self, tokens: Tokens) -> Mask:
        """Small blocks, all at once."""
        shape = self.shape
        content = self.records.payloads(shape.nbytes)
        known, sums = shape.headers.read(self.records.headers(), self._keys(), self.places)
        if self.verify:
            known &= (content_sums(content) == sums).all(axis=1)
        if self.target is not None and known.any():
            whole = known.all()
            self.target.scatter(
                shape.group, tokens if whole else tokens[known], shape.parts, content if whole else content[known]
            )
        return known

    def _large(self, tokens: Tokens) -> Mask:
        """Large blocks, each in runs of slices: what was just read for its checksum is still in the cache."""
        shape = self.shape
        known, sums = shape.headers.read(self.records.headers(), self._keys(), self.places)
        for at in np.flatnonzero(known).tolist():
            record, wanted = self.records.one(at), sums[at].tobytes()
            for run in shape.runs:
                if self.verify and not self._sound(record, run.slices, wanted):
                    known[at] = False
                    break
                if self.target is not None:
                    source = record[run.at : run.at + run.nbytes]
                    self.target.scatter(shape.group, tokens[at : at + 1], run.parts, source[None])
        return known

    def _sound(self, record: Buffer, slices: range, wanted: bytes) -> bool:
        places = self.shape.slices[slices.start : slices.stop]
        found = b"".join([content_sum(record[at : at + nbytes]) for at, nbytes in places])
        return found == wanted[slices.start * SUM_BYTES : slices.stop * SUM_BYTES]

    def _keys(self) -> npt.NDArray[np.uint8]:
        keys: npt.NDArray[np.uint8] = table_of(self.plan, self.rows)["key"]
        return keys

    # --- anything else ----------------------------------------------------------------------------------------------

    def _one(self, at: int, tokens: Tokens) -> Reason:
        record = self.records.one(at)
        try:
            header = RecordHeader.unpack(record[:PAGE_BYTES])
            if not self._is_wanted(header, at):
                return Reason.DAMAGED
            header.check_sizes(self.equipment.sizes_of(header.chain, header.group))
            if header.pages * PAGE_BYTES > record.nbytes:
                raise CorruptBlockError(f"a record of {header.pages} pages in {record.nbytes} bytes")
            self._deliver_slices(header, record, tokens)
        except (CorruptBlockError, ConfigError):
            return Reason.DAMAGED
        return Reason.NONE

    def _is_wanted(self, header: RecordHeader, at: int) -> bool:
        key, group, placement = self._keys()[at].tobytes(), self.shape.group, self.equipment.placement
        if self.places is None:
            return (header.key, header.group, header.placement) == (key, group, placement)
        nonce, segment, page, generation = self.places
        return header.matches(
            key=key, group=group, placement=placement, nonce=nonce, segment=int(segment[at]), page=int(page[at]),
            generation=int(generation[at]),
        )  # fmt: skip

    def _deliver_slices(self, header: RecordHeader, record: Buffer, tokens: Tokens) -> None:
        spans = self.equipment.layout.slices[header.group]
        for span, item, at in zip(spans, header.slices, header.slice_offsets(), strict=True):
            stored = record[at : at + item.stored_bytes]
            if self.verify:
                check_stored(item, stored)
            if not item.coded:
                self._scatter(tokens, span.parts, stored)
                continue
            codec = chain_of(header.chain).byte
            if codec is None:
                raise CorruptBlockError(f"a slice of chain {header.chain!r} is stored shorter than its content")
            content = self.equipment.take_scratch()
            try:
                codec.decode(stored, content[: item.content_bytes])
                check_content(item, content[: item.content_bytes])
                self._scatter(tokens, span.parts, content[: item.content_bytes])
            finally:
                self.equipment.scratch.append(content)

    def _scatter(self, tokens: Tokens, parts: range, raw: Buffer) -> None:
        if self.target is not None:
            self.target.scatter(self.shape.group, tokens, parts, raw[None])
