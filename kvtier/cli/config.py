"""``kvtier config``: check a configuration file, list every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvtier.cli.keys import as_markdown, as_toml, settings, toml_text, value_at
from kvtier.config import Config, load_config
from kvtier.errors import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Check a configuration file, or list every key.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
def check(file: Annotated[Path, typer.Argument(help="TOML file")], *, as_json: Json = False) -> None:
    """Print the settings that are in effect with FILE; exit status 2 and a message where it is wrong."""
    config = load_config(file)
    if as_json:
        typer.echo(json.dumps(config.model_dump(mode="json")))
    else:
        Console().print(_effective(config))


@app.command()
def keys(
    *,
    toml: Annotated[bool, typer.Option("--toml", help="As a configuration file with comments.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table in README.md.")] = False,
    as_json: Json = False,
) -> None:
    """List every key with its type, default and meaning."""
    formats = {"--toml": toml, "--markdown": markdown, "--json": as_json}
    asked = [option for option, is_asked in formats.items() if is_asked]
    if len(asked) > 1:
        raise ConfigError(f"{' '.join(asked)}: the keys are listed in one format at a time; give one of these options")
    if as_json:
        listed = [
            {"key": item.path, "type": item.type, "default": item.default_text, "meaning": item.description}
            for item in settings()
        ]
        typer.echo(json.dumps(listed))
    elif toml:
        typer.echo(as_toml(), nl=False)
    elif markdown:
        typer.echo(as_markdown(), nl=False)
    else:
        Console().print(_reference())


def _effective(config: Config) -> Table:
    table = Table("key", "value", "default")
    for item in settings():
        if item.path.startswith("remote[]"):
            continue
        value = toml_text(value_at(config, item.path), is_size=item.is_size)
        shown = escape(value) if value == item.default_text else f"[bold]{escape(value)}[/bold]"
        table.add_row(item.path, shown, escape(item.default_text))
    return table


def _reference() -> Table:
    table = Table("key", "type", "default", "meaning")
    for item in settings():
        table.add_row(*(escape(cell) for cell in (item.path, item.type, item.default_text, item.description)))
    return table
