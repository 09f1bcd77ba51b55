"""The command line of the benchmarks, what they say of the machine, and the rank that answers at once."""

from __future__ import annotations

import subprocess
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import machine
from benchmarks.app import app
from benchmarks.machine import Bystanders, DeviceCounters, commit, describe
from benchmarks.pairs import Ratio
from benchmarks.report import read_rows
from benchmarks.rows import Row
from benchmarks.suite import BENCHMARKS, BenchmarkError, Settings

runner = CliRunner()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_a_module_that_runs_and_a_command(name: str) -> None:
    assert callable(import_module(BENCHMARKS[name][0]).run)
    assert runner.invoke(app, [name, "--help"]).exit_code == 0


def test_rows_are_appended_to_the_file_with_machine_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(settings: Settings):
        (settings.directory / "file").write_text("gone afterwards")
        yield Row.of(
            "x", 1.0, "GB/s", baseline=1.0, baseline_name="raw", ratio=Ratio(1, 1, settings.pairs_of(30, 3)),
            target=1.0, ok_if="ratio >= target", data_checked=True,
        )  # fmt: skip

    monkeypatch.setattr("benchmarks.memory.run", run)
    file = tmp_path / "out" / "rows.jsonl"
    for options in ([], ["--quick"]):
        result = runner.invoke(app, ["memory", "--json", str(file), "--dir", str(tmp_path), *options])
        assert result.exit_code == 0, result.output
    usual, quick = read_rows(file)
    assert (usual.pairs, usual.config["quick"]) == (30, False)
    assert (quick.pairs, quick.config["quick"]) == (3, True)
    assert usual.machine == describe()
    assert usual.commit == commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_pairs_that_were_asked_for_are_run_quick_or_not() -> None:
    assert Settings(Path(), pairs=7).pairs_of(30, 3) == 7
    assert Settings(Path(), pairs=7, quick=True).pairs_of(30, 3) == 7


def test_all_passes_on_what_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, len(ran) == 2)

    monkeypatch.setattr("benchmarks.app.subprocess.run", run)
    result = runner.invoke(app, ["all", "--quick", "--device", "cuda:1", "--dir", str(tmp_path), "--pairs", "3"])
    assert result.exit_code == 1, "one of them failed"
    assert [command[3] for command in ran] == list(BENCHMARKS)
    for command in ran:
        assert command[4:] == ["--dir", str(tmp_path), "--device", "cuda:1", "--pairs", "3", "--quick"]


def test_report_fills_the_section_from_the_files_named(tmp_path: Path) -> None:
    readme, rows = tmp_path / "README.md", tmp_path / "rows.jsonl"
    readme.write_text("<!-- figures:begin -->\n<!-- figures:end -->\n")
    row = Row.of(
        "x", 1.0, "GB/s", baseline=1.0, baseline_name="raw", ratio=Ratio(1, 1, 3), target=1.0,
        ok_if="ratio >= target", data_checked=True,
    )  # fmt: skip
    rows.write_text(row.stamped("m", "c").as_json() + "\n")
    result = runner.invoke(app, ["report", str(rows), "--readme", str(readme)])
    assert result.exit_code == 0, result.output
    assert "| x | 1 GB/s |" in readme.read_text()


def test_a_commit_with_changes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert commit() == "unknown"
    git("init", "-q")
    (tmp_path / "kvtier").mkdir()
    (tmp_path / "kvtier" / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = commit()
    assert len(clean) == 12
    (tmp_path / "kvtier" / "code.py").write_text("2")
    assert commit() == clean + "+changes"


def test_cores_that_others_use_are_what_the_machine_did_beyond_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"busy": 100.0, "own": 5.0, "now": 0.0}
    monkeypatch.setattr(machine, "_busy_s", lambda: clock["busy"])
    monkeypatch.setattr("benchmarks.machine.time.process_time", lambda: clock["own"])
    monkeypatch.setattr("benchmarks.machine.time.monotonic", lambda: clock["now"])
    others = Bystanders()
    clock.update(busy=115.0, own=10.0, now=10.0)
    assert others.cores() == 1.0


def test_a_directory_on_no_block_device_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="no block device"):
        DeviceCounters.under(Path("/proc"))


def test_the_counters_of_a_device_are_those_of_its_stat_file(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("  10  0  2048  5  1 1 1 1 1 1 1\n")
    assert DeviceCounters(stat).read_bytes()[0] == 2048 * 512


def test_only_arenas_count_for_the_share_in_huge_pages() -> None:
    smaps = (
        "7f00-7f10 rw-s 00000000 00:01 7   /memfd:kvtier-host (deleted)\nRss:     3000 kB\nShmemPmdMapped: 1000 kB\n"
        "7f20-7f30 rw-p 00000000 00:00 0\nRss:     9000 kB\nShmemPmdMapped: 0 kB\n"
        "7f40-7f50 rw-s 00000000 00:01 8   /memfd:kvtier-raw (deleted)\nRss:     1000 kB\nShmemPmdMapped: 1000 kB\n"
    )
    assert machine.huge_share(smaps) == 0.5
    assert machine.huge_share("") == 0.0


def test_what_is_stored_where_nothing_moves_is_found() -> None:
    control = import_module("benchmarks.lookup")._Control(entries=256)
    with closing(control):
        tokens = control.prompts.take(64 * 100 + 1)
        control.store(tokens)
        assert control.entries() == 100
        with control.cache.lookup(tokens) as hit:
            assert hit.num_tokens == 6400
