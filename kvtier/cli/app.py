"""Which commands there are, and how their errors reach the person who typed them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from itertools import takewhile
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from kvtier.errors import ConfigError, KVTierError

COMMANDS: Final = {
    "demo": ("kvtier.cli.demo", "A conversation with and without kvtier, then again in a second process."),
    "stat": ("kvtier.cli.stat", "What a cache directory holds; it may be in use."),
    "config": ("kvtier.cli.config", "Check a configuration file, or list every key."),
}
"""Name -> module with a typer ``app``, and what the list of commands says of it."""


class LazyGroup(TyperGroup):
    """Lists commands from ``COMMANDS`` and imports a command's module only to run it."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A name and a line of help, which is all that the list of commands shows."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was named, loaded."""
        name, listed, rest = super().resolve_command(ctx, args)
        if name not in COMMANDS:
            return name, listed, rest
        command = typer.main.get_command(import_module(COMMANDS[name][0]).app)
        command.name = name
        return name, command, rest


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(metadata.version("kvtier"))
    except metadata.PackageNotFoundError:
        typer.echo("not installed, run from its source")
    raise typer.Exit


@app.callback()
def root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """KV-cache offload for LLM inference."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or configuration.

    An error is a line on standard error, wrong usage a few. With ``--json`` it is an object on standard output, too, so
    that whoever reads that finds one whatever happens: ``{"ok": false, "error": "..."}``.
    """
    given = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in takewhile(lambda arg: arg != "--", given)
    try:
        app(given)
    except KVTierError as error:
        if as_json:
            _print_object(str(error))
        typer.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:  # such as a full disk behind standard output, which gets no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except SystemExit as end:
        # Typer tells people of wrong usage and exits while it handles an error, of a class that it keeps to itself.
        said = getattr(end.__context__, "format_message", None)
        if as_json and said is not None:
            _print_object(said())
        raise
    sys.exit(0)


def _print_object(error: str) -> None:
    typer.echo(json.dumps({"ok": False, "error": error}))
