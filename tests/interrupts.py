"""Ctrl-C at the very moment that a test wants it: out of what waits, or is in the operating system."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType, FunctionType
from typing import Any

import pytest


def interrupt_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Once, while a thread of that name is being started: it runs, but ``Thread.start`` does not get to know."""
    start, wait, left = threading.Thread.start, threading.Event.wait, [name]

    def start_one(thread: threading.Thread) -> None:
        if thread.name not in left:
            start(thread)
            return
        left.remove(thread.name)
        who = threading.current_thread()

        def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
            if threading.current_thread() is who:
                raise KeyboardInterrupt
            return wait(event, timeout)

        with monkeypatch.context() as patched:
            patched.setattr(threading.Event, "wait", interrupted)
            start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)


def once(call: Callable[..., Any], error: BaseException, *, after: int = 0) -> Callable[..., Any]:
    """``call``, which does what it should and then, one time, raises: that is how Ctrl-C comes out of a system call."""
    left = [None] * (after + 1)

    def calling(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        if left:
            left.pop()
            if not left:
                raise error
        return result

    return calling


def strike(call: Callable[[], object], within: FunctionType, number: int) -> bool:
    """Call it, and raise right after the call of a built-in in ``within``, of that number; False where there are fewer.

    There the interpreter looks for signals; between two built-ins that are called it hardly ever does.
    """
    left = [number]

    def on_return(frame: FrameType, event: str, _: object) -> None:
        if event == "c_return" and frame.f_code is within.__code__:
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt

    sys.setprofile(on_return)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def open_files() -> list[str]:
    """What this process has open, arenas and directories among it."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # of the listing itself
            continue
    return sorted(found)
