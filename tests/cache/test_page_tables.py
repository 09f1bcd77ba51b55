"""Page tables belong to the job from ``submit`` on: what others can still change is copied."""

import numpy as np

from kvtier.cache import _own_table
from kvtier.core.memory import GroupPages, PageTable


def _table(*ids: np.ndarray) -> PageTable:
    return PageTable(0, tuple(GroupPages(4, one) for one in ids))


def _frozen(ids: np.ndarray) -> np.ndarray:
    ids.flags.writeable = False
    return ids


def test_a_table_that_nobody_can_change_is_taken_as_it_is() -> None:
    table = _table(_frozen(np.arange(3, dtype=np.int32)), _frozen(np.arange(2, dtype=np.int32)))
    assert _own_table(table) is table


def test_ids_that_can_be_changed_are_copied() -> None:
    ids = np.arange(3, dtype=np.int32)
    own = _own_table(_table(_frozen(np.arange(3, dtype=np.int32)), ids))
    ids[:] = 9
    assert [pages.ids.tolist() for pages in own.groups] == [[0, 1, 2]] * 2
    assert [pages.first_token for pages in own.groups] == [4, 4]


def test_a_view_that_is_only_read_only_itself_is_copied() -> None:
    ids = np.arange(6, dtype=np.int32)
    own = _own_table(_table(_frozen(ids[:3])))
    ids[:] = 9
    assert own.groups[0].ids.tolist() == [0, 1, 2]
