"""What is told of errors in pieces of work: each place once, and not without end."""

from __future__ import annotations

import threading

import pytest

from kvtier.errors import CorruptBlockError
from kvtier.metrics import Metrics
from kvtier.transfer.faults import _MOST_PLACES, Faults


def raised(line: int) -> Exception:
    """An error from ``line`` of some code."""
    code = compile("\n" * (line - 1) + "raise ValueError('no')", "somewhere.py", "exec")
    with pytest.raises(ValueError, match="no") as caught:
        exec(code)
    return caught.value


@pytest.fixture
def faults() -> Faults:
    return Faults(Metrics(threading.Lock(), max_series=1000))


def test_an_error_is_told_once_for_each_place_that_it_comes_from(
    faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    for line in (1, 2, 1, 2, 1):
        faults.tell("work failed", raised(line))
    faults.remarks.write()
    assert [record.message.startswith("work failed") for record in caplog.records] == [True, True]
    assert "somewhere.py" in caplog.text


def test_errors_from_everywhere_do_not_flood_the_log(faults: Faults, caplog: pytest.LogCaptureFixture) -> None:
    for line in range(1, 3 * _MOST_PLACES):
        faults.tell("work failed", raised(line))
    faults.remarks.write()
    assert len(caplog.records) == _MOST_PLACES


def test_damage_is_only_counted(faults: Faults, caplog: pytest.LogCaptureFixture) -> None:
    faults.tell("work failed", CorruptBlockError("a checksum"))
    faults.remarks.write()
    assert caplog.records == []
