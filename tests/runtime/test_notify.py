"""The wake-up of select: its descriptor is closed once, by ``close`` or with the last reference."""

from __future__ import annotations

import os
from select import select

import pytest

from kvtier.runtime.notify import Notifier


def is_readable(notifier: Notifier) -> bool:
    return bool(select([notifier.fileno()], [], [], 0)[0])


def test_it_is_readable_from_set_until_clear() -> None:
    notifier = Notifier()
    assert not is_readable(notifier)
    notifier.set()
    notifier.set()
    assert is_readable(notifier)
    notifier.clear()
    assert not is_readable(notifier)


def test_one_that_is_dropped_gives_its_descriptor_back() -> None:
    notifier = Notifier()
    fd = notifier.fileno()
    del notifier
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_one_that_was_closed_leaves_the_number_to_whoever_has_it_next() -> None:
    """Neither a second close, nor what is set afterwards, nor the last reference may touch it."""
    notifier = Notifier()
    fd = notifier.fileno()
    with open(os.devnull, "rb") as null:
        notifier.close()
        stranger = os.dup2(null.fileno(), fd)
    try:
        notifier.close()
        notifier.set()
        notifier.clear()
        assert notifier.fileno() == -1
        del notifier
        os.fstat(stranger)
    finally:
        os.close(stranger)


def test_one_that_a_stranger_closed_raises_nothing() -> None:
    """Whoever has news goes on with its other work."""
    notifier = Notifier()
    os.close(notifier.fileno())
    notifier.set()
    notifier.clear()
    notifier.close()
