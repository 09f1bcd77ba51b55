"""One control plane here, two data planes in processes of their own; plans, completions and reports cross as bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvtier import TieredCache
from kvtier.core.memory import GroupPages, PageTable
from tests.cache.rank_process import PAGES, PipeChannel, rank_layout, run

SPAWN = multiprocessing.get_context("spawn")
TABLE = PageTable(0, (GroupPages(0, np.arange(PAGES, dtype=np.int32)),))


def settings(tmp_path: Path, rank: int) -> dict[str, Any]:
    return {
        "host": {"capacity": "256KiB", "staging": "1MiB"},
        "disk": {"directories": [str(tmp_path / f"rank{rank}")], "capacity": "8MiB", "segment": "1MiB"},
    }


class Rank:
    """The test's hold on one rank process."""

    def __init__(self, tmp_path: Path, rank: int, incarnation: int = 1) -> None:
        ours, theirs = SPAWN.Pipe()
        self.commands, their_commands = SPAWN.Pipe()
        args = (rank, settings(tmp_path, rank), theirs, their_commands, incarnation)
        self.process = SPAWN.Process(target=run, args=args, daemon=True)
        self.process.start()
        theirs.close()
        their_commands.close()
        self.plans = ours
        self.channel = PipeChannel(ours)

    def ask(self, *command: Any) -> Any:
        self.commands.send(command)
        assert self.commands.poll(60), f"{command[0]}: no answer"
        return self.commands.recv()


@contextmanager
def two_ranks(tmp_path: Path) -> Iterator[tuple[TieredCache, list[Rank]]]:
    ranks = [Rank(tmp_path, rank) for rank in (0, 1)]
    cache = TieredCache(settings(tmp_path, 9), rank_layout(0), "m", channels=[rank.channel for rank in ranks])
    for rank in ranks:
        rank.channel.listen(cache.pump)
    for rank in ranks:
        rank.ask("ready")
    cache.wait_attached(60)
    try:
        yield cache, ranks
    finally:
        cache.close()
        for rank in ranks:
            assert rank.ask("stop") is True
            rank.process.join(10)
            assert rank.process.exitcode == 0


def tell(ranks: list[Rank], *command: Any) -> list[Any]:
    return [rank.ask(*command) for rank in ranks]


def test_blocks_go_to_both_ranks_and_come_back_from_host_and_from_disk(tmp_path: Path) -> None:
    """Stores land on both ranks, spill in both directories, and every rank gets its own bytes back."""
    with two_ranks(tmp_path) as (cache, ranks):
        documents = [cache.keys([number] * 16 * 12 + [1]) for number in range(6)]
        for keys in documents:
            tell(ranks, "write", keys, range(12))
            result = cache.submit_store(keys, TABLE, durability="process").result(60)
            assert (result.stored, result.refused) == (12 * 16, 0)
        tiers = set()
        for keys in reversed(documents):
            tell(ranks, "wipe")
            with cache.lookup(keys) as hit:
                assert hit.num_tokens == 12 * 16
                tiers |= {tier for tier, tokens in hit.by_tier.items() if tokens}
                assert cache.submit_load(hit, TABLE).result(60).ok_tokens == 12 * 16
            assert tell(ranks, "wrong", keys, range(12)) == [[], []]
        assert tiers == {"host", "disk"}
        stats = cache.stats()
        assert (stats["leases"], stats["hops"], stats["pinned_entries"]) == (0, 0, 0)
        assert all(rank.channel.sent_bytes > 0 for rank in ranks)
    for rank in (0, 1):
        assert list((tmp_path / f"rank{rank}").iterdir()), "each rank has a directory of its own"


def test_both_ranks_are_found_again_after_a_restart(tmp_path: Path) -> None:
    """New processes on the same directories: hellos and recovered rows cross as bytes, and the blocks are exact."""
    with two_ranks(tmp_path) as (cache, ranks):
        keys = cache.keys(list(range(16 * 10 + 3)))
        tell(ranks, "write", keys, range(10))
        assert cache.submit_store(keys, TABLE, durability="durable").result(60).stored == 160
    with two_ranks(tmp_path) as (cache, ranks), cache.lookup(keys) as hit:
        assert hit.by_tier == {"device": 0, "host": 0, "disk": 160}
        assert cache.submit_load(hit, TABLE).result(60).ok_tokens == 160
        assert tell(ranks, "wrong", keys, range(10)) == [[], []]


def test_a_rank_that_is_killed_ends_what_was_asked_of_it_and_is_served_again_after_its_restart(tmp_path: Path) -> None:
    """Nobody waits for the dead; the others go on, and a new process finds what the old one wrote."""
    with two_ranks(tmp_path) as (cache, ranks):
        keys = cache.keys(list(range(16 * 10 + 3)))
        tell(ranks, "write", keys, range(10))
        assert cache.submit_store(keys, TABLE, durability="process").result(60).stored == 160
        victim = ranks[1]
        with cache.lookup(keys) as hit:
            os.kill(victim.process.pid, signal.SIGSTOP)
            job = cache.submit_load(hit, TABLE)
            assert not job.done
            victim.process.kill()
            assert job.result(60).failed == {"gone": 160}
            assert cache.submit_load(hit, TABLE).result(60).failed == {"closed": 160}
        assert cache.match(keys) == 0
        assert cache.submit_store(keys, TABLE).result(60).refused == 160
        victim.process.join(60)

        ranks[1] = Rank(tmp_path, 1, incarnation=2)
        victim.channel.connect(ranks[1].plans)
        cache.wait_attached(60)
        tell(ranks, "wipe")
        with cache.lookup(keys) as hit:
            assert hit.by_tier == {"device": 0, "host": 0, "disk": 160}
            assert cache.submit_load(hit, TABLE).result(60).ok_tokens == 160
        assert tell(ranks, "wrong", keys, range(10)) == [[], []]
