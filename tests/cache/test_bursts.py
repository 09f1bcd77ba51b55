"""Many small jobs at once, which share plans where memory is in pages: every byte is where it belongs, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvtier import DenseKV, KVGroup, KVLayout, PagedTensors, Part, TieredCache
from kvtier.core.memory import KVPages
from kvtier.jobs import Client, Job, JobControl, tell
from kvtier.planner import Ticket
from kvtier.runtime import system_machine

BLOCK, ROWS, BLOCKS = 8, 6, 4
PagesOf = Callable[[int], KVPages]


def paged() -> tuple[KVLayout, torch.Tensor, PagesOf]:
    """Two pages a block; request ``row`` has every ROWS-th page, so that no two pages of it are neighbours."""
    part = Part(0, "k", "float32", ("token", "head", "dim"), (BLOCK // 2, 1, 4))
    layout = KVLayout(BLOCK, BLOCK // 2, (KVGroup("attention", (part,)),))
    tensor = torch.zeros(2 * BLOCKS * ROWS, *part.shape)
    memory = PagedTensors(layout, [tensor])
    return layout, tensor, lambda row: memory.pages(np.arange(row, 2 * BLOCKS * ROWS, ROWS))


def dense() -> tuple[KVLayout, torch.Tensor, PagesOf]:
    """The rows of one batch."""
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4}
    layout = KVLayout.from_hf_config(config, block_tokens=BLOCK, dtype="float32")
    both = torch.zeros(2, ROWS, 1, BLOCKS * BLOCK, 4)
    memory = DenseKV(layout, [both[0]], [both[1]])
    return layout, both, memory.row


@pytest.mark.parametrize("make", [paged, dense])
def test_a_burst_of_stores_and_loads_moves_what_was_asked_for_and_nothing_else(
    make: Callable[[], tuple[KVLayout, torch.Tensor, PagesOf]],
) -> None:
    """Each row stores its third and fourth block, then loads one of them; the rest of the memory is left alone."""
    layout, tensor, pages = make()
    with TieredCache({"host": {"capacity": "8MiB", "staging": "1MiB"}}, layout, "m") as cache:
        for number in range(20):
            tensor.copy_(torch.from_numpy(np.random.default_rng(number).random(tuple(tensor.shape), np.float32)))
            wanted = tensor.clone()
            prompts = [[number, row] * (BLOCKS * BLOCK // 2) + [0] for row in range(ROWS)]
            heads = [cache.submit_store(prompt[: 2 * BLOCK], pages(row)) for row, prompt in enumerate(prompts)]
            tails = [cache.submit_store(prompt, pages(row), start=2 * BLOCK) for row, prompt in enumerate(prompts)]
            assert [job.result(30).stored for job in heads + tails] == [2 * BLOCK] * (2 * ROWS)
            hits = [cache.lookup(prompt) for prompt in prompts]
            spans = [((number + row) % BLOCKS * BLOCK, ((number + row) % BLOCKS + 1) * BLOCK) for row in range(ROWS)]
            tensor.zero_()
            jobs = [
                cache.submit_load(hit, pages(row), start=start, stop=stop)
                for row, (hit, (start, stop)) in enumerate(zip(hits, spans, strict=True))
            ]
            assert [job.result(30).ok_tokens for job in jobs] == [stop for _, stop in spans]
            for hit in hits:
                hit.release()
            assert torch.equal(tensor, only(wanted, spans))
        stats = cache.stats()
        assert (stats["leases"], stats["jobs"], stats["hops"], stats["memories"]) == (0, 0, 0, 0)


def only(wanted: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """``wanted`` in the spans of its rows, and nothing elsewhere."""
    kept = torch.zeros_like(wanted)
    for row, (start, stop) in enumerate(spans):
        if wanted.shape[0] == 2:
            kept[:, row, :, start:stop] = wanted[:, row, :, start:stop]
        else:
            for page in range(2 * start // BLOCK, 2 * stop // BLOCK):
                kept[row + page * ROWS] = wanted[row + page * ROWS]
    return kept


def test_a_load_of_no_tokens_moves_nothing() -> None:
    layout, tensor, pages = paged()
    with TieredCache({"host": {"capacity": "8MiB", "staging": "1MiB"}}, layout, "m") as cache:
        prompt = [1] * (BLOCKS * BLOCK)
        cache.submit_store(prompt, pages(0)).result(30)
        tensor.fill_(7)
        with cache.lookup(prompt) as hit:
            result = cache.submit_load(hit, pages(1), start=3, stop=3).result(30)
        assert (result.ok_tokens, result.nbytes, sum(result.by_tier.values())) == (3, 0, 0)
        assert (tensor == 7).all()


def test_an_end_that_comes_while_news_are_heard_is_told_once() -> None:
    """The ticket may finish between any two looks of whoever brings earlier news."""

    class Ending(Ticket):
        looks = 0

        @property
        def finished(self) -> bool:  # type: ignore[override]
            type(self).looks += 1
            return self.looks > 1

    ticket = Ending.__new__(Ending)
    ticket.source_free = True
    runtime = system_machine("threads").runtime
    client = Client()
    job: Job[Any] = Job(ticket, range(0), BLOCK, JobControl(runtime, lambda _: None, lambda: None, 1), client)
    tell([job])
    tell([job])
    assert job.done
    assert client.poll() == [job]
    client.close()
