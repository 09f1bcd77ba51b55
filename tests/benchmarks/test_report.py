"""The figures section of README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.pairs import Ratio
from benchmarks.report import latest, read_rows, write_figures
from benchmarks.rows import AT_MOST, SURELY, Row
from benchmarks.suite import BenchmarkError

README = "before\n<!-- figures:begin -->\nold\n<!-- figures:end -->\nafter\n"


def row(bench: str, value: float, machine: str = "a machine", commit: str = "abc", **config: Any) -> Row:
    made = Row.of(
        bench, value, "GB/s", baseline=2.0, baseline_name="raw", ratio=Ratio(value / 2, value / 4, 30), target=0.9,
        ok_if="ratio >= target", data_checked=True,
    )  # fmt: skip
    return made.stamped(machine, commit, **config)


def recorded(path: Path, *rows: Row) -> Path:
    path.write_text("".join(one.as_json() + "\n" for one in rows))
    return path


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(README)
    return path


@pytest.fixture
def machines(tmp_path: Path) -> Path:
    path = tmp_path / "machines.md"
    path.write_text(README)
    return path


def test_only_the_section_between_the_markers_changes(readme: Path, machines: Path, tmp_path: Path) -> None:
    count = write_figures(readme, machines, [recorded(tmp_path / "a.jsonl", row("disk.load", 1.9))])
    text = readme.read_text()
    assert count == 1
    assert text.startswith("before\n<!-- figures:begin -->\n")
    assert text.endswith("<!-- figures:end -->\nafter\n")
    assert "old" not in text
    assert "| disk.load | 1.9 GB/s | 2 GB/s, raw | 0.95 (0.475) | 0.9 | yes |" in text


def test_writing_the_same_rows_again_changes_nothing(readme: Path, machines: Path, tmp_path: Path) -> None:
    files = [recorded(tmp_path / "a.jsonl", row("disk.load", 1.9), row("disk.store", 1.0))]
    write_figures(readme, machines, files)
    first = readme.read_text()
    write_figures(readme, machines, files)
    assert readme.read_text() == first


def test_machine_and_commit_stand_above_their_rows(readme: Path, machines: Path, tmp_path: Path) -> None:
    rows = [row("disk.load", 1.9), row("disk.load", 9.9, "another"), row("memory.load", 1.0, commit="def")]
    write_figures(readme, machines, [recorded(tmp_path / "a.jsonl", *rows)])
    text = readme.read_text()
    assert text.count("Measured on") == 2
    assert "Measured on a machine, at abc, def:" in text
    assert "Measured on another, at abc:" in text


def test_what_was_missed_is_reported_as_missed(readme: Path, machines: Path, tmp_path: Path) -> None:
    write_figures(readme, machines, [recorded(tmp_path / "a.jsonl", row("disk.store", 1.0))])
    assert "| 0.5 (0.25) | 0.9 | no |" in readme.read_text()


@pytest.mark.parametrize(
    ("ratio", "refused", "met"),
    [(Ratio(0.95, 0.92, 5), 0, "yes"), (Ratio(0.95, 0.85, 5), 0, "by the median"), (Ratio(0.85, 0.8, 5), 0, "no"),
     (Ratio(0.95, 0.85, 5), 64, "no")],
)  # fmt: skip
def test_what_must_be_sure_and_is_so_by_the_median_only_says_so(
    readme: Path, machines: Path, tmp_path: Path, ratio: Ratio, refused: int, met: str
) -> None:
    made = Row.of(
        "disk.store", 1.0, "GB/s", baseline=1.0, baseline_name="raw", ratio=ratio, target=0.9, ok_if=SURELY,
        data_checked=True, refused_tokens=refused,
    )  # fmt: skip
    write_figures(readme, machines, [recorded(tmp_path / "a.jsonl", made.stamped("a machine", "abc"))])
    assert readme.read_text().count(f" | {met} |") == 1


def test_rows_without_a_cache_stand_in_a_file_of_their_own(readme: Path, machines: Path, tmp_path: Path) -> None:
    rows = [row("disk.load.itself", 1.9), row("disk.load", 1.8), row("disk.load.bare", 1.7)]
    assert write_figures(readme, machines, [recorded(tmp_path / "a.jsonl", *rows)]) == 1
    assert readme.read_text().count("| disk.load | ") == 1
    assert (readme.read_text().count("disk.load."), machines.read_text().count("disk.load.")) == (0, 2)


def test_the_last_row_of_a_benchmark_counts() -> None:
    assert [one.value for one in latest([row("disk.load", 1.0), row("disk.load", 1.5)])] == [1.5]


def test_a_quick_look_is_never_reported() -> None:
    assert latest([row("disk.load", 1.0, quick=True)]) == []


def test_code_that_is_not_committed_is_never_reported() -> None:
    assert latest([row("disk.load", 1.0, commit="abc+changes")]) == []


def test_a_limit_is_told_from_a_ratio(readme: Path, machines: Path, tmp_path: Path) -> None:
    limit = Row.of(
        "lookup", 15.0, "ms", baseline=8.0, baseline_name="bare", ratio=Ratio(0.5, 0.5, 30), target=25.0,
        ok_if=AT_MOST, data_checked=True,
    )  # fmt: skip
    write_figures(readme, machines, [recorded(tmp_path / "a.jsonl", limit)])
    assert "| at most 25 ms | yes |" in readme.read_text()


def test_without_rows_the_section_stays_as_it_is(readme: Path, machines: Path) -> None:
    with pytest.raises(BenchmarkError, match="no rows"):
        write_figures(readme, machines, [])
    assert readme.read_text() == README


@pytest.mark.parametrize("unmarked", ["README.md", "machines.md"])
def test_without_markers_both_files_are_left_alone(readme: Path, machines: Path, tmp_path: Path, unmarked: str) -> None:
    (tmp_path / unmarked).write_text("no section\n")
    before = readme.read_text(), machines.read_text()
    with pytest.raises(BenchmarkError, match="no section between"):
        write_figures(readme, machines, [recorded(tmp_path / "a.jsonl", row("disk.load", 1.0))])
    assert (readme.read_text(), machines.read_text()) == before


@pytest.mark.parametrize("line", ["{", '{"bench": "x"}', "[1, 2]"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(row("disk.load", 1.0).as_json() + "\n" + line + "\n")
    with pytest.raises(BenchmarkError, match=r"a\.jsonl:2"):
        read_rows(path)
