"""Whether a data plane that says hello keeps what this control plane thinks that it keeps."""

from __future__ import annotations

from dataclasses import replace

from kvtier.core.plan import Hello
from kvtier.errors import ConfigError
from kvtier.models.layout import KVLayout


def check_hello(hello: Hello, layout: KVLayout, ranks: int) -> None:
    """Refuse a rank that the cache does not have, or whose blocks are others than those of ``layout``.

    Ranks of tensor parallelism have the same layout but for their number. Of others each has parts of its own, and only
    the sizes of blocks and records are known.

    Raises:
        ConfigError: naming the rank, and what differs.
    """
    if not 0 <= hello.rank < ranks:
        raise ConfigError(f"rank {hello.rank}: this cache was opened for {ranks} ranks, from 0 on")
    wanted = _placement_of(hello.rank, layout, ranks)
    if wanted is not None and hello.placement != wanted:
        raise ConfigError(
            f"rank {hello.rank} has placement {hello.placement[:12]}, by this cache's layout it would be {wanted[:12]}:"
            " open both with the same KVLayout, but for tp_rank"
        )
    if (hello.block_tokens, hello.record_pages) != (layout.block_tokens, layout.record_pages):
        raise ConfigError(
            f"rank {hello.rank} has blocks of {hello.block_tokens} tokens and records of {_pages(hello.record_pages)},"
            f" this cache's layout {layout.block_tokens} and {_pages(layout.record_pages)}: open them with the same"
            " KVLayout but for its ranks"
        )


def _placement_of(rank: int, layout: KVLayout, ranks: int) -> str | None:
    """The placement that ``rank`` must have; None where the layout does not say."""
    if ranks == 1:
        return layout.placement
    if (layout.tp_size, layout.pp_size) != (ranks, 1):
        return None
    return replace(layout, tp_rank=rank).placement


def _pages(record_pages: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, record_pages))} pages"
