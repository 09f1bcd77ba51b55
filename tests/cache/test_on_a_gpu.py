"""On a GPU: bytes are right while compute runs, by digests worked out there; needs a CUDA device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvtier import TieredCache
from kvtier.core.keys import Keys
from kvtier.errors import ConfigError
from kvtier.models import KVLayout
from kvtier.pages import DeviceTensors
from kvtier.testing.contents import content_of, tiny_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none"),
]

BLOCKS = 16
LAYOUTS = {"small blocks": tiny_layout(), "blocks of several slices": tiny_layout(layers=3, dim=8192)}
SPIN = 200_000_000
"""Cycles that a stream is kept busy for: about a tenth of a second, long enough for any copy to come too early."""


class Engine:
    """Pages on the GPU, filled and compared there. Everything is queued to the current stream, and nobody waits."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.tensors = [
            torch.zeros((BLOCKS, *part.shape), dtype=getattr(torch, part.dtype), device="cuda")
            for part in layout.groups[0].parts
        ]
        self.memory = DeviceTensors(layout, self.tensors)
        self.pages = self.memory.pages(np.arange(BLOCKS, dtype=np.int32))

    def wanted(self, keys: Keys) -> torch.Tensor:
        """uint8 ``[blocks, bytes]``: what the blocks of ``keys`` hold."""
        rows = [content_of(key, self.layout.block_bytes[0]) for key in keys.digests]
        return torch.from_numpy(np.stack(rows)).cuda()

    def fill(self, content: torch.Tensor) -> None:
        at = 0
        for tensor in self.tensors:
            page = tensor.view(torch.uint8).view(BLOCKS, -1)
            page.copy_(content[:, at : at + page.shape[1]])
            at += page.shape[1]

    def read(self) -> torch.Tensor:
        return torch.cat([tensor.view(torch.uint8).view(BLOCKS, -1) for tensor in self.tensors], dim=1)


def digest(content: torch.Tensor) -> torch.Tensor:
    """One number a block, which depends on every byte and its place."""
    weights = torch.arange(1, 1 + content.shape[1], device=content.device, dtype=torch.int64) * 0x9E3779B1 | 1
    return (content.to(torch.int64) * weights).sum(dim=1)


def cache_of(layout: KVLayout, device_blocks: int, **device: Any) -> TieredCache:
    block_bytes = layout.record_pages[0] * 4096
    config = {
        "device": {"capacity": device_blocks * block_bytes, "device": "cuda", **device},
        "host": {"capacity": 8 * BLOCKS * block_bytes, "staging": "16MiB"},
    }
    return TieredCache(config, layout, "model")


def keys_of(cache: TieredCache, layout: KVLayout, seed: int) -> Keys:
    return cache.keys(np.random.default_rng(seed).integers(0, 1000, BLOCKS * layout.block_tokens + 1))


@pytest.mark.parametrize("device_blocks", [0, 2 * BLOCKS], ids=["host memory", "slab"])
@pytest.mark.parametrize("name", LAYOUTS)
class TestOrder:
    def test_a_store_waits_for_the_compute_that_wrote(self, name: str, device_blocks: int) -> None:
        """The stream is busy when the store is asked for; what it writes comes behind that."""
        layout, engine = LAYOUTS[name], Engine(LAYOUTS[name])
        with cache_of(layout, device_blocks) as cache:
            keys = keys_of(cache, layout, 1)
            content = engine.wanted(keys)
            torch.cuda.synchronize()
            torch.cuda._sleep(SPIN)
            engine.fill(content)
            stored = cache.submit_store(keys, engine.pages)
            assert stored.result(60).stored == BLOCKS * layout.block_tokens
            engine.fill(torch.zeros_like(content))
            torch.cuda.synchronize()
            with cache.lookup(keys) as hit:
                assert cache.submit_load(hit, engine.pages).result(60).ok_tokens == hit.num_tokens
            assert torch.equal(digest(engine.read()), digest(content))

    def test_a_load_waits_for_the_compute_that_last_read(self, name: str, device_blocks: int) -> None:
        """What is read late must still be what was there when the load was asked for."""
        layout, engine = LAYOUTS[name], Engine(LAYOUTS[name])
        with cache_of(layout, device_blocks) as cache:
            keys = keys_of(cache, layout, 2)
            content = engine.wanted(keys)
            engine.fill(content)
            cache.submit_store(keys, engine.pages).result(60)
            before = torch.full_like(content, 85)
            engine.fill(before)
            torch.cuda.synchronize()
            torch.cuda._sleep(SPIN)
            late = digest(engine.read())
            with cache.lookup(keys) as hit:
                cache.submit_load(hit, engine.pages).result(60)
            assert torch.equal(late, digest(before))
            assert torch.equal(digest(engine.read()), digest(content))

    def test_bytes_are_right_while_another_stream_computes(self, name: str, device_blocks: int) -> None:
        layout, engine = LAYOUTS[name], Engine(LAYOUTS[name])
        side, matrix = torch.cuda.Stream(), torch.rand((2048, 2048), device="cuda")
        with cache_of(layout, device_blocks) as cache:
            for seed in range(8):
                with torch.cuda.stream(side):
                    for _ in range(20):
                        matrix = (matrix @ matrix).clamp(0, 1)
                keys = keys_of(cache, layout, seed)
                content = engine.wanted(keys)
                engine.fill(content)
                cache.submit_store(keys, engine.pages).result(60)
                engine.fill(torch.zeros_like(content))
                with cache.lookup(keys) as hit:
                    assert cache.submit_load(hit, engine.pages).result(60).ok_tokens == hit.num_tokens
                assert torch.equal(digest(engine.read()), digest(content))
            torch.cuda.synchronize()


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_come_from_the_slab_and_from_host_memory_with_the_slab_s_own_digests(name: str) -> None:
    layout, engine = LAYOUTS[name], Engine(LAYOUTS[name])
    with cache_of(layout, 2 * BLOCKS, verify=True) as cache:
        seen = dict.fromkeys(("device", "host"), 0)
        for seed in (0, 1, 2, 3, 0, 3):
            keys = keys_of(cache, layout, seed)
            content = engine.wanted(keys)
            engine.fill(content)
            cache.submit_store(keys, engine.pages).result(60)
            engine.fill(torch.zeros_like(content))
            with cache.lookup(keys) as hit:
                by_tier = cache.submit_load(hit, engine.pages).result(60).by_tier
            for tier in seen:
                seen[tier] += by_tier[tier]
            assert torch.equal(digest(engine.read()), digest(content))
        assert seen["device"] > 0
        assert cache.stats().get("lost_copies{tier=device}", 0) == 0


def test_a_slab_larger_than_the_gpu_is_refused() -> None:
    _, total_bytes = torch.cuda.mem_get_info()
    config = {
        "device": {"capacity": 2 * total_bytes, "device": "cuda"},
        "host": {"capacity": "1MiB", "staging": "1MiB"},
    }
    with pytest.raises(ConfigError, match=r"device\.capacity = .* more than the \d+ bytes that cuda:\d+ has free"):
        TieredCache(config, LAYOUTS["small blocks"], "model")
