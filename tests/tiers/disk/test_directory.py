"""Opening a directory: who may, what is said when it cannot be used, and that nothing is lost by it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvtier.errors import CapacityError, TierError
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.directory import read_superblocks
from kvtier.tiers.disk.format import Superblock
from tests.tiers.disk.workbench import (
    LAYOUT,
    RECORD_PAGES,
    RECORDS,
    SEGMENT_BYTES,
    FaultyFiles,
    Workbench,
    layout,
    rewrite_superblocks,
)

Make = Callable[..., Workbench]


def snapshot(path: str) -> dict[str, bytes]:
    """All bytes in a directory, the lock file excepted."""
    return {entry.name: entry.read_bytes() for entry in Path(path).iterdir() if entry.name != "LOCK"}


@pytest.fixture
def closed(workbench: Make) -> Workbench:
    """A tier with nine blocks, closed."""
    bench = workbench().open()
    bench.fill(range(RECORDS + 1))
    bench.tier.close()
    return bench


def test_a_second_process_is_told_who_has_the_directory(workbench: Make) -> None:
    workbench(owner="pid 4711 on node7").open()
    with pytest.raises(TierError, match=r"in use by another cache \(pid 4711 on node7\).*directory of its own"):
        workbench().open()


def test_the_lock_goes_with_its_holder(workbench: Make) -> None:
    workbench().open().tier.close()
    workbench().open()


def test_an_owner_with_a_longer_name_before_leaves_nothing_in_the_lock(workbench: Make) -> None:
    workbench(owner="pid 1234567 on a machine with a long name").open().tier.close()
    bench = workbench(owner="pid 9").open()
    assert (Path(bench.tier.path) / "LOCK").read_text() == "pid 9"


def test_a_directory_that_cannot_be_made_is_named(workbench: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match=r"Not a directory.*can create, lock and write"):
        workbench(directory=str(tmp_path / "file" / "kv")).open()


@pytest.mark.parametrize(
    "operation", ["make_directory", "open", "lock", "write_at", "sync", "sync_directory", "rename"]
)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_any_error_while_a_new_directory_is_opened_is_a_tier_error(
    workbench: Make, files: object, operation: str, code: int
) -> None:
    """And the next attempt, once the cause is gone, finds a usable directory."""
    faulty = FaultyFiles(files)  # type: ignore[arg-type]
    faulty.fail(operation, code)
    with pytest.raises(TierError, match=os.strerror(code)) as failure:
        workbench(files=faulty).open()
    assert isinstance(failure.value.__cause__, OSError)
    bench = workbench().open()
    bench.put(1)


@pytest.mark.parametrize(
    "operation", ["open", "read_at", "write_at", "sync", "size", "lock", "list_directory", "free_bytes", "truncate"]
)
def test_no_single_error_while_a_directory_is_opened_loses_anything(
    workbench: Make, closed: Workbench, operation: str
) -> None:
    """The n-th call fails, for every n that there is: opening fails, or goes on without one segment in this life."""
    for call in range(100):
        faulty = FaultyFiles(closed.files)
        faulty.fail(operation, errno.EIO, after=call)
        broken = workbench(files=faulty)
        with suppress(TierError):
            list(broken.tier.open())
        broken.tier.close()
        if not faulty.fired:
            break
    assert call >= 1
    again = workbench().open()
    assert set(again.recovered()) == set(range(RECORDS + 1))


# --- superblocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["superblock.a", "superblock.b"])
@pytest.mark.parametrize("damage", ["flipped", "empty", "gone"])
def test_one_superblock_is_enough(workbench: Make, closed: Workbench, name: str, damage: str) -> None:
    path = Path(closed.tier.path) / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-1] + b"?")
    again = workbench().open()
    assert len(again.recovered()) == RECORDS + 1
    assert again.tier.nonce == closed.tier.nonce
    assert path.stat().st_size == 4096, "and it is whole again"


def test_without_a_superblock_nothing_is_read_and_nothing_overwritten(workbench: Make, closed: Workbench) -> None:
    for name in ("superblock.a", "superblock.b"):
        (Path(closed.tier.path) / name).write_bytes(b"")
    before = snapshot(closed.tier.path)
    with pytest.raises(TierError, match=r"no whole superblock.*move it away"):
        workbench().open()
    assert snapshot(closed.tier.path) == before


@pytest.mark.parametrize("changes", [{"major": 2}, {"incompat": 1}, {"major": 2, "sequence": 1 << 60}])
def test_a_newer_format_is_neither_read_nor_changed(
    workbench: Make, closed: Workbench, changes: dict[str, int]
) -> None:
    rewrite_superblocks(closed, **changes)
    before = snapshot(closed.tier.path)
    with pytest.raises(TierError, match=r"has format .* use the version that made it"):
        workbench().open()
    assert snapshot(closed.tier.path) == before


def test_a_newer_minor_version_is_read_and_written(workbench: Make, closed: Workbench) -> None:
    rewrite_superblocks(closed, minor=9, compat=0xFF)
    again = workbench().open()
    assert len(again.recovered()) == RECORDS + 1
    again.put(100)


def test_unknown_features_that_only_matter_to_writers_make_it_read_only(workbench: Make, closed: Workbench) -> None:
    rewrite_superblocks(closed, ro_compat=1)
    Path(closed.segment_path(2)).write_bytes(bytes(SEGMENT_BYTES))  # damage that a writer would repair
    with open(closed.segment_path(0), "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"?")
    before = snapshot(closed.tier.path)
    again = workbench().open()
    found = again.recovered()
    assert all(again.read(number, row) for number, row in found.items())
    assert len(found) == RECORDS + 1
    assert again.tier.place(RECORD_PAGES) is None
    events = again.tier.take_events()
    assert events is not None
    assert "newer version" in events.reason
    again.tier.close()
    assert snapshot(closed.tier.path) == before


@pytest.mark.parametrize("ro_compat", [0, 1], ids=["writable", "read only"])
def test_a_fifo_that_is_called_like_a_segment_is_not_waited_for(
    workbench: Make, closed: Workbench, ro_compat: int, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite_superblocks(closed, ro_compat=ro_compat)
    os.mkfifo(closed.segment_path(7))
    again = workbench(segments=8).open()
    found = again.recovered()
    assert all(again.read(number, row) for number, row in found.items())
    assert len(found) == RECORDS + 1
    assert "1 segments cannot be read and are left alone in this life (segment 7: " in caplog.text
    assert "not a regular file" in caplog.text


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)], ids=["FIFO", "directory", "link"]
)
def test_what_is_called_like_a_segment_and_is_none_takes_nothing_of_the_capacity(
    workbench: Make, closed: Workbench, make: Callable[[str], object]
) -> None:
    """Nor is it written over: segments that are made have other numbers."""
    there = len(list(Path(closed.tier.path).glob("seg-*.kvs")))
    for number in range(there, there + 3):
        make(closed.segment_path(number))
    again = workbench().open()
    again.fill(range(100, 100 + RECORDS))
    events = again.tier.take_events()
    assert events is None or not events.reclaims_wanted
    assert len(again.recovered()) == RECORDS + 1


def test_a_directory_that_was_renamed_to_another_placement_is_refused(workbench: Make, closed: Workbench) -> None:
    other = layout(4096)
    shutil.move(closed.tier.path, str(Path(closed.directory) / other.placement))
    with pytest.raises(TierError, match=f"holds blocks of placement {LAYOUT.placement}"):
        workbench(of=other, segment_bytes=None, segments=100).open()


# --- neighbours -----------------------------------------------------------------------------------------------------


def test_blocks_of_another_placement_are_named_in_a_warning(
    workbench: Make, closed: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        workbench(of=layout(4096), segment_bytes=None, segments=100).open()
    assert "1 other placement" in caplog.text
    assert LAYOUT.placement in caplog.text
    assert f"kvtier stat {closed.directory}" in caplog.text


@pytest.mark.parametrize("kind", ["tp", "pp"])
def test_other_ranks_of_the_same_model_are_no_strangers(
    workbench: Make, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with caplog.at_level(logging.WARNING):
        for rank in range(3):
            workbench(of=layout(**{f"{kind}_rank": rank, f"{kind}_size": 3})).open()
    assert "other placement" not in caplog.text


@pytest.mark.parametrize("kind", ["tp", "pp"])
def test_ranks_of_a_model_that_was_cut_into_another_number_of_them_are_strangers(
    workbench: Make, closed: Workbench, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Here it was one."""
    with caplog.at_level(logging.WARNING):
        workbench(of=layout(**{f"{kind}_size": 2})).open()
    assert "1 other placement" in caplog.text
    assert LAYOUT.placement in caplog.text


BROKEN = ["", "{", "[]", "7", '"x"', "null", json.dumps({"format": 1}), '{"ranks": 0}', "[" * 100_000, "\udcff"]
"""What may be found in the place of a description."""


@pytest.mark.parametrize("text", [None, *BROKEN], ids=lambda text: "missing" if text is None else text[:8])
def test_a_description_that_was_lost_is_written_anew(workbench: Make, closed: Workbench, text: str | None) -> None:
    """``kvtier stat`` could else never again say what is in the directory."""
    described = Path(closed.tier.path) / "layout.json"
    whole = described.read_bytes()
    described.unlink()
    if text is not None:
        described.write_bytes(text.encode(errors="surrogateescape"))
    (described.parent / "layout.json.new").write_bytes(bytes(10_000))  # of a crash in the middle of it
    assert len(workbench().open().recovered()) == RECORDS + 1
    assert described.read_bytes() == whole


def test_a_description_with_more_in_it_than_we_know_is_kept(workbench: Make, closed: Workbench) -> None:
    """A newer version wrote it: its placement is the same, so that what we know is in it."""
    described = Path(closed.tier.path) / "layout.json"
    text = json.dumps(json.loads(described.read_text()) | {"hint": 1})
    described.write_text(text)
    workbench().open()
    assert described.read_text() == text


def test_what_is_only_read_keeps_a_lost_description(workbench: Make, closed: Workbench) -> None:
    rewrite_superblocks(closed, ro_compat=1)
    (Path(closed.tier.path) / "layout.json").unlink()
    workbench().open()
    assert not (Path(closed.tier.path) / "layout.json").exists()


@pytest.mark.parametrize("operation", ["rename", "sync_directory"])
def test_a_description_that_cannot_be_written_anew_costs_no_blocks(
    workbench: Make, closed: Workbench, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes room on a file system that the segments may have filled."""
    (Path(closed.tier.path) / "layout.json").unlink()
    faulty = FaultyFiles(closed.files)
    faulty.fail(operation, errno.ENOSPC)
    again = workbench(files=faulty).open()
    assert len(again.recovered()) == RECORDS + 1
    assert "layout.json is missing or damaged and cannot be written anew: [Errno 28]" in caplog.text


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:8])
def test_a_neighbour_with_a_broken_layout_file_is_a_stranger(
    workbench: Make, closed: Workbench, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(closed.tier.path) / "layout.json").write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        workbench(of=layout(4096), segment_bytes=None, segments=100).open()
    assert LAYOUT.placement in caplog.text


def test_other_files_beside_the_placements_are_left_alone(workbench: Make, caplog: pytest.LogCaptureFixture) -> None:
    bench = workbench()
    Path(bench.directory).mkdir()
    (Path(bench.directory) / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        bench.open()
    assert "other placement" not in caplog.text
    assert (Path(bench.directory) / "notes.txt").read_text() == "mine"


# --- room -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    point = tmp_path / "small"
    point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(point)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_a_full_file_system_is_told_at_opening(workbench: Make, small_tmpfs: Path) -> None:
    (small_tmpfs / "ballast").write_bytes(bytes(200 * 1024))
    with pytest.raises(TierError, match=r"has \d+ bytes free and a segment takes \d+; make room"):
        workbench(directory=str(small_tmpfs / "kv")).open()


def test_a_file_system_without_a_single_free_page_is_told_at_opening(workbench: Make, small_tmpfs: Path) -> None:
    with (small_tmpfs / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(TierError, match="disk directory"):
        workbench(directory=str(small_tmpfs / "kv")).open()


def test_on_a_file_system_smaller_than_the_capacity_the_tier_stays_smaller(
    workbench: Make, small_tmpfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It asks for reclaims instead of room, says why, and goes on writing."""
    bench = workbench(directory=str(small_tmpfs / "kv"), segments=8).open()
    bench.fill(range(2 * RECORDS))
    assert bench.tier.place(RECORD_PAGES) is None
    events = bench.tier.take_events()
    assert events is not None
    assert events.usable
    assert events.reclaims_wanted == 1
    assert "is full" in events.reason
    bench.tier.reclaim(*events.sealed[0])
    bench.keep_house()
    assert bench.read(1000, bench.put(1000))
    assert not list(Path(bench.tier.path).glob("*.new"))


def test_a_capacity_that_is_too_small_is_refused_before_anything_is_touched(workbench: Make, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"disk\.capacity"):
        DiskTier(
            workbench().files, workbench().runtime, directory=str(tmp_path / "new"), layout=LAYOUT,
            capacity_bytes=10 * 4096, segment_bytes=None,
        )  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_numbers_are_used_once_also_where_older_superblocks_are_put_back(workbench: Make, closed: Workbench) -> None:
    """A life is counted twice then: what is written in the second one is newer all the same."""
    sequences = []
    for _ in range(3):
        rewrite_superblocks(closed, sequence=0)
        again = workbench().open()
        sequences.append(again.put(3).sequence)
        assert again.recovered()[3]["sequence"] < sequences[-1]
        again.tier.close()
    assert sequences == sorted(set(sequences))
    assert workbench().open().recovered()[3]["sequence"] == sequences[-1]


def test_superblocks_begin_a_new_life_at_every_opening(workbench: Make) -> None:
    lives = []
    for _ in range(3):
        bench = workbench().open()
        found = read_superblocks(bench.files, bench.tier.path)
        assert isinstance(found, Superblock)
        lives.append(found.sequence)
        bench.tier.close()
    assert lives == [1, 2, 3]
