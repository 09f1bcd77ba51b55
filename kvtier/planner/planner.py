"""The planner: wish -> plan; completion and report -> published state.

Single-threaded code without I/O. Its owner (``cache.py``, or an engine's scheduler) serialises the calls, passes the
time as ``now_s``, sends what ``take_plans`` returns to the data planes, and tells callers of ``take_finished``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby
from typing import Final, TypeVar

import numpy as np

from kvtier.config import Config
from kvtier.core.keys import Keys
from kvtier.core.memory import PageTable
from kvtier.core.plan import (
    PAGE_BYTES,
    Completion,
    DiskState,
    Farewell,
    Hello,
    Lineage,
    Lost,
    Message,
    Plan,
    Priority,
    Reason,
    Recovered,
    Tier,
)
from kvtier.errors import ConfigError
from kvtier.index.cells import Cells
from kvtier.index.entries import MAX_RANKS, EntryRows
from kvtier.models.layout import KVLayout
from kvtier.planner.commits import Commits
from kvtier.planner.events import ControlEvents
from kvtier.planner.finding import Found
from kvtier.planner.joint import JointPlans
from kvtier.planner.journeys import Journeys
from kvtier.planner.leases import Lease
from kvtier.planner.memory import MemoryBook
from kvtier.planner.recovery import Recovery
from kvtier.planner.reports import Reports
from kvtier.planner.sessions import Sessions
from kvtier.planner.stages import Stages
from kvtier.planner.state import ControlState
from kvtier.planner.stores import Stores
from kvtier.planner.tickets import Durability, Ticket
from kvtier.planner.upkeep import Upkeep
from kvtier.planner.windows import Windows
from kvtier.planner.wishes import FlushWish, LoadWish, PrefetchWish, StoreWish, Wish
from kvtier.planner.writes import WriteQueue

X = TypeVar("X")
Y = TypeVar("Y")
_MAX_ENTRIES: Final = 1 << 24
_FEW_ROWS: Final = 32
"""Of plans, which are sent as soon as what follows from them is planned; more are sent before."""
_NOTHING_LEFT: Final[Sequence[Wish]] = ()


class Planner:
    """The whole control plane of one cache."""

    def __init__(self, config: Config, layout: KVLayout, *, ranks: int = 1) -> None:
        """``layout`` gives block and record sizes, equal on all ``ranks``.

        Raises:
            ConfigError: there are too many ranks.
        """
        if not 1 <= ranks <= MAX_RANKS:
            raise ConfigError(f"ranks = {ranks}: between 1 and {MAX_RANKS} are served")
        index = Cells(max_entries(config, layout), ranks, has_device=config.device.capacity > 0)
        self._state = ControlState(config, layout, index)
        stages = self._stages = Stages(self._state)
        self._journeys = Journeys(self._state, stages)
        self._stores = Stores(self._state, stages)
        self._joint = JointPlans(self._state, self._stores)
        self._recovery = Recovery(self._state)
        self._commits = Commits(self._state, stages, self._recovery)
        self._reports = Reports(self._state, self._commits, self._recovery)
        self._upkeep = Upkeep(self._state, stages)
        self.sessions = Sessions()
        self.follows = False
        """Whether it is time for ``follow_up``."""

    # --- looking up -------------------------------------------------------------------------------------------------

    def match(self, keys: Keys, *, start: int = 0, exact: bool = False) -> int:
        """Tokens that ``lookup`` would find: without a pin, without a trace.

        Raises:
            ConfigError: ``keys`` are of blocks of another size.
        """
        return self._state.finder.find(keys, self._wanted(keys, start), exact=exact).stop * keys.block_tokens

    def lookup(
        self,
        keys: Keys,
        *,
        now_s: float,
        start: int = 0,
        exact: bool = False,
        session: str | None = None,
        owner: Hashable | None = None,
    ) -> Lease:
        """Pin the longest prefix that can be read beyond ``start``, which the engine holds itself."""
        state = self._state
        wanted = self._wanted(keys, start)
        if owner is not None and (held := state.leases.of(owner, keys, wanted, exact=exact)):
            return held
        found = state.finder.find(keys, wanted, exact=exact)
        lease = Lease(
            number=0, owner=owner, keys=keys, first_block=wanted.start, last_block=wanted.stop, blocks=found.blocks,
            begins=found.begins, groups=found.groups, tiers=self._tiers(found),
            pending_blocks=self._pending_after(keys, wanted, found.blocks), lineage=self._lineage(found),
            replay_tokens=found.replay_tokens,
        )  # fmt: skip
        for book in state.books.values():
            book.now_s = now_s
            for group in (*state.windows.whole, *state.windows.partial):  # what only a hit's end needs is the newer one
                book.touch(found.groups[group])
            for group in state.windows.partial:
                book.keep(found.groups[group])
        state.counts["lookup_tokens"] += keys.num_tokens - start
        state.counts["hit_tokens"] += max(0, found.stop * keys.block_tokens - start)
        if found.replay_tokens:
            state.counts["replay_tokens"] += found.replay_tokens
        if session is not None:
            self.sessions.used(session, keys, now_s)
        state.leases.open(lease)
        try:
            self._admit_to_disk(found.groups)
        except BaseException:  # Ctrl-C: nobody gets to know of the lease
            self.release(lease)
            raise
        return lease

    def release(self, lease: Lease) -> None:
        """Give the lease back; a second time is harmless."""
        for entries in self._state.leases.release(lease):
            self._state.unpinned(entries)
        if self._upkeep.waits_for_segments:
            self.follow_up()

    # --- moving -----------------------------------------------------------------------------------------------------

    def plan(self, wishes: Iterable[Wish], *, now_s: float | None = None) -> None:
        """Plan ``wishes``, in order; small ones side by side share a plan. Their tickets say how it goes on.

        Whoever made them has compared page tables with their memory, and keys with ``check_keys``. One that cannot be
        planned, by a mistake of ours, is refused, and all others are planned: ``take_mistakes`` says why.
        What follows from them is planned at once where they are few, and left to ``follow_up`` where ``follows`` says
        so: the bytes of many blocks are on their way meanwhile.
        """
        if now_s is not None:
            for book in self._state.books.values():
                book.now_s = now_s
        for _, alike in groupby(wishes, self._joint.likeness):
            for portion in self._joint.portions(alike):
                alone = portion
                if len(portion) > 1:
                    alone = self._guarded(self._joint.plan, portion, portion, _NOTHING_LEFT)
                for wish in alone:
                    self._guarded(self._plan_one, wish, (wish,), None)
        self.follows = True
        if sum(len(plan.rows) for plan in self._state.plans) <= _FEW_ROWS:
            self.follow_up()

    def _guarded(self, step: Callable[[X], Y], subject: X, wishes: Sequence[Wish], instead: Y) -> Y:
        try:
            return step(subject)
        except BaseException as error:
            self._refuse(wishes, error)
            if not isinstance(error, Exception):
                raise
            return instead

    def _refuse(self, wishes: Sequence[Wish], error: BaseException) -> None:
        """Planning ``wishes`` failed half-way: what is under way for them ends them, or they end now."""
        self._state.mistakes.append((f"planning {len(wishes)} wishes", error))
        for wish in wishes:
            ticket = wish.ticket
            self._state.counts["failed_wishes"] += 1
            self._stages.give_up(ticket, Reason.REFUSED, waits=ticket.waits)

    def give_up(self, wishes: Sequence[Wish], error: BaseException) -> None:
        """End those of ``wishes`` that nothing is under way for: nobody came to planning them. None: a lease stays."""
        self._state.mistakes.append(("planning wishes" if wishes else "letting go of a lease", error))
        for wish in wishes:
            ticket = wish.ticket
            if not ticket.finished and not ticket.waits:
                self._stages.give_up(ticket, Reason.REFUSED)
                self._state.counts["failed_wishes"] += 1

    def end(self, tickets: Iterable[Ticket]) -> None:
        """End those of ``tickets`` that have not: every rank is closed, and answers nothing any more."""
        for ticket in tickets:
            self._stages.give_up(ticket, Reason.CLOSED)

    def take_mistakes(self) -> list[tuple[str, BaseException]]:
        """What was being done, and what it raised, where nothing should be raised: for the log, once."""
        mistakes, self._state.mistakes = self._state.mistakes, []
        return mistakes

    def _plan_one(self, wish: Wish) -> None:
        if isinstance(wish, StoreWish):
            self._stores.store(wish)
        elif isinstance(wish, LoadWish):
            self._journeys.load(wish)
        elif isinstance(wish, PrefetchWish):
            self._journeys.prefetch(wish)
        else:
            self._journeys.flush(wish)

    def load(
        self,
        lease: Lease,
        pages: PageTable,
        *,
        start: int,
        stop: int,
        priority: Priority = Priority.DEMAND,
        deadline_s: float | None = None,
    ) -> Ticket:
        """Plan to bring tokens [start, stop) of a lease into engine pages."""
        return self._planned(
            LoadWish.of(lease, pages, start=start, stop=stop, priority=priority, deadline_s=deadline_s)
        )

    def store(
        self,
        keys: Keys,
        pages: PageTable,
        *,
        start: int = 0,
        lineage: Lineage = Lineage.EXACT,
        durability: Durability = Durability.MEMORY,
        checkpoints: Sequence[int] | None = None,
    ) -> Ticket:
        """Plan to keep the full blocks in [start, len) that are not kept yet; of windows and states, all of them.

        Raises:
            ConfigError: ``keys`` are of blocks of another size.
        """
        self.check_keys(keys)
        return self._planned(
            StoreWish.of(
                keys, len(keys), pages, start=start, lineage=lineage, durability=durability, checkpoints=checkpoints
            )
        )

    def prefetch(self, keys: Keys, *, deadline_s: float | None = None, to_device: bool = False) -> Ticket:
        """Plan to bring what is only on disk into host memory, or all to the device; raises as ``store``."""
        self.check_keys(keys)
        return self._planned(PrefetchWish.of(keys, deadline_s, to_device=to_device))

    def flush(self, durability: Durability) -> Ticket:
        """Everything stored so far reaches ``durability``."""
        return self._planned(FlushWish.of(durability))

    def _planned(self, wish: Wish) -> Ticket:
        self.plan((wish,))
        if self.follows:
            self.follow_up()
        return wish.ticket

    def check_keys(self, keys: Keys) -> None:
        """Refuse keys of blocks of another size. Changes nothing, so any thread may call it at any time.

        Raises:
            ConfigError: they are of blocks of another size.
        """
        if keys.block_tokens != self._state.layout.block_tokens:
            raise ConfigError(
                f"these keys are of blocks of {keys.block_tokens} tokens, the cache's have"
                f" {self._state.layout.block_tokens}: make keys with cache.keys()"
            )

    # --- hearing ----------------------------------------------------------------------------------------------------

    def hear(self, messages: Iterable[Message]) -> None:
        """``take_in`` each of ``messages``, in order; then ``follow_up``."""
        for message in messages:
            self.take_in(message)
        self.follow_up()

    def follow_up(self) -> None:
        """Plan what nobody asked for and what follows from what was taken in, or planned."""
        self.follows = False
        try:
            self._upkeep.plan()
        except Exception as error:
            self._state.counts["failed_follow_ups"] += 1
            self._state.mistakes.append(("planning what follows", error))

    def pass_over(self, message: Message, error: BaseException) -> None:
        """Taking ``message`` in failed, nobody knows how far it came: whoever waits for it is refused."""
        state = self._state
        state.counts["failed_messages"] += 1
        what = f"taking in a {type(message).__name__} of rank {message.rank}"
        state.mistakes.append((what, error))
        try:
            if isinstance(message, Completion):
                self._commits.give_up(message)
            elif isinstance(message, Recovered) and message.final:
                self._recovery.give_up(message.rank)
        except Exception as another:
            state.mistakes.append((f"passing over what followed from {what}", another))

    def disown(self, plans: Iterable[Plan]) -> None:
        """A rank did not take ``plans``: whoever waits for them is refused, and nothing of them is published."""
        for plan in plans:
            self._state.counts["failed_plans"] += 1
            self._commits.disown(plan)
        self.follow_up()

    def take_in(self, message: Message) -> None:
        """Commit a completion, or take a report in; words of an earlier life of a rank are passed over.

        Raises:
            ConfigError: a data plane says hello for a rank that this cache does not have.
        """
        if isinstance(message, Completion) and message.incarnation == self._state.incarnations.get(message.rank):
            self._commits.complete(message)
        elif isinstance(message, Hello):
            self._reports.attach(message)
        elif message.incarnation != self._state.incarnations.get(message.rank):
            self._state.counts["late_messages"] += 1
        elif isinstance(message, Farewell):
            self._reports.detach(message.rank)
        elif isinstance(message, Recovered):
            self._recovery.take(message)
        elif isinstance(message, Lost):
            self._reports.lost(message)
        elif isinstance(message, DiskState):
            self._reports.disk_state(message)

    def set_weights_version(self, version: str) -> None:
        """From now on only KV of ``version`` hits; loads and stores of others that are under way end as misses."""
        self._state.version = version

    @property
    def weights_version(self) -> str:
        """The version whose KV may hit."""
        return self._state.version

    def take_plans(self) -> list[Plan]:
        """Plans to send, once."""
        plans, self._state.plans = self._state.plans, []
        return plans

    def take_finished(self) -> list[Ticket]:
        """Tickets that finished or whose source became free since the last call."""
        finished, self._state.news = self._state.news, []
        return finished

    @property
    def windows(self) -> Windows:
        """Which groups need no whole prefix, and what of them."""
        return self._state.windows

    @property
    def has_news(self) -> bool:
        """Whether ``take_plans``, ``take_finished`` or ``take_mistakes`` has something, or something ``follows``."""
        state = self._state
        return bool(state.plans or state.news or state.mistakes or self.follows)

    @property
    def events(self) -> ControlEvents:
        """Stored and removed blocks."""
        return self._state.events

    @property
    def recovering(self) -> bool:
        """Whether a data plane has not told all of what it found on disk yet."""
        return bool(self._state.recovering) or len(self._state.incarnations) < self._state.index.ranks

    @property
    def recovered_ranks(self) -> int:
        """Ranks that have reported everything that they found."""
        return len(self._state.incarnations) - len(self._state.recovering)

    def counters(self) -> dict[str, float]:
        """What happened so far; names end in their unit."""
        state = self._state
        evicted = {"evicted_entries": state.host.evicted}
        if state.device is not None:
            evicted["evicted_device_entries"] = state.device.evicted
        return {**state.counts, **evicted, "dropped_events": state.events.dropped}

    def levels(self) -> dict[str, float]:
        """How things are now; names end in their unit."""
        state, touched = self._state, self._state.index.table.touched
        spaces = state.host.spaces.values()
        levels = {} if state.device is None else _levels_of_device(state.device, state.landing)
        return levels | {
            "entries": state.index.count,
            "host_entries": len(state.host),
            "disk_entries": int(np.count_nonzero(state.index.disk_ranks[:touched])),
            "pinned_entries": int(np.count_nonzero(state.index.pins[:touched])),
            "host_used_bytes": PAGE_BYTES * sum(space.used_pages for space in spaces),
            "host_capacity_bytes": PAGE_BYTES * sum(space.capacity_pages for space in spaces),
            "write_backlog_entries": state.disk.backlog,
            "leases": len(state.leases),
            "hops": len(state.hops),
        }

    def stats(self) -> dict[str, float]:
        """Counters and levels together."""
        return self.counters() | self.levels()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _wanted(self, keys: Keys, start: int) -> range:
        """Blocks that may hit: from the one that ``start`` lies in, so far that a token is left to compute."""
        self.check_keys(keys)
        first = start // keys.block_tokens
        if keys.root.weights_version != self._state.version:
            return range(first, first)
        return range(first, max(first, (keys.num_tokens - 1) // keys.block_tokens))

    def _admit_to_disk(self, groups: tuple[EntryRows, ...]) -> None:
        """``write_through_selective``: a block that is used again has earned its place on disk."""
        state = self._state
        if state.config.policy.write != "write_through_selective" or not state.disk.usable:
            return
        for group, entries in enumerate(groups):
            if group not in state.spilled_groups:
                continue
            for entry in entries[~state.index.on_disk(entries)].tolist():
                if not state.disk.was_refused(entry):
                    state.disk.enqueue(entry)
        self.follow_up()

    def _tiers(self, found: Found) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        state = self._state
        tiers = np.full(found.blocks, state.top_tier, np.uint8)
        for begin, entries in zip(found.begins, found.groups, strict=True):
            own = tiers[begin - found.first :]
            if state.device is not None:
                np.maximum(own, state.tiers_of(entries), out=own)
            elif not state.index.all_on_host(entries):
                own[~state.index.on_host(entries)] = Tier.DISK
        return tiers

    def _lineage(self, found: Found) -> int:
        if found.is_approximate:
            return int(Lineage.APPROXIMATE)
        lineage = self._state.index.lineage
        return max((int(lineage[entries].max()) for entries in found.groups if len(entries)), default=0)

    def _pending_after(self, keys: Keys, wanted: range, found: int) -> int:
        storing, table, first = self._state.storing, self._state.index.table, wanted.start + found
        if not storing or keys.root.weights_version != self._state.version:
            return 0
        at = first
        group = (*self._state.windows.whole, 0)[0]
        while at < len(keys) and table.find_one(keys.digests[at], group) in storing:
            at += 1
        return at - first


def _levels_of_device(device: MemoryBook, landing: WriteQueue) -> dict[str, float]:
    spaces = device.spaces.values()
    return {
        "device_entries": len(device),
        "device_used_bytes": PAGE_BYTES * sum(space.used_pages for space in spaces),
        "device_capacity_bytes": PAGE_BYTES * sum(space.capacity_pages for space in spaces),
        "landing_backlog_entries": landing.backlog,
    }


def max_entries(config: Config, layout: KVLayout) -> int:
    """Entries that the tiers can hold, doubled for compression and for links that outlive their copies."""
    nbytes = config.device.capacity + config.host.capacity + config.disk.capacity * bool(config.disk.directories)
    smallest = min(layout.record_pages) * PAGE_BYTES
    return min(_MAX_ENTRIES, 2 * (nbytes // smallest) * len(layout.groups) + 4096)
