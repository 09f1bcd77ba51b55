"""What is done for one entry in cells is what is done for it in arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtier.core.plan import ROW, ROW_STRUCT, PlanKind
from kvtier.index import Index
from kvtier.index.cells import Cells
from kvtier.planner.hops import Hop
from kvtier.planner.rows import NO_PARENTS, _many_rows, plan_rows
from tests.planner.bench import Bench

COLUMNS = ("parent", "children", "host_children", "depth", "tokens", "pins", "lineage", "linked", "host_ranks")


def state_of(index: Index) -> dict[str, Any]:
    table = index.table
    columns = {name: getattr(index, name).tolist() for name in COLUMNS}
    places = {name: getattr(index, name).tolist() for name in ("host_page", "host_pages")}
    return columns | places | {"count": index.count, "free": table.free, "keys": table.keys.tobytes()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_entry_lives_the_same_life_as_in_arrays(ranks: int) -> None:
    """Added under a parent, pinned, landed, unpinned, released, and its number used again."""
    keys = np.random.default_rng(1).integers(0, 256, (3, 32), np.uint8)
    cells, arrays = Cells(16, ranks), Index(16, ranks)
    for at, key in enumerate(keys):
        cells.add_one(key.tobytes(), at - 1, depth=at, tokens=4, lineage=at % 2)
        new = arrays.add(key[None], 0, depths=np.array([at], np.int32), tokens=4, lineage=at % 2)
        arrays.link(new, np.array([at - 1], np.int32))
        for index in (cells, arrays):
            assert index.table.find(keys, 0).tolist() == [n if n <= at else -1 for n in range(3)]
    assert state_of(cells) == state_of(arrays)
    last = np.array([2])
    for index in (cells, arrays):
        index.pin(np.array([0, 1]))
        index.pin(last)
        index.pin(last)
        assert index.unpin(last).tolist() == []
        for rank in range(ranks):
            complete = index.host.add(rank, last, [5], np.array([2]))
            assert complete.tolist() == ([2] if rank == ranks - 1 else [])
    assert state_of(cells) == state_of(arrays)
    for index in (cells, arrays):
        assert index.unpin(last).tolist() == [2]
        index.host.drop(2)
        index.release(2)
        assert index.table.find(keys, 0).tolist() == [0, 1, -1]
    assert state_of(cells) == state_of(arrays)
    assert cells.add_one(keys[2].tobytes(), 1, depth=2, tokens=4, lineage=0) == 2
    assert cells.table.find(keys, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("many", [False, True])
def test_questions_have_the_same_answer_for_one_and_for_many(many: bool) -> None:
    cells = Cells(16, 2)
    for at in range(4):
        cells.add_one(bytes([at]) * 32, -1, depth=at, tokens=4, lineage=0)
    rows = np.array([0, 1] if many else [0])
    assert cells.none_on_host(rows)
    assert not cells.all_on_host(rows)
    assert cells.bare(rows).tolist() == rows.tolist()
    cells.host.add(0, rows, [0] * len(rows), np.ones(len(rows), np.int32))
    assert not cells.none_on_host(rows)
    assert not cells.all_on_host(rows), "one rank is not every rank"
    cells.host.add(1, rows, [0] * len(rows), np.ones(len(rows), np.int32))
    assert cells.all_on_host(rows)
    assert cells.bare(rows).tolist() == []
    assert cells.reachable(rows).tolist() == rows.tolist()
    cells.unlink(0)
    assert cells.reachable(rows).tolist() == rows.tolist()[1:]
    assert cells.all_missing(np.full(len(rows), -1))
    assert not cells.all_missing(rows)


def test_a_row_that_is_packed_is_the_row_that_is_filled_in() -> None:
    """Stores with parents, and loads of copies in host memory and on disk, with and without a target."""
    assert ROW_STRUCT.size == ROW.itemsize
    bench = Bench(ranks=2, segments=8, host_blocks=3)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.loaded(bench.keys(2, 5))
    bench.stored(bench.keys(2, 6))
    index = bench.planner._state.index
    places = set()
    for block in range(3):
        entries = np.array([bench.entry(keys, block)])
        places.add(bool(index.host_ranks[entries[0]]))
        for parents in (NO_PARENTS, keys.parents([block])):
            hop = Hop(1, PlanKind.LOAD, entries, np.array([block], np.int32), 3, "")
            for rank in (0, 1):
                one, many = plan_rows(index, hop, rank, parents), _many_rows(index, hop, rank, parents)
                assert one.tobytes() == many.tobytes()
    assert places == {True, False}


def test_one_block_is_refused_existing_or_joined_like_many() -> None:
    bench = Bench(host_blocks=1)
    first, second = bench.keys(1, 0), bench.keys(1, 1)
    one = bench.store(first)
    joined = bench.store(first)
    refused = bench.store(second)
    assert refused.finished
    bench.run()
    existing = bench.store(first)
    assert [(ticket.outcome[0], ticket.reason[0]) for ticket in (one, joined, refused, existing)] == [
        (1, 0), (2, 0), (3, 7), (2, 0),
    ]  # fmt: skip
    bench.check_at_rest()


def test_one_block_extends_the_block_before_it() -> None:
    bench = Bench()
    keys = bench.keys(1)
    bench.stored(keys)
    keys.append([7] * 4)
    bench.stored(keys, start=4)
    assert bench.plans(PlanKind.STORE)[1].rows["parent"][0].tobytes() == keys.digests[0]
    assert bench.index.parent[bench.entry(keys, 1)] == bench.entry(keys, 0)
    assert bench.match(keys) == 2
    bench.check_at_rest()
