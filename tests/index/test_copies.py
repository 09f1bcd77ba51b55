"""Copies of a second memory tier count as any other: for reading, for holding an entry, and for who goes first."""

from __future__ import annotations

import numpy as np

from kvtier.index.cells import Cells, wide
from kvtier.index.entries import MISSING


def chain(index: Cells, count: int) -> np.ndarray:
    keys = np.random.default_rng(0).integers(0, 256, (count, 32), np.uint8)
    entries = wide(index.add(keys, 0, depths=np.arange(count, dtype=np.int32), tokens=4, lineage=0))
    index.link_chain(entries, MISSING)
    return entries


def lengths(count: int) -> np.ndarray:
    return np.ones(count, np.int32)


def test_an_entry_can_be_read_once_every_rank_has_it_in_any_tier() -> None:
    index = Cells(16, 2, has_device=True)
    assert index.device is not None
    entries = chain(index, 3)
    index.device.add(0, entries, [0, 1, 2], lengths(3))
    assert not index.readable(entries).any()
    index.host.add(1, entries[:1], [7], lengths(1))
    assert index.readable(entries).tolist() == [True, False, False]
    assert not index.are_at_hand(entries[:1]), "no tier has it on both ranks"
    complete = index.device.add(1, entries, [5, 6, 7], lengths(3))
    assert complete.tolist() == entries.tolist()
    assert index.are_at_hand(entries)
    assert index.on_device(entries).all()
    assert len(index.prefix(index.table.keys[entries], 0, exact=True)) == 3


def test_children_are_counted_for_each_tier_by_itself() -> None:
    index = Cells(16, 1, has_device=True)
    assert index.device is not None
    entries = chain(index, 3)
    index.device.add(0, entries, [0, 1, 2], lengths(3))
    index.host.add(0, entries[:2], [0, 1], lengths(2))
    assert index.device.children[entries].tolist() == [1, 1, 0]
    assert index.host.children[entries].tolist() == [1, 0, 0]
    assert index.device.drop(int(entries[2])) == [(0, 2, 1)]
    assert [pages.tolist() for pages in index.device.leave(entries[1:2])[0]] == [[1], [1]]
    assert index.device.children[entries].tolist() == [0, 0, 0]


def test_an_entry_that_only_the_device_has_is_not_forgotten() -> None:
    index = Cells(16, 1, has_device=True)
    assert index.device is not None
    entries = chain(index, 2)
    index.device.add(0, entries[1:], [3], lengths(1))
    assert not len(index.bare(entries[1:]))
    index.release(int(entries[1]))
    index.release_many(entries)
    assert index.count == 2
    index.device.drop(int(entries[1]))
    index.release(int(entries[1]))
    assert index.count == 0
