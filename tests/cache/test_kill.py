"""kill -9 in the middle of writing, again and again on one directory."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import pytest

from kvtier import TieredCache
from kvtier.core.keys import Keys, Root
from kvtier.testing.contents import PseudoEngine
from tests.cache.kill_writer import LAYOUT, SIZE, settings, write_until_killed

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.cache.kill_writer"])
RECORD_BYTES = 2 * 4096
CYCLES = int(os.environ.get("KVTIER_KILL_CYCLES", "50"))


def newest_bytes(directories: list[str]) -> int:
    """What must still be there: capacity less one open, two clean and two segments' worth of headers and footers."""
    config = settings(directories)["disk"]
    segments = 12 // len(directories) - 1 - config["clean_segments"]
    return len(directories) * segments * ((1 << 20) - 64 * 1024)


def killed_writer(directories: list[str], seed: int, rng: random.Random) -> list[bytes]:
    """Keys that a writer acknowledged before it was killed at a random moment."""
    ours, theirs = FORK.Pipe(duplex=False)
    writer = FORK.Process(target=write_until_killed, args=(directories, seed, theirs), daemon=True)
    writer.start()
    theirs.close()
    assert ours.poll(60), "the writer did not open the directory"
    assert ours.recv() == []
    keys: list[bytes] = []
    for _ in range(rng.randint(0, 60)):
        if not ours.poll(60):
            break
        keys += ours.recv()
    writer.kill()
    writer.join(60)
    try:
        while ours.poll(0):
            keys += ours.recv()
    except EOFError:
        pass
    return keys


def single(key: bytes) -> Keys:
    """``key`` alone, without the chain that it was stored in."""
    keys = Keys(Root("kill"), SIZE)
    keys.digests, keys.chained, keys.num_tokens = [key], False, SIZE + 1
    return keys


def found_and_exact(cache: TieredCache, engine: PseudoEngine, key: bytes) -> bool:
    """Whether ``key`` is found; what is found must be exact."""
    keys = single(key)
    with cache.lookup(keys) as hit:
        if not hit.num_tokens:
            return False
        engine.wipe()
        loaded = cache.submit_load(hit, engine.pages).result(60)
        assert loaded.ok_tokens == SIZE, loaded
    assert engine.wrong_blocks(keys, range(1)) == []
    return True


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("count", "cycles"), [(1, CYCLES), (2, CYCLES // 5)], ids=["one directory", "two directories"])
def test_what_was_acknowledged_survives_kill_9_and_nothing_is_ever_wrong(
    tmp_path: Path, count: int, cycles: int
) -> None:
    """Everything acknowledged among the newest bytes is found by key and exact; older blocks may be gone."""
    rng, engine = random.Random(7), PseudoEngine(LAYOUT, 1)
    directories = [str(tmp_path / f"tier-{number}") for number in range(count)]
    keys: list[bytes] = []
    lost: list[int] = []
    for cycle in range(cycles):
        keys += killed_writer(directories, cycle, rng)
        recent = newest_bytes(directories) // RECORD_BYTES
        with TieredCache(settings(directories), LAYOUT, "kill") as cache:
            for age, key in enumerate(reversed(keys)):
                found = found_and_exact(cache, engine, key) if age < recent or rng.random() < 0.05 else None
                if age < recent and not found:
                    lost.append(cycle)
            assert cache.stats()["leases"] == 0
        keys = keys[-4 * recent :]
    assert not lost
    assert len(keys) > recent, "the writers got far enough for segments to be used again"
