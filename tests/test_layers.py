"""The direction of imports, and what imports without torch. The rules themselves are in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WITHOUT_TORCH = (
    "kvtier",
    "kvtier.errors",
    "kvtier.config",
    "kvtier.core.wire",
    "kvtier.models",
    "kvtier.runtime",
    "kvtier.metrics.prometheus",
    "kvtier.codecs",
    "kvtier.index",
    "kvtier.policy",
    "kvtier.planner",
    "kvtier.tiers.disk",
    "kvtier.cli",
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_imports_keep_every_contract() -> None:
    done = run("from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_it_imports_without_torch(module: str) -> None:
    done = run(f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numba') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_no_module_has_a_name_that_says_nothing() -> None:
    vague = {"utils", "util", "common", "helpers", "misc"}
    assert [path for path in (ROOT / "kvtier").rglob("*.py") if {path.stem, path.parent.name} & vague] == []
