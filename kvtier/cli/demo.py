"""``kvtier demo``: a conversation with and without kvtier, and its continuation in a second process."""

from __future__ import annotations

import json
import reprlib
import subprocess
import sys
import tempfile
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvtier.errors import ConfigError, KVTierError

if TYPE_CHECKING:
    from kvtier.cli.conversation import Talk, Turn

SECOND_PROCESS_LIMIT_S: Final = 240.0
TIERS: Final = ("device", "host", "disk")

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    directory: Annotated[
        Path | None, typer.Option(help="Where the blocks go; kept afterwards. By default a temporary directory.")
    ] = None,
    family: Annotated[
        str, typer.Option(help="The model's family, such as deepseek_v4; see docs/layouts.md.")
    ] = "llama",
    second_process: Annotated[bool, typer.Option("--second-process", hidden=True)] = False,
) -> None:
    """Talk with a small model, with and without kvtier, then go on in a second process on the same directory.

    The exit status is 1 if an answer differs, if the device tier, host memory or the disk served nothing, or if the
    second process found nothing.
    """
    _check_installed()
    family = _checked_family(family)
    if second_process:
        if directory is None:
            raise ConfigError("--second-process: also give --directory, the one that the first process wrote to")
        typer.echo(json.dumps(_go_on(str(directory), family, _request(sys.stdin.read()))))
        return
    with nullcontext(str(directory)) if directory else tempfile.TemporaryDirectory(prefix="kvtier-demo-") as where:
        turns, restart = _run(where, family)
    ok = _succeeded(turns, restart)
    if as_json:
        typer.echo(json.dumps({"turns": [_plain(turn) for turn in turns], "restart": _plain(restart), "ok": ok}))
    else:
        _show(turns, restart, ok=ok)
    if not ok:
        raise typer.Exit(1)


def _run(directory: str, family: str) -> tuple[list[Turn], Turn]:
    from kvtier.cli.conversation import Talk, messages
    from kvtier.cli.families import FAMILIES

    *said, last = messages(FAMILIES[family].document_share)
    turns = []
    with _progress() as progress:
        task = progress.add_task("building the model", total=len(said) + 2)
        talk = Talk(directory, tenant=uuid.uuid4().hex, family=family)
        talk.warm_up()
        sequence = said[0][:, :0]
        for number, message in enumerate(said, 1):
            progress.update(task, advance=1, description=f"turn {number} of {len(said)}")
            turn, sequence = talk.turn(_after(sequence, message))
            turns.append(turn)
        talk.close()
        progress.update(task, advance=1, description="second process")
        restart = _restart(talk, directory, family, _after(sequence, last))
        progress.update(task, advance=1)
    return turns, restart


def _restart(talk: Talk, directory: str, family: str, prompt: Any) -> Turn:
    """One more turn in a process of its own, which knows nothing but the directory; compared with what we remember."""
    from kvtier.cli.conversation import Turn

    command = [sys.executable, "-m", "kvtier", "demo", "--second-process", "--directory", directory, "--family", family]
    request = json.dumps({"tenant": talk.tenant, "prompt": prompt.tolist()})
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=SECOND_PROCESS_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise KVTierError(
            f"the second process had not ended after {SECOND_PROCESS_LIMIT_S:g} s and was stopped; run kvtier demo"
            " again when the machine has less to do"
        ) from error
    if done.returncode:
        raise KVTierError(f"the second process failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    kept = talk.from_memory(prompt, sum(answer["hit_tokens"].values()))
    identical = answer["same_tokens"] and answer["logits"] == kept.digest
    return Turn(prompt.shape[1], answer["hit_tokens"], answer["without_s"], answer["with_s"], identical)


def _request(text: str) -> dict[str, Any]:
    """What ``_restart`` wrote: {"tenant": a name, "prompt": [[token ids]]}."""
    try:
        request = json.loads(text)
        tenant, (prompt,) = request["tenant"], request["prompt"]
        good = isinstance(tenant, str) and all(isinstance(token, int) for token in prompt)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise ConfigError(
            f"--second-process: standard input = {reprlib.repr(text)}: want what `kvtier demo` writes there, a JSON"
            ' object {"tenant": "...", "prompt": [[...]]}; start `kvtier demo` without this option'
        )
    return {"tenant": tenant, "prompt": [prompt]}


def _go_on(directory: str, family: str, request: dict[str, Any]) -> dict[str, Any]:
    """The second process: the same turn without and with the cache."""
    import torch

    from kvtier.cli.conversation import Talk

    talk = Talk(directory, request["tenant"], family)
    talk.warm_up()
    prompt = torch.tensor(request["prompt"])
    plain = talk.without_cache(prompt)
    cached, hit_tokens = talk.with_cache(prompt)
    talk.close()
    return {
        "hit_tokens": hit_tokens,
        "without_s": plain.ttft_s,
        "with_s": cached.ttft_s,
        "same_tokens": torch.equal(plain.sequence, cached.sequence),
        "logits": cached.digest,
    }


def _after(sequence: Any, message: Any) -> Any:
    import torch

    return torch.cat((sequence, message), 1)


def _succeeded(turns: list[Turn], restart: Turn) -> bool:
    served = {tier: sum(turn.hit_tokens[tier] for turn in turns) for tier in TIERS}
    identical = all(turn.identical for turn in (*turns, restart))
    return identical and all(served.values()) and sum(restart.hit_tokens.values()) > 0


def _plain(turn: Turn) -> dict[str, Any]:
    return {
        "prompt_tokens": turn.prompt_tokens,
        "hit_tokens": turn.hit_tokens,
        "ttft_s": {"without": turn.without_s, "with": turn.with_s},
        "identical": turn.identical,
    }


def _show(turns: list[Turn], restart: Turn, *, ok: bool) -> None:
    title = "Tokens of the prompt, those from each tier, and seconds to the first new token"
    table = Table("turn", title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("prompt", *TIERS, "without", "with", "faster", "same"):
        table.add_column(column, justify="right")
    rows = [(str(number), turn) for number, turn in enumerate(turns, 1)]
    for name, turn in [*rows, ("restart", restart)]:
        table.add_row(
            name,
            f"{turn.prompt_tokens:,}",
            *(f"{turn.hit_tokens[tier]:,}" for tier in TIERS),
            f"{turn.without_s:.3f}",
            f"{turn.with_s:.3f}",
            f"{turn.without_s / turn.with_s:.1f} x",
            "yes" if turn.identical else "[bold red]NO[/bold red]",
        )
    console = Console()
    console.print(table)
    console.print(
        "restart: a second process on the same directory\n"
        "same: the tokens of a plain run, and bit for bit the logits of a run from the same prefix kept in memory",
        style="dim",
    )
    if not ok:
        console.print(
            "failed: an answer differs, or a tier served nothing, or the second process missed", style="bold red"
        )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_interactive)


def _checked_family(family: str) -> str:
    from kvtier.cli.families import FAMILIES, OTHER_NAMES

    name = OTHER_NAMES.get(family, family)
    if name not in FAMILIES:
        raise ConfigError(f"--family {family}: want one of {', '.join(sorted((*FAMILIES, *OTHER_NAMES)))}")
    return name


def _check_installed() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError("kvtier demo needs transformers: pip install 'kvtier[hf]'") from error
