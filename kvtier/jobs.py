"""Jobs: what callers hold while bytes move, and what they get when it is over."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar, cast

from kvtier.config import MOST_SECONDS
from kvtier.core.checks import timeout, whole
from kvtier.core.plan import Reason, Tier
from kvtier.errors import ClosedError, ConfigError
from kvtier.planner.tickets import Outcome, Ticket, TicketKind
from kvtier.runtime.notify import Notifier
from kvtier.runtime.process import this_process
from kvtier.runtime.seam import Event, Lock, Runtime

if TYPE_CHECKING:
    from kvtier.core.memory import KVMemory

log = logging.getLogger(__name__)
TIER_NAMES: Final = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Tokens [start, ok_tokens) are in engine memory.

    ``by_tier`` counts them by where they came from; ``failed`` is the tokens behind them by reason (lower case), such
    as ``{"damaged": 64}``: the caller computes them (``engine_error``: the engine's own memory raised when it was
    written to; the log has the traceback). ``nbytes`` is what was moved: whole records in 4 KiB pages, with
    their header pages, also where only part of a block was wanted.
    """

    ok_tokens: int
    by_tier: dict[str, int]
    failed: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class StoreResult:
    """Tokens of the full blocks in range: ``stored`` + ``existing`` + ``refused``; ``failed`` is refused by reason.

    ``engine_error``: the engine's own memory raised when it was read; the log has the traceback. What somebody else was
    storing already ends as that store does, whatever becomes of it. ``no_disk``: more than host memory was asked for,
    and no directory is configured, or works; host memory may hold the blocks all the same.
    What is ``existing`` keeps its place on disk: it goes with the blocks that were written beside it, the oldest first.
    ``nbytes`` is what was moved to host memory: whole records in 4 KiB pages, with their header pages.
    """

    stored: int
    existing: int
    refused: int
    failed: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """``fetched`` tokens came to the tier that was asked for, ``existing`` were there, the others failed by reason.

    ``pending`` tokens are still on their way: with ``prefetch.policy = "best_effort"`` nobody waits for them.
    """

    fetched: int
    existing: int
    failed: dict[str, int] = field(default_factory=dict)
    pending: int = 0


@dataclass(frozen=True, slots=True)
class FlushResult:
    """Whether everything reached the level that was asked for; ``reason`` says why not."""

    ok: bool
    reason: str = ""


Result: TypeAlias = LoadResult | StoreResult | PrefetchResult | FlushResult
R = TypeVar("R")
AnyJob: TypeAlias = "Job[Any]"


class Job(Generic[R]):
    """One load, store, prefetch or flush under way. It ends exactly once, whoever waits or does not.

    Engine memory of a load stays the caller's to keep until ``done``, of a store until ``source_free``.
    """

    __slots__ = (
        "__weakref__",
        "_block_tokens",
        "_callbacks",
        "_client",
        "_control",
        "_done",
        "_result",
        "_source_free",
        "memory",
        "span",
        "ticket",
    )  # fmt: skip

    def __init__(
        self, ticket: Ticket, span: range, block_tokens: int, control: JobControl, client: Client | None
    ) -> None:
        self.ticket = ticket
        self.span = span  # the absolute token positions that a load covers
        self.memory: KVMemory | None = None
        self._block_tokens = block_tokens
        self._control = control
        self._client = client
        self._done = False
        self._result: R | None = None
        self._source_free = False
        self._callbacks: list[Callable[[AnyJob], object]] | tuple[()] = ()  # most jobs never have one

    @property
    def done(self) -> bool:
        """Whether ``result`` is there."""
        return self._done

    @property
    def source_free(self) -> bool:
        """Whether the engine may use the pages of a store again; comes before ``done``."""
        return self._source_free

    def result(self, timeout: float | None = None) -> R:
        """Wait for the end: ``timeout`` seconds (0 or less: look, do not wait), or with None for as long as it takes.

        Raises:
            TimeoutError: it has not ended in time; the job goes on.
            ConfigError: ``timeout`` is no number.
            ClosedError: this is another process than that of the cache.
        """
        timeout = checked_timeout_s(timeout)
        if not self._done:
            self._wait(lambda: self._done, timeout)
        if self._result is None:  # made by who asks for it, not by who brings the news: the ticket stays as it ended
            self._result = cast(R, _result_of(self.ticket, self.span, self._block_tokens))
        return self._result

    def wait_source_free(self, timeout: float | None = None) -> None:
        """Wait until the engine may use the pages of a store again; ``timeout`` and errors as ``result``."""
        self._wait(lambda: self._source_free, checked_timeout_s(timeout))

    def wait_part(self, part: int, timeout: float | None = None) -> int:
        """Wait until ``part`` of a load is in engine memory; returns ok_tokens.

        Parts are counted over all groups of the layout, in its order. Whole blocks are read, so every part comes with
        the last one: ok_tokens is that of ``result``, and no part has fewer than one that was consumed before it.

        Raises:
            ConfigError: the layout has no such part, this is no load, or ``timeout`` is no number.
            TimeoutError: it has not come in time; the job goes on.
            ClosedError: as ``result``.
        """
        self._check_part(part)
        return cast(LoadResult, self.result(timeout)).ok_tokens

    def cancel(self) -> None:
        """Nobody wants it any more: the job ends as soon as nothing touches engine memory for it.

        A small one that shares a plan with others ends when they do, as if nothing had been said. So does what only
        waits for the disk: a store whose pages are free already, and a flush.
        """
        self._control.cancel(self)

    def part_ready(self, part: int) -> bool:
        """Whether ``wait_part(part)`` would return at once. ConfigError as there."""
        self._check_part(part)
        return self._done  # whole blocks are read, so every part comes with the last one

    def call_on_news(self, callback: Callable[[AnyJob], object], *, unless: Callable[[], bool]) -> None:
        """Call ``callback`` once, on whichever thread brings the next news (source free, done); at once if ``unless``
        holds already. It must not block; whoever does not wait any longer says so by ``call_no_more``."""
        with self._control.lock:
            if not unless():
                if not self._callbacks:
                    self._callbacks = []
                self._callbacks.append(callback)
                return
        callback(self)

    def call_no_more(self, callback: Callable[[AnyJob], object]) -> None:
        """Forget ``callback``, which ``call_on_news`` was given; harmless if it was called, or is being called now."""
        with self._control.lock:
            if self._callbacks and callback in self._callbacks:
                self._callbacks.remove(callback)

    def __repr__(self) -> str:
        state = repr(self.result()) if self._done else "under way"
        return f"Job({self._kind}, {state})"

    # --- for the cache ----------------------------------------------------------------------------------------------

    def hear(self) -> tuple[Client | None, Sequence[Callable[[AnyJob], object]]]:
        """The ticket has news: take it over. Called without a lock, once per piece of news.

        Returns the client that is to be told of the end, and what is to be called.
        """
        ticket = self.ticket
        with self._control.lock:
            finished = ticket.finished  # once: it may turn true meanwhile, and the end is told by whoever saw it first
            self._source_free = self._source_free or ticket.source_free
            ended = finished and not self._done
            self._done = finished
            callbacks, self._callbacks = self._callbacks, ()
            return self._client if ended else None, callbacks

    def _check_part(self, part: int) -> None:
        if self.ticket.kind != TicketKind.LOAD:
            raise ConfigError(f"part = {part!r}: only loads have parts; wait for the result of this {self._kind}")
        parts = self._control.parts
        if not 0 <= whole("part", part) < parts:
            raise ConfigError(f"part = {part}: must be in [0, {parts}), the parts of the layout over all groups")

    @property
    def _kind(self) -> str:
        return self.ticket.kind.name.lower()

    def _wait(self, ready: Callable[[], bool], timeout_s: float | None) -> None:
        if ready():
            return
        self._control.check_here()
        clock = self._control.runtime.clock
        deadline = None if timeout_s is None else clock.monotonic() + timeout_s
        while not ready():
            event = self._control.runtime.event()
            wake = partial(_wake, event)
            self.call_on_news(wake, unless=ready)
            try:
                told = event.wait(None if deadline is None else max(0.0, deadline - clock.monotonic()))
            finally:  # whoever polls with short timeouts leaves nothing behind, nor does Ctrl-C
                self.call_no_more(wake)
            if not told and not ready():
                raise TimeoutError(f"{self!r} after {timeout_s} s")


class JobControl:
    """What jobs share with their cache. ``check_here`` raises where nobody would ever end a job.

    ``parts`` is how many the layout has, over all groups.
    """

    def __init__(
        self, runtime: Runtime, cancel: Callable[[AnyJob], object], check_here: Callable[[], object], parts: int
    ) -> None:
        self.runtime = runtime
        self.lock: Lock = runtime.lock()
        self.cancel = cancel
        self.check_here = check_here
        self.parts = parts


def tell(jobs: Iterable[AnyJob]) -> None:
    """``jobs`` have news: whoever waits for them hears it. Called without a lock."""
    ended: dict[Client, list[AnyJob]] = {}
    untold = iter(jobs)
    try:
        for job in untold:
            client, callbacks = job.hear()
            if client is not None:
                ended.setdefault(client, []).append(job)
            if callbacks:
                _call(iter(callbacks), job)
    except BaseException:  # Ctrl-C: nobody else would tell the rest
        tell(untold)
        raise
    finally:
        for client, done in ended.items():
            client.add(done)


def _call(callbacks: Iterator[Callable[[AnyJob], object]], job: AnyJob) -> None:
    """Each of ``callbacks`` with ``job``: a stranger's code on a thread of ours, which has to go on."""
    try:
        for callback in callbacks:
            try:
                callback(job)
            except KeyboardInterrupt:
                raise
            except BaseException:
                log.exception("a callback of %r failed", job)
    except BaseException:
        _call(callbacks, job)
        raise


class Client:
    """A queue of finished jobs of one consumer; nobody else can take its jobs.

    It belongs to whoever asked for it, who closes it or uses it by ``with``; one that is dropped closes itself once its
    last job is gone. Closing a cache leaves its clients open: they have the jobs that ended then. It may be passed to
    several caches.
    """

    def __init__(self) -> None:
        self._done: deque[AnyJob] = deque()
        self._notifier = Notifier()
        self._process = this_process()
        self._told = False  # since the last poll: telling once is enough

    def fileno(self) -> int:
        """Readable while ``poll`` has something: for select, epoll and event loops; -1 once it is closed."""
        return self._notifier.fileno()

    def poll(self) -> list[AnyJob]:
        """Jobs that ended since the last call, in order; never blocks. ClosedError after a fork, in the child."""
        if not self._process.is_here:  # to look would be to take the parent's wake-up
            raise ClosedError("this client is of another process, which forked this one: open a cache of your own here")
        self._notifier.clear()
        self._told = False  # from here on a new job tells again; those before are taken below
        done = self._done
        return [done.popleft() for _ in range(len(done))]

    def add(self, jobs: Iterable[AnyJob]) -> None:
        """Jobs of this client ended."""
        self._done.extend(jobs)
        if not self._told:
            self._told = True
            self._notifier.set()  # after the jobs are there: a poll in between takes them, and finds nothing next time

    def close(self) -> None:
        """Close the descriptor; idempotent. Jobs may end afterwards: ``poll`` still has them, and nobody is woken."""
        self._notifier.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def checked_timeout_s(timeout_s: float | None) -> float | None:
    """Seconds to wait for a job; None for as long as it takes.

    Raises:
        ConfigError: it is neither a number nor None.
    """
    if timeout_s is None:
        return None
    return timeout(timeout_s, MOST_SECONDS, name="timeout", or_else=", or None to wait for as long as it takes")


def _wake(event: Event, _: AnyJob) -> None:
    event.set()


def _result_of(ticket: Ticket, span: range, block_tokens: int) -> Result:
    failed = _reasons(ticket, block_tokens)
    if ticket.kind == TicketKind.FLUSH:
        return FlushResult(not failed, next(iter(failed), ""))
    if ticket.kind == TicketKind.LOAD:
        return _load_result(ticket, span, block_tokens, failed)
    done, existing = (ticket.count(outcome) * block_tokens for outcome in (Outcome.DONE, Outcome.EXISTING))
    if ticket.kind == TicketKind.STORE:
        return StoreResult(done, existing, ticket.count(Outcome.FAILED) * block_tokens, failed, ticket.moved_bytes)
    return PrefetchResult(done, existing, failed, ticket.count(Outcome.PENDING) * block_tokens)


def _load_result(ticket: Ticket, span: range, block_tokens: int, failed: dict[str, int]) -> LoadResult:
    good = ticket.outcome.index(Outcome.FAILED) if failed else len(ticket.outcome)
    by_tier = dict.fromkeys(TIER_NAMES, 0)
    if not good:
        return LoadResult(span.start, by_tier, failed, ticket.moved_bytes)
    tiers, begin = ticket.tiers[:good], ticket.first_block * block_tokens
    end = begin + good * block_tokens
    for tier in set(tiers):
        by_tier[Tier(tier).label] = tiers.count(tier) * block_tokens
    # The load may begin and end inside a block.
    by_tier[Tier(tiers[0]).label] -= span.start - begin
    by_tier[Tier(tiers[-1]).label] -= max(0, end - span.stop)
    return LoadResult(min(end, span.stop), by_tier, failed, ticket.moved_bytes)


def _reasons(ticket: Ticket, block_tokens: int) -> dict[str, int]:
    if Outcome.FAILED not in ticket.outcome:
        return {}
    ends = zip(ticket.outcome, ticket.reason, strict=True)
    counts = Counter(reason for outcome, reason in ends if outcome == Outcome.FAILED)
    return {Reason(reason).name.lower(): count * block_tokens for reason, count in counts.items()}
