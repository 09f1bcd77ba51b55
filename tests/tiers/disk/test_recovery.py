"""What recovery makes of segments that a crash, rot or somebody's hand has left behind."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvtier.codecs.record import RecordHeader, restamp
from kvtier.runtime import SystemFiles
from kvtier.runtime.seam import Buffer
from kvtier.tiers.disk import recovery
from kvtier.tiers.disk.format import HEADER_SLOTS
from tests.interrupts import once, open_files
from tests.tiers.disk.workbench import (
    RECORD_PAGES,
    RECORDS,
    SEGMENT_BYTES,
    SEGMENT_PAGES,
    FaultyFiles,
    Workbench,
    layout,
    record,
    rewrite_superblocks,
)

Make = Callable[..., Workbench]
PAGE = 4096


def abandon(bench: Workbench) -> None:
    """Leave as a killed process does: nothing is sealed, synced or written any more."""
    bench.tier._book.segments.clear()
    bench.tier._directory.close()


def change(bench: Workbench, segment: int, offset: int, data: bytes | None = None) -> None:
    """Write into a segment from outside; without ``data``, flip one bit."""
    with open(bench.segment_path(segment), "r+b") as file:
        if data is None:
            file.seek(offset)
            data = bytes([file.read(1)[0] ^ 1])
        file.seek(offset)
        file.write(data)


def copy(bench: Workbench, segment: int, source: int, target: int, pages: int) -> None:
    """Copy pages within a segment, as a misdirected write would."""
    with open(bench.segment_path(segment), "r+b") as file:
        file.seek(source * PAGE)
        data = file.read(pages * PAGE)
        file.seek(target * PAGE)
        file.write(data)


def readable(bench: Workbench) -> set[int]:
    """The blocks that were recovered; each is read back and compared."""
    found = bench.recovered()
    assert all(bench.read(number, row) for number, row in found.items())
    return set(found)


@pytest.fixture(params=["one window", "many windows"])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are scanned in one window, or in windows that records cross."""
    if request.param == "many windows":
        monkeypatch.setattr(recovery, "WINDOW_PAGES", RECORD_PAGES + 1)


@pytest.mark.usefixtures("windows")
class TestUnsealedSegment:
    """A segment without a footer is read from end to end."""

    def test_all_that_was_written_is_found(self, workbench: Make) -> None:
        bench = workbench().open()
        bench.fill(range(RECORDS - 2))
        abandon(bench)
        again = workbench().open()
        assert readable(again) == set(range(RECORDS - 2))
        assert again.tier.recovery.scanned == 2

    def test_what_lies_behind_a_hole_is_found(self, workbench: Make) -> None:
        """Several writers finish out of order: a write that never came must not hide those that did."""
        bench = workbench().open()
        bench.put(0)
        for number in range(1, RECORDS, 2):
            hole = bench.tier.place(RECORD_PAGES)
            assert hole is not None
            if number + 1 < RECORDS:
                bench.put(number + 1)
        abandon(bench)
        again = workbench().open()
        assert readable(again) == set(range(0, RECORDS, 2))

    def test_holes_and_torn_records_are_written_over(self, workbench: Make, caplog: pytest.LogCaptureFixture) -> None:
        bench = workbench().open()
        kept = bench.put(0)
        torn = bench.tier.place(RECORD_PAGES)
        assert torn is not None
        image = bench.image_for(1, torn)
        bench.files.write_at(torn.fd, torn.page * PAGE, image[: 2 * PAGE])  # its last page never came
        abandon(bench)
        again = workbench().open()
        assert readable(again) == {0}
        assert again.tier.recovery.damaged_records == 1
        assert not caplog.records, "a crash does that"
        assert again.put(2).page == kept.page + kept.pages
        again.fill(range(3, 12))
        again.tier.close()
        assert readable(workbench().open()) == {0, *range(2, 12)}

    @pytest.mark.parametrize("page", range(RECORD_PAGES))
    def test_a_flipped_bit_costs_one_record(self, workbench: Make, page: int) -> None:
        bench = workbench().open()
        places = bench.fill(range(5))
        abandon(bench)
        change(bench, places[2].segment, (places[2].page + page) * PAGE + 77)
        again = workbench().open()
        assert readable(again) == {0, 1, 3, 4}
        assert again.tier.recovery.damaged_records == 1

    def test_a_record_in_another_place_is_not_taken(self, workbench: Make) -> None:
        bench = workbench().open()
        places = bench.fill(range(3))
        abandon(bench)
        copy(bench, places[0].segment, places[1].page, places[2].page + RECORD_PAGES, RECORD_PAGES)
        copy(bench, places[0].segment, places[0].page, places[2].page, RECORD_PAGES)
        assert readable(workbench().open()) == {0, 1}

    def test_what_looks_like_a_record_inside_the_payload_of_another_is_not_one(self, workbench: Make) -> None:
        """Whoever chooses the KV of a block could else make up blocks under any key."""
        bench = workbench().open()
        outer, after = bench.tier.place(RECORD_PAGES), bench.tier.place(RECORD_PAGES)
        assert outer is not None
        assert after is not None
        bench.write(1, after)
        next_header = bench.image_for(1, after)[:PAGE]
        filler = np.full(PAGE, 7, np.uint8)
        forged = bench.image_for(9, replace(outer, page=outer.page + 1), content=np.concatenate((filler, next_header)))
        image = bench.image_for(0, outer, content=np.concatenate((forged[:PAGE], filler)))
        bench.files.write_at(outer.fd, outer.page * PAGE, image)
        bench.tier.written(outer, image[:PAGE])
        abandon(bench)
        assert set(workbench().open().recovered()) == {0, 1}

    @pytest.mark.parametrize("field", ["nonce", "segment", "generation", "page_number"])
    def test_a_record_of_another_store_segment_or_life_is_not_taken(self, workbench: Make, field: str) -> None:
        """Its checksums are right: only where it says that it belongs tells it from one of ours."""
        bench = workbench().open()
        good = bench.put(0)
        place = bench.tier.place(RECORD_PAGES)
        assert place is not None
        image = bench.image_for(1, place)
        stamp = {
            "nonce": bench.tier.nonce, "segment": place.segment, "generation": place.generation,
            "page_number": place.page, "sequence": place.sequence,
        }  # fmt: skip
        stamp[field] = b"another store..." if field == "nonce" else int(stamp[field]) - 1  # type: ignore[call-overload]
        restamp(image[:PAGE], **stamp)  # type: ignore[arg-type]
        bench.files.write_at(place.fd, place.page * PAGE, image)
        abandon(bench)
        assert good.page == 2
        assert readable(workbench().open()) == {0}

    def test_the_image_of_a_record_inside_of_a_payload_is_not_taken(self, workbench: Make) -> None:
        """KV bytes may hold anything, even a record of this very segment with its checksums."""
        bench = workbench(of=layout(5 * PAGE), segment_bytes=100 * PAGE).open()
        inner = workbench(directory=bench.directory + "-other").open()
        outer = bench.tier.place(6)
        assert outer is not None
        small = inner.image_for(7, outer)
        place = outer.__class__(outer.segment, outer.page + 2, 3, outer.generation, outer.sequence, outer.fd)
        restamp(
            small[:PAGE], nonce=bench.tier.nonce, segment=place.segment, generation=place.generation,
            page_number=place.page, sequence=place.sequence,
        )  # fmt: skip
        image = bench.image_for(1, outer)
        image[2 * PAGE : 5 * PAGE] = small
        bench.files.write_at(outer.fd, outer.page * PAGE, image)
        abandon(bench)
        assert readable(workbench(of=layout(5 * PAGE), segment_bytes=100 * PAGE).open()) == set()

    def test_records_of_the_life_before_are_not_taken(self, workbench: Make) -> None:
        """A reclaimed segment holds its old records until they are written over."""
        bench = workbench(segments=4).open()
        bench.fill(range(4 * RECORDS))
        events = bench.tier.take_events()
        assert events is not None
        bench.tier.reclaim(*events.sealed[0])
        bench.keep_house()
        bench.put(100)
        bench.keep_house()
        abandon(bench)
        assert readable(workbench(segments=4).open()) == {100, *range(RECORDS, 4 * RECORDS)}

    def test_lengths_that_the_layout_does_not_allow_are_not_believed(self, workbench: Make) -> None:
        """A record that is ours by all its marks, with whole checksums, and longer than any that we write."""
        bench = workbench().open()
        place = bench.tier.place(RECORD_PAGES)
        assert place is not None
        longer = layout(16384)
        header = RecordHeader.unpack(record(5, longer)[:PAGE])
        header = replace(
            header, placement=bench.tier.placement, nonce=bench.tier.nonce, segment=place.segment, page=place.page,
            generation=place.generation, sequence=place.sequence,
        )  # fmt: skip
        image = record(5, longer)
        header.pack_into(image[:PAGE])
        bench.files.write_at(place.fd, place.page * PAGE, image)
        abandon(bench)
        assert workbench().open().rows == []


class TestSealedSegment:
    """A sealed segment says in its footer what it holds."""

    def sealed(self, workbench: Make) -> tuple[Workbench, int]:
        """A closed tier with blocks 0 to 7 in a sealed segment, and block 8 in another."""
        bench = workbench().open()
        places = bench.fill(range(RECORDS + 1))
        bench.tier.close()
        return bench, places[0].segment

    def test_its_records_are_not_read(self, workbench: Make) -> None:
        _, _ = self.sealed(workbench)
        again = workbench().open()
        assert readable(again) == set(range(RECORDS + 1))
        assert again.tier.recovery.scanned == 2, "the open one and the clean one"

    @pytest.mark.parametrize("pages_from_end", [1, 2])
    def test_without_its_footer_it_is_scanned_and_sealed_once_more(self, workbench: Make, pages_from_end: int) -> None:
        bench, segment = self.sealed(workbench)
        change(bench, segment, SEGMENT_BYTES - pages_from_end * PAGE + 50)
        again = workbench().open()
        assert readable(again) == set(range(RECORDS + 1))
        assert again.tier.recovery.scanned == 3
        again.tier.close()
        third = workbench().open()
        assert readable(third) == set(range(RECORDS + 1))
        assert third.tier.recovery.scanned == 2

    @pytest.mark.parametrize("slot", [0, 1])
    def test_one_copy_of_its_header_is_enough(self, workbench: Make, slot: int) -> None:
        """The header is written anew when a segment is sealed and when it is reclaimed; a torn write loses nothing."""
        bench, segment = self.sealed(workbench)
        change(bench, segment, slot * PAGE + 20)
        assert readable(workbench().open()) == set(range(RECORDS + 1))

    def test_without_both_copies_it_becomes_clean(self, workbench: Make) -> None:
        bench, segment = self.sealed(workbench)
        for slot in (0, 1):
            change(bench, segment, slot * PAGE + 20)
        again = workbench().open()
        assert readable(again) == {RECORDS}
        assert again.tier.recovery.damaged_segments == 1
        events = again.tier.take_events()
        assert events is not None
        assert events.clean_segments == 2

    def test_a_generation_is_not_used_again_when_the_header_that_held_it_is_lost(self, workbench: Make) -> None:
        """Records of the lost life are still there; in the same generation they would come back as new ones."""
        bench = workbench(segments=4).open()
        bench.fill(range(4 * RECORDS))
        events = bench.tier.take_events()
        assert events is not None
        segment, _ = events.sealed[0]
        bench.tier.reclaim(*events.sealed[0])
        bench.keep_house()
        lost = [bench.put(number) for number in range(100, 103)]
        abandon(bench)
        change(bench, segment, 20)  # the copy of the header that was written last
        again = workbench(segments=4).open()
        events = again.tier.take_events()
        assert events is not None
        life = next(life for life in events.sealed if life[0] == segment)
        again.tier.reclaim(*life)
        again.keep_house()
        again.put(200)
        abandon(again)
        third = workbench(segments=4).open()
        assert lost[0].segment == segment
        assert readable(third) == {200, *range(RECORDS, 4 * RECORDS)}

    def test_a_header_of_another_segment_is_not_believed(self, workbench: Make) -> None:
        """A file that was copied over another, or whose header went astray."""
        bench, segment = self.sealed(workbench)
        other = 1 - segment
        data = Path(bench.segment_path(segment)).read_bytes()
        Path(bench.segment_path(other)).write_bytes(data)
        again = workbench().open()
        assert readable(again) == set(range(RECORDS))
        assert again.tier.recovery.foreign_segments == 1

    def test_a_file_of_another_store_is_not_believed(self, workbench: Make) -> None:
        bench, segment = self.sealed(workbench)
        stranger = workbench(directory=bench.directory + "-other").open()
        stranger.fill(range(50, 50 + RECORDS + 1))
        stranger.tier.close()
        data = Path(stranger.segment_path(segment)).read_bytes()
        Path(bench.segment_path(segment)).write_bytes(data)
        again = workbench().open()
        assert readable(again) == {RECORDS}
        assert again.tier.recovery.foreign_segments == 1

    @pytest.mark.parametrize("pages", [0, 1, 2, 10, SEGMENT_PAGES - 1])
    def test_a_file_that_was_cut_off_keeps_what_is_left_and_is_made_anew(self, workbench: Make, pages: int) -> None:
        bench, segment = self.sealed(workbench)
        os.truncate(bench.segment_path(segment), pages * PAGE)
        again = workbench().open()
        whole = {number for number in range(RECORDS) if 2 + RECORD_PAGES * (number + 1) <= pages}
        assert readable(again) == {RECORDS, *whole}
        events = again.tier.take_events()
        assert events is not None
        for life in events.sealed:
            again.tier.reclaim(*life)
        again.keep_house()
        again.fill(range(20, 20 + 3 * RECORDS))
        sizes = {entry.stat().st_size for entry in Path(again.tier.path).glob("seg-*")}
        assert sizes == {SEGMENT_BYTES}


class BadPages(SystemFiles):
    """Files of which some pages of one cannot be read; ``failed`` counts the reads that came to them."""

    def __init__(self, path: str, pages: set[int]) -> None:
        self._inode = os.stat(path).st_ino
        self._pages = pages
        self.failed = 0

    def read_at(self, fd: int, offset: int, buffer: Buffer) -> int:
        touched = range(offset // PAGE, (offset + buffer.nbytes - 1) // PAGE + 1)
        if os.fstat(fd).st_ino == self._inode and not self._pages.isdisjoint(touched):
            self.failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read_at(fd, offset, buffer)


class TestDevice:
    """Errors of the device while a directory is opened."""

    @pytest.mark.parametrize("slot", range(HEADER_SLOTS))
    def test_a_segment_whose_header_cannot_be_read_is_left_alone_for_the_next_life(
        self, workbench: Make, slot: int
    ) -> None:
        """The error may pass: nothing is wiped, nothing is written to it. The other copy may be of a life before."""
        bench = workbench().open()
        places = bench.fill(range(RECORDS + 1))
        bench.tier.close()
        again = workbench(files=BadPages(bench.segment_path(places[0].segment), {slot})).open()
        assert again.tier.recovery.unreadable_segments == 1
        assert again.tier.locate(places[0].segment, places[0].generation) is None
        assert set(again.recovered()) == {RECORDS}
        again.tier.close()
        assert readable(workbench().open()) == set(range(RECORDS + 1))

    def test_a_page_that_cannot_be_read_costs_the_records_on_it(self, workbench: Make) -> None:
        bench = workbench().open()
        places = [bench.put(number) for number in range(RECORDS - 1)]
        bench.sync()
        abandon(bench)
        files = BadPages(bench.segment_path(places[0].segment), {places[3].page + 1})
        again = workbench(files=files).open()
        assert readable(again) == {*range(RECORDS - 1)} - {3}
        assert again.tier.recovery.samples()["unreadable_pages"] == 1
        assert again.put(100).segment != places[0].segment, "nothing more is written to it"

    def test_a_page_that_comes_with_two_windows_is_counted_once(
        self, workbench: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a record reaches over the end of one, the next begins with it."""
        bench = workbench().open()
        places = [bench.put(number) for number in range(RECORDS - 1)]
        bench.sync()
        abandon(bench)
        monkeypatch.setattr("kvtier.tiers.disk.recovery.WINDOW_PAGES", places[4].page - HEADER_SLOTS + 2)
        again = workbench(files=BadPages(bench.segment_path(places[0].segment), {places[4].page + 1})).open()
        assert readable(again) == {*range(RECORDS - 1)} - {4}
        assert again.tier.recovery.samples()["unreadable_pages"] == 1

    def test_a_footer_that_cannot_be_read_costs_no_record(self, workbench: Make) -> None:
        bench = workbench().open()
        places = bench.fill(range(RECORDS + 1))
        bench.tier.close()
        again = workbench(files=BadPages(bench.segment_path(places[0].segment), {SEGMENT_PAGES - 1})).open()
        assert readable(again) == {*range(RECORDS + 1)}

    def test_of_a_device_that_fails_altogether_not_every_page_is_tried(self, workbench: Make) -> None:
        bench = workbench().open()
        places = bench.fill(range(RECORDS + 1))
        bench.tier.close()
        files = BadPages(bench.segment_path(places[0].segment), {*range(2, SEGMENT_PAGES)})
        again = workbench(files=files).open()
        assert again.tier.recovery.unreadable_segments == 1
        assert files.failed < 30

    def test_too_many_open_files_cost_segments_of_this_life_only(self, workbench: Make) -> None:
        bench = workbench().open()
        bench.fill(range(3 * RECORDS))
        bench.tier.close()
        faulty = FaultyFiles(bench.files)
        again = workbench(files=faulty)
        batches = again.tier.open()
        faulty.fail("open", errno.EMFILE)
        assert len(list(batches)) < 3
        again.tier.close()
        assert readable(workbench().open()) == set(range(3 * RECORDS))


class Witness(logging.Handler):
    """What is in a file at every warning."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.WARNING)
        self.path = path
        self.texts: list[str] = []
        self.seen: list[bytes] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.seen.append(Path(self.path).read_bytes())


@pytest.fixture
def witness(workbench: Make) -> Iterator[Witness]:
    """Looks at a sealed segment, of blocks 0 to 7, of a closed tier whose other blocks are 8 to 10."""
    bench = workbench().open()
    places = bench.fill(range(RECORDS + 3))
    bench.tier.close()
    handler = Witness(bench.segment_path(places[0].segment))
    logging.getLogger("kvtier").addHandler(handler)
    yield handler
    logging.getLogger("kvtier").removeHandler(handler)


def spoil(path: str, *offsets: int) -> bytes:
    """Flip bits from outside; what the file is then."""
    data = bytearray(Path(path).read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    Path(path).write_bytes(data)
    return bytes(data)


class TestWhatIsTold:
    """Damage that no crash does is told once, in one line for the directory, before anything is written over."""

    def test_a_directory_that_is_whole_is_not_spoken_of(self, workbench: Make, witness: Witness) -> None:
        again = workbench().open()
        assert witness.texts == []
        assert again.tier.recovery.samples() == {
            "recovered_segments": 3, "recovered_records": RECORDS + 3, "damaged_records": 0, "damaged_segments": 0,
            "damaged_tails": 0, "unreadable_pages": 0, "foreign_segments": 0, "unreadable_segments": 0,
        }  # fmt: skip

    def test_a_segment_without_a_whole_header(self, workbench: Make, witness: Witness) -> None:
        spoiled = spoil(witness.path, 20, PAGE + 20)
        again = workbench().open()
        [text] = witness.texts
        assert text.startswith(f"disk directory {again.tier.path}: not all of its blocks are found: 1 segments have no")
        assert "written over" in text
        assert witness.seen == [spoiled]
        assert Path(witness.path).read_bytes() != spoiled
        assert again.tier.recovery.samples()["damaged_segments"] == 1

    def test_segments_of_another_store(self, workbench: Make, witness: Witness) -> None:
        """The superblocks of another directory were copied over: all segments are whole, and none is of this store."""
        bench, stranger = workbench(), workbench(directory=workbench().directory + "-other").open()
        for name in ("superblock.a", "superblock.b"):
            shutil.copy(f"{stranger.tier.path}/{name}", f"{bench.tier.path}/{name}")
        before = Path(witness.path).read_bytes()
        bench.open()
        [text] = witness.texts
        assert "3 segments are of another store" in text
        assert witness.seen == [before]
        assert bench.rows == []
        samples = bench.tier.recovery.samples()
        assert (samples["foreign_segments"], samples["damaged_segments"]) == (3, 0)

    def test_a_file_of_somebody_that_is_called_like_a_segment(self, workbench: Make, witness: Witness) -> None:
        """It has no place in the capacity, and goes; files with other names stay."""
        bench = workbench()
        stranger, notes = Path(bench.segment_path(999_999)), Path(bench.tier.path) / "notes.kvs"
        stranger.write_bytes(bytes(2 * SEGMENT_BYTES))
        notes.write_text("mine")
        bench.open()
        [text] = witness.texts
        assert "1 segments have no whole header, and are now written over or removed" in text
        assert not stranger.exists()
        assert notes.exists()
        assert set(bench.recovered()) == set(range(RECORDS + 3))

    def test_a_sealed_segment_without_a_whole_footer(self, workbench: Make, witness: Witness) -> None:
        spoil(witness.path, SEGMENT_BYTES - 50, 3 * PAGE + 50)
        again = workbench().open()
        [text] = witness.texts
        assert "1 segments are cut off or have lost their footer" in text
        assert again.tier.recovery.samples()["damaged_tails"] == 1
        assert again.tier.recovery.samples()["damaged_records"] == 1

    def test_an_open_segment_that_was_cut_off(self, workbench: Make, witness: Witness) -> None:
        opened = next(path for path in Path(witness.path).parent.glob("seg-*") if str(path) != witness.path)
        os.truncate(opened, SEGMENT_BYTES - PAGE)
        assert workbench().open().tier.recovery.damaged_tails == 1
        assert len(witness.texts) == 1

    def test_segments_that_cannot_be_read_are_told_of_together(self, workbench: Make, witness: Witness) -> None:
        again = workbench()
        for number in (70, 71, 72):
            os.mkfifo(again.segment_path(number))
        again.open()
        [text] = witness.texts
        assert "3 segments cannot be read and are left alone in this life (segment 70: " in text
        assert "not a regular file" in text
        assert again.tier.recovery.samples()["unreadable_segments"] == 3

    def test_what_is_only_read_is_not_said_to_be_written_over(self, workbench: Make, witness: Witness) -> None:
        bench = workbench()
        spoil(witness.path, 20, PAGE + 20)
        rewrite_superblocks(bench, ro_compat=1)
        bench.open()
        told = " ".join(witness.texts)
        assert "1 segments have no whole header, and are left alone" in told
        assert "written over" not in told


def test_segments_that_were_not_finished_are_removed(workbench: Make) -> None:
    bench = workbench().open()
    bench.tier.close()
    unfinished = Path(bench.tier.path) / "seg-000007.kvs.new"
    unfinished.write_bytes(bytes(PAGE))
    foreign = Path(bench.tier.path) / "notes.new"
    foreign.write_text("mine")
    workbench().open()
    assert not unfinished.exists()
    assert foreign.exists(), "only what is ours is removed"


def test_noise_in_every_page_of_a_segment_never_comes_back_as_a_block(workbench: Make) -> None:
    bench = workbench().open()
    bench.fill(range(RECORDS + 1))
    bench.tier.close()
    original = Path(bench.segment_path(0)).read_bytes()
    rng = np.random.default_rng(11)
    for _ in range(60):
        pages = np.frombuffer(bytearray(original), np.uint8).reshape(-1, PAGE)
        for page in rng.integers(0, SEGMENT_PAGES, int(rng.integers(1, 6))):
            span = slice(*sorted(rng.integers(0, PAGE + 1, 2)))
            pages[page, span] = rng.integers(0, 256, span.stop - span.start)
        Path(bench.segment_path(0)).write_bytes(pages.tobytes())
        again = workbench()
        for table in again.tier.open():
            again.rows.extend(table)
        verified = [number for number, row in again.recovered().items() if again.read(number, row)]
        assert len(verified) >= 1
        abandon(again)
        Path(bench.segment_path(0)).write_bytes(original)


@pytest.mark.parametrize("call", ["size", "read_at"])
@pytest.mark.parametrize("which", range(3))
def test_ctrl_c_while_a_segment_is_read_leaves_no_file_open(
    workbench: Make, monkeypatch: pytest.MonkeyPatch, call: str, which: int
) -> None:
    bench = workbench().open()
    bench.fill(range(RECORDS + 1))
    assert bench.tier.close()
    before, again = open_files(), workbench()
    batches = again.tier.open()
    with monkeypatch.context() as patched:
        patched.setattr(again.files, call, once(getattr(again.files, call), KeyboardInterrupt(), after=which))
        with pytest.raises(KeyboardInterrupt):
            list(batches)
    again.tier.give_back()
    assert open_files() == before
    assert set(workbench().open().recovered()) == set(range(RECORDS + 1))


def test_ctrl_c_while_a_directory_is_looked_at_unlocks_it(workbench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    before, bench = open_files(), workbench()
    with monkeypatch.context() as patched:
        patched.setattr(bench.files, "free_bytes", once(bench.files.free_bytes, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            bench.tier.open()
    assert open_files() == before
    workbench().open()
