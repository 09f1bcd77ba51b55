"""Which data planes a cache takes for its ranks, by what they say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtier.core.plan import Hello
from kvtier.errors import ConfigError
from kvtier.models import KVLayout
from kvtier.planner.hellos import check_hello
from kvtier.testing.contents import tiny_layout

TWO = replace(tiny_layout(), tp_rank=0, tp_size=2)


def hello(rank: int, layout: KVLayout) -> Hello:
    return Hello(rank, 1, layout.placement, layout.block_tokens, layout.record_pages, 8, 0, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_tensor_parallelism_has_the_layout_of_the_cache_but_for_its_number(rank: int) -> None:
    check_hello(hello(rank, replace(TWO, tp_rank=rank)), TWO, 2)
    for other in (replace(TWO, tp_rank=1 - rank), tiny_layout()):
        with pytest.raises(ConfigError, match=f"rank {rank} has placement {other.placement[:12]}"):
            check_hello(hello(rank, other), TWO, 2)


def test_ranks_of_which_the_layout_does_not_say_enough_are_known_by_their_sizes() -> None:
    """Each stage of a pipeline has layers of its own."""
    stage = replace(tiny_layout(), pp_rank=0, pp_size=2)
    check_hello(hello(1, replace(stage, pp_rank=1)), stage, 2)
    with pytest.raises(ConfigError, match="rank 1 has blocks of"):
        check_hello(replace(hello(1, stage), block_tokens=2 * stage.block_tokens), stage, 2)


def test_a_rank_that_the_cache_does_not_have_is_refused() -> None:
    for rank in (-1, 2):
        with pytest.raises(ConfigError, match=f"rank {rank}: this cache was opened for 2 ranks"):
            check_hello(hello(rank, TWO), TWO, 2)
