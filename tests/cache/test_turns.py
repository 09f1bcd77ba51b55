"""What is planned at once: as much as nobody has to wait long for, the rest by a copy thread that has time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest

from kvtier import KVGroup, KVLayout, Part
from kvtier.config import load_config
from kvtier.core.keys import Keys, Root
from kvtier.core.memory import GroupPages, PageTable
from kvtier.core.plan import Lineage, Message, Plan
from kvtier.dispatch import Dispatch
from kvtier.planner import Durability, Lease, Planner, StoreWish
from kvtier.runtime import system_machine

BLOCK_BYTES = 32 << 20
A_TURN = 2
"""Wishes of one such block: 64 MiB."""


class _Channel:
    """Nothing ever answers; ``calls`` counts how often somebody wants to be called back."""

    def __init__(self, *, has_threads: bool) -> None:
        self.has_threads = has_threads
        self.calls = 0

    def poll(self) -> Sequence[Message]:
        return []

    def send(self, plans: Sequence[Plan]) -> None:
        raise AssertionError(plans)

    def call_back(self) -> bool:
        self.calls += 1
        return self.has_threads

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def _dispatch(channel: _Channel, block_bytes: int) -> Dispatch:
    part = Part(0, "kv", "int8", ("token", "head", "dim"), (16, 1, block_bytes // 16))
    layout = KVLayout(16, 16, (KVGroup("attention", (part,)),))
    planner = Planner(load_config({"host": {"capacity": "1GiB"}}), layout)
    return Dispatch(
        planner, system_machine("threads").runtime, layout, make_channels=lambda _: [channel],  # type: ignore[list-item]
        check_here=lambda: None,
    )  # fmt: skip


def _wish(number: int) -> StoreWish:
    keys = Keys.from_tokens(Root("m", ""), np.full(16, number, np.int32), 16)
    table = PageTable(0, (GroupPages(0, np.zeros(1, np.int32)),))
    return StoreWish.of(keys, 1, table, start=0, lineage=Lineage.EXACT, durability=Durability.MEMORY)


def _submit(dispatch: Dispatch, count: int) -> list[StoreWish]:
    wishes = [_wish(number) for number in range(count)]
    for wish in wishes:
        dispatch.submit(wish, range(0), None, None)
    return wishes


def _planned(wishes: Sequence[StoreWish]) -> int:
    """Nobody is attached, so that what is planned ends at once."""
    return sum(wish.ticket.finished for wish in wishes)


def test_a_turn_ends_after_so_many_bytes_and_asks_a_copy_thread_for_the_next_one() -> None:
    channel = _Channel(has_threads=True)
    dispatch = _dispatch(channel, BLOCK_BYTES)
    wishes = _submit(dispatch, 2 * A_TURN + 1)
    assert _planned(wishes) == 0
    for planned, calls in ((A_TURN, 1), (2 * A_TURN, 1), (2 * A_TURN + 1, 0)):
        channel.calls = 0
        dispatch.pump()
        assert (_planned(wishes), channel.calls) == (planned, calls)


def test_a_turn_ends_after_so_many_wishes_however_small() -> None:
    channel = _Channel(has_threads=True)
    dispatch = _dispatch(channel, 512)
    wishes = _submit(dispatch, 130)
    dispatch.pump()
    assert _planned(wishes) == 128
    dispatch.pump()
    assert _planned(wishes) == 130


def test_a_block_longer_than_a_turn_is_planned_all_the_same() -> None:
    channel = _Channel(has_threads=True)
    dispatch = _dispatch(channel, 3 * BLOCK_BYTES)
    wishes = _submit(dispatch, 2)
    dispatch.pump()
    assert _planned(wishes) == 1


@pytest.mark.parametrize("count", [1, 5])
def test_without_copy_threads_whoever_submits_plans_all_of_it(count: int) -> None:
    wishes = _submit(_dispatch(_Channel(has_threads=False), BLOCK_BYTES), count)
    assert _planned(wishes) == count


def test_a_lease_is_let_go_behind_what_was_wished_for_before_it() -> None:
    channel = _Channel(has_threads=True)
    dispatch = _dispatch(channel, BLOCK_BYTES)
    wishes = _submit(dispatch, A_TURN)
    lease = dispatch.decide(lambda: dispatch.planner.lookup(wishes[0].keys, now_s=0.0))
    later = _submit(dispatch, 1)
    channel.calls = 0
    dispatch.release(lease)
    assert (lease.released, _planned(later), channel.calls) == (True, 1, 1), "whose end a copy thread tells"


def test_without_copy_threads_whoever_releases_sends_and_tells_what_follows() -> None:
    channel = _Channel(has_threads=True)
    dispatch = _dispatch(channel, BLOCK_BYTES)
    lease = dispatch.decide(lambda: dispatch.planner.lookup(_wish(0).keys, now_s=0.0))
    job = dispatch.submit(_wish(0), range(0), None, None)
    channel.has_threads = False
    dispatch.release(lease)
    assert (lease.released, job.done) == (True, True)


def test_without_copy_threads_what_follows_from_letting_go_is_left_to_the_next_verb() -> None:
    """Garbage collection must neither send nor tell."""
    channel = _Channel(has_threads=True)
    dispatch = _dispatch(channel, BLOCK_BYTES)
    lease = dispatch.decide(lambda: dispatch.planner.lookup(_wish(0).keys, now_s=0.0))
    job = dispatch.submit(_wish(0), range(0), None, None)
    channel.has_threads = False
    assert dispatch.let_go(lease)
    assert (lease.released, job.done) == (True, False)
    dispatch.decide(lambda: None)
    assert job.done


def test_a_lease_that_is_given_back_in_the_middle_of_a_decision_is_let_go_right_after_it() -> None:
    dispatch = _dispatch(_Channel(has_threads=False), BLOCK_BYTES)
    lease = dispatch.decide(lambda: dispatch.planner.lookup(_wish(0).keys, now_s=0.0))
    dispatch.decide(lambda: dispatch.release(lease))
    assert lease.released


def test_a_lease_that_cannot_be_let_go_keeps_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = _dispatch(_Channel(has_threads=True), BLOCK_BYTES)
    leases = [dispatch.decide(lambda: dispatch.planner.lookup(_wish(0).keys, now_s=0.0)) for _ in range(4)]
    with dispatch.lock:
        for lease in leases:
            dispatch.release(lease)
    release = dispatch.planner.release

    def failing(lease: Lease) -> None:
        if lease is leases[1]:
            raise ValueError
        release(lease)

    monkeypatch.setattr(dispatch.planner, "release", failing)
    dispatch.pump()
    assert [lease.released for lease in leases] == [True, False, True, True]


def test_an_interrupt_wherever_it_strikes_among_wishes_leaves_nobody_waiting() -> None:
    struck = [line for line in range(1, 200) if _all_end_though_interrupted_at(line)]
    assert struck == list(range(1, len(struck) + 1))
    assert 20 < len(struck) < 199


def _all_end_though_interrupted_at(line: int) -> bool:
    """Queue wishes and leases, interrupt whoever plans them at that line event; False when there are not so many."""
    dispatch = _dispatch(_Channel(has_threads=True), 16)
    leases = [dispatch.decide(lambda: dispatch.planner.lookup(_wish(0).keys, now_s=0.0)) for _ in range(3)]
    jobs = []
    with dispatch.lock:
        for number, lease in enumerate(leases):
            jobs += [dispatch.submit(_wish(10 * number + i), range(0), None, None) for i in range(2)]
            dispatch.release(lease)
    with _interrupt_at(line, Dispatch._plan_wishes) as struck:
        dispatch.decide(lambda: None)
    for _ in jobs:  # one round each: there is a copy thread, which could go on
        dispatch.pump()
    assert all(job.done for job in jobs)
    assert all(lease.released for lease in leases)
    return bool(struck)


@contextmanager
def _interrupt_at(line: int, function: Callable[..., object]) -> Iterator[list[int]]:
    """Ctrl-C at the line event of that number in ``function``; yields a list that is filled when it strikes."""
    struck: list[int] = []
    seen = 0

    def in_function(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        seen += event == "line"
        if event == "line" and seen == line:
            struck.append(frame.f_lineno)
            raise KeyboardInterrupt
        return in_function

    def trace(frame: FrameType, event: str, _: object) -> Any:
        return in_function if frame.f_code is function.__code__ else None  # type: ignore[attr-defined]

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield struck
    except KeyboardInterrupt:
        assert struck
    finally:
        sys.settrace(before)


def test_whoever_decides_comes_behind_all_that_was_wished_for() -> None:
    dispatch = _dispatch(_Channel(has_threads=True), BLOCK_BYTES)
    wishes = _submit(dispatch, 2 * A_TURN + 1)
    assert dispatch.decide(lambda: _planned(wishes)) == len(wishes)


def test_whoever_decides_leaves_what_follows_to_a_copy_thread() -> None:
    channel = _Channel(has_threads=True)
    dispatch = _dispatch(channel, BLOCK_BYTES)
    job = dispatch.submit(_wish(0), range(0), None, None)
    channel.calls = 0
    dispatch.decide(lambda: None)
    assert (job.ticket.finished, job.done, channel.calls) == (True, False, 1)
    dispatch.pump()
    assert job.done


def test_whoever_decides_wakes_nobody_where_nothing_follows() -> None:
    channel = _Channel(has_threads=True)
    _dispatch(channel, BLOCK_BYTES).decide(lambda: None)
    assert channel.calls == 0


def test_without_copy_threads_whoever_decides_tells_all_of_it() -> None:
    channel = _Channel(has_threads=True)
    dispatch = _dispatch(channel, BLOCK_BYTES)
    job = dispatch.submit(_wish(0), range(0), None, None)
    channel.has_threads = False
    dispatch.decide(lambda: None)
    assert job.done


@pytest.mark.parametrize("has_threads", [True, False])
def test_a_thread_that_pumps_hands_on_after_some_rounds_where_there_is_somebody(*, has_threads: bool) -> None:
    """Others bring news as fast as it is taken in."""
    channel = _Channel(has_threads=has_threads)
    dispatch = _dispatch(channel, BLOCK_BYTES)
    busy = iter(range(20))

    def poll() -> Sequence[Message]:
        if next(busy, None) is not None:
            dispatch.pump()
        return []

    channel.poll = poll  # type: ignore[method-assign]
    dispatch.pump()
    left = len(list(busy))
    assert (left, channel.calls) == ((12, 1) if has_threads else (0, 2))
