"""Rows: one result each, as a line of JSON and as a line of a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rich.table import Table

from benchmarks.pairs import Ratio

AT_LEAST: Final = "ratio >= target"
SURELY: Final = "low >= target"
AT_MOST: Final = "value <= target"
VALUE_AT_LEAST: Final = "value >= target"
ITSELF: Final = "0.97 <= ratio <= 1.03"

_RULES: Final[dict[str, Callable[[float, Ratio, float], bool]]] = {
    AT_LEAST: lambda value, ratio, target: ratio.ratio >= target,
    SURELY: lambda value, ratio, target: ratio.low >= target,
    AT_MOST: lambda value, ratio, target: value <= target,
    VALUE_AT_LEAST: lambda value, ratio, target: value >= target,
    ITSELF: lambda value, ratio, target: 0.97 <= ratio.ratio <= 1.03,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One result. ``ratio`` is how many times as good as the baseline, ``low`` its lower 5 % bound.

    ``config`` says what was run, which rule ``ok`` stands for (``ok_if``), and what was refused (``refused_tokens``).
    ``machine`` and ``commit`` are filled in by whoever started the benchmark.
    """

    bench: str
    value: float
    unit: str
    baseline: float
    baseline_name: str
    ratio: float
    low: float
    target: float
    ok: bool
    data_checked: bool
    pairs: int
    cpu_s_per_gib: float | None
    machine: str
    commit: str
    config: dict[str, Any]

    @classmethod
    def of(
        cls,
        bench: str,
        value: float,
        unit: str,
        *,
        baseline: float,
        baseline_name: str,
        ratio: Ratio,
        target: float,
        ok_if: str,
        data_checked: bool,
        refused_tokens: int = 0,
        cpu_s_per_gib: float | None = None,
        config: dict[str, Any] | None = None,
    ) -> Row:
        """A row whose ``ok`` follows from ``ok_if``, from the data having been checked and nothing being refused."""
        good = _RULES[ok_if](value, ratio, target) and data_checked and not refused_tokens
        return cls(
            bench=bench,
            value=_short(value),
            unit=unit,
            baseline=_short(baseline),
            baseline_name=baseline_name,
            ratio=_short(ratio.ratio),
            low=_short(ratio.low),
            target=target,
            ok=good,
            data_checked=data_checked,
            pairs=ratio.pairs,
            cpu_s_per_gib=None if cpu_s_per_gib is None else _short(cpu_s_per_gib),
            machine="",
            commit="",
            config={"ok_if": ok_if, "refused_tokens": refused_tokens, **(config or {})},
        )

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row that ``as_json`` wrote."""
        return cls(**json.loads(line))

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    def stamped(self, machine: str, commit: str, **config: Any) -> Row:
        """The same with where it ran, and more of ``config``."""
        return replace(self, machine=machine, commit=commit, config={**self.config, **config})


def itself(
    bench: str, value: float, unit: str, *, baseline: float, baseline_name: str, ratio: Ratio, **more: Any
) -> Row:
    """The row of a baseline against itself: how much of a ratio the machine makes up."""
    return Row.of(
        bench,
        value,
        unit,
        baseline=baseline,
        baseline_name=baseline_name,
        ratio=ratio,
        target=1.0,
        ok_if=ITSELF,
        data_checked=True,
        **more,
    )


def table(rows: Iterable[Row], title: str) -> Table:
    """``rows`` for a terminal."""
    shown = Table(title=title, title_justify="left")
    for name in ("bench", "value", "baseline", "ratio", "low", "target", "ok", "data", "refused", "pairs", "CPU s/GiB"):
        shown.add_column(name, justify="left" if name == "bench" else "right", overflow="fold")
    for row in rows:
        target = f"{row.target:g} {row.unit}" if row.config["ok_if"] == AT_MOST else f"{row.target:g}"
        shown.add_row(
            row.bench,
            f"{row.value:.4g} {row.unit}",
            f"{row.baseline:.4g} {row.baseline_name}",
            f"{row.ratio:.3f}",
            f"{row.low:.3f}",
            target,
            "[green]yes[/]" if row.ok else "[red]NO[/]",
            "checked" if row.data_checked else "[red]NOT CHECKED[/]",
            str(row.config["refused_tokens"]),
            str(row.pairs),
            "-" if row.cpu_s_per_gib is None else f"{row.cpu_s_per_gib:.3f}",
        )
    return shown


def _short(number: float) -> float:
    return float(f"{number:.5g}")
