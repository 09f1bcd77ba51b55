"""The thread-safe core: checks what callers pass, and turns it into wishes and decisions of one planner."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeAlias

from kvtier.arguments import (
    check_block_tokens,
    check_codecs,
    check_owner,
    check_root,
    checked_checkpoints,
    checked_deadline_s,
    checked_model_id,
    checked_name,
    checked_start,
    checked_string,
    durability_of,
    priority_of,
)
from kvtier.channel import Channel, LocalChannel
from kvtier.config import MOST_SECONDS, Config, load_config
from kvtier.core.checks import flag, timeout, whole
from kvtier.core.keys import Extra, Keys, Root, TokenIds
from kvtier.core.memory import KVMemory, KVPages, PageTable
from kvtier.core.plan import Lineage
from kvtier.dispatch import Dispatch
from kvtier.errors import ClosedError, ConfigError
from kvtier.hits import Hit, Session
from kvtier.jobs import Client, FlushResult, Job, LoadResult, PrefetchResult, StoreResult, checked_timeout_s
from kvtier.memories import EnginePages, own_table
from kvtier.metrics import Sample
from kvtier.models.layout import KVLayout, checked_layout
from kvtier.planner import FlushWish, Held, Lease, LoadWish, Planner, PrefetchWish, StoreWish
from kvtier.planner.events import BlockEvent, events_of
from kvtier.runtime import system_machine, this_process
from kvtier.runtime.deadline import Deadline
from kvtier.runtime.seam import Event, Machine
from kvtier.transfer import DataPlane
from kvtier.transfer.streams import pin

Prompt: TypeAlias = TokenIds | Keys
"""What every verb takes: token ids, or the keys that were made of them."""
log = logging.getLogger(__name__)

_NO_SPAN: Final = range(0)
_ENDING_SHARE: Final = 0.2
"""Of the time that closing has: kept for ending what is under way on a disk that could not take all in the rest."""
_TELLING_S: Final = 1.0
"""For a thread that has planned something, to tell of it."""


class TieredCache:
    """A cache for synchronous callers, in as many threads as they like. A context manager that closes.

    Close it: until then its threads go on, and what the write policy kept back from the disk is lost with the process.
    Call it from any thread, but not from a signal handler or a finalizer, which run in the middle of what their thread
    does, perhaps here: there, only a hit may be released.
    It belongs to the process that opened it: after a fork every verb raises ``ClosedError`` in the child.
    """

    def __init__(
        self,
        config: Config | str | dict[str, Any],
        layout: KVLayout,
        model_id: str,
        *,
        weights_version: str = "",
        machine: Machine | None = None,
        channels: Sequence[Channel] = (),
    ) -> None:
        """Open the tiers, and recover what an earlier life left on disk.

        ``channels`` lead to data planes elsewhere, one per rank; without them there is one, in this process.

        Raises:
            ConfigError: a setting does not fit the layout, or the memory that is free.
            CapacityError: a block is larger than a tier.
            TierError: a directory cannot be used, or the operating system refuses memory, threads or descriptors.
        """
        self.config = config if isinstance(config, Config) else load_config(config)
        check_codecs(self.config)
        self.layout = checked_layout(layout)
        check_block_tokens(self.config, layout)
        self.model_id = checked_model_id(model_id)
        self._machine = machine or system_machine(self.config.disk.io_engine)
        self._process = this_process()
        self._clock = self._machine.runtime.clock
        self._is_local = not channels
        planner = Planner(self.config, layout, ranks=max(1, len(channels)))
        planner.set_weights_version(checked_name("weights_version", weights_version))
        self._dispatch = Dispatch(
            planner, self._machine.runtime, layout,
            make_channels=lambda pump: tuple(channels) or (self._local(pump),), check_here=self._check_here,
        )  # fmt: skip
        self._planner, self._memories, self._lock = planner, self._dispatch.memories, self._dispatch.lock
        self._closing: Event | None = None

    def _local(self, pump: Callable[[], None]) -> Channel:
        pin_arena = partial(pin, mode=self.config.host.pin)
        return LocalChannel(
            lambda on_news: DataPlane(
                self.config, self.layout, self._machine, on_news=on_news, pin=pin_arena, tables_are_checked=True
            ),
            pump,
        )

    def wait_attached(self, timeout_s: float) -> None:
        """Wait until every rank is there and has told what it found on disk; until then lookups miss.

        Raises:
            TimeoutError: a rank is missing.
            ConfigError: ``timeout_s`` is no number.
        """
        self._check_here()
        self._dispatch.wait_attached(timeout(timeout_s, MOST_SECONDS))

    # --- names ------------------------------------------------------------------------------------------------------

    def keys(self, tokens: TokenIds, *, tenant: str = "", adapter: str = "", extra: Iterable[Extra] = ()) -> Keys:
        """Keys of ``tokens``, to be hashed once and appended to; every verb takes them in place of tokens.

        ``extra`` is content beyond the token ids, as (start, stop, digest).

        Raises:
            ConfigError: token ids out of [0, 2^31), or not one dimension of integers; a name that cannot be printed.
            ClosedError: this is another process than that of the cache.
        """
        return Keys.from_tokens(self._root(tenant, adapter), tokens, self.layout.block_tokens, extra)

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
            ClosedError: this is another process than that of the cache.
        """
        root = self._root(tenant, adapter)
        return Keys.foreign(
            root, raw_keys, self.layout.block_tokens, engine=engine, chained=chained, num_tokens=num_tokens
        )

    # --- looking up -------------------------------------------------------------------------------------------------

    def match(self, tokens: Prompt, *, tenant: str = "", adapter: str = "", start: int = 0, exact: bool = False) -> int:
        """Tokens that ``lookup`` would find: no pin, no side effect, memory only.

        Raises:
            ConfigError: as ``lookup``.
            ClosedError: the cache is closed, or of another process.
        """
        keys = self._keys(tokens, tenant, adapter)
        start, exact = checked_start(keys, start), flag("exact", exact)
        self._check_open()
        with self._lock:
            return self._planner.match(keys, start=start, exact=exact)

    def lookup(
        self,
        tokens: Prompt,
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
            ClosedError: the cache is closed, or of another process.
        """
        keys = self._keys(tokens, tenant, adapter)
        start, exact = checked_start(keys, start), flag("exact", exact)
        if session is not None:
            checked_string("session", session)
        if owner is not None:
            check_owner(owner)
        self._check_open()
        now_s, found = self._clock.monotonic(), list[Lease]()

        def find() -> None:
            found.append(
                self._planner.lookup(keys, now_s=now_s, start=start, exact=exact, session=session, owner=owner)
            )

        try:
            self._dispatch.decide(find)
            return Hit(found[0], start, self)
        except BaseException:  # Ctrl-C: what has an owner, its owner finds again
            for lease in found if owner is None else ():
                self.let_go(lease)
            raise

    def session(self, session: str) -> Session:
        """Hints about a conversation, by the name that ``lookup(session=)`` was given.

        Raises:
            ConfigError: the name is no string.
            ClosedError: this is another process than that of the cache.
        """
        self._check_here()
        name = checked_string("session", session)
        with self._lock:
            return Session(self._planner.sessions.hints(name))

    # --- moving -----------------------------------------------------------------------------------------------------

    def submit_load(
        self,
        hit: Hit,
        pages: KVPages | PageTable,
        *,
        start: int | None = None,
        stop: int | None = None,
        priority: str = "demand",
        deadline_s: float | None = None,
        client: Client | None = None,
    ) -> Job[LoadResult]:
        """Bring tokens [start, stop) of ``hit`` into engine memory; by default all that it found.

        ``deadline_s`` (seconds from now; default ``read.deadline_s``) ends the job with what is there by then.

        Raises:
            ConfigError: the range is not within the hit, or the pages do not fit it.
            ClosedError: the cache is closed.
        """
        self._check_open()  # first: of the parent of a fork some thread may have held any lock
        self._check_hit("hit", hit)
        if client is not None:
            _check_client(client)
        start = hit.start if start is None else whole("start", start)
        stop = max(hit.num_tokens, start) if stop is None else whole("stop", stop)
        self._check_hit_range(hit, start, stop)
        deadline = self._clock.monotonic() + checked_deadline_s(deadline_s, self.config.read.deadline_s)
        service = priority_of(priority)
        own = self._pages(pages, start, stop)
        self._check_windows(hit, own, start, stop)
        wish = LoadWish.of(
            hit.lease, own.table, start=start, stop=stop, priority=service, deadline_s=deadline, is_paged=own.is_paged
        )
        return self._dispatch.submit(wish, range(start, stop), own.lent, client)

    def submit_store(
        self,
        tokens: Prompt,
        pages: KVPages | PageTable,
        *,
        tenant: str = "",
        adapter: str = "",
        start: int = 0,
        derived_from: Hit | None = None,
        durability: str = "memory",
        checkpoints: Sequence[int] | None = None,
        session: str | None = None,
        client: Client | None = None,
    ) -> Job[StoreResult]:
        """Keep the full blocks in [start, len(tokens)); what is kept or being stored already is not moved again.

        ``derived_from`` is the hit that these tokens were computed on top of: they inherit its lineage.
        ``durability`` is the level of acknowledgement: ``memory``, ``process`` (survives kill -9) or ``durable``
        (survives a power cut); the last two write to disk for this call, whatever the write policy.
        ``checkpoints`` are numbers of tokens behind which hits are likely to end, such as the length of the prompt and
        that of all tokens, by default the latter alone: of sliding windows and states what the ends of full blocks
        there need is kept (``policy.windows``), as far as the pages have it.

        Raises:
            ConfigError: the pages do not fit, a word is not known, or a checkpoint is no number of tokens.
            ClosedError: the cache is closed.
        """
        self._check_open()
        keys = self._keys(tokens, tenant, adapter)
        start, level = checked_start(keys, start), durability_of(durability)
        if session is not None:
            checked_string("session", session)
        if client is not None:
            _check_client(client)
        lineage = Lineage.EXACT
        if derived_from is not None:
            self._check_hit("derived_from", derived_from)
            lineage = Lineage(derived_from.lease.lineage)
        first = -(-start // keys.block_tokens) * keys.block_tokens
        stop = len(keys)  # they may grow from here on
        if session is not None:
            with self._lock:
                self._planner.sessions.used(session, keys, self._clock.monotonic())
        ends = None if checkpoints is None else checked_checkpoints(checkpoints)
        own = self._pages(pages, first, max(first, stop * keys.block_tokens))
        wish = StoreWish.of(
            keys, stop, own.table, start=start, lineage=lineage, durability=level, is_paged=own.is_paged,
            checkpoints=ends, held=self._held(own, first // keys.block_tokens, stop),
        )  # fmt: skip
        return self._dispatch.submit(wish, _NO_SPAN, own.lent, client)

    def submit_prefetch(
        self,
        tokens: Prompt,
        *,
        to: str = "host",
        tenant: str = "",
        adapter: str = "",
        deadline_s: float | None = None,
        client: Client | None = None,
    ) -> Job[PrefetchResult]:
        """Bring the stored prefix of ``tokens`` up to ``to``, ``host`` or ``device``, ahead of its use.

        It may take ``deadline_s`` seconds, without that as long as ``[prefetch]`` says; what is not there by then is
        left on disk. With ``policy = "best_effort"`` the job ends at once, and the blocks come behind it: whoever
        loads them takes those that have come from host memory, and reads the others itself.

        Raises:
            ConfigError: ``to`` is no memory tier of this cache, ``deadline_s`` no time above 0, or tokens or keys as
                ``lookup``.
            ClosedError: the cache is closed, or of another process.
        """
        self._check_tier(to)
        keys = self._keys(tokens, tenant, adapter)
        waits = deadline_s is not None or self.config.prefetch.policy != "best_effort"
        patience_s = self._prefetch_patience_s(keys) if deadline_s is None else checked_deadline_s(deadline_s, 0.0)
        deadline = None if patience_s is None else self._clock.monotonic() + patience_s
        if client is not None:
            _check_client(client)
        self._check_open()
        return self._dispatch.submit(
            PrefetchWish.of(keys, deadline, waits=waits, to_device=to == "device"), _NO_SPAN, None, client
        )

    def submit_flush(self, durability: str = "process", *, client: Client | None = None) -> Job[FlushResult]:
        """Everything stored so far reaches ``durability``, as in ``submit_store``.

        Raises:
            ConfigError: there is no such level.
            ClosedError: the cache is closed, or of another process.
        """
        if client is not None:
            _check_client(client)
        self._check_open()
        return self._dispatch.submit(FlushWish.of(durability_of(durability)), _NO_SPAN, None, client)

    def flush(self, durability: str = "process", timeout_s: float | None = None) -> FlushResult:
        """``submit_flush``, waited for.

        Raises:
            TimeoutError: it takes longer than ``timeout_s`` seconds; it goes on.
            ConfigError: as ``submit_flush``, or ``timeout_s`` is neither a number nor None.
            ClosedError: as ``submit_flush``.
        """
        timeout_s = checked_timeout_s(timeout_s)
        return self.submit_flush(durability).result(timeout_s)

    # --- the engine's memory ----------------------------------------------------------------------------------------

    def register(self, memory: KVMemory) -> int:
        """Make ``memory`` known on every rank for good; returns its number for page tables.

        ``KVPages`` of memory that was not registered are registered for the time of each job.

        Raises:
            ConfigError: it is no engine memory, it is of another layout, or ranks disagree on its number.
            ClosedError: the cache is closed, or of another process.
        """
        if not isinstance(memory, KVMemory):
            raise ConfigError(f"memory = {memory!r}: want engine memory, such as PagedTensors or DenseKV")
        self._check_open()
        with self._lock:
            return self._memories.register(memory)

    def unregister(self, memory: KVMemory) -> None:
        """Forget ``memory`` once no job uses it that was given ``KVPages``; jobs that name it by number end first.

        Raises:
            ClosedError: this is another process than that of the cache.
        """
        self._check_here()
        with self._lock:
            self._memories.unregister(memory)

    # --- the rest ---------------------------------------------------------------------------------------------------

    def client(self) -> Client:
        """A queue of one's own for finished jobs: pass it to ``submit_*``, poll it, or wait on its ``fileno``.

        Whoever asks for it closes it, or uses it by ``with``; ``close`` of the cache leaves it open, to be polled.
        """
        return Client()

    def set_weights_version(self, version: str) -> None:
        """From now on KV of any other version is a miss, in every tier, at once.

        Raises:
            ConfigError: ``version`` is no string of printable characters.
            ClosedError: the cache is closed, or of another process.
        """
        checked = checked_name("weights_version", version)
        self._check_open()
        self._dispatch.decide(lambda: self._planner.set_weights_version(checked))

    def take_events(self) -> list[BlockEvent]:
        """Blocks that came and went since the last call; the first call begins to listen.

        Of more than 262,144 blocks the oldest are dropped; the counter ``dropped_events`` says how many.

        Raises:
            ClosedError: this is another process than that of the cache.
        """
        self._check_here()
        with self._lock:
            self._planner.events.listening = True
            batches = self._planner.events.take_batches()
        return events_of(batches)

    def samples(self) -> list[Sample]:
        """Counters and levels of planner and data planes, for ``kvtier.metrics.prometheus.PrometheusCollector``.

        Raises:
            ClosedError: this is another process than that of the cache.
        """
        self._check_here()
        counters, levels = self._dispatch.decide(self._counts)
        found = [Sample("counter", name, {}, value) for name, value in counters.items()]
        found += [Sample("gauge", name, {}, value) for name, value in levels.items()]
        channels = self._dispatch.channels
        for rank, channel in enumerate(channels):
            for sample in channel.samples():
                labels = {"rank": str(rank)} if len(channels) > 1 else {}
                found.append(replace(sample, labels=sample.labels | labels))
        return sorted(found, key=lambda sample: sample.name)

    def _counts(self) -> tuple[dict[str, float], dict[str, float]]:
        return self._planner.counters(), self._planner.levels() | self._dispatch.levels()

    def stats(self) -> dict[str, float]:
        """``samples`` as one dict; names end in their unit, labels stand in braces.

        Raises:
            ClosedError: as ``samples``.
        """
        return {str(sample): sample.value for sample in self.samples()}

    def close(self, timeout_s: float = 30.0) -> bool:
        """Write what the policy promised, end every job, close the tiers; True when nothing was left behind.

        ``timeout_s`` is for all of it; 0 or less does not wait. False: time ran out, and jobs may be under way still.
        They end when it is called again, with more of it. Any number of threads may close: they take turns.
        In a child of the process that opened it nothing happens: all of it is the parent's.

        Raises:
            ConfigError: ``timeout_s`` is no number; nothing is closed.
        """
        timeout_s = timeout(timeout_s, MOST_SECONDS)
        if not self._process.is_here:
            return True
        deadline, mine = Deadline(self._clock, timeout_s), self._machine.runtime.event()
        try:
            if not self._begin_to_close(mine, deadline):
                return False
            if self.config.disk.directories and not self._dispatch.closed:
                self._flush_at_close(deadline.left_s() * (1 - _ENDING_SHARE))
            return self._dispatch.close(deadline.left_s())
        finally:
            self._end_to_close(mine)

    def _begin_to_close(self, mine: Event, deadline: Deadline) -> bool:
        """One thread closes at a time: another would stop what the first one is waiting for."""
        while True:
            with self._lock:
                other = self._closing
                if other is None:
                    self._closing = mine
                    return True
            left_s = deadline.left_s()
            if not left_s or not other.wait(left_s):
                return False

    def _end_to_close(self, mine: Event) -> None:
        with self._lock:
            if self._closing is mine:  # else it never was our turn
                self._closing = None
        mine.set()

    def _flush_at_close(self, timeout_s: float) -> None:
        job = self.submit_flush("process")
        # Planned and told here and now: what has nothing to do ends however little time there is.
        self._dispatch.decide(lambda: None)
        self._dispatch.pump()
        try:
            # Where another thread planned it, that one is about to tell, unless Ctrl-C struck it.
            result = job.result(max(timeout_s, _TELLING_S) if job.ticket.finished else timeout_s)
        except TimeoutError:
            log.warning("close: the disk did not take everything within %g s; what is not on it is lost", timeout_s)
            return
        if not result.ok:
            log.warning("close: some blocks could not be written to disk (%s); they are lost", result.reason)

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Take in what channels have to say; for channels to call on news, from any thread, with no lock held."""
        self._dispatch.pump()

    def release(self, lease: Lease) -> None:
        """For hits: let go of ``lease``, and see to what follows."""
        if self._process.is_here:
            self._dispatch.release(lease)

    def let_go(self, lease: Lease) -> None:
        """For hits: as ``release``, in the middle of anything; what follows may be left to the next verb."""
        if self._process.is_here:
            self._dispatch.let_go(lease)

    def _root(self, tenant: str, adapter: str) -> Root:
        self._check_here()
        tenant, adapter = checked_name("tenant", tenant), checked_name("adapter", adapter)
        return Root(self.model_id, self._planner.weights_version, adapter, tenant)

    def _keys(self, tokens: Prompt, tenant: str, adapter: str) -> Keys:
        if isinstance(tokens, Keys):
            self._planner.check_keys(tokens)
            check_root(tokens, self.model_id, tenant, adapter)
            return tokens
        return self.keys(tokens, tenant=tenant, adapter=adapter)

    def _pages(self, pages: KVPages | PageTable, start: int, stop: int) -> EnginePages:
        """``pages``, once tokens [start, stop) are known to lie in them."""
        if isinstance(pages, PageTable):
            return self._registered_pages(pages, start, stop)
        is_whole = (
            isinstance(pages, KVPages) and isinstance(pages.table, PageTable) and hasattr(pages.memory, "is_paged")
        )
        if not is_whole:
            raise ConfigError(
                f"pages: want KVPages (see PagedTensors.pages, DenseKV.row) or a PageTable, not {reprlib.repr(pages)}"
            )
        own = own_table(pages.table, len(self.layout.groups))
        if start < stop:  # else no block is full, and the table need not reach as far as the next one
            pages.memory.check(own, start, stop)
        with self._lock:
            self._check_open()
            memory_id = self._memories.use(pages.memory)
        table = PageTable(memory_id, own.groups)
        return EnginePages(table, is_paged=pages.memory.is_paged, lent=pages.memory, memory=pages.memory)

    def _registered_pages(self, table: PageTable, start: int, stop: int) -> EnginePages:
        self._check_open()
        memory = self._memories.find(table.memory_id) if isinstance(table.memory_id, int) else None
        if memory is None and self._is_local:
            raise ConfigError(f"pages: memory {table.memory_id} is not registered; see register()")
        if start >= stop:
            return EnginePages(table)
        own = own_table(table, len(self.layout.groups))
        if memory is None:  # only the ranks know it, and compare the table with it
            return EnginePages(own)
        memory.check(own, start, stop)
        return EnginePages(own, is_paged=memory.is_paged, memory=memory)

    def _held(self, pages: EnginePages, first: int, stop: int) -> Mapping[int, Held]:
        """Of groups that need no whole prefix, which blocks of a store of [first, stop) lie in ``pages``."""
        windows, held = self._planner.windows, dict[int, Held]()
        for group in windows.stored if first < stop else ():
            blocks = windows.reach(group, first, stop)
            held[group] = Held(blocks.start, pages.held(self.layout, group, blocks))
        return held

    def _check_windows(self, hit: Hit, pages: EnginePages, start: int, stop: int) -> None:
        """Refuse pages without a place for what ``hit`` has in [start, stop) of windows and states."""
        size, lease = self.layout.block_tokens, hit.lease
        for group in self._planner.windows.partial if start < stop else ():
            first, end = lease.begins[group], lease.first_block + lease.blocks
            blocks = range(max(first, start // size), min(end, -(-stop // size)))
            if len(lease.groups[group]) and blocks and not (held := pages.held(self.layout, group, blocks)).all():
                missing = blocks[int(held.argmin())]
                raise ConfigError(
                    f"pages: group {self.layout.groups[group].name!r} has no pages for block {missing} (tokens"
                    f" [{missing * size}, {missing * size + size})), want pages for blocks {blocks.start} to"
                    f" {blocks.stop - 1}: the end of a hit needs them"
                )

    def _check_tier(self, to: str) -> None:
        wanted = ("host", "device") if self.config.device.capacity else ("host",)
        if not isinstance(to, str) or to not in wanted:
            remedy = "" if len(wanted) > 1 else "; device.capacity = 0: there is no device tier"
            raise ConfigError(f"prefetch(to={to!r}): want {' or '.join(map(repr, wanted))}{remedy}")

    def _prefetch_patience_s(self, keys: Keys) -> float | None:
        prefetch = self.config.prefetch
        if prefetch.policy != "timeout":
            return None
        return prefetch.timeout_base_s + prefetch.timeout_per_1k_tokens_s * keys.num_tokens / 1024

    def _check_hit(self, name: str, hit: Hit) -> None:
        if not isinstance(hit, Hit) or hit.origin is not self:
            raise ConfigError(f"{name} = {hit!r}: want a hit that lookup() of this very cache returned")

    def _check_hit_range(self, hit: Hit, start: int, stop: int) -> None:
        low = hit.lease.first_block * hit.keys.block_tokens
        end = hit.num_tokens if start < stop else max(hit.num_tokens, hit.start)
        if not low <= start <= stop <= end:
            raise ConfigError(f"load [{start}, {stop}): the hit holds tokens [{low}, {hit.num_tokens})")

    def _check_here(self) -> None:
        if not self._process.is_here:
            raise ClosedError("this cache is of another process, which forked this one: open a cache of your own here")

    def _check_open(self) -> None:
        self._check_here()
        self._dispatch.check_open()


def _check_client(client: object) -> None:
    if not isinstance(client, Client):
        raise ConfigError(f"client = {client!r}: want what client() of a cache returned, or None")
