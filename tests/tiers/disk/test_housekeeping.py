"""When housekeeping does its work: while nobody uses the directory, and otherwise only what must be."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random

import pytest

from kvtier.core.plan import Reason
from kvtier.testing.simulation import Simulation
from kvtier.tiers.disk import Place, geometry
from kvtier.tiers.disk.geometry import CLEAN_SHARE
from kvtier.tiers.disk.traffic import QUIET_S
from tests.tiers.disk.workbench import RECORD_PAGES, RECORDS, SEGMENTS, FaultyFiles, Workbench

Make = Callable[..., Workbench]
HOUSEKEEPING = {"sync", "allocate", "rename", "open"}


@pytest.fixture(autouse=True)
def low_at_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small segments: without it every clean segment less would be urgent."""
    monkeypatch.setattr(geometry, "SLOW_SYNC_PAGES", 1)


class Control:
    """Gives segments back as it is asked to, oldest first, like the control plane; ``pinned`` ones stay."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.sealed: list[tuple[int, int]] = []
        self.reclaiming: set[int] = set()
        self.reclaimed: list[int] = []
        self.pinned: set[int] = set()
        self.clean = 0

    def hear(self) -> bool:
        """Take the news; False when there is none."""
        events = self.bench.tier.take_events()
        if events is None:
            return False
        self.clean = events.clean_segments
        self.sealed += events.sealed
        self.reclaimed += events.reclaimed
        self.reclaiming -= set(events.reclaimed)
        free = [life for life in self.sealed if life[0] not in self.pinned]
        for life in free[: max(0, events.reclaims_wanted - len(self.reclaiming))]:
            self.sealed.remove(life)
            self.reclaiming.add(life[0])
            self.bench.tier.reclaim(*life)
        return True


class Busy:
    """A full tier of 32 segments, four of them clean and less than two urgent, that is used without a pause."""

    def __init__(self, workbench: Make, files: FaultyFiles, filled: int = 32) -> None:
        self.bench = workbench(files=files, segments=32, clean_segments=4).open()
        self.control = Control(self.bench)
        self.files = files
        self.number = 0
        for _ in range(filled):
            self.store(1)
            self.make_up()
        self.bench.put(self.number)  # the last one of them is full now
        self.make_up()
        files.calls.clear()

    def make_up(self) -> None:
        """Nobody uses the tier until nothing is left to do."""
        for _ in range(3):
            self.bench.keep_house()
            self.control.hear()

    def store(self, segments: int) -> list[Place]:
        """Blocks for so many segments, with a step of housekeeping after each; control is not asked."""
        places = []
        for _ in range(segments * RECORDS):
            places.append(self.bench.put(self.number))
            self.number += 1
            self.bench.tier.housekeep()
        return places

    @property
    def worked(self) -> list[str]:
        """What housekeeping did since the last look."""
        done = [call for call in self.files.calls if call in HOUSEKEEPING]
        self.files.calls.clear()
        return done


@pytest.fixture
def faulty(files: object) -> FaultyFiles:
    return FaultyFiles(files)  # type: ignore[arg-type]


@pytest.mark.parametrize("filled", [6, 32], ids=["growing", "full"])
def test_a_burst_that_the_clean_segments_take_meets_no_housekeeping(
    workbench: Make, faulty: FaultyFiles, filled: int
) -> None:
    busy = Busy(workbench, faulty, filled)
    busy.store(2)
    busy.control.hear()
    assert not busy.bench.tier.housekeep()
    assert busy.worked == []
    assert busy.control.clean == 2
    busy.make_up()
    assert busy.control.clean == 4, "afterwards it is made up for"
    assert len(busy.bench.tier.unsynced()) == 1, "all but the one that is written are sealed"


@pytest.mark.parametrize("use", ["write", "read", "sync"])
def test_nothing_is_synced_while_somebody_uses_the_directory(workbench: Make, faulty: FaultyFiles, use: str) -> None:
    """However long it takes: a write and a sync say when they end, a read keeps housekeeping off for a while."""
    busy = Busy(workbench, faulty)
    (*_, place) = busy.store(2)
    bench, tier = busy.bench, busy.bench.tier
    bench.pause(2 * QUIET_S)
    if use == "write":
        under_way = tier.place(RECORD_PAGES)
        assert under_way is not None
    elif use == "sync":
        (*_, target) = tier.unsynced()
        assert tier.begin_sync(target)
    if use == "read":
        tier.locate(place.segment, place.generation)
        bench.pause(QUIET_S / 2)
    else:
        bench.pause(100 * QUIET_S)
    assert not tier.housekeep()
    assert busy.worked == []
    if use == "write":
        tier.abandoned(under_way)
    elif use == "sync":
        tier.synced(target, None)
    assert not tier.housekeep(), "it may be a pause between two of a burst"
    bench.pause(2 * QUIET_S)
    assert tier.housekeep()
    assert busy.worked == ["sync"]


def test_a_seal_stops_between_its_syncs_when_somebody_comes(workbench: Make, faulty: FaultyFiles) -> None:
    busy = Busy(workbench, faulty)
    busy.store(1)
    busy.bench.pause(2 * QUIET_S)
    for _ in range(2):
        assert busy.bench.tier.housekeep()
        assert busy.worked == ["sync"]
        busy.bench.put(1000)
        assert not busy.bench.tier.housekeep()
        assert busy.worked == []
        busy.bench.pause(2 * QUIET_S)


def test_a_seal_that_was_stopped_has_made_its_records_durable(workbench: Make, faulty: FaultyFiles) -> None:
    """After the first of its two syncs: one that was asked for before has nothing left to do."""
    busy = Busy(workbench, faulty)
    first, *_ = busy.store(1)
    tier = busy.bench.tier
    targets = tier.unsynced()
    busy.bench.pause(2 * QUIET_S)
    assert tier.housekeep()
    (done,) = {target.segment for target in targets} - {target.segment for target in tier.unsynced()}
    (target,) = [target for target in targets if target.segment == done]
    assert done == first.segment
    assert not tier.begin_sync(target)
    assert tier.sync_over(target) == Reason.NONE
    busy.make_up()
    assert busy.control.sealed[-1] == (first.segment, first.generation)


def test_while_somebody_syncs_a_full_segment_it_is_not_sealed(workbench: Make, faulty: FaultyFiles) -> None:
    """Two syncs of one file at a time would be wrong. After one that failed it is given back, and never sealed."""
    busy = Busy(workbench, faulty)
    first, *_ = busy.store(1)
    tier = busy.bench.tier
    (target,) = [target for target in tier.unsynced() if target.segment == first.segment]
    assert tier.begin_sync(target)
    busy.bench.pause(2 * QUIET_S)
    assert not tier.housekeep()
    tier.synced(target, OSError(errno.EIO, "Input/output error"))
    busy.files.calls.clear()
    busy.bench.keep_house()
    assert "sync" not in busy.files.calls
    busy.control.hear()
    assert busy.control.sealed[-1] == (first.segment, first.generation)


def test_too_few_clean_segments_are_urgent(workbench: Make, faulty: FaultyFiles) -> None:
    """Two are left, and control has given segments back: that can wait. One is left: there must be two."""
    busy = Busy(workbench, faulty)
    busy.store(2)
    busy.control.hear()
    assert (busy.control.clean, len(busy.control.reclaiming)) == (2, 2)
    assert not busy.bench.tier.housekeep()
    for _ in range(RECORDS):
        busy.bench.put(999)
    assert busy.worked == []
    assert busy.bench.tier.housekeep()
    assert busy.worked == ["sync"]
    assert not busy.bench.tier.housekeep()
    busy.control.hear()
    assert (busy.control.clean, len(busy.control.reclaiming)) == (2, 2)


def test_a_reclaim_comes_between_the_syncs_of_a_seal(workbench: Make, faulty: FaultyFiles) -> None:
    busy = Busy(workbench, faulty)
    busy.store(1)
    busy.bench.pause(2 * QUIET_S)
    assert busy.bench.tier.housekeep(), "the first sync of a seal"
    busy.control.hear()
    sealed, reclaimed = list(busy.control.sealed), len(busy.control.reclaimed)
    assert busy.bench.tier.housekeep()
    busy.control.hear()
    assert len(busy.control.reclaimed) == reclaimed + 1
    assert busy.control.sealed == sealed
    assert busy.worked == ["sync", "sync"]


def test_full_segments_that_wait_for_their_seal_are_as_few_as_those_that_are_kept_clean(
    workbench: Make, faulty: FaultyFiles
) -> None:
    """A stream without a pause: what a crash leaves to be scanned is bounded, and no more is sealed than must be."""
    busy = Busy(workbench, faulty)
    waiting = []
    for _ in range(40):
        busy.store(1)
        busy.control.hear()
        waiting.append(len(busy.bench.tier.unsynced()) - 1)
    assert max(waiting) <= 4 + 1, "and one that is just being sealed"
    assert min(waiting[8:]) >= 4


@pytest.mark.parametrize("clean_segments", [None, 1, 2, 8])
@pytest.mark.parametrize("segments", [SEGMENTS, 5, 7, 8, 16, 40])
def test_a_stream_without_a_pause_never_waits(workbench: Make, segments: int, clean_segments: int | None) -> None:
    """One step of housekeeping a record is enough, while the tier grows and long after it is full."""
    bench = workbench(segments=segments, clean_segments=clean_segments).open()
    control = Control(bench)
    for number in range(3 * segments * RECORDS):
        bench.put(number)
        bench.tier.housekeep()
        control.hear()


@pytest.mark.parametrize("seed", range(24))
def test_the_newest_blocks_survive_kill_9_however_long_seals_were_put_off(seed: int) -> None:
    """Lives with pauses and without, each killed: all of the capacity but the open and the clean segments is there."""
    rng, simulation = Random(seed), Simulation(seed)
    simulation.machine()
    segments, clean_segments = rng.choice([(5, None), (8, 2), (12, 2), (12, 3), (17, None), (33, None)])
    target = clean_segments or max(1, segments // CLEAN_SHARE)
    number = 0
    for _ in range(12):
        bench = Workbench(simulation.disk, simulation, "/kv", segments=segments, clean_segments=clean_segments)
        for table in bench.tier.open():
            bench.rows.extend(table)
        newest = range(max(0, number - (segments - 1 - target) * RECORDS), number)
        assert set(newest) <= set(bench.recovered())
        control, pauses = Control(bench), rng.choice([0.0, 0.02, 0.2])
        for _ in range(rng.randrange(2 * segments * RECORDS)):
            while (place := bench.tier.place(RECORD_PAGES)) is None:
                assert bench.tier.housekeep() or control.hear()
            bench.write(number, place)
            number += 1
            if rng.random() < pauses:
                bench.pause(2 * QUIET_S)
            for _ in range(rng.choice([0, 1, 1, 4])):
                bench.tier.housekeep()
            if rng.random() < 0.5:
                control.hear()
        simulation.kill()


def test_when_every_sealed_segment_is_read_those_that_wait_are_sealed(workbench: Make) -> None:
    """Control can give none of them back, however many there are: without more the stream would stand still."""
    bench = workbench(segments=8, clean_segments=2).open()
    places = []
    for number in range(7 * RECORDS + 1):
        places.append(bench.put(number))
        bench.tier.housekeep()
    control = Control(bench)
    control.pinned = {place.segment for place in places[: 5 * RECORDS]}  # the others: two wait, one is written
    for number in range(100, 100 + 4 * RECORDS):
        bench.put(number)
        for _ in range(2):
            bench.tier.housekeep()
            control.hear()


class Cramped:
    """A tier of 32 segments of which 8 would be kept clean, on a file system with room for 8 in all: two are clean.

    It is used without a pause; control has given four segments back.
    """

    def __init__(self, workbench: Make, files: FaultyFiles) -> None:
        self.bench = workbench(files=files, segments=32, clean_segments=8).open()
        self.tier = self.bench.tier
        files.fail("allocate", errno.ENOSPC, sticky=True)
        self.bench.fill(range(6 * RECORDS))
        self.number = 1000
        self.write()
        self.bench.keep_house()
        events = self.tier.take_events()
        assert events is not None
        first, *others = events.sealed
        self.tier.reclaim(*first)
        self.bench.keep_house()
        self.write()
        for life in others[:4]:
            self.tier.reclaim(*life)
        assert self.stages == {"clean": 2, "open": 1, "sealed": 1, "reclaiming": 4}

    @property
    def stages(self) -> dict[str, int]:
        return {stage: count for stage, count in self.tier.stages().items() if count}

    def write(self) -> None:
        self.bench.put(self.number)
        self.number += 1


def test_with_few_segments_the_share_of_them_that_is_kept_clean_is_enough(workbench: Make, faulty: FaultyFiles) -> None:
    """Of all that were configured so few would be urgent. With one less it is."""
    cramped = Cramped(workbench, faulty)
    for _ in range(RECORDS - 2):
        assert not cramped.tier.housekeep()
        cramped.write()
    cramped.write()
    assert cramped.stages["clean"] == 1
    assert cramped.tier.housekeep()
    assert cramped.stages["clean"] == 2


def test_with_few_segments_no_more_wait_to_be_sealed_than_are_kept_clean(workbench: Make, faulty: FaultyFiles) -> None:
    cramped = Cramped(workbench, faulty)
    waiting = []
    for _ in range(5 * RECORDS - 2):
        cramped.write()
        cramped.tier.housekeep()
        assert cramped.stages["clean"] == 2
        waiting.append(cramped.stages.get("full", 0))
    assert (waiting[-1], max(waiting)) == (2, 3)
