"""An engine of one's own with kvtier: paged KV memory, asyncio, no model library.

    python examples/engine_loop.py

The "model" fills its pages with numbers that depend on the tokens; a real engine runs attention there.
"""

import asyncio

import torch

import kvtier

LAYERS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, NUM_PAGES = 4, 2, 64, 16, 256
AXES = ("token", "head", "dim")


def make_layout() -> kvtier.KVLayout:
    shape = (PAGE_TOKENS, KV_HEADS, HEAD_DIM)
    parts = tuple(kvtier.Part(layer, kind, "bfloat16", AXES, shape) for layer in range(LAYERS) for kind in ("k", "v"))
    return kvtier.KVLayout(64, PAGE_TOKENS, (kvtier.KVGroup("attention", parts),))


def compute(tensors: list[torch.Tensor], pages: list[int], tokens: list[int], start: int) -> None:
    """Prefill: the KV of tokens [start, len(tokens)) into their pages."""
    for position in range(start, len(tokens)):
        page, cell = pages[position // PAGE_TOKENS], position % PAGE_TOKENS
        for number, tensor in enumerate(tensors):
            tensor[page, cell] = tokens[position] + number / len(tensors)


async def serve(
    cache: kvtier.CacheManager, memory: kvtier.PagedTensors, tensors: list, pages: list, tokens: list
) -> int:
    """One request; returns how many tokens did not have to be computed."""
    table = memory.pages(pages)
    with cache.lookup(tokens) as hit:
        ready = (await cache.load(hit, table)).ok_tokens if hit.num_tokens else 0
    compute(tensors, pages, tokens, ready)
    stored = await cache.store(tokens, table, start=ready, derived_from=hit)
    print(f"{len(tokens)} tokens: {ready} loaded, {len(tokens) - ready} computed, {stored.stored} newly stored")
    return ready


async def main() -> None:
    layout = make_layout()
    tensors = [torch.zeros((NUM_PAGES, *part.shape), dtype=torch.bfloat16) for part in layout.groups[0].parts]
    memory = kvtier.PagedTensors(layout, tensors)
    document = list(range(1000, 1500))
    async with kvtier.CacheManager({"host": {"capacity": "64MiB"}}, layout, "my-model-v1") as cache:
        assert await serve(cache, memory, tensors, list(range(33)), [*document, 1, 2, 3]) == 0
        assert await serve(cache, memory, tensors, list(range(100, 133)), [*document, 7, 8, 9]) == 448
    first, second = tensors[0][: 448 // PAGE_TOKENS], tensors[0][100 : 100 + 448 // PAGE_TOKENS]
    assert torch.equal(first, second)


if __name__ == "__main__":
    asyncio.run(main())
