"""The journeys of a disk tier on real files: place, write, seal, reclaim, close, open again."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest

from kvtier.codecs.headers import Pages
from kvtier.core.plan import PAGE_BYTES, RECOVERED, Reason
from kvtier.errors import CapacityError
from kvtier.tiers.disk import DiskEvents, Place
from tests.tiers.disk.workbench import RECORD_PAGES, RECORDS, SEGMENT_BYTES, SEGMENT_PAGES, SEGMENTS, Workbench, layout

Make = Callable[..., Workbench]


def events_of(bench: Workbench) -> DiskEvents:
    events = bench.tier.take_events()
    assert events is not None
    return events


def test_a_new_directory_holds_nothing_and_gets_clean_segments_ahead(workbench: Make) -> None:
    bench = workbench(segments=12, clean_segments=2).open()
    assert bench.rows == []
    assert events_of(bench) == DiskEvents((), (), True, "", clean_segments=2, reclaims_wanted=0)
    assert bench.tier.take_events() is None


def test_no_record_is_placed_before_recovery_has_ended(workbench: Make) -> None:
    bench = workbench().open()
    bench.fill(range(RECORDS + 1))
    bench.tier.close()
    tier = workbench().tier
    batches = tier.open()
    assert tier.place(RECORD_PAGES) is None
    assert [table.dtype for table in batches] == [RECOVERED] * 2
    assert tier.place(RECORD_PAGES) is not None


def test_what_was_written_can_be_read(workbench: Make) -> None:
    bench = workbench().open()
    places = bench.fill(range(20))
    assert all(bench.read(number, place) for number, place in enumerate(places))
    assert not bench.read(3, places[4])


def test_places_are_adjacent_and_their_sequence_rises(workbench: Make) -> None:
    bench = workbench().open()
    places = [bench.put(number) for number in range(RECORDS)]
    assert [place.page for place in places] == [2 + RECORD_PAGES * i for i in range(RECORDS)]
    assert len({(place.segment, place.generation, place.fd) for place in places}) == 1
    assert [place.sequence for place in places] == sorted({place.sequence for place in places})


def test_a_segment_is_filled_to_its_footer_and_then_the_next_is_taken(workbench: Make) -> None:
    bench = workbench().open()
    places = bench.fill(range(RECORDS + 1))
    assert len({place.segment for place in places[:RECORDS]}) == 1
    assert places[RECORDS].segment != places[0].segment
    assert places[RECORDS].page == 2


def test_without_a_clean_segment_there_is_no_place(workbench: Make) -> None:
    bench = workbench(segments=SEGMENTS).open()
    for number in range(RECORDS):
        bench.put(number)
    assert bench.tier.place(RECORD_PAGES) is None
    bench.keep_house()
    assert bench.tier.place(RECORD_PAGES) is not None


def test_a_record_that_can_never_fit_is_refused(workbench: Make) -> None:
    bench = workbench().open()
    assert bench.tier.place(SEGMENT_PAGES - 4) is not None
    with pytest.raises(CapacityError, match=r"raise disk\.segment"):
        bench.tier.place(SEGMENT_PAGES - 3)


def test_wake_is_set_when_housekeeping_has_something_to_do(workbench: Make) -> None:
    bench = workbench().open()
    bench.tier.wake.clear()
    places = [bench.tier.place(RECORD_PAGES)]
    assert bench.tier.wake.wait(0.0), "a clean segment was taken"
    bench.keep_house()
    bench.tier.wake.clear()
    places += [bench.tier.place(RECORD_PAGES) for _ in range(RECORDS)]
    assert bench.tier.wake.wait(0.0), "a segment is full"
    bench.keep_house()
    bench.tier.wake.clear()
    for place in places:
        bench.tier.abandoned(place)
    assert bench.tier.wake.wait(0.0), "the full segment is idle"


# --- sealing --------------------------------------------------------------------------------------------------------


def test_a_full_segment_is_sealed_once_its_last_write_ended(workbench: Make) -> None:
    bench = workbench().open()
    places = [bench.put(number) for number in range(RECORDS - 1)]
    last = bench.tier.place(RECORD_PAGES)
    bench.keep_house()
    bench.put(RECORDS)  # goes to the next segment: the first is full
    bench.keep_house()
    bench.tier.take_events()
    bench.tier.abandoned(last)
    bench.keep_house()
    assert events_of(bench).sealed == ((last.segment, last.generation),)
    assert all(bench.read(number, place) for number, place in enumerate(places))


def test_sealed_segments_are_told_oldest_first(workbench: Make) -> None:
    bench = workbench(segments=8).open()
    places = bench.fill(range(3 * RECORDS))
    told = events_of(bench).sealed
    assert list(told) == list(dict.fromkeys((p.segment, p.generation) for p in places))[:2]
    bench.tier.close()
    again = workbench(segments=8).open()
    again.keep_house()
    assert events_of(again).sealed[:2] == told


# --- reclaiming -----------------------------------------------------------------------------------------------------


def full_bench(workbench: Make, **settings: int) -> tuple[Workbench, list[Place]]:
    """A tier without room: every segment but the one in use is sealed or clean."""
    bench = workbench(**settings).open()
    places = bench.fill(range((SEGMENTS - 1) * RECORDS))
    return bench, places


def test_reclaims_are_wanted_only_when_the_tier_cannot_grow(workbench: Make) -> None:
    bench = workbench().open()
    for filled in range(1, SEGMENTS + 1):
        bench.fill(range(RECORDS))
        assert events_of(bench).reclaims_wanted == (filled == SEGMENTS)
    assert bench.tier.place(RECORD_PAGES) is None
    assert len(list(Path(bench.tier.path).glob("seg-*.kvs"))) == SEGMENTS


def test_a_reclaimed_segment_takes_records_in_another_generation(workbench: Make) -> None:
    bench, places = full_bench(workbench)
    bench.fill(range(100, 100 + RECORDS))
    events = events_of(bench)
    assert events.reclaims_wanted == 1
    (segment, generation), *_ = events.sealed
    bench.tier.reclaim(segment, generation)
    bench.keep_house()
    events = events_of(bench)
    assert (events.reclaimed, events.clean_segments, events.reclaims_wanted) == ((segment,), 1, 0)
    assert bench.tier.locate(segment, generation) is None
    assert not bench.read(0, places[0])
    place = bench.put(200)
    assert place.segment == segment
    assert place.generation > generation
    assert bench.read(200, place)


def test_a_reclaim_of_another_life_changes_nothing_and_ends(workbench: Make) -> None:
    bench, places = full_bench(workbench)
    segment, generation = events_of(bench).sealed[0]
    for wrong in ((segment, generation + 1), (999, generation)):
        bench.tier.reclaim(*wrong)
        bench.keep_house()
        assert events_of(bench).reclaimed == (wrong[0],)
    assert all(bench.read(number, place) for number, place in enumerate(places))


def test_an_open_segment_cannot_be_reclaimed(workbench: Make) -> None:
    bench = workbench().open()
    place = bench.put(1)
    bench.tier.reclaim(place.segment, place.generation)
    bench.keep_house()
    assert bench.read(1, place)


def test_reclaimed_blocks_do_not_come_back(workbench: Make) -> None:
    bench, places = full_bench(workbench)
    segment, generation = events_of(bench).sealed[0]
    bench.tier.reclaim(segment, generation)
    bench.keep_house()
    bench.tier.close()
    gone = {number for number, place in enumerate(places) if place.segment == segment}
    again = workbench().open()
    assert set(again.recovered()) == set(range(len(places))) - gone


def test_generations_and_sequences_are_never_used_twice(workbench: Make) -> None:
    """Over lives and reclaims: a stale record must not pass for a new one, whatever was lost."""
    seen: set[tuple[int, int]] = set()
    youngest = 0
    for life in range(4):
        bench = workbench().open()
        for turn in range(3):
            places = bench.fill(range(RECORDS))
            lives = {(place.segment, place.generation) for place in places}
            assert turn == 0 or not lives & seen
            seen |= lives
            assert min(place.sequence for place in places) > youngest, life
            youngest = max(place.sequence for place in places)
            for segment in (bench.tier.take_events() or DiskEvents((), (), True, "", 0, 0)).sealed:
                bench.tier.reclaim(*segment)
            bench.keep_house()
        bench.tier.close()


# --- durability -----------------------------------------------------------------------------------------------------


def test_files_with_new_records_are_unsynced_until_a_sync_covers_them(workbench: Make) -> None:
    bench = workbench().open()
    assert bench.tier.unsynced() == []
    place = bench.put(1)
    (target,) = bench.tier.unsynced()
    assert (target.segment, target.generation, target.fd) == (place.segment, place.generation, place.fd)
    bench.tier.begin_sync(target)
    bench.put(2)
    bench.tier.synced(target, None)
    assert len(bench.tier.unsynced()) == 1, "record 2 was written after the sync was begun"
    assert bench.sync()
    assert bench.tier.unsynced() == []


def test_a_sealed_segment_needs_no_sync(workbench: Make) -> None:
    bench = workbench().open()
    bench.fill(range(RECORDS + 1))
    assert bench.sync()
    bench.fill(range(RECORDS + 1, 2 * RECORDS))
    bench.put(99)
    bench.keep_house()
    assert [target.segment for target in bench.tier.unsynced()] == [bench.put(100).segment]


def test_one_file_is_synced_once_at_a_time(workbench: Make) -> None:
    """The kernel reports a failed sync to one caller only; a second one at the same time would take it for success."""
    bench = workbench().open()
    bench.put(1)
    (target,) = bench.tier.unsynced()
    assert bench.tier.begin_sync(target)
    assert not bench.tier.begin_sync(target)
    bench.tier.synced(target, None)
    bench.put(2)
    (target,) = bench.tier.unsynced()
    assert bench.tier.begin_sync(target)


def test_a_sync_is_for_all_who_asked_before_it_began(workbench: Make) -> None:
    """What was written by then is durable, also what was not when the sync itself was asked for."""
    bench = workbench().open()
    targets = []
    for number in range(3):
        bench.put(number)
        targets += bench.tier.unsynced()
    assert bench.tier.begin_sync(targets[1])
    bench.put(3)
    targets += bench.tier.unsynced()
    bench.tier.synced(targets[1], None)
    assert [bench.tier.sync_over(target) for target in targets] == [Reason.NONE] * 3 + [None]
    assert [bench.tier.begin_sync(target) for target in targets] == [False] * 3 + [True]
    bench.tier.synced(targets[3], OSError(errno.EIO, "Input/output error"))
    assert [bench.tier.sync_over(target) for target in targets] == [Reason.NONE] * 3 + [Reason.IO_ERROR]


def test_recovered_records_of_open_segments_may_not_be_durable(workbench: Make) -> None:
    """They survived a killed process, and may be in a cache that a power cut would empty."""
    bench = workbench().open()
    place = bench.put(1)
    bench.tier.close()
    again = workbench().open()
    assert [target.segment for target in again.tier.unsynced()] == [place.segment]
    assert again.sync()
    assert again.tier.unsynced() == []


# --- closing and opening again --------------------------------------------------------------------------------------


def test_everything_is_there_after_closing_and_opening(workbench: Make) -> None:
    bench = workbench().open()
    places = bench.fill(range(2 * RECORDS + 3))
    bench.tier.close()
    again = workbench().open()
    found = again.recovered()
    assert sorted(found) == list(range(2 * RECORDS + 3))
    assert all(again.read(number, row) for number, row in found.items())
    assert [int(found[n]["page"]) for n in sorted(found)] == [place.page for place in places]
    assert again.tier.recovery.damaged_records == 0


def test_recovered_rows_are_writable_copies_in_batches(workbench: Make) -> None:
    bench = workbench().open()
    bench.fill(range(RECORDS + 2))
    bench.tier.close()
    for table in workbench().tier.open():
        assert table.dtype == RECOVERED
        table["segment"] += 1000


def test_a_partly_filled_segment_is_filled_on_in_the_next_life(workbench: Make) -> None:
    bench = workbench().open()
    first = bench.put(0)
    bench.tier.close()
    again = workbench().open()
    second = again.put(1)
    assert (second.segment, second.generation) == (first.segment, first.generation)
    assert second.page == first.page + first.pages
    again.fill(range(2, RECORDS + 1))
    again.tier.close()
    third = workbench().open()
    assert sorted(third.recovered()) == list(range(RECORDS + 1))
    assert all(third.read(number, row) for number, row in third.recovered().items())


def test_a_segment_filled_in_two_lives_has_room_for_the_footer_of_both(workbench: Make) -> None:
    """With many small records the footer is several pages long, and none of them may lie on a record."""
    small = {"of": layout(4096), "segment_bytes": 202 * 4096, "segments": 4}
    bench = workbench(**small).open()
    first = [bench.put(number) for number in range(60)]
    bench.tier.close()
    again = workbench(**small).open()
    number = len(first)
    while again.put(number).segment == first[0].segment:
        number += 1
    again.keep_house()
    again.tier.close()
    third = workbench(**small).open()
    assert third.tier.recovery.damaged_records == 0
    assert set(third.recovered()) == set(range(number + 1))
    assert all(third.read(block, row) for block, row in third.recovered().items())


def test_the_lineage_of_a_block_is_recovered(workbench: Make) -> None:
    bench = workbench().open()
    bench.put(1, lineage=1)
    bench.put(1, lineage=0)
    bench.tier.close()
    rows = workbench().open().rows
    assert sorted(int(row["lineage"]) for row in rows) == [0, 1], "which of them wins is for control to say"


def test_closing_twice_does_no_harm_and_frees_every_descriptor(workbench: Make) -> None:
    before = set(os.listdir("/proc/self/fd"))
    bench = workbench().open()
    bench.fill(range(20))
    bench.tier.close()
    bench.tier.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert bench.tier.place(RECORD_PAGES) is None
    assert bench.tier.locate(0, 1 << 40) is None


def test_a_file_that_something_is_under_way_to_stays_open_after_closing(workbench: Make) -> None:
    """Its number must not be given to another file while a write to it may still come."""
    bench = workbench().open()
    place = bench.tier.place(RECORD_PAGES)
    bench.tier.close()
    assert bench.files.size(place.fd) == SEGMENT_BYTES
    bench.files.close(place.fd)


def test_recovery_may_be_broken_off(workbench: Make) -> None:
    bench = workbench().open()
    bench.fill(range(20))
    bench.tier.close()
    before = set(os.listdir("/proc/self/fd"))
    tier = workbench().tier
    next(tier.open())
    tier.close()
    assert set(os.listdir("/proc/self/fd")) == before


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_are_private_and_have_plain_names(workbench: Make) -> None:
    bench = workbench().open()
    bench.fill(range(20))
    path = Path(bench.tier.path)
    assert path.name == bench.layout.placement
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    names = sorted(entry.name for entry in path.iterdir())
    assert names == ["LOCK", "layout.json", "seg-000000.kvs", "seg-000001.kvs", "seg-000002.kvs", "seg-000003.kvs",
                     "superblock.a", "superblock.b"]  # fmt: skip
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in path.iterdir()} == {0o600}
    assert all(entry.stat().st_size == SEGMENT_BYTES for entry in path.glob("seg-*"))


def test_the_capacity_is_never_exceeded(workbench: Make) -> None:
    bench = workbench(segments=6).open()
    for number in range(200):
        place = bench.tier.place(RECORD_PAGES)
        if place is not None:
            bench.tier.abandoned(place)
        bench.keep_house()
        for segment in (bench.tier.take_events() or DiskEvents((), (), True, "", 0, 0)).sealed:
            if number % 3:
                bench.tier.reclaim(*segment)
        used = sum(entry.stat().st_blocks * 512 for entry in Path(bench.tier.path).glob("seg-*"))
        assert used <= bench.tier.capacity_bytes == 6 * SEGMENT_BYTES


def test_a_smaller_capacity_is_reached_by_reclaiming(workbench: Make) -> None:
    bench = workbench(segments=8).open()
    bench.fill(range(7 * RECORDS + 1))
    bench.tier.close()
    smaller = workbench(segments=4).open()
    smaller.keep_house()
    while (events := smaller.tier.take_events()) is not None and events.reclaims_wanted:
        for life in events.sealed[: events.reclaims_wanted]:
            smaller.tier.reclaim(*life)
        smaller.keep_house()
    assert len(list(Path(smaller.tier.path).glob("seg-*"))) == 4
    assert smaller.tier.place(RECORD_PAGES) is not None


def reclaim_as_wanted(bench: Workbench) -> list[tuple[int, int]]:
    """What control does: give up the oldest sealed segments while more are wanted; returns which."""
    sealed: deque[tuple[int, int]] = deque()
    under_way: set[int] = set()
    gone = []
    while (events := bench.tier.take_events()) is not None:
        sealed.extend(sorted(events.sealed, key=itemgetter(1)))
        under_way -= set(events.reclaimed)
        while sealed and events.reclaims_wanted > len(under_way):
            gone.append(sealed.popleft())
            under_way.add(gone[-1][0])
            bench.tier.reclaim(*gone[-1])
        bench.keep_house()
    return gone


@pytest.mark.parametrize("new_scale", [1, 2, 4])
@pytest.mark.parametrize("old_scale", [1, 2, 4])
@pytest.mark.parametrize("share", [0.4, 0.5, 0.75, 0.9])
def test_no_more_is_given_up_for_a_smaller_capacity_than_has_to_be(
    workbench: Make, old_scale: int, new_scale: int, share: float
) -> None:
    """Clean segments go first; of those that hold blocks no more than it takes, whatever sizes they have."""
    old_bytes, new_bytes = old_scale * SEGMENT_BYTES, new_scale * SEGMENT_BYTES
    bench = workbench(segments=48 // old_scale, segment_bytes=old_bytes).open()
    bench.fill(range(46 * RECORDS))
    bench.tier.close()
    smaller = workbench(segments=int(48 * share) // new_scale, segment_bytes=new_bytes).open()
    gone = reclaim_as_wanted(smaller)
    used_bytes = sum(entry.stat().st_size for entry in Path(smaller.tier.path).glob("seg-*"))
    assert used_bytes <= smaller.tier.capacity_bytes
    clean_bytes = smaller.tier.stages()["clean"] * new_bytes
    assert clean_bytes == new_bytes
    assert used_bytes - clean_bytes + old_bytes > smaller.tier.capacity_bytes - new_bytes, "one too many went"
    kept = set(smaller.recovered()) - {
        number for number, row in smaller.recovered().items() if (row["segment"], row["generation"]) in gone
    }
    assert kept == set(range(46 * RECORDS - len(kept), 46 * RECORDS)), "the oldest go first"


def test_segments_of_another_size_are_read_and_replaced_when_reclaimed(workbench: Make) -> None:
    bench = workbench(segments=8).open()
    bench.fill(range(2 * RECORDS + 1))
    bench.tier.close()
    larger = workbench(segments=8, segment_bytes=2 * SEGMENT_BYTES).open()
    found = larger.recovered()
    assert sorted(found) == list(range(2 * RECORDS + 1))
    assert all(larger.read(number, row) for number, row in found.items())
    old = events_of(larger).sealed
    for life in old:
        larger.tier.reclaim(*life)
    larger.keep_house()
    larger.fill(range(100, 100 + 2 * RECORDS))
    sizes = {entry.name: entry.stat().st_size for entry in Path(larger.tier.path).glob("seg-*")}
    assert 2 * SEGMENT_BYTES in sizes.values()
    assert {sizes.get(f"seg-{number:06d}.kvs", 2 * SEGMENT_BYTES) for number, _ in old} == {2 * SEGMENT_BYTES}


def test_records_of_several_sizes_share_segments(workbench: Make) -> None:
    """Byte codecs make records shorter; a segment then holds more of them and a longer footer."""
    bench = workbench().open()
    rng = np.random.default_rng(5)
    taken: dict[int, int] = {}
    while (place := bench.tier.place(int(rng.integers(2, 4)))) is not None:
        taken[place.segment] = max(taken.get(place.segment, 0), place.page + place.pages)
        bench.tier.written(place, bench.image_for(1, place)[:4096])
        bench.keep_house()
    assert len(taken) == SEGMENTS
    assert max(taken.values()) <= SEGMENT_PAGES - 2
    bench.tier.place(2)
    bench.keep_house()
    bench.tier.close()
    assert workbench().open().tier.recovery.segments == SEGMENTS


def test_the_layout_lies_beside_the_blocks_for_people(workbench: Make) -> None:
    bench = workbench().open()
    text = (Path(bench.tier.path) / "layout.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(bench.layout.describe()))


def test_ranks_have_directories_of_their_own(workbench: Make) -> None:
    first = workbench(of=layout(tp_rank=0, tp_size=2)).open()
    second = workbench(of=layout(tp_rank=1, tp_size=2)).open()
    assert first.tier.path != second.tier.path
    assert first.tier.nonce != second.tier.nonce


def put_many(bench: Workbench, first: int, most: int) -> Place:
    """Blocks ``first`` and following at one place, as many of ``most`` as there is room for."""
    place = bench.tier.place(RECORD_PAGES, most)
    assert place is not None
    images = [
        bench.image_for(first + at, replace(place, page=page, sequence=sequence, count=1))
        for at, (page, sequence) in enumerate(
            zip(place.first_pages().tolist(), place.sequences().tolist(), strict=True)
        )
    ]
    for page, image in zip(place.first_pages().tolist(), images, strict=True):
        bench.files.write_at(place.fd, page * PAGE_BYTES, image)
    headers = np.stack([image[:PAGE_BYTES] for image in images])
    bench.tier.written(place, Pages(headers, np.arange(len(images))))
    return place


def test_records_placed_together_are_adjacent_and_take_what_is_left_of_the_segment(workbench: Make) -> None:
    bench = workbench(segments=12, clean_segments=2).open()
    bench.put(0)
    place = put_many(bench, 1, most=100)
    assert (place.count, place.page, place.pages) == (RECORDS - 1, 2 + RECORD_PAGES, RECORD_PAGES)
    following = put_many(bench, RECORDS, most=2)
    assert following.segment != place.segment
    assert following.count == 2
    assert following.sequence == place.sequence + place.count


def test_a_life_that_placed_records_together_is_found_again_as_one_that_placed_them_one_by_one(
    workbench: Make, tmp_path: Path
) -> None:
    """A sealed segment by its footer, and an open one by its records."""
    found = []
    for name, most in (("one", 1), ("many", 5)):
        bench = workbench(directory=str(tmp_path / name)).open()
        number = 0
        while number < RECORDS + 3:
            number += put_many(bench, number, min(most, RECORDS + 3 - number)).count
            bench.keep_house()
        assert bench.tier.close()
        found.append(workbench(directory=str(tmp_path / name)).open().rows)
    one_by_one, together = ([row.tobytes() for row in rows] for rows in found)
    assert len(together) == RECORDS + 3
    assert together == one_by_one


def test_records_placed_together_are_abandoned_and_fail_together(workbench: Make) -> None:
    bench = workbench(segments=12, clean_segments=2).open()
    place = bench.tier.place(RECORD_PAGES, 3)
    assert place is not None
    bench.tier.abandoned(place)
    second = bench.tier.place(RECORD_PAGES, 3)
    assert second is not None
    assert second.page == place.page + 3 * RECORD_PAGES, "a hole, and no fault"
    bench.tier.failed(second, OSError(errno.EIO, "device"))
    third = bench.tier.place(RECORD_PAGES, 3)
    assert third is not None
    assert third.segment != second.segment
    assert bench.tier.stages()["poisoned"] == 1
