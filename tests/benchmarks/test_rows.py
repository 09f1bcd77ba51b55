"""Rows: their fields, and when a result is met."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from benchmarks.pairs import Ratio
from benchmarks.rows import AT_LEAST, AT_MOST, ITSELF, SURELY, Row, itself, table

FIELDS = [
    "bench", "value", "unit", "baseline", "baseline_name", "ratio", "low", "target", "ok", "data_checked", "pairs",
    "cpu_s_per_gib", "machine", "commit", "config",
]  # fmt: skip


def row(**changed: Any) -> Row:
    given: dict[str, Any] = {
        "bench": "disk.load", "value": 1.9, "unit": "GB/s", "baseline": 2.0, "baseline_name": "preadv",
        "ratio": Ratio(0.96, 0.94, 30), "target": 0.95, "ok_if": AT_LEAST, "data_checked": True,
    }  # fmt: skip
    given.update(changed)
    return Row.of(given.pop("bench"), given.pop("value"), given.pop("unit"), **given)


def test_a_line_of_json_has_exactly_these_fields() -> None:
    assert list(json.loads(row().as_json())) == FIELDS


def test_json_comes_back_as_the_same_row() -> None:
    one = row(cpu_s_per_gib=0.25, config={"io_threads": 4}).stamped("a machine", "abc", quick=False)
    assert Row.from_json(one.as_json()) == one


@pytest.mark.parametrize(
    ("ok_if", "value", "ratio", "low", "target", "met"),
    [
        (AT_LEAST, 0, 0.95, 0.5, 0.95, True),
        (AT_LEAST, 0, 0.9499, 0.9, 0.95, False),
        (SURELY, 0, 0.99, 0.95, 0.95, True),
        (SURELY, 0, 0.99, 0.9499, 0.95, False),
        (AT_MOST, 25.0, 0.1, 0.1, 25.0, True),
        (AT_MOST, 25.01, 9.0, 9.0, 25.0, False),
        (ITSELF, 0, 0.97, 0.5, 1.0, True),
        (ITSELF, 0, 1.03, 0.5, 1.0, True),
        (ITSELF, 0, 0.969, 0.969, 1.0, False),
        (ITSELF, 0, 1.031, 1.03, 1.0, False),
    ],
)
def test_a_result_is_met_by_its_own_rule(
    ok_if: str, value: float, ratio: float, low: float, target: float, met: bool
) -> None:
    assert row(ok_if=ok_if, value=value, ratio=Ratio(ratio, low, 30), target=target).ok is met


def test_a_result_is_not_met_by_a_figure_that_only_rounds_to_the_target() -> None:
    assert row(ratio=Ratio(0.9499999, 0.9, 30)).ok is False


def test_nothing_is_met_where_the_data_was_not_checked() -> None:
    assert row(data_checked=False).ok is False


def test_nothing_is_met_where_something_was_refused() -> None:
    refused = row(refused_tokens=64)
    assert refused.ok is False
    assert refused.config["refused_tokens"] == 64


def test_every_row_says_which_rule_it_was_held_to_and_what_was_refused() -> None:
    assert row(ok_if=SURELY, config={"pages": 16}).config == {"ok_if": SURELY, "refused_tokens": 0, "pages": 16}


def test_where_it_ran_is_stamped_on_without_losing_what_was_run() -> None:
    stamped = row(config={"pages": 16}).stamped("a machine", "abc", other_cores=0.5)
    assert (stamped.machine, stamped.commit) == ("a machine", "abc")
    assert stamped.config["pages"] == 16
    assert stamped.config["other_cores"] == 0.5


def test_a_baseline_against_itself_is_held_to_one() -> None:
    good = itself("x.itself", 2.0, "GB/s", baseline=2.0, baseline_name="raw", ratio=Ratio(1.02, 0.9, 30))
    assert good.ok
    assert good.target == 1.0
    assert good.config["ok_if"] == ITSELF


def test_the_table_shows_what_was_missed_and_what_was_refused() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(table([row(), row(ok_if=SURELY, refused_tokens=7)], "results"))
    first, second = (line for line in out.getvalue().splitlines() if "disk.load" in line)
    assert "yes" in first
    assert "NO" in second
    assert " 7 " in second
