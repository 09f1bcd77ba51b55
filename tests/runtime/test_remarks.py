"""Remarks: noted where a lock is held, logged where none is."""

from __future__ import annotations

import logging

import pytest

from kvtier.runtime import remarks
from kvtier.runtime.remarks import Remarks

LOG = logging.getLogger("kvtier.test")


def test_what_was_noted_is_logged_once_in_order_and_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    noted = Remarks(LOG)
    noted.add(logging.WARNING, "100% full")
    noted.add(logging.ERROR, "gone", OSError("why"))
    assert caplog.records == []
    for _ in range(2):
        noted.write()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "100% full"),
        ("ERROR", "gone"),
    ]
    assert "OSError: why" in caplog.text


def test_what_a_handler_causes_to_be_noted_is_logged_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    noted, seen = Remarks(LOG), []

    class Answering(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())
            if len(seen) == 1:
                noted.add(logging.WARNING, "answer")
                noted.write()

    monkeypatch.setattr(LOG, "handlers", [Answering()])
    for message in ("first", "second"):
        noted.add(logging.WARNING, message)
    noted.write()
    assert seen == ["first", "second", "answer"]


def test_of_more_than_can_wait_the_oldest_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    noted = Remarks(LOG)
    for number in range(remarks._MOST + 2):
        noted.add(logging.WARNING, str(number))
    noted.write()
    assert [record.getMessage() for record in caplog.records] == [str(2 + number) for number in range(remarks._MOST)]
