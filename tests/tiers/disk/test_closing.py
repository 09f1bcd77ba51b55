"""Closing a disk tier in the time that it is given, over a device that answers late."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvtier.errors import TierError
from kvtier.testing.simulation import Simulation
from tests.interrupts import interrupt_start, once, open_files
from tests.tiers.disk.workbench import RECORDS, FaultyFiles, Workbench

Make = Callable[..., Workbench]
PATIENCE_S = 60.0
A_MOMENT_S = 0.02


class HangingFiles:
    """Files whose syncs, once ``hang`` is set, do not return before ``released`` is; with ``hang_closing`` closes."""

    def __init__(self, files: Any) -> None:
        self._files = files
        self.hang, self.released, self.syncs = False, threading.Event(), 0
        self.entered = threading.Event()
        self.hang_closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def sync(self, fd: int) -> None:
        self.syncs += 1
        if self.hang:
            assert self.released.wait(PATIENCE_S)
        self._files.sync(fd)

    def close(self, fd: int) -> None:
        if self.hang_closing:
            self.entered.set()
            assert self.released.wait(PATIENCE_S)
        self._files.close(fd)


@pytest.fixture
def hanging(files: object) -> HangingFiles:
    return HangingFiles(files)


@pytest.mark.parametrize("blocks", [3, 2 * RECORDS + 1])
def test_a_device_that_hangs_in_a_sync_keeps_closing_no_longer_than_its_time(
    workbench: Make, hanging: HangingFiles, caplog: pytest.LogCaptureFixture, blocks: int
) -> None:
    """Blocks that only need a sync, and full segments that wait for their footers, too."""
    bench = workbench(files=hanging, segments=32, clean_segments=4).open()
    for number in range(blocks):
        bench.put(number)
    hanging.hang = True
    with caplog.at_level(logging.WARNING):
        assert not bench.tier.close(A_MOMENT_S)
    owed = -(-blocks // RECORDS)
    assert f"{owed} segments are not sealed or synced after 0.0 s" in caplog.text
    with pytest.raises(TierError, match="in use by another cache"):
        workbench(segments=32).open()
    hanging.released.set()
    assert bench.tier.close(PATIENCE_S)
    assert bench.tier.close(0)
    again = workbench(segments=32).open()
    assert all(again.read(number, row) for number, row in again.recovered().items())
    assert set(again.recovered()) == set(range(blocks))


def test_closing_again_without_a_limit_waits_for_the_sync_that_hangs(workbench: Make, hanging: HangingFiles) -> None:
    bench = workbench(files=hanging).open()
    bench.put(1)
    hanging.hang = True
    assert not bench.tier.close(A_MOMENT_S)
    hanging.released.set()
    assert bench.tier.close()
    assert set(workbench().open().recovered()) == {1}


def test_no_time_is_enough_where_everything_is_durable(workbench: Make) -> None:
    bench = workbench().open()
    bench.put(1)
    assert bench.sync()
    assert bench.tier.close(0)
    assert set(workbench().open().recovered()) == {1}


def test_several_threads_may_close_one_with_less_time_than_the_other(workbench: Make, hanging: HangingFiles) -> None:
    """Who has no time left does not end what the other one waits for, and everything is given back once."""
    bench = workbench(files=hanging).open()
    bench.put(1)
    hanging.hang = True
    closed: list[bool] = []
    patient = [threading.Thread(target=lambda: closed.append(bench.tier.close(PATIENCE_S))) for _ in range(4)]
    for thread in patient:
        thread.start()
    assert not bench.tier.close(A_MOMENT_S)
    hanging.released.set()
    for thread in patient:
        thread.join(PATIENCE_S)
    assert closed == [True] * 4
    assert set(workbench().open().recovered()) == {1}


def test_who_closes_second_waits_until_the_first_has_given_everything_back(
    workbench: Make, hanging: HangingFiles
) -> None:
    bench = workbench(files=hanging).open()
    hanging.hang_closing = True
    first = threading.Thread(target=bench.tier.close)
    first.start()
    assert hanging.entered.wait(PATIENCE_S)
    assert not bench.tier.close(0)
    hanging.released.set()
    assert bench.tier.close()
    workbench().open()
    first.join(PATIENCE_S)


def test_no_thread_is_left_after_closing(workbench: Make) -> None:
    before = set(threading.enumerate())
    bench = workbench().open()
    bench.put(1)
    assert bench.tier.close(PATIENCE_S)
    assert set(threading.enumerate()) == before


def test_where_no_thread_can_be_had_closing_says_so_and_can_be_tried_again(
    workbench: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = workbench().open()
    bench.put(1)
    with monkeypatch.context() as patched:
        patched.setattr(bench.runtime, "spawn", lambda *_: (_ for _ in ()).throw(TierError("no thread")))
        assert not bench.tier.close(PATIENCE_S)
    assert "1 segments are not sealed or synced after 0.0 s" in caplog.text, "not after all the time that it had"
    assert bench.tier.close(PATIENCE_S)


def test_ctrl_c_while_the_thread_that_writes_is_started_leaves_no_thread(
    workbench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    bench = workbench().open()
    bench.put(1)
    interrupt_start(monkeypatch, "closing")
    with pytest.raises(KeyboardInterrupt):
        bench.tier.close(PATIENCE_S)
    assert set(threading.enumerate()) == before
    assert bench.tier.close(PATIENCE_S)
    assert set(workbench().open().recovered()) == {1}


def test_ctrl_c_never_strikes_in_a_sync_at_closing(workbench: Make, hanging: HangingFiles) -> None:
    """Nobody could tell whether it failed; the thread of who closes only waits, with or without a limit."""
    bench = workbench(files=hanging).open()
    bench.put(1)
    who: list[threading.Thread] = []
    sync = hanging.sync
    hanging.sync = lambda fd: (who.append(threading.current_thread()), sync(fd))[1]  # type: ignore[method-assign]
    assert bench.tier.close()
    assert who
    assert threading.current_thread() not in who


def test_a_defect_in_what_writes_at_closing_is_raised_and_not_waited_for(
    workbench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = workbench().open()
    bench.put(1)
    with monkeypatch.context() as patched:
        patched.setattr(bench.tier, "_sync_one", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            bench.tier.close()
    assert bench.tier.close()


def _with_segments(workbench: Make) -> Workbench:
    """Several that are full, open or clean: with the lock at least four files are open."""
    bench = workbench(segments=32, clean_segments=2).open()
    for number in range(2 * RECORDS + 1):
        bench.put(number)
        bench.keep_house()
    return bench


@pytest.mark.parametrize("which", range(4))
def test_ctrl_c_while_a_file_is_closed_leaves_nothing_open(
    workbench: Make, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Whichever file it is: the others are closed before it is raised, the lock among them."""
    before = open_files()
    bench = _with_segments(workbench)
    assert len(open_files()) - len(before) >= which + 1
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", once(os.close, KeyboardInterrupt(), after=which))
        with pytest.raises(KeyboardInterrupt):
            bench.tier.close(PATIENCE_S)
    assert open_files() == before
    assert bench.tier.close(0)
    assert set(workbench(segments=32).open().recovered()) == set(range(2 * RECORDS + 1))


def test_what_ctrl_c_kept_from_being_given_back_is_given_back_the_next_time(
    workbench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it strikes between the steps."""
    before = open_files()
    bench = _with_segments(workbench)
    held = bench.tier._held
    with monkeypatch.context() as patched:
        patched.setattr(held, "close", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bench.tier.close(PATIENCE_S)
    assert bench.tier.close(PATIENCE_S)
    assert open_files() == before


@pytest.mark.parametrize("which", range(4))
def test_a_file_that_cannot_be_closed_keeps_neither_the_others_nor_the_lock(
    workbench: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, which: int
) -> None:
    """NFS and quotas report in close(2) what they did not write; the descriptor is gone all the same."""
    before = open_files()
    bench = _with_segments(workbench)
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", once(os.close, OSError(errno.EIO, "Input/output error"), after=which))
        assert bench.tier.close(PATIENCE_S)
    assert open_files() == before
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "failed: [Errno 5]" in warning
    assert bench.tier.close(0)
    workbench(segments=32).open()


def test_giving_back_writes_nothing(workbench: Make, hanging: HangingFiles) -> None:
    """It is for openings that failed, perhaps because a device does not answer."""
    before = open_files()
    bench = workbench(files=hanging).open()
    bench.put(1)
    syncs = hanging.syncs
    bench.tier.give_back()
    assert hanging.syncs == syncs
    assert open_files() == before
    assert bench.tier.close(0)


def test_with_no_time_nothing_is_begun(workbench: Make, hanging: HangingFiles) -> None:
    bench = workbench(files=hanging).open()
    bench.put(1)
    before = hanging.syncs
    assert not bench.tier.close(0)
    assert hanging.syncs == before
    assert bench.tier.close(PATIENCE_S)


def test_a_sync_that_fails_at_closing_was_answered(workbench: Make, files: object) -> None:
    """There is nothing that more time would help."""
    faulty = FaultyFiles(files)  # type: ignore[arg-type]
    bench = workbench(files=faulty).open()
    bench.put(1)
    faulty.fail("sync", errno.EIO, sticky=True)
    assert bench.tier.close(PATIENCE_S)


def test_in_a_simulation_closing_has_a_time_as_well() -> None:
    world = Simulation(1)
    bench = Workbench(world.disk, world, "/kv")
    list(bench.tier.open())
    while bench.tier.housekeep():
        pass
    bench.put(1)
    assert not bench.tier.close(0)
    assert bench.tier.close(1)
    world.power_cut()
    assert set(Workbench(world.disk, world, "/kv").open().recovered()) == {1}
