"""What a disk tier does when writes and syncs fail, or when its directory goes away."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from unittest.mock import Mock

import pytest

from kvtier.core.memory import Bytes1D
from kvtier.core.plan import PAGE_BYTES, Reason
from kvtier.tiers.disk import DiskEvents
from kvtier.tiers.disk.format import HEADER_SLOTS, SegmentState
from kvtier.tiers.disk.health import GROW_PAUSE_S, POISONED_IN_A_ROW, RECLAIM_PAUSE_S, WRITE_PAUSE_S
from kvtier.tiers.disk.housekeeping import HEALTH_S, Housekeeper
from kvtier.tiers.disk.segment import Segment
from tests.tiers.disk.conftest import HandClock, HandRuntime
from tests.tiers.disk.workbench import RECORD_PAGES, RECORDS, FaultyFiles, Workbench

Make = Callable[..., Workbench]
OFF = OSError(errno.EIO, "Input/output error")


@pytest.fixture
def faulty(files: object) -> FaultyFiles:
    return FaultyFiles(files)  # type: ignore[arg-type]


def events_of(bench: Workbench) -> DiskEvents:
    events = bench.tier.take_events()
    assert events is not None
    return events


def advance(runtime: HandRuntime, seconds: float) -> None:
    assert isinstance(runtime.clock, HandClock)
    runtime.clock.now_s += seconds


def test_what_was_written_to_a_file_that_somebody_removed_is_never_durable(workbench: Make) -> None:
    bench = workbench().open()
    place = bench.put(1)
    assert bench.sync()
    bench.put(2)
    os.unlink(f"{bench.tier.path}/seg-{place.segment:06d}.kvs")
    assert not bench.sync()
    bench.keep_house()
    assert bench.put(3).segment != place.segment, "nothing more is written to it"


# --- failed writes --------------------------------------------------------------------------------------------------


def test_after_a_failed_write_its_segment_takes_no_more_and_keeps_what_it_has(workbench: Make) -> None:
    bench = workbench(segments=8).open()
    kept = [bench.put(number) for number in range(3)]
    broken = bench.tier.place(RECORD_PAGES)
    assert broken is not None
    bench.tier.failed(broken)
    bench.keep_house()
    assert bench.put(4).segment != broken.segment
    assert all(bench.read(number, place) for number, place in enumerate(kept))


def test_a_poisoned_segment_may_be_reclaimed_once_nothing_is_under_way_to_it(workbench: Make) -> None:
    bench = workbench(segments=8).open()
    first, second = (bench.tier.place(RECORD_PAGES) for _ in range(2))
    assert first is not None
    assert second is not None
    bench.tier.failed(first)
    bench.keep_house()
    assert events_of(bench).sealed == ()
    bench.tier.abandoned(second)
    life = (first.segment, first.generation)
    assert events_of(bench).sealed == (life,)
    bench.sync()
    assert bench.tier.take_events() is None, "it is told once"
    bench.tier.reclaim(*life)
    bench.keep_house()
    assert events_of(bench).reclaimed == (first.segment,)


def test_several_failed_writes_to_one_segment_are_one_fault(workbench: Make) -> None:
    bench = workbench(segments=8).open()
    for place in [bench.tier.place(RECORD_PAGES) for _ in range(5)]:
        assert place is not None
        bench.tier.failed(place)
    bench.keep_house()
    assert bench.tier.place(RECORD_PAGES) is not None


def fail_segments(bench: Workbench, count: int) -> None:
    for _ in range(count):
        place = bench.tier.place(RECORD_PAGES)
        assert place is not None
        bench.tier.failed(place)
        bench.keep_house()


def test_after_three_segments_in_a_row_no_record_is_placed_for_a_while(workbench: Make, runtime: HandRuntime) -> None:
    bench = workbench(segments=16).open()
    fail_segments(bench, POISONED_IN_A_ROW)
    assert bench.tier.place(RECORD_PAGES) is None
    events = events_of(bench)
    assert events.usable, "what was written can still be read"
    assert "takes no writes for 60 s" in events.reason
    advance(runtime, WRITE_PAUSE_S)
    assert bench.tier.place(RECORD_PAGES) is not None
    assert events_of(bench).reason == ""


@pytest.mark.parametrize("good", ["sync", "seal"])
def test_a_success_between_faults_keeps_the_tier_writing(workbench: Make, good: str) -> None:
    bench = workbench(segments=20).open()
    for _ in range(POISONED_IN_A_ROW):
        if good == "sync":
            bench.put(1)
            assert bench.sync()
        else:
            bench.fill(range(RECORDS + 1))
        fail_segments(bench, 1)
    bench.fill(range(RECORDS))


# --- failed syncs ---------------------------------------------------------------------------------------------------


def test_after_a_failed_sync_the_file_is_never_synced_again(workbench: Make, faulty: FaultyFiles) -> None:
    """The kernel drops what it could not write and forgets the error: a second sync would claim success."""
    bench = workbench(files=faulty, segments=8).open()
    place = bench.put(1)
    faulty.fail("sync", errno.EIO)
    assert not bench.sync()
    bench.keep_house()
    assert bench.put(2).segment != place.segment
    faulty.calls.clear()
    assert not bench.sync(), "block 1 will never be durable, and whoever asks is told so"
    assert faulty.calls.count("sync") == 1, "only the file of block 2"
    assert [target.fd for target in bench.tier.unsynced()] == [-1]


def test_a_sync_that_was_asked_for_before_another_of_the_file_failed_is_not_begun(workbench: Make) -> None:
    bench = workbench(segments=8).open()
    bench.put(1)
    (first,), (second,) = bench.tier.unsynced(), bench.tier.unsynced()
    assert bench.tier.begin_sync(first)
    assert not bench.tier.begin_sync(second)
    assert bench.tier.sync_over(second) is None, "it may be its turn yet"
    bench.tier.synced(first, OFF)
    assert not bench.tier.begin_sync(second)
    assert bench.tier.sync_over(second) == Reason.IO_ERROR


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_sync_of_a_segment_that_was_given_back_meanwhile_is_not_begun_and_has_nothing_left_to_do(
    workbench: Make, is_removed: bool
) -> None:
    """Its file has another life, or is closed and its number another file's: a sync would hide errors from that."""
    bench = workbench(segments=8).open()
    place = bench.put(1)
    (target,) = bench.tier.unsynced()
    broken = bench.tier.place(RECORD_PAGES)
    assert broken is not None
    bench.tier.failed(broken)
    if is_removed:
        bench.files.unlink(bench.segment_path(place.segment))
    bench.tier.reclaim(place.segment, place.generation)
    bench.keep_house()
    assert bench.tier.locate(place.segment, place.generation) is None
    assert not bench.tier.begin_sync(target)
    assert bench.tier.sync_over(target) == Reason.NONE


def test_while_a_segment_is_made_clean_no_sync_of_its_life_before_begins(workbench: Make) -> None:
    """Two at a time would be wrong, and this one would be over when its segment has another life to answer for."""
    bench = workbench(segments=8).open()
    bench.put(1)
    broken = bench.tier.place(RECORD_PAGES)
    assert broken is not None
    bench.tier.failed(broken)
    (target,) = bench.tier.unsynced()
    bench.tier.reclaim(broken.segment, broken.generation)
    begun = []
    write_at = bench.files.write_at

    def while_the_lane_syncs(fd: int, offset: int, buffer: Bytes1D) -> None:
        begun.append((bench.tier.begin_sync(target), bench.tier.sync_over(target)))
        write_at(fd, offset, buffer)

    bench.files.write_at = while_the_lane_syncs  # type: ignore[method-assign]
    bench.keep_house()
    assert begun[0] == (False, Reason.NONE)
    assert bench.tier.stages()["reclaiming"] == 0


def test_a_segment_of_an_earlier_life_whose_first_sync_fails_takes_no_more(
    workbench: Make, faulty: FaultyFiles
) -> None:
    """It was found half full, unsynced: what the kernel dropped of it would be called durable by the next sync."""
    killed = workbench().open()
    killed.put(1)
    killed.tier._book.segments.clear()
    killed.tier._directory.close()
    bench = workbench(files=faulty, segments=8).open()
    faulty.fail("sync", errno.EIO)
    assert not bench.sync()
    assert bench.put(2).segment != bench.recovered()[1]["segment"]
    assert bench.tier.stages()["poisoned"] == 1
    assert not bench.sync(), "of what the first sync failed for nobody knows"


def test_durability_can_be_had_again_once_the_poisoned_segment_is_reclaimed(
    workbench: Make, faulty: FaultyFiles
) -> None:
    bench = workbench(files=faulty, segments=8).open()
    place = bench.put(1)
    faulty.fail("sync", errno.EIO)
    assert not bench.sync()
    bench.tier.reclaim(place.segment, place.generation)
    bench.keep_house()
    bench.put(2)
    assert bench.sync()


def test_after_a_failed_write_the_others_in_its_segment_can_become_durable(workbench: Make) -> None:
    """The file itself is not in doubt: a sync that succeeds says the truth about the writes that did."""
    bench = workbench(segments=8).open()
    bench.put(1)
    place = bench.tier.place(RECORD_PAGES)
    assert place is not None
    bench.tier.failed(place)
    assert len(bench.tier.unsynced()) == 1
    assert bench.sync()
    assert bench.tier.unsynced() == []


@pytest.mark.parametrize("operation", ["sync", "write_at"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_segment_that_cannot_be_sealed_is_poisoned_and_stays_readable(
    workbench: Make, faulty: FaultyFiles, operation: str, after: int
) -> None:
    """Each sync and each write of the sequence fails once; blocks stay, whatever happens."""
    bench = workbench(files=faulty, segments=8).open()
    places = [bench.put(number) for number in range(RECORDS)]
    bench.keep_house()
    bench.put(RECORDS)
    faulty.fail(operation, errno.EIO, after=after)
    bench.keep_house()
    faulty.heal()
    assert events_of(bench).sealed == ((places[0].segment, places[0].generation),)
    assert all(bench.read(number, place) for number, place in enumerate(places))
    bench.tier.close()
    assert set(workbench(segments=8).open().recovered()) == set(range(RECORDS + 1))


def test_a_sync_that_was_cancelled_leaves_its_segment_as_good_as_before(workbench: Make) -> None:
    """The engine was closed before it began: nothing is known to be lost, and closing makes it durable after all."""
    bench = workbench(segments=8).open()
    place = bench.put(1)
    (target,) = bench.tier.unsynced()
    assert bench.tier.begin_sync(target)
    bench.tier.synced(target, OSError(errno.ECANCELED, "closed"))
    assert bench.tier.unsynced() == [target]
    assert bench.put(2).segment == place.segment
    assert bench.sync()
    assert bench.tier.stages()["poisoned"] == 0


def test_a_write_that_was_cancelled_leaves_its_segment_as_good_as_before(workbench: Make) -> None:
    bench = workbench(segments=8).open()
    place = bench.tier.place(RECORD_PAGES)
    assert place is not None
    bench.tier.failed(place, OSError(errno.ECANCELED, "closed"))
    assert bench.put(2).segment == place.segment
    assert bench.tier.stages()["poisoned"] == 0
    bench.tier.close()
    assert set(workbench(segments=8).open().recovered()) == {2}


def test_a_failed_sync_at_closing_is_no_error(workbench: Make, faulty: FaultyFiles) -> None:
    bench = workbench(files=faulty).open()
    bench.put(1)
    faulty.fail("sync", errno.EIO, sticky=True)
    bench.tier.close()
    assert set(workbench().open().recovered()) == {1}


# --- reclaiming and growing -----------------------------------------------------------------------------------------


def fail_headers(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Segment], bool]) -> None:
    """From now on no header of such a segment can be written."""
    write_header = Housekeeper._write_header

    def failing(house: Housekeeper, segment: Segment, state: SegmentState, generation: int) -> int:
        if is_bad(segment):
            raise OFF
        return write_header(house, segment, state, generation)

    monkeypatch.setattr(Housekeeper, "_write_header", failing)


@pytest.mark.parametrize("operation", ["write_at", "sync", "links", "size"])
def test_a_segment_that_cannot_be_written_anew_is_tried_again_later(
    workbench: Make, faulty: FaultyFiles, runtime: HandRuntime, operation: str
) -> None:
    bench = workbench(files=faulty).open()
    bench.fill(range(4 * RECORDS))
    (life, *_) = events_of(bench).sealed
    advance(runtime, -HEALTH_S)  # no look at the lock file in between
    faulty.fail(operation, errno.EIO)
    bench.tier.reclaim(*life)
    bench.keep_house()
    assert events_of(bench).reclaimed == ()
    advance(runtime, RECLAIM_PAUSE_S)
    bench.keep_house()
    events = events_of(bench)
    assert events.reclaimed == (life[0],)
    assert events.clean_segments == 1
    bench.put(100)
    bench.tier.close()
    assert 100 in workbench().open().recovered()


@pytest.mark.parametrize("operation", ["write_at", "sync"])
def test_however_long_writes_fail_control_is_asked_for_one_segment_more_and_no_file_goes(
    workbench: Make, faulty: FaultyFiles, runtime: HandRuntime, operation: str
) -> None:
    """What is on disk can be read all the while, and is found again by the next life."""
    bench = workbench(files=faulty).open()
    bench.fill(range(4 * RECORDS))
    lives = list(events_of(bench).sealed)
    given: list[int] = []
    faulty.fail(operation, errno.EROFS, sticky=True)
    for _ in range(50):
        events = bench.tier.take_events()
        while len(given) < (events.reclaims_wanted if events else 1):
            bench.tier.reclaim(*lives[len(given)])
            given.append(lives[len(given)][0])
        advance(runtime, RECLAIM_PAUSE_S)
        bench.keep_house()
    assert len(given) == 2
    assert not bench.tier.takes_writes
    assert all(os.path.exists(bench.segment_path(number)) for number, _ in lives)
    faulty.heal()
    advance(runtime, WRITE_PAUSE_S)
    bench.keep_house()
    assert sorted(events_of(bench).reclaimed) == sorted(given)
    bench.put(100)


def test_a_segment_that_alone_cannot_be_written_anew_is_removed_once_another_could(
    workbench: Make, runtime: HandRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = workbench().open()
    bench.fill(range(4 * RECORDS))
    bad, good, *_ = events_of(bench).sealed
    fail_headers(monkeypatch, lambda segment: (segment.number, segment.generation) == bad)
    path = bench.segment_path(bad[0])
    inode = os.stat(path).st_ino
    for life in (bad, None, good, None):
        if life is not None:
            bench.tier.reclaim(*life)
        advance(runtime, RECLAIM_PAUSE_S)
        bench.keep_house()
    assert sorted(events_of(bench).reclaimed) == sorted((bad[0], good[0]))
    assert bench.tier.stages()["reclaiming"] == 0
    assert not os.path.exists(path) or os.stat(path).st_ino != inode, "a new one may have taken its number"


def test_one_segment_that_can_never_be_written_anew_does_not_stop_a_directory_that_grows(
    workbench: Make, runtime: HandRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = workbench(segments=8).open()
    (first, *_) = bench.fill(range(2 * RECORDS))
    bench.tier.close()
    with open(bench.segment_path(first.segment), "r+b") as file:
        file.write(bytes(HEADER_SLOTS * PAGE_BYTES))
    fail_headers(monkeypatch, lambda segment: segment.number == 0)
    bench = workbench(segments=8).open()
    for number in range(4 * POISONED_IN_A_ROW):
        advance(runtime, RECLAIM_PAUSE_S)
        bench.keep_house()
        bench.put(100 + number)
    assert bench.tier.stages()["reclaiming"] == 1


def test_a_segment_file_that_somebody_removed_is_replaced_when_reclaimed(workbench: Make) -> None:
    bench = workbench().open()
    places = bench.fill(range(4 * RECORDS))
    bench.files.unlink(bench.segment_path(places[0].segment))
    assert bench.read(0, places[0]), "the open file still holds it"
    bench.tier.reclaim(places[0].segment, places[0].generation)
    bench.keep_house()
    bench.put(100)
    bench.tier.close()
    assert 100 in workbench().open().recovered()


@pytest.mark.parametrize("operation", ["open", "allocate", "write_at", "sync", "rename", "sync_directory"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_a_segment_that_cannot_be_made_is_tried_again_later(
    workbench: Make, faulty: FaultyFiles, runtime: HandRuntime, operation: str, code: int
) -> None:
    bench = workbench(files=faulty, segments=8).open()
    faulty.fail(operation, code)
    places = [bench.tier.place(RECORD_PAGES)]
    bench.keep_house()
    events = events_of(bench)
    assert events.clean_segments == 0
    assert events.reason.startswith("cannot grow")
    assert events.reclaims_wanted == 1, "until it can grow, it must live on what it has"
    assert not [name for name in bench.files.list_directory(bench.tier.path) if name.endswith(".new")]
    advance(runtime, GROW_PAUSE_S)
    bench.keep_house()
    events = events_of(bench)
    assert (events.clean_segments, events.reclaims_wanted, events.reason) == (1, 0, "")
    assert places[0] is not None


def test_on_a_full_file_system_as_large_a_share_of_the_segments_is_kept_clean_as_of_the_capacity(
    workbench: Make, faulty: FaultyFiles
) -> None:
    """Not as many as the capacity would keep: of the few that there are nearly all would be."""
    bench = workbench(files=faulty, segments=32, clean_segments=8).open()
    bench.keep_house()
    assert events_of(bench).clean_segments == 8
    faulty.fail("allocate", errno.ENOSPC, sticky=True)
    bench.fill(range(6 * RECORDS))
    stages = bench.tier.stages()
    assert (stages["clean"], stages["open"] + stages["full"] + stages["sealed"]) == (2, 6)
    assert events_of(bench).reclaims_wanted == 0


# --- the directory goes away ----------------------------------------------------------------------------------------


def test_a_directory_that_is_removed_turns_the_tier_off(workbench: Make, runtime: HandRuntime) -> None:
    bench = workbench().open()
    place = bench.put(1)
    bench.tier.take_events()
    shutil.rmtree(bench.directory)
    advance(runtime, HEALTH_S)
    assert not bench.tier.housekeep()
    events = events_of(bench)
    assert not events.usable
    assert "was removed" in events.reason
    assert not bench.tier.usable
    assert bench.tier.place(RECORD_PAGES) is None
    assert bench.tier.locate(place.segment, place.generation) is None
    bench.tier.close()
    assert workbench().open().rows == []


def test_an_error_while_looking_counts_as_removed(workbench: Make, faulty: FaultyFiles, runtime: HandRuntime) -> None:
    bench = workbench(files=faulty).open()
    advance(runtime, HEALTH_S)
    faulty.fail("links", errno.EIO)
    bench.tier.housekeep()
    assert not bench.tier.usable


def test_looking_costs_one_call_a_second(workbench: Make, faulty: FaultyFiles, runtime: HandRuntime) -> None:
    bench = workbench(files=faulty).open()
    faulty.calls.clear()
    for _ in range(100):
        bench.tier.housekeep()
        advance(runtime, HEALTH_S / 10)
    assert 9 <= faulty.calls.count("links") <= 11
    assert set(faulty.calls) == {"links"}, "an idle tier does nothing else"


def test_a_step_of_housekeeping_writes_no_more_than_8_mib(workbench: Make, faulty: FaultyFiles) -> None:
    written: list[int] = []
    write_at = faulty.write_at
    faulty.write_at = lambda fd, offset, buffer: (written.append(buffer.nbytes), write_at(fd, offset, buffer))  # type: ignore[attr-defined]
    bench = workbench(files=faulty, segment_bytes=20 << 20, segments=4)
    list(bench.tier.open())
    while True:
        written.clear()
        more = bench.tier.housekeep()
        assert sum(written) <= 8 << 20
        if not more:
            break
    assert bench.tier.place(RECORD_PAGES) is not None


def test_reclaims_end_with_the_directory(workbench: Make, runtime: HandRuntime) -> None:
    """Whoever waits for one, or asks for one afterwards, is told: nobody will clean the segment any more."""
    bench = workbench(segments=8).open()
    bench.fill(range(3 * RECORDS))
    before, after, *_ = events_of(bench).sealed
    bench.tier.reclaim(*before)
    shutil.rmtree(bench.tier.path)
    advance(runtime, HEALTH_S)
    bench.keep_house()
    bench.tier.reclaim(*after)
    assert set(events_of(bench).reclaimed) == {before[0], after[0]}


@pytest.mark.parametrize("step", ["_write_header", "_is_reusable"])
def test_a_segment_whose_cleaning_raises_is_not_left_half_way(
    workbench: Make, step: str, monkeypatch: pytest.MonkeyPatch, runtime: HandRuntime
) -> None:
    """For want of memory, say: control waits for it."""
    bench = workbench(segments=8).open()
    bench.fill(range(2 * RECORDS))
    life, *_ = events_of(bench).sealed
    bench.tier.reclaim(*life)
    with monkeypatch.context() as patched:
        patched.setattr(Housekeeper, step, Mock(side_effect=MemoryError))
        bench.keep_house()
    advance(runtime, RECLAIM_PAUSE_S)
    bench.keep_house()
    assert life[0] in events_of(bench).reclaimed
    assert bench.tier.stages()["reclaiming"] == 0


def test_a_segment_whose_footer_cannot_be_made_keeps_no_close_waiting(
    workbench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = workbench(segments=8).open()
    with monkeypatch.context() as patched:
        patched.setattr(Housekeeper, "_write_footer", Mock(side_effect=MemoryError))
        bench.fill(range(RECORDS + 1))
    assert bench.tier.stages()["poisoned"] == 1
    assert bench.tier.close()
    assert len(workbench().open().recovered()) == RECORDS + 1, "what is in it was written"
