"""README.md says what is so: its example runs, its table, tree and links are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.cli.keys import as_markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(marker: str) -> str:
    match = re.search(rf"<!-- {marker}:begin -->\n(.*?)<!-- {marker}:end -->", README, re.DOTALL)
    assert match, f"README.md has no section {marker}"
    return match[1]


def test_the_example_runs_and_prints_what_it_says() -> None:
    code = re.fullmatch(r"```python\n(.*)```\n", between("example"), re.DOTALL)
    assert code
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("64 {")
    assert "'host': 64" in done.stdout


def test_the_example_is_short() -> None:
    assert len([line for line in between("example").splitlines() if line.strip()]) - 2 <= 15


def test_the_table_of_keys_is_what_the_configuration_says() -> None:
    """Replace the section by the output of ``kvtier config keys --markdown``."""
    assert between("config") == as_markdown()


def test_the_tree_names_every_part_of_the_package_and_no_other() -> None:
    lines = re.findall(r"^  (\S.*?)  ", between("tree"), re.MULTILINE)
    named = {name.rstrip("/") for line in lines for name in line.split()}
    found = {
        path.name for path in (ROOT / "kvtier").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert named == found - {"__init__.py", "__main__.py"}


@pytest.mark.parametrize(
    "document", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
)
def test_every_link_to_a_file_leads_to_one(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_figure_says_what_it_was_compared_with_and_where_it_was_measured() -> None:
    """What ``python -m benchmarks report`` wrote: machine and commit first, then rows of six columns."""
    machine, *lines = (line for line in between("figures").splitlines() if line)
    assert re.search(r"cores.* at [0-9a-f]{12}(, [0-9a-f]{12})*:$", machine)
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 2
    assert {row.count("|") for row in rows} == {7}
    above = {line for line in lines if line not in rows and not line.startswith("Measured on ")}
    assert above <= {"The machine meanwhile, with no cache:"}


def test_what_is_not_met_is_said_in_words_above_the_figures() -> None:
    """Not only in a column of the table. Rows of the second table are of the machine, not of kvtier."""
    table = between("figures").partition("The machine meanwhile")[0]
    missed = re.findall(r"^\| (\S+) \|.*\| no \|$", table, re.MULTILINE)
    _, _, said = README.partition("## Figures")[2].partition("<!-- figures:begin -->")[0].partition("not met:")
    assert [name for name in missed if f"`{name}`" not in said] == []
