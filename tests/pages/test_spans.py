import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.pages.spans import cut, frozen_ids


@given(st.integers(1, 16), st.integers(0, 100), st.integers(0, 100))
def test_whole_pages_and_edges_are_the_tokens_asked_for_each_once(page_tokens, start, length):
    whole, edges = cut(start, start + length, page_tokens)
    tokens = [page * page_tokens + token for page in whole for token in range(page_tokens)]
    tokens += [edge.page * page_tokens + token for edge in edges for token in range(edge.start, edge.stop)]
    assert sorted(tokens) == list(range(start, start + length))


@given(st.integers(1, 16), st.integers(0, 100), st.integers(0, 100))
def test_an_edge_is_never_a_whole_page(page_tokens, start, length):
    _, edges = cut(start, start + length, page_tokens)
    assert all(0 < edge.stop - edge.start < page_tokens for edge in edges)
    assert len(edges) <= 2


@pytest.mark.parametrize("ids", [[3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1]), np.array([3, 1], np.uint8)])
def test_ids_of_any_kind_become_an_own_frozen_int32_array(ids):
    own = frozen_ids(ids, "ids")
    assert own.dtype == np.int32
    assert own.tolist() == [3, 1]
    assert not own.flags.writeable
    assert not np.shares_memory(own, np.asarray(ids))


@pytest.mark.parametrize("ids", [[[1]], [1.5], [-1], [2**31], "12", [True, False], [[1, 2], [3]], None, 1])
def test_ids_that_are_no_page_numbers_are_refused(ids):
    with pytest.raises(ConfigError, match=r"^ids: "):
        frozen_ids(ids, "ids")


@pytest.mark.parametrize("kind", [{"dtype": torch.bfloat16}, {"dtype": torch.complex64}, {"device": "meta"}], ids=str)
def test_tensors_that_are_no_list_of_page_numbers_are_refused(kind):
    with pytest.raises(ConfigError, match=r"^ids: want one dimension of integers"):
        frozen_ids(torch.ones(2, **kind), "ids")
