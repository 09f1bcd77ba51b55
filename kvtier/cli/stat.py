"""``kvtier stat``: what a cache directory holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from kvtier.cli.stores import StoreReport, find_stores, read_store
from kvtier.runtime import SystemClock, SystemFiles

app = typer.Typer(add_completion=False)

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_AGES: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@app.command()
def stat(
    directory: Annotated[Path, typer.Argument(help="One of disk.directories, or one placement in it")],
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Read every record and check its checksums.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what lies in DIRECTORY, per placement: segments, records, bytes, age, damage.

    Sealed segments are listed from their footers, the others are read whole. A process may be using the directory:
    nothing is locked or changed, and a record that is just being written counts as damaged.
    """
    files = SystemFiles()
    reports = _read(files, find_stores(files, str(directory.absolute())), verify=verify, quiet=as_json)
    if as_json:
        typer.echo(json.dumps({"directory": str(directory), "placements": [asdict(report) for report in reports]}))
        return
    if not reports:
        typer.echo(f"{directory}: holds no blocks of kvtier")
    now_s = SystemClock().wall()
    for report in reports:
        typer.echo(report.path)
        Console().print(_table(report, now_s, verified=verify))


def _read(files: SystemFiles, paths: list[str], *, verify: bool, quiet: bool) -> list[StoreReport]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with ProgressBar(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        reports = []
        for path in paths:
            task = bar.add_task(path.rpartition("/")[2][:12], total=None)

            def show(done: int, total: int, task: TaskID = task) -> None:
                bar.update(task, completed=done, total=total)

            reports.append(read_store(files, path, verify=verify, progress=show))
    return reports


def _table(report: StoreReport, now_s: float, *, verified: bool) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _rows(report, now_s, verified=verified):
        table.add_row(name, escape(value))
    return table


def _rows(report: StoreReport, now_s: float, *, verified: bool) -> Iterator[tuple[str, str]]:
    if report.problem:
        yield "problem", report.problem
    if report.format:
        by = f", last by {report.last_opened_by}" if report.last_opened_by else ""
        age = _age_text(now_s - report.created_s)
        yield "store", f"format {report.format}, made {age} ago, opened {report.lives} times{by}"
    yield (
        "segments",
        f"{report.segments} ({report.sealed} sealed, {report.open} open, {report.unreadable} unreadable), "
        f"{_bytes_text(report.file_bytes)}",
    )
    if report.problem:
        return
    tp_rank, tp_size, pp_rank, pp_size = report.ranks
    yield (
        "layout",
        f"{report.block_tokens} tokens per block, rank {tp_rank}/{tp_size} tensor, {pp_rank}/{pp_size} pipeline",
    )
    yield "records", f"{report.records}, {_bytes_text(report.record_bytes)}, {report.approximate} of them approximate"
    for group in report.groups:
        yield (
            f"group {group.name}",
            f"{group.blocks} blocks in {group.records} records, {_bytes_text(group.record_bytes)}",
        )
    checked = "every record was read" if verified else "sealed segments were not read, see --verify"
    yield "damaged", f"{report.damaged} ({checked})"
    if report.unreadable_pages:
        yield "unreadable", f"{report.unreadable_pages} pages were passed over"


def _bytes_text(nbytes: int) -> str:
    power = max(0, min(4, (nbytes.bit_length() - 1) // 10))
    return f"{nbytes / 1024**power:.{1 if power else 0}f} {_UNITS[power]}"


def _age_text(age_s: float) -> str:
    unit_s, unit = next((pair for pair in _AGES if age_s >= pair[0]), _AGES[-1])
    return f"{age_s / unit_s:.0f} {unit}"
