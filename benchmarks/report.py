"""The sections with figures: what kvtier reaches in README.md, what the machine made of it beside the recorded rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from benchmarks.machine import CHANGED
from benchmarks.rows import AT_MOST, SURELY, Row
from benchmarks.suite import BenchmarkError

RESULTS: Final = Path("docs/results")
MACHINES: Final = RESULTS / "README.md"
OF_THE_MACHINE: Final = (".itself", ".bare")
"""Endings of rows that have no cache in them."""
_SECTION: Final = re.compile(r"(?<=<!-- figures:begin -->\n).*?(?=<!-- figures:end -->)", re.DOTALL)


def write_figures(readme: Path, machines: Path, files: Iterable[Path]) -> int:
    """Replace the section between the markers in both; returns how many rows ``readme`` now has.

    Raises:
        BenchmarkError: there are no rows, a file is damaged, or one of the two has no markers.
    """
    rows = latest(row for file in files for row in read_rows(file))
    ours = [row for row in rows if not row.bench.endswith(OF_THE_MACHINE)]
    if not ours:
        raise BenchmarkError(f"no rows to report; record some: python -m benchmarks NAME --json {RESULTS}/NAME.jsonl")
    of_machines = [row for row in rows if row.bench.endswith(OF_THE_MACHINE)]
    texts = {path: _with_section(path, as_markdown(own)) for path, own in ((readme, ours), (machines, of_machines))}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return len(ours)


def read_rows(file: Path) -> list[Row]:
    """The rows of one file, in the order in which they were measured."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(Row.from_json(line))
        except (ValueError, TypeError) as error:
            raise BenchmarkError(f"{file}:{number}: not a row of a benchmark: {error}") from error
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every benchmark on every machine; quick looks and code of no commit are never reported."""
    found = {
        (row.machine, row.bench): row
        for row in rows
        if not row.config.get("quick") and not row.commit.endswith(CHANGED)
    }
    return sorted(found.values(), key=lambda row: row.machine)


def as_markdown(rows: Sequence[Row]) -> str:
    """A table per machine; commits are named where rows differ."""
    lines: list[str] = []
    for machine, group in groupby(rows, key=lambda row: row.machine):
        own = list(group)
        commits = sorted({row.commit for row in own})
        lines += [f"Measured on {machine}, at {', '.join(commits)}:", "", *_table(own)]
    return "\n".join(lines[:-1]) + "\n"


def _with_section(path: Path, section: str) -> str:
    text = path.read_text(encoding="utf-8")
    if not _SECTION.search(text):
        raise BenchmarkError(f"{path}: has no section between <!-- figures:begin --> and <!-- figures:end -->")
    return _SECTION.sub(lambda _: section, text)


def _table(rows: Sequence[Row]) -> list[str]:
    head = ["| what | measured | baseline | ratio (lower 5 % bound) | target | met |", "|---|---|---|---|---|---|"]
    return [*head, *(_line(row) for row in rows), ""]


def _line(row: Row) -> str:
    target = f"at most {row.target:g} {row.unit}" if row.config["ok_if"] == AT_MOST else f"{row.target:g}"
    cells = (
        row.bench,
        f"{row.value:.3g} {row.unit}",
        f"{row.baseline:.3g} {row.unit}, {row.baseline_name}",
        f"{row.ratio:.3g} ({row.low:.3g})",
        target,
        _met(row),
    )
    return f"| {' | '.join(cells)} |"


def _met(row: Row) -> str:
    if row.ok:
        return "yes"
    is_whole = row.data_checked and not row.config.get("refused_tokens")
    is_by_median = row.config["ok_if"] == SURELY and row.ratio >= row.target and is_whole
    return "by the median" if is_by_median else "no"
