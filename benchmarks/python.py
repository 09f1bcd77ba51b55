"""CPU time that goes into moving bytes, and so what is left for everything else: Python, in the main."""

from __future__ import annotations

from collections import defaultdict
from threading import get_ident
from time import process_time, thread_time
from typing import Any

import numpy as np

from benchmarks.pairs import Floats, Step


class ByteClock:
    """Sums the CPU time that all threads spend inside some calls, those that copy, sum, read and write."""

    def __init__(self) -> None:
        self._spent_s: defaultdict[int, float] = defaultdict(float)
        """By thread: each adds to its own."""
        self._watched: list[tuple[Any, str, Any]] = []

    def around(self, owner: Any, name: str) -> None:
        """Time every call of ``owner.name``, until ``close``."""
        call = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            began_s = thread_time()
            try:
                return call(*arguments, **named)
            finally:
                self._spent_s[get_ident()] += thread_time() - began_s

        self._watched.append((owner, name, call))
        setattr(owner, name, timed)

    def close(self) -> None:
        """Everything is as it was."""
        for owner, name, call in reversed(self._watched):
            setattr(owner, name, call)
        self._watched.clear()

    def inside_s(self) -> float:
        """CPU seconds that all threads have spent inside these calls so far."""
        return sum(self._spent_s.copy().values())


class WatchedStep:
    """A contestant's step, of which every round is noted."""

    def __init__(self, run: Step, clock: ByteClock) -> None:
        """No round was run."""
        self._run = run
        self._clock = clock
        self._others_s: list[float] = []
        self._bytes_s: list[float] = []

    def __call__(self, number: int) -> None:
        """One round."""
        cpu_s, bytes_s = process_time(), self._clock.inside_s()
        self._run(number)
        bytes_s = self._clock.inside_s() - bytes_s
        self._bytes_s.append(bytes_s)
        self._others_s.append(process_time() - cpu_s - bytes_s)

    def last(self, rounds: int) -> tuple[Floats, Floats]:
        """Of the last ``rounds`` rounds: CPU seconds of the process outside the clock's calls, and inside."""
        return np.array(self._others_s[-rounds:]), np.array(self._bytes_s[-rounds:])
