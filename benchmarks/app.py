"""The command line: one command per benchmark, ``all`` of them, and ``report``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, cast

import typer
from rich.console import Console

from benchmarks.machine import Bystanders, commit, describe
from benchmarks.report import MACHINES, RESULTS, write_figures
from benchmarks.rows import Row, table
from benchmarks.suite import BENCHMARKS, Benchmark, BenchmarkError, Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 160)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Append one line of JSON per row to this file.")]
Pairs = Annotated[int | None, typer.Option(min=2, help="Pairs to measure; by default as many as each needs.")]
Quick = Annotated[bool, typer.Option("--quick", help="A first look: fewer pairs, less data, figures not to quote.")]
Device = Annotated[str, typer.Option("--device", help="Where the device tier lies: cuda, or cpu, which stands in.")]
Directory = Annotated[Path, typer.Option("--dir", help="Where to put files; the disk to measure.")]


@app.callback()
def root() -> None:
    """Measure kvtier, each figure beside a baseline of the same run."""


def measure(name: str, json_file: Path | None, settings: Settings) -> None:
    """Run one benchmark, show its rows, and append them to ``json_file``."""
    module = cast(Benchmark, import_module(BENCHMARKS[name][0]))
    machine, code = describe(), commit()
    rows: list[Row] = []
    with TemporaryDirectory(prefix="kvtier-bench-", dir=settings.directory) as scratch:
        others = Bystanders()
        own = replace(settings, directory=Path(scratch))
        for row in module.run(own):
            rows.append(row.stamped(machine, code, quick=settings.quick, other_cores=others.cores()))
            console.print(f"{row.bench}: {row.value:g} {row.unit}, {row.ratio:.3f} x {row.baseline_name}")
            if json_file is not None:
                _append(json_file, rows[-1])
    console.print(table(rows, f"{name} ({code}; {machine}; {rows[-1].config['other_cores']} cores busy with others)"))


def _command(name: str) -> Callable[..., None]:
    def command(
        json_file: JsonFile = None,
        pairs: Pairs = None,
        quick: Quick = False,
        directory: Directory = Path(),
        device: Device = "cpu",
    ) -> None:
        measure(name, json_file, Settings(directory.resolve(), pairs, quick, device))

    return command


for _name, (_, _about) in BENCHMARKS.items():
    app.command(_name, help=_about)(_command(_name))


@app.command("all")
def run_all(
    json_file: JsonFile = None,
    pairs: Pairs = None,
    quick: Quick = False,
    directory: Directory = Path(),
    device: Device = "cpu",
) -> None:
    """Run every benchmark, each in a process of its own."""
    options = ["--dir", str(directory), "--device", device]
    options += ["--json", str(json_file)] if json_file else []
    options += ["--pairs", str(pairs)] if pairs else []
    options += ["--quick"] if quick else []
    ended = [subprocess.run([sys.executable, "-m", "benchmarks", name, *options], check=False) for name in BENCHMARKS]
    raise typer.Exit(max(done.returncode for done in ended))


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help=f"Files of rows; by default {RESULTS}/*.jsonl.")] = None,
    readme: Annotated[Path, typer.Option(help="The file to fill in.")] = Path("README.md"),
    machines: Annotated[Path, typer.Option(help="The file for rows that have no cache in them.")] = MACHINES,
) -> None:
    """Write the figures into README.md, and what the machines made of them beside the recorded rows."""
    count = write_figures(readme, machines, files or sorted(RESULTS.glob("*.jsonl")))
    console.print(f"{readme}: {count} rows")


def main() -> None:
    """Exit status: 0 measured, 1 a measurement that means nothing; whether a target was met is in the rows."""
    try:
        app()
    except BenchmarkError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(row.as_json() + "\n")
