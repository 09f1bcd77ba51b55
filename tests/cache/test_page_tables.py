"""Page tables belong to the job from ``submit`` on: what others can still change is copied."""

import numpy as np
import pytest

from kvtier.core.memory import GroupPages, PageTable
from kvtier.memories import own_table
from kvtier.pages.spans import frozen_ids


def _table(*ids: np.ndarray) -> PageTable:
    return PageTable(0, tuple(GroupPages(4, one) for one in ids))


def _frozen(ids: np.ndarray) -> np.ndarray:
    return frozen_ids(ids, "ids")


def test_a_table_that_nobody_can_change_is_taken_as_it_is() -> None:
    table = _table(_frozen(np.arange(3, dtype=np.int32)), _frozen(np.arange(2, dtype=np.int32)))
    assert own_table(table, 2) is table


def test_ids_that_can_be_changed_are_copied() -> None:
    ids = np.arange(3, dtype=np.int32)
    own = own_table(_table(_frozen(np.arange(3, dtype=np.int32)), ids), 2)
    ids[:] = 9
    assert [pages.ids.tolist() for pages in own.groups] == [[0, 1, 2]] * 2
    assert [pages.first_token for pages in own.groups] == [4, 4]


@pytest.mark.parametrize("part", [slice(0, 3), slice(0, 6)])
def test_what_is_only_marked_as_read_only_is_copied(part: slice) -> None:
    """The mark can be set back, and views that were made before do not have it."""
    ids = np.arange(6, dtype=np.int32)
    view, marked = ids[:], ids[part] if part.stop < 6 else ids
    marked.flags.writeable = False
    own = own_table(_table(marked), 1)
    view[:] = 9
    assert own.groups[0].ids.tolist() == list(range(part.stop))


def test_what_is_frozen_cannot_be_made_writeable_again() -> None:
    with pytest.raises(ValueError, match="WRITEABLE"):
        frozen_ids([1, 2], "ids").flags.writeable = True
