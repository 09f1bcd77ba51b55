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
PAGES = 64
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


def without_chain(digests: list[bytes]) -> Keys:
    """``digests`` by themselves, without the chain that they were stored in."""
    keys = Keys(Root("kill"), SIZE)
    keys.digests, keys.chained, keys.num_tokens = digests, False, len(digests) * SIZE + 1
    return keys


def found_and_exact(cache: TieredCache, engine: PseudoEngine, digests: list[bytes]) -> list[bytes]:
    """Those of ``digests`` that are found, each looked up alone; what is found must be exact."""
    found: list[bytes] = []
    for at in range(0, len(digests), PAGES):
        keys = without_chain(digests[at : at + PAGES])
        engine.wipe()
        hits = [cache.lookup(without_chain([digest])) for digest in keys.digests]
        there = [page for page, hit in enumerate(hits) if hit.num_tokens]
        jobs = [cache.submit_load(hits[page], engine.memory.pages([page])) for page in there]
        assert [job.result(60).ok_tokens for job in jobs] == [SIZE] * len(jobs)
        for hit in hits:
            hit.release()
        for page in there:
            assert engine.wrong_blocks(keys, range(page, page + 1)) == []
            found.append(keys.digests[page])
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("count", "cycles"), [(1, CYCLES), (2, CYCLES // 5)], ids=["one directory", "two directories"])
def test_what_was_acknowledged_survives_kill_9_and_nothing_is_ever_wrong(
    tmp_path: Path, count: int, cycles: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything acknowledged among the newest bytes is found by key and exact; older blocks may be gone.

    Nobody is warned of damage: a crash is none.
    """
    rng, engine = random.Random(7), PseudoEngine(LAYOUT, PAGES)
    directories = [str(tmp_path / f"tier-{number}") for number in range(count)]
    keys: list[bytes] = []
    lost: list[int] = []
    for cycle in range(cycles):
        keys += killed_writer(directories, cycle, rng)
        recent = newest_bytes(directories) // RECORD_BYTES
        with TieredCache(settings(directories), LAYOUT, "kill") as cache:
            older = [key for key in keys[:-recent] if rng.random() < 0.05]
            found = set(found_and_exact(cache, engine, keys[-recent:] + older))
            lost += [cycle for key in keys[-recent:] if key not in found]
            assert cache.stats()["leases"] == 0
        keys = keys[-4 * recent :]
    assert not lost
    assert "not all of its blocks" not in caplog.text
    assert len(keys) > recent, "the writers got far enough for segments to be used again"
