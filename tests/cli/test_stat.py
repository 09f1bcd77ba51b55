"""``kvtier stat`` on directories that a real cache wrote, and on what is left of them after damage."""

from __future__ import annotations

import errno
import json
import os
import stat as stat_module
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.cli import main
from kvtier.cli.stores import read_store
from kvtier.core.plan import PAGE_BYTES
from kvtier.runtime import SystemFiles
from kvtier.runtime.seam import Buffer
from kvtier.tiers.disk.directory import SUPERBLOCKS
from kvtier.tiers.disk.format import Superblock

BLOCK_TOKENS = 16
BLOCKS = 120
MODEL = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
LAYOUT = kvtier.KVLayout.from_hf_config(MODEL, block_tokens=BLOCK_TOKENS, dtype="float32")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link": lambda path: path.symlink_to("seg-000000.kvs"),
    "FIFO": os.mkfifo,
    "directory": Path.mkdir,
    "socket": lambda path: os.mknod(path, stat_module.S_IFSOCK | 0o600),
}


def open_cache(directory: Path) -> kvtier.TieredCache:
    disk = {"directories": [str(directory)], "capacity": "8MiB", "segment": "1MiB"}
    return kvtier.TieredCache({"host": {"capacity": "16MiB", "staging": "8MiB"}, "disk": disk}, LAYOUT, "some-model")


def store(cache: kvtier.TieredCache) -> None:
    random = np.random.default_rng(0)
    tensors = [random.random((BLOCKS, *part.shape), np.float32) for part in LAYOUT.groups[0].parts]
    pages = kvtier.PagedTensors(LAYOUT, tensors).pages(list(range(BLOCKS)))
    job = cache.submit_store(list(range(BLOCKS * BLOCK_TOKENS)), pages, durability="durable")
    assert job.result(60).stored == BLOCKS * BLOCK_TOKENS


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with 120 blocks in it: two segments are sealed, a third is partly filled."""
    with open_cache(tmp_path) as cache:
        store(cache)
    return tmp_path


def placement_of(directory: Path) -> Path:
    return directory / LAYOUT.placement


def stat(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    status, out, _ = run(capsys, *args, "--json")
    assert status == 0
    (only,) = json.loads(out)["placements"]
    return dict(only)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["stat", *map(str, args)])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def flip_in_record(segment: Path, record: int) -> None:
    """Change one byte in the payload of a record."""
    record_bytes = LAYOUT.record_pages[0] * PAGE_BYTES
    with segment.open("r+b") as file:
        file.seek(2 * PAGE_BYTES + record * record_bytes + PAGE_BYTES + 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


class TestHealthyDirectory:
    def test_it_counts_segments_records_blocks_and_bytes(
        self, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report = stat(capsys, directory)
        assert report["path"] == str(placement_of(directory))
        assert (report["records"], report["damaged"], report["unreadable"], report["problem"]) == (BLOCKS, 0, 0, "")
        assert report["sealed"] == 2
        assert report["sealed"] + report["open"] == report["segments"] >= 3
        assert report["record_bytes"] == BLOCKS * LAYOUT.record_pages[0] * PAGE_BYTES
        assert report["file_bytes"] == sum(path.stat().st_size for path in placement_of(directory).glob("seg-*"))
        assert report["groups"] == [
            {"name": "attention", "records": BLOCKS, "blocks": BLOCKS, "record_bytes": report["record_bytes"]}
        ]
        assert (report["block_tokens"], report["lives"]) == (BLOCK_TOKENS, 1)

    def test_verifying_finds_the_same(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert stat(capsys, directory, "--verify") == stat(capsys, directory)

    def test_a_placement_can_be_named_itself(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert stat(capsys, placement_of(directory)) == stat(capsys, directory)

    def test_it_may_be_in_use(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with open_cache(tmp_path) as cache:
            store(cache)
            assert stat(capsys, tmp_path)["records"] == BLOCKS

    def test_nothing_is_changed(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = {path: path.read_bytes() for path in placement_of(directory).iterdir()}
        stat(capsys, directory, "--verify")
        assert {path: path.read_bytes() for path in placement_of(directory).iterdir()} == before

    def test_people_get_a_table(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, directory)
        assert status == 0
        assert "120 blocks in 120 records" in out
        assert "see --verify" in out

    def test_every_segment_is_reported_as_progress(self, directory: Path) -> None:
        told: list[tuple[int, int]] = []
        files = SystemFiles()
        report = read_store(files, str(placement_of(directory)), verify=False, progress=lambda *at: told.append(at))
        assert len(told) == report.segments
        assert told[-1] == (report.file_bytes, report.file_bytes)


class TestDamage:
    def test_a_flipped_byte_in_a_sealed_segment_is_found_by_verifying(
        self, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flip_in_record(placement_of(directory) / "seg-000000.kvs", record=3)
        assert stat(capsys, directory)["damaged"] == 0
        report = stat(capsys, directory, "--verify")
        assert (report["damaged"], report["records"]) == (1, BLOCKS - 1)

    @pytest.mark.parametrize("verify", [False, True])
    def test_a_page_that_cannot_be_read_costs_the_records_on_it_and_no_other(
        self, directory: Path, verify: bool
    ) -> None:
        class BadPage(SystemFiles):
            def read_at(self, fd: int, offset: int, buffer: Buffer) -> int:
                if os.readlink(f"/proc/self/fd/{fd}").endswith(name) and offset <= at < offset + buffer.nbytes:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return super().read_at(fd, offset, buffer)

        path, at = str(placement_of(directory)), 3 * PAGE_BYTES
        for name in ("seg-000000.kvs", "seg-000002.kvs"):  # one that is sealed, one that is not
            report = read_store(BadPage(), path, verify=verify, progress=lambda *_: None)
            lost = int(verify or name == "seg-000002.kvs")
            assert (report.records, report.unreadable, report.sealed) == (BLOCKS - lost, 0, 2)
            assert report.unreadable_pages == int(name == "seg-000002.kvs")

    def test_a_flipped_byte_without_a_footer_is_always_found(
        self, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        segment = placement_of(directory) / "seg-000000.kvs"
        with segment.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
        flip_in_record(segment, record=3)
        report = stat(capsys, directory)
        assert (report["damaged"], report["records"]) == (1, BLOCKS - 1)

    def test_a_segment_without_a_header_is_unreadable(
        self, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with (placement_of(directory) / "seg-000000.kvs").open("r+b") as file:
            file.write(bytes(2 * PAGE_BYTES))
        report = stat(capsys, directory)
        assert report["unreadable"] == 1
        assert 0 < report["records"] < BLOCKS

    @pytest.mark.parametrize("kind", FOREIGN)
    def test_what_is_called_like_a_segment_and_is_none_hides_no_other(
        self, kind: str, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A FIFO is not waited for, and a link not followed."""
        whole = stat(capsys, directory)
        FOREIGN[kind](placement_of(directory) / "seg-000042.kvs")
        for args in ((), ("--verify",)):
            report = stat(capsys, directory, *args)
            assert report == whole | {"segments": whole["segments"] + 1, "unreadable": 1}

    @pytest.mark.parametrize("names", [SUPERBLOCKS, ("layout.json",)])
    @pytest.mark.parametrize("content", [b"{}", b"[" * 100_000], ids=["empty", "nested without end"])
    def test_without_its_identity_only_files_are_counted(
        self, names: tuple[str, ...], content: bytes, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in names:
            (placement_of(directory) / name).write_bytes(content)
        report = stat(capsys, directory)
        assert names[0].partition(".")[0] in report["problem"]
        assert report["segments"] >= 3
        assert report["records"] == 0

    def test_a_newer_format_is_named_and_left_alone(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        newer = Superblock(9, 0.0, bytes(16), bytes(16), bytes.fromhex(LAYOUT.placement), major=7).pack()
        for name in SUPERBLOCKS:
            (placement_of(directory) / name).write_bytes(newer.tobytes())
        assert stat(capsys, directory)["problem"] == "format 7.0; this version of kvtier reads 1"


class TestOtherDirectories:
    def test_an_empty_one_holds_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, tmp_path)
        assert (status, out) == (0, f"{tmp_path}: holds no blocks of kvtier\n")

    def test_one_that_is_not_there_is_wrong_usage(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, _, err = run(capsys, tmp_path / "none")
        assert status == 2
        assert "No such file or directory" in err
