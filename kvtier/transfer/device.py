"""Records between engine pages, the slab and host memory: what a copy thread does for a device tier, without a lock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvtier.core.memory import Tokens
from kvtier.core.plan import Plan, Reason
from kvtier.tiers.device import Resident, Slab
from kvtier.transfer.endpoint import DeviceEndpoint, Rows, first_tokens, table_of
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.shapes import RecordShape


def gather_to_slab(slab: Slab, source: DeviceEndpoint, shape: RecordShape, tokens: Tokens, first: list[int]) -> None:
    """Copy the blocks that begin at ``tokens`` from engine pages to the extents at ``first``, without headers."""
    for rows, records in slab.runs(first, shape.pages):
        for run in shape.payload:
            source.gather(shape.group, tokens[rows], run.parts, records[:, run.at : run.at + run.nbytes])
        for start, stop in shape.padding:
            records[:, start:stop] = 0


def scatter_from_slab(slab: Slab, target: DeviceEndpoint, shape: RecordShape, tokens: Tokens, first: list[int]) -> None:
    """Write the tokens that the plan is about from the extents at ``first`` to engine pages."""
    for rows, records in slab.runs(first, shape.pages):
        for run in shape.payload:
            target.scatter(shape.group, tokens[rows], run.parts, records[:, run.at : run.at + run.nbytes])


def deliver_from_slab(
    equipment: Equipment,
    plan: Plan,
    slab: Slab,
    shape: RecordShape,
    rows: Rows,
    residents: list[Resident],
    target: DeviceEndpoint | None,
) -> list[Reason]:
    """Bring ``rows``, which lie in the slab as ``residents`` say, to engine pages; how it went, row by row.

    Raises:
        EngineMemoryError: engine memory would not take one of them.
    """
    first = table_of(plan, rows)["device_page"].tolist()
    with slab.ordered():
        sound = np.ones(len(rows), np.bool_)
        if slab.verifies:
            sound = are_sound(slab, shape, first, residents)
        if target is not None and sound.any():
            tokens = first_tokens(equipment, plan, rows)
            scatter_from_slab(slab, target, shape, tokens[sound], [first[at] for at in np.flatnonzero(sound).tolist()])
    return [Reason.NONE if good else Reason.DAMAGED for good in sound.tolist()]


def are_sound(slab: Slab, shape: RecordShape, first: list[int], residents: list[Resident]) -> npt.NDArray[np.bool_]:
    """Which records have the digest that they had when they landed."""
    found = slab.digests(first, shape.pages)
    return np.array([digest == resident.digest for digest, resident in zip(found, residents, strict=True)], np.bool_)


def note_residents(
    slab: Slab, plan: Plan, rows: Rows, shape: RecordShape, digests: Sequence[int | None] | None, *, sealed: bool
) -> None:
    """``rows`` lie whole at their targets in the slab. Called under the data plane's lock."""
    table = table_of(plan, rows)
    keys, pages = table["key"], table["target_page"].tolist()
    for at, page in enumerate(pages):
        digest = None if digests is None else digests[at]
        slab.residents.note(page, shape.pages, keys[at].tobytes(), shape.group, sealed=sealed, digest=digest)
