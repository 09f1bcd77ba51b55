"""After a fork the child has the memory of its parent, and its locks: it must neither use nor give back any of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.cache import fork_child


def test_a_cache_is_of_the_process_that_opened_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", fork_child.__name__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    answers = found["child"].pop("answers")
    assert {name for name, answer in answers.items() if "ClosedError" not in answer} == set()
    assert all("a cache of your own" in answer for answer in answers.values())
    assert found["child"] == {"closed": True, "own": True}
    want = {"whole": True, "ended": fork_child.SIZE, "leases": 1, "polled": 1, "closed": True, "found": True}
    assert found["parent"] == want
