"""Memory is bounded: what passes through leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.index.entries import Index

PROGRAM = """
import sys
import numpy as np
from kvtier import KVGroup, KVLayout, PagedTensors, Part, TieredCache

def resident_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

BLOCKS, HOST, STAGING = 16, 1 << 30, 64 << 20
axes, shape = ("token", "head", "dim"), (64, 8, 64)
parts = tuple(Part(layer, kind, "float16", axes, shape) for layer in range(32) for kind in "kv")
layout = KVLayout(64, 64, (KVGroup("attention", parts),))
block_bytes = layout.block_bytes[0]
tensors = [np.ones((BLOCKS, 64, 8, 64), np.float16) for _ in parts]
memory = PagedTensors(layout, tensors)
pages = memory.pages(np.arange(BLOCKS))
before = resident_bytes()
settings = {
    "host": {"capacity": HOST, "staging": STAGING},
    "disk": {"directories": [sys.argv[1]], "capacity": 2 * HOST},
}
cache = TieredCache(settings, layout, "resident")
passed, number, loaded = 0, 0, 0
while passed < 10 * HOST:
    keys = cache.keys(np.full(BLOCKS * 64 + 1, number, np.int32))
    result = cache.submit_store(keys, pages).result(120)
    with cache.lookup(keys) as hit:
        loaded += cache.submit_load(hit, pages).result(120).nbytes
    passed += result.stored // 64 * block_bytes
    cache.flush("process", 120)
    number += 1
stats = cache.stats()
grown = resident_bytes() - before
print(grown, HOST + STAGING, stats["entries"], loaded, stats["host_capacity_bytes"])
cache.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_times_the_arenas_pass_through_and_resident_memory_stays(tmp_path: Path) -> None:
    """Resident size above that before opening is at most 1.1 times arenas and index."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True).stdout
    grown, arenas, entries, loaded, capacity = map(float, output.split())
    assert capacity >= 1 << 30
    assert loaded > 5 * capacity
    assert grown <= 1.1 * (arenas + entries * (Index.ENTRY_BYTES + Index.RANK_BYTES))
