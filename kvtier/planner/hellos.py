"""Whether a data plane that says hello keeps what this control plane thinks that it keeps."""

from __future__ import annotations

from kvtier.core.plan import Hello
from kvtier.errors import ConfigError
from kvtier.models.layout import KVLayout


def check_hello(hello: Hello, layout: KVLayout, ranks: int) -> None:
    """Refuse a rank that the cache does not have, or whose blocks are others than those of ``layout``.

    Of several ranks each has a placement of its own; their blocks and records must be of the same size.

    Raises:
        ConfigError: naming the rank, and what differs.
    """
    if not 0 <= hello.rank < ranks:
        raise ConfigError(f"rank {hello.rank}: this cache was opened for {ranks} ranks, from 0 on")
    if ranks == 1 and hello.placement != layout.placement:
        raise ConfigError(
            f"rank 0 has placement {hello.placement[:12]}, this cache's layout {layout.placement[:12]}: open both with"
            " the same KVLayout"
        )
    if (hello.block_tokens, hello.record_pages) != (layout.block_tokens, layout.record_pages):
        raise ConfigError(
            f"rank {hello.rank} has blocks of {hello.block_tokens} tokens and records of {_pages(hello.record_pages)},"
            f" this cache's layout {layout.block_tokens} and {_pages(layout.record_pages)}: open them with the same"
            " KVLayout but for its ranks"
        )


def _pages(record_pages: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, record_pages))} pages"
