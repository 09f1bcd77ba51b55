"""Where the CPU time of small jobs goes: the work of all threads, run step by step in one, each stage timed.

``python -m benchmarks.stages`` prints it as Markdown; docs/results/overhead-stages.md keeps what one machine said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from time import thread_time
from typing import Any, Final

import numpy as np

from benchmarks.machine import commit, describe
from benchmarks.pairs import freeze_heap
from benchmarks.payload import Prompts
from kvtier import Hit, KVGroup, KVLayout, PagedTensors, Part, TieredCache
from kvtier.core.keys import Keys
from kvtier.core.memory import PageTable
from kvtier.runtime import SystemRuntime, system_machine
from kvtier.runtime.seam import Event, Worker

JOBS: Final = 256
ROUNDS: Final = 24
BLOCK_TOKENS: Final = 16
STAGES: Final = ("submit", "plan", "begin", "move", "commit", "poll")
MEANING: Final = {
    "submit": "check arguments and page table, make the job, queue the wish",
    "plan": "look keys up, reserve room, make the plan",
    "begin": "hand plans to the data plane",
    "move": "gather or scatter, checksums, headers, answers",
    "commit": "publish or settle, tell the ticket",
    "poll": "hand the job back to its caller",
    "the rest": "locks, turns, waking",
}


class _SteppedRuntime(SystemRuntime):
    """Loops are kept, and run when they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], bool]] = []

    def spawn(self, name: str, step: Callable[[], bool], wake: Event, idle_s: float | None = None) -> Worker:
        """Keep ``step``."""
        del name, wake, idle_s
        self.steps.append(step)
        return _Stopped()


class _Stopped:
    def stop(self, timeout_s: float) -> bool:
        """It never ran by itself."""
        del timeout_s
        return True


@dataclass(slots=True)
class _Clocks:
    """CPU seconds by stage since the last ``take``; a stage inside another one counts for itself only."""

    spent_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _inner_s: float = 0.0

    def around(self, owner: Any, name: str, stage: str) -> None:
        """Time every call of ``owner.name``."""
        call = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            outer_s, self._inner_s, began_s = self._inner_s, 0.0, thread_time()
            try:
                return call(*arguments, **named)
            finally:
                took_s = thread_time() - began_s
                self.spent_s[stage] += took_s - self._inner_s
                self._inner_s = outer_s + took_s

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """What was spent, once."""
        spent_s, self.spent_s = self.spent_s, dict.fromkeys(STAGES, 0.0)
        return spent_s


class _Bench:
    """A cache whose copy threads are steps of this one."""

    def __init__(self, blocks: int) -> None:
        part = Part(0, "k", "float32", ("token", "head", "dim"), (BLOCK_TOKENS, 1, 4))
        self.layout = KVLayout(BLOCK_TOKENS, BLOCK_TOKENS, (KVGroup("attention", (part, replace(part, kind="v"))),))
        self.blocks = blocks
        shape = (JOBS * blocks, *part.shape)
        tensors = [np.random.default_rng(0).random(shape, np.float32) for _ in range(2)]
        self.runtime = _SteppedRuntime()
        self.cache = TieredCache(
            {"host": {"capacity": "1GiB", "staging": "1MiB"}},
            self.layout,
            "stages",
            machine=replace(system_machine(), runtime=self.runtime),
        )
        memory = PagedTensors(self.layout, tensors)
        number = self.cache.register(memory)
        self.client = self.cache.client()
        ids = np.arange(JOBS * blocks).reshape(JOBS, blocks)
        self.tables = [PageTable(number, memory.pages(own).table.groups) for own in ids]
        self.prompts = Prompts()
        self.clocks = _Clocks()
        planner, plane = self.cache._planner, self.cache._dispatch.channels[0]._plane  # type: ignore[attr-defined]
        self.clocks.around(planner, "plan", "plan")
        self.clocks.around(planner, "take_in", "commit")
        self.clocks.around(planner, "follow_up", "commit")
        self.clocks.around(plane, "submit", "begin")
        self.clocks.around(plane, "_perform", "move")
        self.clocks.around(self.client, "poll", "poll")

    def close(self) -> None:
        """End everything."""
        self.client.close()
        self.cache.close()

    def rounds(self, verb: str) -> Iterator[dict[str, float]]:
        """CPU microseconds a job by stage, round after round; the first one warms up."""
        for number in range(ROUNDS + 1):
            keys = [self._fresh() for _ in range(JOBS)]
            if verb == "store":
                spent_us = self._run(partial(self._store, keys))
            else:
                self._run(partial(self._store, keys))
                hits = [self.cache.lookup(own) for own in keys]
                spent_us = self._run(partial(self._load, hits))
                for hit in hits:
                    hit.release()
            if number:
                yield spent_us

    def _fresh(self) -> Keys:
        return self.cache.keys(self.prompts.take(self.blocks * BLOCK_TOKENS + 1))

    def _store(self, keys: Sequence[Keys], at: int) -> None:
        self.cache.submit_store(keys[at], self.tables[at], client=self.client)

    def _load(self, hits: Sequence[Hit], at: int) -> None:
        self.cache.submit_load(hits[at], self.tables[at], client=self.client)

    def _run(self, submit: Callable[[int], None]) -> dict[str, float]:
        self.clocks.take()
        began_s = thread_time()
        for at in range(JOBS):
            submit(at)
        submitted_s, inside_s = thread_time() - began_s, sum(self.clocks.spent_s.values())
        done = 0
        while done < JOBS:
            for step in self.runtime.steps:
                step()
            done += len(self.client.poll())
        total_s, spent_s = thread_time() - began_s, self.clocks.take()
        spent_s["submit"] = submitted_s - inside_s
        spent_s["the rest"] = total_s - sum(spent_s.values())
        return {stage: took_s * 1e6 / JOBS for stage, took_s in spent_s.items()}


def stages_of(verb: str, blocks: int) -> dict[str, float]:
    """The median over rounds of what each stage takes, in CPU microseconds a job."""
    with closing(_Bench(blocks)) as bench:
        freeze_heap()
        rounds = list(bench.rounds(verb))
    return {stage: median(spent_us[stage] for spent_us in rounds) for stage in rounds[0]}


def as_markdown(found: dict[str, dict[str, float]]) -> str:
    """A line a stage, a column for each kind of job."""
    lines = [f"| stage | {' | '.join(found)} | what it does |", "|---|" + "---|" * (len(found) + 1)]
    for stage in (*STAGES, "the rest"):
        cells = " | ".join(f"{spent_us[stage]:.1f}" for spent_us in found.values())
        lines.append(f"| {stage} | {cells} | {MEANING[stage]} |")
    sums = " | ".join(f"{sum(spent_us.values()):.1f}" for spent_us in found.values())
    return "\n".join([*lines, f"| **all** | {sums} | |"])


def main() -> None:
    """Print the table for stores and loads of 1 block and of 64."""
    found = {
        f"{verb} of {blocks} {'block' if blocks == 1 else 'blocks'}": stages_of(verb, blocks)
        for blocks in (1, 64)
        for verb in ("store", "load")
    }
    print(f"CPU microseconds a job, {JOBS} in flight, blocks of 512 bytes; {describe()}, commit {commit()}.\n")
    print(as_markdown(found))


if __name__ == "__main__":
    main()
