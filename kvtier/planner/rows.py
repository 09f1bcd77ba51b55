"""The rows of plans: what the index says of entries, as a table for one rank."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtier.core.keys import KEY_BYTES
from kvtier.core.plan import NOWHERE, ROW, ROW_STRUCT, Table
from kvtier.index.cells import Cells
from kvtier.planner.hops import Hop

NO_PARENTS: Final = b""
"""Of rows whose parents nobody has to write down."""
_NO_KEY: Final = bytes(KEY_BYTES)
_EMPTY_ROW: Final = np.zeros(1, ROW)
for _place in ("device_page", "host_page", "disk_segment", "target_page"):
    _EMPTY_ROW[_place] = NOWHERE


def plan_rows(index: Cells, hop: Hop, rank: int, parents: bytes) -> Table:
    """The rows of ``hop`` for ``rank``, dtype ``ROW``; ``parents``: the keys that they extend, 32 bytes each."""
    if len(hop.entries) == 1:
        return _one_row(index, hop, rank, parents or _NO_KEY)
    return _many_rows(index, hop, rank, parents)


def _one_row(index: Cells, hop: Hop, rank: int, parent: bytes) -> Table:
    entry, block = hop.entries.item(), hop.blocks.item()
    device = index.device
    on_device = device is not None and device.ranks_at[entry] >> rank & 1
    on_host = index.host_ranks_at[entry] >> rank & 1
    on_disk = index.disk_ranks_at[entry] >> rank & 1
    target = hop.targets.get(rank)
    packed = ROW_STRUCT.pack(
        index.cells.key(entry),
        parent,
        index.cells.groups_at[entry],
        index.lineage_at[entry],
        0,
        index.depth_at[entry],
        block,
        index.tokens_at[entry],
        device.page_at[rank][entry] if device is not None and on_device else NOWHERE,
        device.pages_at[rank][entry] if device is not None and on_device else 0,
        index.host.page_at[rank][entry] if on_host else NOWHERE,
        index.host.pages_at[rank][entry] if on_host else 0,
        index.disk_segment[rank, entry] if on_disk else NOWHERE,
        index.disk_page[rank, entry] if on_disk else 0,
        index.disk_pages[rank, entry] if on_disk else 0,
        target.page.item() if target is not None else NOWHERE,
        target.pages.item() if target is not None else 0,
        index.generations(rank, hop.entries)[0] if on_disk else 0,
    )
    return np.frombuffer(packed, ROW)


def _many_rows(index: Cells, hop: Hop, rank: int, parents: bytes) -> Table:
    entries = hop.entries
    rows: Table = _EMPTY_ROW.repeat(len(entries))
    if not len(entries):
        return rows
    rows["key"] = index.table.keys[entries]
    if parents:
        rows["parent"] = np.frombuffer(parents, np.uint8).reshape(-1, KEY_BYTES)
    rows["group"] = index.table.groups[entries]
    rows["lineage"] = index.lineage[entries]
    rows["depth"] = index.depth[entries]
    rows["block"] = hop.blocks
    rows["tokens"] = index.tokens[entries]
    _fill_copies(rows, index, entries, rank)
    if (target := hop.targets.get(rank)) is not None:
        rows["target_page"], rows["target_pages"] = target.page, target.pages
    return rows


def _fill_copies(rows: Table, index: Cells, entries: np.ndarray[tuple[int], np.dtype[np.int32]], rank: int) -> None:
    """The places of the copies that ``rank`` has."""
    bit = np.uint32(1 << rank)
    if index.device is not None:
        on_device = index.device.ranks[entries] & bit
        rows["device_page"] = np.where(on_device, index.device.page[rank, entries], NOWHERE)
        rows["device_pages"] = index.device.pages[rank, entries]
    on_host = index.host_ranks[entries] & bit
    if np.count_nonzero(on_host):
        rows["host_page"] = np.where(on_host, index.host_page[rank, entries], NOWHERE)
        rows["host_pages"] = index.host_pages[rank, entries]
    on_disk = index.disk_ranks[entries] & bit
    if np.count_nonzero(on_disk):
        rows["disk_segment"] = np.where(on_disk, index.disk_segment[rank, entries], NOWHERE)
        rows["disk_page"] = index.disk_page[rank, entries]
        rows["disk_pages"] = index.disk_pages[rank, entries]
        rows["disk_generation"] = index.generations(rank, entries)
