"""Starting threads: whatever comes between, none is left that nobody knows of."""

from __future__ import annotations

import threading

import pytest

from kvtier.runtime.threads import MORE_THREADS, start_all, wait_for_end
from tests.interrupts import interrupt_start
from tests.runtime.contract_io import PATIENCE_S


@pytest.mark.parametrize("which", range(3))
def test_no_thread_is_left_where_ctrl_c_comes_while_one_is_started(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    before, told = set(threading.enumerate()), threading.Event()
    threads = [
        threading.Thread(target=told.wait, args=(PATIENCE_S,), name=f"t-{slot}", daemon=True) for slot in range(3)
    ]
    interrupt_start(monkeypatch, f"t-{which}")
    with pytest.raises(KeyboardInterrupt):
        start_all(threads, told.set, MORE_THREADS)
    assert set(threading.enumerate()) == before


def test_a_thread_that_was_never_started_is_not_waited_for() -> None:
    never = threading.Thread(target=lambda: None)
    wait_for_end([never])
    assert never.ident is None
