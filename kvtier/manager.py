"""CacheManager: the asyncio face of a TieredCache.

Cancelling an await detaches from the job, it never frees a buffer in flight: the job goes on, and the caller keeps its
pages until the job's ``source_free`` (store) or ``done`` (load). ``job.cancel()`` ends it early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic

from kvtier.cache import TieredCache
from kvtier.config import MOST_SECONDS, Config
from kvtier.core.checks import timeout
from kvtier.core.keys import Extra, Keys, TokenIds
from kvtier.core.memory import KVMemory, KVPages, PageTable
from kvtier.errors import ClosedError
from kvtier.hits import Hit, Session
from kvtier.jobs import FlushResult, Job, LoadResult, PrefetchResult, R, StoreResult
from kvtier.metrics import Sample
from kvtier.models.layout import KVLayout
from kvtier.planner.events import BlockEvent
from kvtier.runtime import SystemRuntime
from kvtier.runtime.seam import Machine

CLOSE_S: Final = 30.0
"""How long closing may take where nobody says otherwise."""


class AsyncJob(Generic[R]):
    """A job that can be awaited, any number of times, from any task of its loop."""

    def __init__(self, job: Job[R], loop: asyncio.AbstractEventLoop) -> None:
        self.job = job
        self._loop = loop

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self.job.done

    @property
    def source_free(self) -> bool:
        """Whether the engine may use the pages of a store again."""
        return self.job.source_free

    def cancel(self) -> None:
        """Nobody wants it any more: it ends as soon as nothing touches engine memory for it; see ``Job.cancel``."""
        self.job.cancel()

    async def wait_source_free(self) -> None:
        """Wait until the engine may use the pages of a store again."""
        await self._until(lambda: self.job.source_free)

    async def wait_part(self, part: int) -> int:
        """Wait until ``part`` of a load is in engine memory; returns ok_tokens, as ``Job.wait_part``.

        Raises:
            ConfigError: the layout has no such part, or this is no load.
        """
        await self._until(lambda: self.job.part_ready(part))
        return self.job.wait_part(part, 0)

    def __await__(self) -> Generator[Any, None, R]:
        return self._wait().__await__()

    async def _wait(self) -> R:
        await self._until(lambda: self.job.done)
        return self.job.result(0)

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            woken = self._loop.create_future()
            wake = partial(_wake_from_thread, self._loop, woken)
            self.job.call_on_news(wake, unless=ready)
            try:
                await woken
            finally:  # a cancelled await leaves nothing behind
                self.job.call_no_more(wake)


class CacheManager:
    """The verbs of ``TieredCache`` for asyncio: ``async with``, ``await``. Lookups are plain calls, they never wait.

    Several tasks may be inside ``async with`` at once: the last one to leave closes it. Entered again after that, it
    opens anew: what was on disk is found again, host memory begins empty.
    """

    def __init__(
        self,
        config: Config | str | dict[str, Any],
        layout: KVLayout,
        model_id: str,
        *,
        weights_version: str = "",
        machine: Machine | None = None,
    ) -> None:
        """What ``TieredCache`` takes and raises; the tiers are opened by ``async with``.

        Synchronous code opens them by the first use of ``core`` or of a verb.
        """
        self._open = partial(TieredCache, config, layout, model_id, weights_version=weights_version, machine=machine)
        self._lock = SystemRuntime().lock()  # held while it is opened, once, whoever asks; never while it is closed
        self._core: TieredCache | None = None
        self._is_closed = False  # what is in _core
        self._ending: TieredCache | None = None  # told to close, not known to have ended: nothing opens before that
        self._wanted_by: set[object] = set()  # whoever entered or is about to; what nobody wants is closed
        self._inside: set[object] = set()  # of them, those for whom it was opened

    @property
    def core(self) -> TieredCache:
        """The thread-safe cache underneath, for synchronous code; opened here if it is not yet, once for all threads.

        Raises:
            ClosedError: it is not open, and opening it here would block a running event loop.
        """
        return self._opened_here() if self._core is None else self._core

    async def __aenter__(self) -> CacheManager:
        """Open the tiers in a thread, if they are not open. Cancelled, it closes them again, unless others want them.

        Raises:
            ConfigError, CapacityError, TierError: as ``TieredCache``.
            ClosedError: it was closed, and even after 30 s something of it is under way.
        """
        loop, who = asyncio.get_running_loop(), object()
        self._wanted_by.add(who)
        try:
            await asyncio.to_thread(self._come_in, who)
        except BaseException:  # the thread goes on after a cancelled await, or has not even begun
            self._wanted_by.discard(who)
            with suppress(RuntimeError):  # a loop that was closed: the thread that opens looks at its end too
                loop.run_in_executor(None, self._give_up, who)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self._leave))

    async def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Write what the policy promised, end every job, close the tiers; True when nothing was left behind.

        ``timeout_s`` is for all of it; 0 or less does not wait. False: time ran out, and jobs may be under way still.
        They end when it is called again, with more of it. Any number of threads may close: they take turns.
        Whoever is inside loses it; an opening under way is waited for first.
        In a child of the process that opened it nothing happens: all of it is the parent's.

        Raises:
            ConfigError: ``timeout_s`` is no number; nothing is closed.
        """
        timeout_s = timeout(timeout_s, MOST_SECONDS)  # also where it was never opened
        return await asyncio.shield(asyncio.to_thread(self._close, timeout_s))

    def keys(self, tokens: TokenIds, *, tenant: str = "", adapter: str = "", extra: Iterable[Extra] = ()) -> Keys:
        """Keys of ``tokens``, to be hashed once and appended to; every verb takes them in place of tokens.

        ``extra`` is content beyond the token ids, as (start, stop, digest).

        Raises:
            ConfigError: token ids out of [0, 2^31), or not one dimension of integers; a name that cannot be printed.
            ClosedError: the cache is not open yet, or of another process.
        """
        return self.core.keys(tokens, tenant=tenant, adapter=adapter, extra=extra)

    def foreign_keys(
        self,
        raw_keys: Sequence[bytes],
        *,
        engine: str,
        tenant: str = "",
        adapter: str = "",
        chained: bool = True,
        num_tokens: int | None = None,
    ) -> Keys:
        """Keys of an engine's own block hashes; ``chained``: each extends the one before it.

        ``num_tokens`` is the length of the sequence; by default every full block may hit.

        Raises:
            ConfigError: a raw key is no bytes or comes twice, or another argument is not what it should be.
            ClosedError: the cache is not open yet, or of another process.
        """
        return self.core.foreign_keys(
            raw_keys, engine=engine, tenant=tenant, adapter=adapter, chained=chained, num_tokens=num_tokens
        )

    def match(
        self, tokens: TokenIds | Keys, *, tenant: str = "", adapter: str = "", start: int = 0, exact: bool = False
    ) -> int:
        """Tokens that ``lookup`` would find: no pin, no side effect, memory only. A plain call.

        Raises:
            ConfigError: as ``lookup``.
            ClosedError: the cache is closed, or not open yet.
        """
        return self.core.match(tokens, tenant=tenant, adapter=adapter, start=start, exact=exact)

    def lookup(
        self,
        tokens: TokenIds | Keys,
        *,
        tenant: str = "",
        adapter: str = "",
        start: int = 0,
        exact: bool = False,
        session: str | None = None,
        owner: Hashable | None = None,
    ) -> Hit:
        """Pin the longest stored prefix beyond ``start``, which the engine holds itself. Never waits.

        ``exact``: only KV that is what the model computes. ``owner``: asking again gives the same hit;
        whoever gives it back first, gives it back for both.

        Raises:
            ConfigError: tokens as ``keys``, or keys of another block size, model, tenant or adapter; ``start`` is
                beyond the sequence, ``owner`` cannot be hashed, or a word or flag is none.
            ClosedError: the cache is closed, or not open yet.
        """
        return self.core.lookup(
            tokens, tenant=tenant, adapter=adapter, start=start, exact=exact, session=session, owner=owner
        )

    def load(
        self,
        hit: Hit,
        pages: KVPages | PageTable,
        *,
        start: int | None = None,
        stop: int | None = None,
        priority: str = "demand",
        deadline_s: float | None = None,
    ) -> AsyncJob[LoadResult]:
        """Bring tokens [start, stop) of ``hit`` into engine memory; by default all that it found.

        ``deadline_s`` (seconds from now; default ``read.deadline_s``) ends the job with what is there by then. It goes
        on by itself: await it, or wait for it part by part.

        Raises:
            RuntimeError: no event loop runs; nothing was submitted.
            ConfigError: the range is not within the hit, or the pages do not fit it.
            ClosedError: the cache is closed, or not open yet.
        """
        loop = _loop_for("load")
        job = self.core.submit_load(hit, pages, start=start, stop=stop, priority=priority, deadline_s=deadline_s)
        return AsyncJob(job, loop)

    def store(
        self,
        tokens: TokenIds | Keys,
        pages: KVPages | PageTable,
        *,
        tenant: str = "",
        adapter: str = "",
        start: int = 0,
        derived_from: Hit | None = None,
        durability: str = "memory",
        checkpoints: Sequence[int] | None = None,
        session: str | None = None,
    ) -> AsyncJob[StoreResult]:
        """Keep the full blocks in [start, len(tokens)); what is kept or being stored already is not moved again.

        ``derived_from`` is the hit that these tokens were computed on top of: they inherit its lineage.
        ``durability`` is the level of acknowledgement: ``memory``, ``process`` (survives kill -9) or ``durable``
        (survives a power cut); the last two write to disk for this call, whatever the write policy. The job goes on by
        itself; the pages are its own until ``source_free``.
        ``checkpoints`` are numbers of tokens behind which hits are likely to end, such as the length of the prompt and
        that of all tokens, by default the latter alone: of sliding windows and states what the ends of full blocks
        there need is kept (``policy.windows``), as far as the pages have it.

        Raises:
            RuntimeError: no event loop runs; nothing was submitted.
            ConfigError: the pages do not fit, a word is not known, or a checkpoint is no number of tokens.
            ClosedError: the cache is closed, or not open yet.
        """
        loop = _loop_for("store")
        job = self.core.submit_store(
            tokens, pages, tenant=tenant, adapter=adapter, start=start, derived_from=derived_from,
            durability=durability, checkpoints=checkpoints, session=session,
        )  # fmt: skip
        return AsyncJob(job, loop)

    def prefetch(
        self,
        tokens: TokenIds | Keys,
        *,
        to: str = "host",
        tenant: str = "",
        adapter: str = "",
        deadline_s: float | None = None,
    ) -> AsyncJob[PrefetchResult]:
        """Bring the stored prefix of ``tokens`` up to ``to``, ``host`` or ``device``, ahead of its use.

        It may take ``deadline_s`` seconds, without that as long as ``[prefetch]`` says; what is not there by then is
        left on disk. With ``policy = "best_effort"`` the job ends at once, and the blocks come behind it: whoever
        loads them takes those that have come from host memory, and reads the others itself.

        Raises:
            RuntimeError: no event loop runs; nothing was submitted.
            ConfigError: ``to`` is no memory tier of this cache, ``deadline_s`` no time above 0, or tokens or keys as
                ``lookup``.
            ClosedError: the cache is closed, or not open yet.
        """
        loop = _loop_for("prefetch")
        job = self.core.submit_prefetch(tokens, to=to, tenant=tenant, adapter=adapter, deadline_s=deadline_s)
        return AsyncJob(job, loop)

    def flush(self, durability: str = "process") -> AsyncJob[FlushResult]:
        """Everything stored so far reaches ``durability``, as in ``store``. The job goes on by itself.

        Raises:
            RuntimeError: no event loop runs; nothing was submitted.
            ConfigError: there is no such level.
            ClosedError: the cache is closed, or not open yet.
        """
        loop = _loop_for("flush")
        return AsyncJob(self.core.submit_flush(durability), loop)

    def register(self, memory: KVMemory) -> int:
        """Make ``memory`` known on every rank for good; returns its number for page tables.

        ``KVPages`` of memory that was not registered are registered for the time of each job.

        Raises:
            ConfigError: it is no engine memory, it is of another layout, or ranks disagree on its number.
            ClosedError: the cache is closed, or not open yet.
        """
        return self.core.register(memory)

    def unregister(self, memory: KVMemory) -> None:
        """Forget ``memory`` once no job uses it that was given ``KVPages``; jobs that name it by number end first.

        Raises:
            ClosedError: the cache is not open yet, or of another process.
        """
        self.core.unregister(memory)

    def session(self, session: str) -> Session:
        """Hints about a conversation, by the name that ``lookup(session=)`` was given.

        Raises:
            ConfigError: the name is no string.
            ClosedError: the cache is not open yet, or of another process.
        """
        return self.core.session(session)

    def set_weights_version(self, version: str) -> None:
        """From now on KV of any other version is a miss, in every tier, at once.

        Raises:
            ConfigError: ``version`` is no string of printable characters.
            ClosedError: the cache is closed, or not open yet.
        """
        self.core.set_weights_version(version)

    def take_events(self) -> list[BlockEvent]:
        """Blocks that came and went since the last call; the first call begins to listen.

        Of more than 262,144 blocks the oldest are dropped; the counter ``dropped_events`` says how many.

        Raises:
            ClosedError: the cache is not open yet, or of another process.
        """
        return self.core.take_events()

    def samples(self) -> list[Sample]:
        """Counters and levels of planner and data planes, for ``kvtier.metrics.prometheus.PrometheusCollector``.

        Raises:
            ClosedError: the cache is not open yet, or of another process.
        """
        return self.core.samples()

    def stats(self) -> dict[str, float]:
        """``samples`` as one dict; names end in their unit, labels stand in braces.

        Raises:
            ClosedError: as ``samples``.
        """
        return self.core.stats()

    def _opened_here(self) -> TieredCache:
        if _loop_runs():
            raise ClosedError("the cache is not open: enter it by `async with` (opening it here would block the loop)")
        self._wanted_by.add(self)  # until it is closed
        try:
            self._come_in(self)
        except BaseException:
            self._wanted_by.discard(self)
            raise
        return self.core

    def _come_in(self, who: object) -> None:
        """Open it for ``who``, unless it gives up meanwhile."""
        while (ending := self._try_to_open(who)) is not None:
            if not self._end(ending, CLOSE_S):
                raise ClosedError("the cache was closed and has not ended: call close() until it says True")
        if who not in self._wanted_by:
            self._give_up(who)

    def _try_to_open(self, who: object) -> TieredCache | None:
        """The cache that has to end before, if there is one."""
        with self._lock:
            if who not in self._wanted_by:
                return None
            if self._core is not None and not self._is_closed and not _is_open(self._core):
                self._told_to_close()  # by somebody else: ``core`` has a close() of its own
            if self._ending is None:
                if self._core is None or self._is_closed:
                    self._core, self._is_closed = self._open(), False
                self._inside.add(who)
            return self._ending

    def _give_up(self, who: object) -> None:
        with self._lock:
            self._inside.discard(who)
            if self._wanted_by or self._core is None or self._is_closed:
                return
            core = self._told_to_close()
            self._core = None  # nobody has seen it: the next to come opens another
        if core is not None:
            self._end(core, CLOSE_S)

    def _leave(self) -> None:
        with self._lock:
            if tasks := self._inside - {self}:
                who = tasks.pop()
                self._inside.discard(who)
                self._wanted_by.discard(who)
            if self._wanted_by - {self}:
                return
            core = self._told_to_close()  # before anybody can come in to it
        if core is not None:
            self._end(core, CLOSE_S)

    def _close(self, timeout_s: float) -> bool:
        with self._lock:  # behind an opening
            core = self._told_to_close()
        return core is None or self._end(core, timeout_s)

    def _told_to_close(self) -> TieredCache | None:
        """What is to be closed now, outside of the lock; nobody is inside any more."""
        if self._core is not None and not self._is_closed:
            self._ending, self._is_closed = self._core, True
            self._wanted_by.difference_update(self._inside)
            self._inside.clear()
        return self._ending

    def _end(self, core: TieredCache, timeout_s: float) -> bool:
        ended = core.close(timeout_s)
        if ended:
            with self._lock:
                if self._ending is core:
                    self._ending = None
        return ended


def _is_open(core: TieredCache) -> bool:
    try:
        core.match(())
    except ClosedError:
        return False
    return True


def _loop_for(verb: str) -> asyncio.AbstractEventLoop:
    """The running loop; asked for before anything is submitted, whose pages nobody could tell when they are free."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        remedy = f"call it in a coroutine, or use core.submit_{verb}() without asyncio"
        raise RuntimeError(f"{verb}(): no running event loop; {remedy}") from None


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _wake_from_thread(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], _: object) -> None:
    # A loop that was closed while the job went on has nobody left to wake.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(_wake, future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
