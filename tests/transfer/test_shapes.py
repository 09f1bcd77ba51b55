from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.plan import PAGE_BYTES
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.transfer.shapes import BATCH_BYTES, RUN_BYTES, RecordShape

AXES = ("token", "head", "dim")


def _layout(dims: list[int], tokens: int = 16, heads: int = 8) -> KVLayout:
    """One part per entry of ``dims``, of ``tokens * heads * dim * 4`` bytes a block."""
    parts = tuple(Part(layer, "kv", "float32", AXES, (tokens, heads, dim)) for layer, dim in enumerate(dims))
    return KVLayout(tokens, tokens, (KVGroup("attention", parts),))


LAYOUTS = st.lists(st.sampled_from([1, 3, 64, 511, 512, 1024, 2048]), min_size=1, max_size=24).map(_layout)


@given(LAYOUTS)
def test_runs_cover_every_slice_once_in_order_and_nothing_but_slices(layout: KVLayout) -> None:
    shape = RecordShape.of(layout, 0)
    for runs in (shape.payload, shape.runs):
        assert [number for run in runs for number in run.slices] == list(range(len(shape.slices)))
        assert [part for run in runs for part in run.parts] == list(shape.parts)
        for run in runs:
            own = shape.slices[run.slices.start : run.slices.stop]
            assert (run.at, run.nbytes) == (own[0][0], sum(nbytes for _, nbytes in own))


@given(LAYOUTS)
def test_slices_and_padding_are_the_whole_record_behind_its_header(layout: KVLayout) -> None:
    shape = RecordShape.of(layout, 0)
    pieces = sorted([(at, at + nbytes) for at, nbytes in shape.slices] + list(shape.padding))
    assert pieces[0][0] == PAGE_BYTES
    assert all(before[1] == after[0] for before, after in pairwise(pieces))
    assert pieces[-1][1] == shape.pages * PAGE_BYTES
    assert all(at % PAGE_BYTES == 0 for at, _ in shape.slices)


@given(LAYOUTS)
def test_a_run_is_verified_while_it_is_cached_unless_one_slice_is_longer(layout: KVLayout) -> None:
    shape = RecordShape.of(layout, 0)
    assert all(run.nbytes <= RUN_BYTES or len(run.slices) == 1 for run in shape.runs)


@pytest.mark.parametrize(("dims", "batch"), [([1], BATCH_BYTES // (2 * PAGE_BYTES)), ([1024], 1), ([512] * 64, 1)])
def test_only_small_blocks_of_one_slice_are_copied_many_at_a_time(dims: list[int], batch: int) -> None:
    assert RecordShape.of(_layout(dims), 0).batch == batch


def test_batches_are_the_rows_in_order() -> None:
    shape = replace(RecordShape.of(_layout([1]), 0), batch=3)
    assert list(shape.batches([4, 5, 6, 7, 9, 12, 1])) == [[4, 5, 6], [7, 9, 12], [1]]
