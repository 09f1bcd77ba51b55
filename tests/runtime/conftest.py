"""Fixtures of the seam's tests."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads take turns as often as they can, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def fewer_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From the call on, so many threads more can be started."""
    start = threading.Thread.start

    def limit(count: int) -> None:
        left = [None] * count

        def start_one(thread: threading.Thread) -> None:
            if not left:
                raise RuntimeError("can't start new thread")
            left.pop()
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_one)

    return limit
