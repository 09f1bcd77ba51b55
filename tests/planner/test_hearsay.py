"""What others learn from a planner: events of blocks, statistics, and what it notes of sessions."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.core.plan import PAGE_BYTES, Lineage, Reason, Status, Tier
from kvtier.planner import sessions as sessions_module
from kvtier.planner.events import BlockEvent
from kvtier.planner.sessions import Sessions
from tests.planner.bench import BLOCK, Bench


def events(bench: Bench) -> list[tuple[str, str, bytes]]:
    """(change, tier, key) since the last call."""
    return [(event.change, event.tier, event.key) for event in bench.planner.events.take()]


def listening(**how: object) -> Bench:
    bench = Bench(**how)  # type: ignore[arg-type]
    bench.planner.events.listening = True
    return bench


# --- events -----------------------------------------------------------------------------------------------------------


def test_nothing_is_collected_while_nobody_listens() -> None:
    bench = Bench()
    bench.stored(bench.keys(3))
    assert not events(bench)


def test_a_stored_block_says_what_it_extends_and_how_long_it_is() -> None:
    bench = listening()
    keys = bench.keys(2)
    bench.stored(keys)
    assert bench.planner.events.take() == [
        BlockEvent("stored", keys.digests[0], b"", BLOCK, "host"),
        BlockEvent("stored", keys.digests[1], keys.digests[0], BLOCK, "host"),
    ]
    assert not events(bench), "each is told once"


def test_a_block_that_did_not_come_is_not_told() -> None:
    bench = listening()
    keys = bench.keys(3)
    bench.store(keys)
    assert not events(bench), "not before it is whole"
    bench.run(lambda plan, row: Reason.IO_ERROR if row == 1 else Status.OK)
    assert [key for _, _, key in events(bench)] == [keys.digests[0], keys.digests[2]]


def test_children_leave_before_their_parents() -> None:
    bench = listening(host_blocks=3)
    keys = bench.keys(3)
    bench.stored(keys)
    events(bench)
    bench.stored(bench.keys(3, 1))
    removed = [key for change, _, key in events(bench) if change == "removed"]
    assert removed == keys.digests[::-1]


def test_every_tier_tells_for_itself() -> None:
    bench = listening(segments=4)
    keys = bench.keys(1)
    bench.stored(keys)
    bench.lose(keys, 0, Tier.HOST)
    bench.loaded(keys)
    bench.lose(keys, 0, Tier.DISK)
    bench.lose(keys, 0, Tier.HOST)
    assert [event[:2] for event in events(bench)] == [
        ("stored", "host"), ("stored", "disk"), ("removed", "host"), ("stored", "host"), ("removed", "disk"),
        ("removed", "host"),
    ]  # fmt: skip


def test_what_a_restart_found_is_told_with_its_parents() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.stored(keys)
    plane = bench.planes[0]
    bench = listening(attach=False, segments=1)
    bench.planes = [plane]
    plane.restart()
    plane.recover()
    bench.hear()
    told = {event.key: event.parent for event in bench.planner.events.take()}
    assert told == dict(zip(keys.digests, [b"", *keys.digests[:2]], strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_superseded_content_is_told_as_removed(fails: bool) -> None:
    """Else followers would believe for ever in a block whose successor never came."""
    bench = listening(segments=6)
    keys = bench.keys(1)
    bench.stored(keys, lineage=Lineage.APPROXIMATE)
    lease = bench.lookup(keys)
    events(bench)
    bench.store(keys)
    assert events(bench) == [("removed", "host", keys.digests[0]), ("removed", "disk", keys.digests[0])]
    bench.run(lambda plan, row: Reason.IO_ERROR if fails else Status.OK)
    bench.planner.release(lease)
    bench.run()
    assert [event[:2] for event in events(bench)] == ([] if fails else [("stored", "host"), ("stored", "disk")])
    bench.check_at_rest()


def test_a_listener_that_never_asks_costs_a_bounded_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.planner.events.MAX_BLOCKS", 6)
    bench = listening(host_blocks=40)
    for seed in range(10):
        bench.stored(bench.keys(2, seed))
    assert len(events(bench)) == 6
    assert bench.planner.stats()["dropped_events"] == 14


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_count_what_was_asked_for_and_what_was_found() -> None:
    bench = Bench(segments=4)
    keys = bench.keys(3)
    bench.planner.release(bench.lookup(keys))
    bench.stored(keys)
    lease = bench.lookup(keys)
    stats = bench.planner.stats()
    assert stats["lookup_tokens"] == 2 * keys.num_tokens
    assert stats["hit_tokens"] == 3 * BLOCK
    assert stats["leases"] == 1
    assert stats["pinned_entries"] == stats["entries"] == stats["host_entries"] == stats["disk_entries"] == 3
    assert stats["host_used_bytes"] == 3 * 2 * PAGE_BYTES
    assert stats["spilled_bytes"] == 3 * 2 * PAGE_BYTES
    assert stats["stored_host_blocks"] == stats["stored_disk_blocks"] == 3
    bench.planner.release(lease)
    bench.check_at_rest()


def test_statistics_count_evictions_and_losses() -> None:
    bench = Bench(host_blocks=3)
    keys = bench.keys(3)
    bench.stored(keys)
    bench.lose(keys, 2, Tier.HOST)
    bench.stored(bench.keys(2, 1))
    stats = bench.planner.stats()
    assert stats["evicted_entries"] == 1
    assert stats["removed_host_blocks"] == 2


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_an_entry_takes_at_most_200_bytes_and_16_more_a_tier_for_every_further_rank(ranks: int) -> None:
    """All arrays of the planner that have a place for every entry, also while a restart is being recovered."""
    bench = Bench(ranks=ranks, segments=4, attach=False)
    for plane in bench.planes:
        plane.hello()
    bench.hear()
    planner, state = bench.planner, bench.planner._state
    owners = [state.index, state.index.table, state.host._policy, state.disk]
    arrays = [value for owner in owners for value in vars(owner).values()]
    arrays += list(planner._recovery._sequences.values())
    nbytes = sum(a.nbytes for a in arrays if isinstance(a, np.ndarray) and a.base is None)
    assert nbytes / state.index.table.capacity <= 200 + (ranks - 1) * 2 * 16


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_a_session_remembers_its_last_use() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.now_s = 7.5
    bench.lookup(keys, session="chat-42")
    hints = bench.planner.sessions.hints("chat-42")
    assert (hints.last_key, hints.tokens, hints.last_use_s) == (keys.digests[-1], keys.num_tokens, 7.5)
    assert not hints.ended
    hints.ended = hints.one_shot = True
    bench.lookup(bench.keys(0), session="chat-42")
    assert bench.planner.sessions.hints("chat-42").last_key == b""
    assert not hints.ended, "whoever asks again has not ended"
    assert hints.one_shot


def test_hints_change_nothing_of_what_is_found() -> None:
    bench = Bench()
    keys = bench.keys(3)
    bench.stored(keys)
    hints = bench.planner.sessions.hints("s")
    hints.ended = hints.one_shot = True
    hints.ttl_s = 0.0
    assert bench.lookup(keys, session="s").blocks == 3


def test_the_least_recently_used_sessions_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "_MAX_SESSIONS", 3)
    sessions = Sessions()
    for name in "abc":
        sessions.hints(name).tokens = 9
    sessions.hints("a")
    sessions.hints("d")
    assert len(sessions) == 3
    assert sessions.hints("a").tokens == 9
    assert sessions.hints("b").tokens == 0
