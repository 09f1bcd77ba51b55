"""Jobs as callers see them: waiting, giving up waiting, and the parts of a load."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvtier.jobs import Job, JobControl
from kvtier.manager import AsyncJob
from kvtier.planner import Ticket
from kvtier.planner.tickets import TicketKind
from kvtier.runtime import SystemEvent, SystemRuntime
from kvtier.runtime.seam import Event

BLOCK = 8


class CountingRuntime(SystemRuntime):
    """Counts how often somebody who waits is woken."""

    def __init__(self) -> None:
        super().__init__()
        self.woken = 0

    def event(self) -> Event:
        runtime = self

        class Counting(SystemEvent):
            def set(self) -> None:
                runtime.woken += 1
                super().set()

        return Counting()


@pytest.fixture
def runtime() -> CountingRuntime:
    return CountingRuntime()


@pytest.fixture
def job(runtime: CountingRuntime) -> Job[Any]:
    """A store of one block that is under way."""
    ticket = Ticket.of(TicketKind.STORE, 0, 1)
    return Job(ticket, range(0), BLOCK, JobControl(runtime, lambda _: None, lambda: None), None)


def end(job: Job[Any]) -> None:
    job.ticket.succeed()
    job.ticket.source_free = job.ticket.finished = True
    job.hear()


def test_who_gave_up_waiting_is_not_told_of_the_end(job: Job[Any], runtime: CountingRuntime) -> None:
    """Else every look of a poller stays on the job for as long as that goes on."""
    for _ in range(50):
        with pytest.raises(TimeoutError):
            job.result(0)
        with pytest.raises(TimeoutError):
            job.wait_source_free(0)
    end(job)
    assert runtime.woken == 0
    assert job.result(0).stored == BLOCK


async def test_an_await_that_was_cancelled_is_not_told_of_the_end(
    job: Job[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    waiting = AsyncJob(job, loop)
    for _ in range(50):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting, 0.0001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting.wait_source_free(), 0.0001)
    told: list[Any] = []
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *arguments: told.append(arguments))
    end(job)
    assert told == []


def test_who_still_waits_is_told_though_others_gave_up(job: Job[Any]) -> None:
    told: list[Job[Any]] = []
    job.call_on_news(told.append, unless=lambda: False)
    with pytest.raises(TimeoutError):
        job.result(0)
    end(job)
    assert told == [job]


def test_to_take_a_callback_back_after_it_was_called_is_harmless(job: Job[Any]) -> None:
    called: list[Job[Any]] = []
    job.call_on_news(called.append, unless=lambda: False)
    job.hear()
    job.call_no_more(called.append)
    job.call_no_more(called.append)
    assert called == [job]
