"""Columns: zeros of any shape, whose memory comes in small steps however large they are."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from kvtier.core.columns import column

LARGE = 8 << 20


@pytest.mark.parametrize("rows", [0, 1, 1000, LARGE])
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int32])
def test_a_column_is_zeros_that_can_be_written(rows: int, dtype: type[np.generic]) -> None:
    zeros = column(rows, dtype)
    assert zeros.shape == (rows,)
    assert zeros.dtype == dtype
    assert not zeros.any()
    zeros[rows // 2 :] = 1
    assert np.count_nonzero(zeros) == rows - rows // 2


def test_a_table_of_columns_lies_row_after_row() -> None:
    table = column((3, LARGE), np.uint8)
    table[1, -1] = 7
    assert table.flags.c_contiguous
    assert table.reshape(-1)[2 * LARGE - 1] == 7


def test_a_large_column_is_touched_four_kib_at_a_time() -> None:
    """With huge pages one touch would zero 2 MiB, and all columns come to such a border in the same call."""
    zeros = column(LARGE, np.uint8)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    zeros[::4096] = 1
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before >= LARGE // 4096


def test_memory_lives_as_long_as_a_part_of_the_column_does() -> None:
    part = column(LARGE, np.uint8)[-2:]
    part[:] = 5
    assert part.tolist() == [5, 5]
