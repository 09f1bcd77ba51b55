"""The data plane of one rank: moves the bytes of plans, and chooses only among the sources that a plan allows.

Its copy threads are loops over ``step``: each takes a short piece of work, runs it without a lock, and brings the
result back; in passing it reaps what the lanes finished and hands them more. One housekeeping loop for each directory
keeps it going; what is past its deadline ends by a loop that waits for no device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from math import ceil
from typing import Final

import numpy as np
import torch

from kvtier.config import Config
from kvtier.core.memory import KVMemory
from kvtier.core.plan import (
    PAGE_BYTES,
    RECOVERED,
    Completion,
    Hello,
    Message,
    Plan,
    PlanKind,
    Reason,
    Recovered,
)
from kvtier.errors import CapacityError, ClosedError, ConfigError, CorruptBlockError, TierError
from kvtier.kernels import compiled
from kvtier.metrics import Metrics, Sample
from kvtier.models.layout import KVLayout
from kvtier.runtime.deadline import Deadline
from kvtier.runtime.seam import Arena, Buffer, Event, Machine, Worker
from kvtier.tiers.device import Slab, device_bytes, device_of
from kvtier.transfer.endpoint import table_fits
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.gathering import StoreRun
from kvtier.transfer.landing import LandRun
from kvtier.transfer.paths import IDLE_THREADS_S, DiskPath, open_path
from kvtier.transfer.reclaiming import ReclaimRun
from kvtier.transfer.run import Run
from kvtier.transfer.scattering import LoadRun
from kvtier.transfer.spilling import SpillRun
from kvtier.transfer.staging import Staging
from kvtier.transfer.syncing import SyncRun
from kvtier.transfer.work import Piece

_RUNS: Final[dict[PlanKind, type[Run]]] = {
    PlanKind.STORE: StoreRun,
    PlanKind.LOAD: LoadRun,
    PlanKind.FETCH: LoadRun,
    PlanKind.SPILL: SpillRun,
    PlanKind.SYNC: SyncRun,
    PlanKind.RECLAIM: ReclaimRun,
    PlanKind.LAND: LandRun,
}
_HEADER_PAGES: Final = 1024
_HOUSEKEEPING_S: Final = 0.02
_DEADLINES_S: Final = 0.02
_LOOK_AGAIN_S: Final = 0.1
"""Who closes looks so often whether all is over: of several who do, only one hears of the last run's end."""


class DataPlane:
    """Tiers, lanes and threads of one rank. Everything public is safe to call from any thread."""

    def __init__(
        self,
        config: Config,
        layout: KVLayout,
        machine: Machine,
        *,
        rank: int = 0,
        incarnation: int = 1,
        on_news: Callable[[], None] = lambda: None,
        pin: Callable[[Buffer], Callable[[], None]] = lambda buffer: lambda: None,
        tables_are_checked: bool = False,
    ) -> None:
        """Make the arenas, open the directories, start the threads. ``on_news`` is called, without a lock, whenever
        ``poll`` has something; ``pin`` page-locks an arena for a GPU and returns what undoes it. With
        ``tables_are_checked`` whoever sends plans has compared every page table with its memory; else that is done
        here. What raises leaves nothing open.

        Raises:
            CapacityError: a block is larger than a tier.
            ConfigError: an arena is larger than the memory that is free.
            TierError: a directory cannot be used, an arena cannot be had or pinned, or there are too few threads.
        """
        compiled()  # now, while nobody waits: compiling stalls every thread
        self.rank = rank
        self._config = config
        self._machine = machine
        self._on_news = on_news
        self._lock = machine.runtime.lock()
        self._runs: dict[int, Run] = {}
        self._next_memory = 0
        self._progress = machine.runtime.event()
        self._given_back = machine.runtime.event()
        self._closed = False
        self._working = self._holding = True
        self._called_back = False
        self._tables_are_checked = tables_are_checked
        self._busy_threads = 0
        self._workers: list[Worker] = []
        record_pages = max(layout.record_pages)
        _check_host(config, sum(layout.record_pages))
        _check_device(config, sum(layout.record_pages))
        with ExitStack() as held:
            host = _make_arena(machine, "host", config.host.capacity // PAGE_BYTES * PAGE_BYTES, held)
            staging = _make_arena(machine, "staging", Staging.arena_bytes(config.host.staging, record_pages), held)
            headers = _make_arena(machine, "headers", _HEADER_PAGES * PAGE_BYTES, held)
            for arena in (host, staging):
                held.callback(pin(arena.data))  # undone before the arena goes: CUDA forgets no address by itself
            self._equipment = Equipment(
                rank=rank, incarnation=incarnation, layout=layout, verify_memory=config.read.verify_memory,
                clock=machine.runtime.clock, host=host, staging=Staging(staging, record_pages),
                headers=Staging(headers, 1, shares=False), paths=[], slab=_make_slab(config, machine, held),
                metrics=Metrics(machine.runtime.lock(), max_series=config.metrics.max_series),
            )  # fmt: skip
            self._open_directories(layout, held)
            self._start(held)
            self._held = held.pop_all()

    # --- the engine's memory ----------------------------------------------------------------------------------------

    def register(self, memory: KVMemory) -> int:
        """Number of ``memory``, to be used in page tables; the caller keeps it alive until ``unregister``.

        Raises:
            ConfigError: it was built for another layout than this data plane's.
        """
        wanted = self._equipment.layout.placement
        if memory.placement != wanted:
            raise ConfigError(
                f"memory of placement {memory.placement[:12]} does not fit this cache's layout {wanted[:12]}: build it"
                " with the KVLayout that the cache was opened with"
            )
        with self._lock:
            number = self._next_memory
            self._next_memory += 1
            self._equipment.memories[number] = memory
            return number

    def unregister(self, memory_id: int) -> None:
        """Forget a memory; plans that still name it fail."""
        with self._lock:
            self._equipment.memories.pop(memory_id, None)

    # --- plans ------------------------------------------------------------------------------------------------------

    def submit(self, plans: Iterable[Plan]) -> None:
        """Begin plans; never blocks, and moves nothing itself. After ``close`` their rows fail.

        Where Ctrl-C comes between, those that were not begun are refused: what raises leaves none without an answer.
        """
        left = deque(plans)
        try:
            with self._lock:
                while left:
                    self._begin(left[0])
                    left.popleft()
                self._equipment.kick()
        finally:
            if left:
                self._refuse(left)
        self._write_log()

    def _refuse(self, plans: Iterable[Plan]) -> None:
        with self._lock:
            for plan in plans:
                if plan.plan_id not in self._runs:
                    self._refuse_one(plan)

    def call_back(self) -> bool:
        """Let a copy thread call ``on_news`` as soon as one is free, once for all calls until then.

        False once it closes: its threads may be gone, so whoever wants something done does it.
        """
        if self._closed:
            return False
        if not self._called_back:
            self._called_back = True
            self._equipment.work.wake_one()
        return True

    def _refuse_one(self, plan: Plan) -> None:
        run = self._runs[plan.plan_id] = Run(plan, self._equipment)
        run.end(Reason.REFUSED)

    def _begin(self, plan: Plan) -> None:
        """Begin ``plan``, or answer it; what goes wrong is a mistake of ours, and the plans around it are others'."""
        try:
            run = self._runs[plan.plan_id] = _RUNS[plan.kind](plan, self._equipment)
        except Exception as error:
            self._equipment.faults.tell(f"a plan to {plan.kind.name.lower()} could not be taken", error)
            self._refuse_one(plan)
            return
        if self._closed:
            run.end(Reason.CLOSED)
        elif plan.incarnation != self._equipment.incarnation:  # it was on its way when an earlier life ended
            run.end(Reason.GONE)
        elif not self._tables_are_checked and not table_fits(self._equipment, plan):
            run.end(Reason.REFUSED)
        else:
            try:
                run.begin()
            except Exception as error:
                self._equipment.faults.tell(f"a plan to {plan.kind.name.lower()} could not be begun", error)
                run.end(Reason.REFUSED)

    def cancel(self, plan_id: int, reason: Reason = Reason.ABANDONED) -> None:
        """Nobody waits for ``plan_id`` any more; its rows end as soon as nothing touches engine memory for them."""
        with self._lock:
            run = self._runs.get(plan_id)
            if run is not None and not run.abandoned:
                run.abandon(reason)
        self._on_news()

    def poll(self) -> list[Message]:
        """Completions and reports since the last call, in order; never blocks."""
        with self._lock:
            outbox = self._equipment.outbox
            if not outbox:
                return []
            news = list(outbox)
            outbox.clear()
            for message in news:
                if isinstance(message, Completion) and message.final:
                    self._runs.pop(message.plan_id, None)
            return news

    def samples(self) -> list[Sample]:
        """What happened to the bytes, and the levels of now."""
        with self._lock:
            equipment, metrics = self._equipment, self._equipment.metrics
            metrics.set("runs", len(self._runs))
            metrics.set("staging_free", equipment.staging.free)
            metrics.set("staging_buffers", equipment.staging.count)
            for path in equipment.paths:
                metrics.set("lane_queued_bytes", path.lane.queued_bytes, lane=path.lane.name)
                metrics.set("lane_bytes_per_s", path.lane.bytes_per_s, lane=path.lane.name)
                for stage, count in path.tier.stages().items():
                    metrics.set("disk_segments", count, lane=path.lane.name, stage=stage)
        return metrics.samples()

    def close(self, timeout_s: float) -> bool:
        """Stop taking plans, end what is under way, close the directories; True when nothing was left behind.

        It waits for ``timeout_s`` in all. What does not end in time keeps its buffers, and a directory that is not
        durable in time stays open; calling again goes on waiting for it. Any number of threads may close.
        """
        deadline = Deadline(self._equipment.clock, timeout_s)
        if self._given_back.wait(0):
            return True
        with self._lock:
            self._closed = True
            for run in list(self._runs.values()):
                if not run.abandoned:
                    run.abandon(Reason.CLOSED)
            self._equipment.kick()
        self._on_news()
        if self._working and not self._drain(deadline):
            return False  # the copy threads go on, and end it
        # Engines first: the copy threads are still there to take in what was in flight.
        stuck = sum(path.lane.engine.close(deadline.left_s()) for path in self._equipment.paths)
        self._working = False  # whoever closes a second time waits for the engines alone: nobody drains any more
        stopped = [worker.stop(deadline.left_s()) for worker in self._workers]
        if stuck or not all(stopped):
            return False
        self._end_all()
        closed = [path.tier.close(deadline.left_s()) for path in self._equipment.paths]
        return all(closed) and self._give_back(deadline)

    def _end_all(self) -> None:
        """End what no thread works on any more."""
        with self._lock:
            self._equipment.reap()
            while len(self._equipment.work):  # what was reaped just now still has buffers to give back
                self._equipment.work.give_up(ClosedError("the data plane is closed"))
            for run in list(self._runs.values()):
                run.end(Reason.CLOSED)
        self._write_log()
        self._on_news()

    def _give_back(self, deadline: Deadline) -> bool:
        """Let go of everything: of several threads that close one does, and the others wait for it."""
        with self._lock:
            mine, self._holding = self._holding, False
        if mine:
            try:
                self._held.close()
            finally:
                self._given_back.set()
        return self._given_back.wait(deadline.left_s())

    def _drain(self, deadline: Deadline) -> bool:
        """Let the copy threads end what was begun: stores are finished, everything else ends as soon as it may.

        False: they did not come to the end of it in time.
        """
        while True:
            self._progress.clear()
            with self._lock:
                self._equipment.kick()
                if all(run.final for run in self._runs.values()) or not self._moves:
                    return True
            left_s = deadline.left_s()
            if not left_s:
                return False
            self._progress.wait(min(left_s, _LOOK_AGAIN_S))

    @property
    def _moves(self) -> bool:
        """Whether something is under way that runs may wait for: else only a mistake of ours left them open."""
        equipment = self._equipment
        waiting = len(equipment.work) or len(equipment.waiting_for_staging)
        return bool(self._busy_threads or waiting or any(path.lane.is_busy for path in equipment.paths))

    # --- threads ----------------------------------------------------------------------------------------------------

    def _start(self, held: ExitStack) -> None:
        for number in range(self._config.host.copy_threads):
            wake = self._machine.runtime.event()
            self._spawn(held, f"copy-{number}", partial(self._step, wake), wake)
        for path in self._equipment.paths:
            path.lane.engine.ready = _WakeOne(self)
            name, step = f"housekeeping-{path.number}", partial(self._keep_house, path)
            self._spawn(held, name, step, path.chores, _HOUSEKEEPING_S)
        self._spawn(held, "deadlines", self._watch_deadlines, self._machine.runtime.event(), _DEADLINES_S)

    def _spawn(
        self, held: ExitStack, name: str, step: Callable[[], bool], wake: Event, idle_s: float | None = None
    ) -> None:
        worker = self._machine.runtime.spawn(name, step, wake, idle_s)
        self._workers.append(worker)
        held.callback(worker.stop, IDLE_THREADS_S)

    def _step(self, wake: Event) -> bool:
        """One piece of work, if there is any."""
        with self._lock:
            reaped = self._equipment.reap()
            self._equipment.kick()
            piece = self._equipment.work.take(wake)
            if piece is None:
                # What ended before this thread was known to wait woke nobody: look once more.
                reaped += self._equipment.reap()
            # Who only asked for a call waits for the piece: nearly always its bytes move without the interpreter.
            news = self._take_news() if piece is None else bool(self._equipment.outbox)
            self._busy_threads += piece is not None
        if news:
            self._write_log()
            self._on_news()
        if piece is None:
            return reaped > 0  # whatever the news brings wakes a thread that waits
        self._perform(piece)
        return True

    def _perform(self, piece: Piece) -> None:
        try:
            result = piece.work()
        except BaseException as error:  # the one boundary: what a codec or engine memory throws is a failed row
            is_damage = isinstance(error, CorruptBlockError)
            result = error if is_damage else RuntimeError(f"a piece of work failed: {error!r}")
            self._equipment.faults.tell("a piece of work failed", error)
        with self._lock:
            try:
                piece.finish(result)
            except Exception as error:  # a mistake of ours: the thread goes on for all the others
                self._equipment.faults.tell("the end of a piece of work failed", error)
            self._busy_threads -= 1
            self._equipment.kick()
            news = self._take_news()
        self._tell(news)

    def _take_news(self) -> bool:
        """Whether ``on_news`` is to be called. That takes the request: who wants a call from here on asks again."""
        if self._called_back:
            self._called_back = False
            return True
        return bool(self._equipment.outbox)

    def _tell(self, news: bool) -> None:
        self._write_log()
        if news:
            self._on_news()
        if self._closed:
            self._progress.set()

    def _write_log(self) -> None:
        """Log what was noticed under the lock: whoever reads it there may ask us how we are."""
        self._equipment.faults.remarks.write()
        for path in self._equipment.paths:
            path.tier.write_log()

    def _keep_house(self, path: DiskPath) -> bool:
        """One bounded step for a directory, and what it has to say."""
        busy = False
        try:
            busy = path.tier.housekeep()
        except Exception as error:  # a mistake of ours: the directory still has to be looked after
            self._equipment.faults.tell("housekeeping failed", error)
        with self._lock:
            reclaimed, messages = path.take_news(self.rank, self._equipment.incarnation)
            for segment in reclaimed:
                waiting = self._equipment.reclaims.pop(segment, None)
                if waiting is not None:
                    waiting.ended()
            self._equipment.outbox.extend(messages)
            self._equipment.kick()
            news = self._take_news()
        self._tell(news)
        return busy

    def _watch_deadlines(self) -> bool:
        """End what is past its deadline, whatever the devices do."""
        with self._lock:
            now_s = self._equipment.clock.monotonic()
            for run in list(self._runs.values()):
                if run.plan.deadline_s is not None and run.plan.deadline_s <= now_s and not run.abandoned:
                    self._give_up(run)
            self._equipment.reap()
            self._equipment.kick()
            news = self._take_news()
        self._tell(news)
        return False

    def _give_up(self, run: Run) -> None:
        try:
            run.abandon(Reason.ABANDONED)
        except Exception as error:  # a mistake of ours: others' deadlines pass, too
            self._equipment.faults.tell("giving up what is past its deadline failed", error)

    def wake(self) -> None:
        """Let a copy thread look for finished I/O."""
        self._equipment.work.wake_one()

    # --- directories ------------------------------------------------------------------------------------------------

    def _open_directories(self, layout: KVLayout, held: ExitStack) -> None:
        equipment, directories = self._equipment, self._config.disk.directories
        recovered: list[Recovered] = []
        for number in range(len(directories)):
            path, found = open_path(self._config, layout, self._machine, number, held)
            equipment.paths.append(path)
            for name, count in path.tier.recovery.samples().items():
                equipment.metrics.add(name, count, lane=path.lane.name)
            recovered.extend(Recovered(self.rank, equipment.incarnation, rows) for rows in found)
        if directories:
            recovered.append(Recovered(self.rank, equipment.incarnation, np.empty(0, RECOVERED), final=True))
        tiers = [path.tier for path in equipment.paths]
        equipment.outbox.append(
            Hello(
                rank=self.rank, incarnation=equipment.incarnation, placement=layout.placement,
                block_tokens=layout.block_tokens, record_pages=layout.record_pages,
                host_pages=equipment.host.data.nbytes // PAGE_BYTES,
                device_pages=0 if equipment.slab is None else equipment.slab.page_count,
                disk_bytes=sum(tier.capacity_bytes for tier in tiers),
                segment_bytes=max((tier.segment_bytes for tier in tiers), default=0), directories=directories,
            )
        )  # fmt: skip
        equipment.outbox.extend(recovered)


def _make_arena(machine: Machine, name: str, nbytes: int, held: ExitStack) -> Arena:
    try:
        arena = machine.arena(name, nbytes)
    except OSError as error:
        raise TierError(
            f"arena {name!r}: {nbytes} bytes of memory cannot be had: {error.strerror or error}; lower host.capacity "
            "or host.staging, or raise the limits of the process (ulimit -v, -f and -n)"
        ) from error
    held.callback(arena.close)
    return arena


def _make_slab(config: Config, machine: Machine, held: ExitStack) -> Slab | None:
    nbytes = config.device.capacity // PAGE_BYTES * PAGE_BYTES
    if not nbytes:
        return None
    device = device_of(config.device.device)
    if device.type == "cpu":
        memory = torch.from_numpy(_make_arena(machine, "device", nbytes, held).data)
    else:
        memory = device_bytes(nbytes, device)
    slab = Slab(memory, verifies=config.device.verify)
    held.callback(slab.close)
    return slab


def _check_device(config: Config, block_pages: int) -> None:
    if 0 < config.device.capacity < block_pages * PAGE_BYTES:
        raise CapacityError(
            f"device.capacity = {config.device.capacity}: one block of this model takes {block_pages * PAGE_BYTES}"
            f" bytes; set it to at least {block_pages * PAGE_BYTES}, or to 0 for no device tier"
        )


def _check_host(config: Config, block_pages: int) -> None:
    high = config.host.high_watermark
    least = ceil(block_pages / high)
    least += least * high < block_pages  # with less, no block would stay
    if config.host.capacity < least * PAGE_BYTES:
        raise CapacityError(
            f"host.capacity = {config.host.capacity}: one block of this model takes {block_pages * PAGE_BYTES} bytes; "
            f"set it to at least {least * PAGE_BYTES} (host.high_watermark = {high:g} of it stays in use), or use a "
            "smaller block_tokens"
        )


class _WakeOne:
    """The event of an I/O engine: wakes one copy thread instead of somebody who waits for it."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def set(self) -> None:
        """Something can be reaped."""
        self._plane.wake()

    def clear(self) -> None:
        """Threads clear their own events."""

    def wait(self, timeout_s: float | None) -> bool:
        """Nobody waits for an engine: ``step`` asks it."""
        del timeout_s
        return False


__all__ = ["DataPlane"]
