"""A planner with fake data planes around it; everything between them crosses as bytes. ``check`` knows what is true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from kvtier.config import Config, load_config
from kvtier.core.keys import Keys, Root
from kvtier.core.memory import GroupPages, PageTable
from kvtier.core.plan import PAGE_BYTES, Lineage, Message, Plan, PlanKind, Priority, Status, Tier
from kvtier.core.wire import decode, encode
from kvtier.models import KVGroup, KVLayout, Part, Reuse
from kvtier.planner import Durability, Lease, Planner, Ticket, Wish
from kvtier.planner.hops import SILENT
from tests.planner.fake_plane import FakePlane, Place

BLOCK = 4
ROOT = Root("model")
BACK: dict[str, Any] = {"policy": {"write": "write_back"}}
PAGES = PageTable(0, (GroupPages(0, np.arange(64, dtype=np.int32)),))


def layout_of(groups: int) -> KVLayout:
    """Records of two pages in group 0, three in group 1."""
    parts = [Part(0, "kv", "bfloat16", ("token", "head", "dim"), (BLOCK, 1, 8 if at == 0 else 1024)) for at in range(2)]
    return KVLayout(BLOCK, BLOCK, tuple(KVGroup(f"g{at}", (parts[at],)) for at in range(groups)))


def windowed_layout(window_tokens: int = 2 * BLOCK, replay_tokens: int = 0) -> KVLayout:
    """A group that needs the whole prefix, a sliding window and a state; records of two pages each."""
    axes, shape = ("token", "head", "dim"), (BLOCK, 1, 8)
    state = Part(0, "state", "float32", ("head", "state"), (2, 8))
    return KVLayout(
        BLOCK,
        BLOCK,
        (
            KVGroup("attention", (Part(0, "kv", "bfloat16", axes, shape),)),
            KVGroup(
                "window", (Part(1, "kv", "bfloat16", axes, shape),), Reuse("trailing", window_tokens, replay_tokens)
            ),
            KVGroup("state", (state,), Reuse("last")),
        ),
    )


def config_of(with_disk: bool, **sections: dict[str, Any]) -> Config:
    """Watermarks are out of the way unless a test sets them."""
    base: dict[str, Any] = {
        "host": {"capacity": "1MiB", "high_watermark": 1.0, "low_watermark": 0.99, "staging": "1MiB"},
        "disk": {"directories": ["/disk"] if with_disk else [], "capacity": "1MiB"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return load_config(base)


class Bench:
    """Blocks of four tokens; ``host_blocks`` of them fit host memory of each rank."""

    def __init__(
        self,
        *,
        ranks: int = 1,
        groups: int = 1,
        host_blocks: int = 16,
        device_blocks: int = 0,
        segments: int = 0,
        segment_blocks: int = 4,
        clean_target: int = 1,
        directories: int = 1,
        attach: bool = True,
        layout: KVLayout | None = None,
        **sections: dict[str, Any],
    ) -> None:
        self.layout = layout or layout_of(groups)
        pages = sum(self.layout.record_pages)
        if device_blocks:
            sections = {"device": {"capacity": "1MiB"}, **sections}
        self.planner = Planner(config_of(segments > 0, **sections), self.layout, ranks=ranks)
        self.planes = [
            FakePlane(
                rank, host_pages=host_blocks * pages, segments=segments, segment_pages=segment_blocks * pages,
                clean_target=clean_target, directories=directories, layout=self.layout,
                device_pages=device_blocks * pages,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        self.now_s = 0.0
        self.tickets: list[Ticket] = []
        self.news: list[Ticket] = []
        self.sent: list[Plan] = []
        if attach:
            for plane in self.planes:
                plane.hello()
                if segments:
                    plane.recover()
            self.hear()

    def reopen(self, **order: Any) -> Bench:
        """A new process for everything, in the same directories; ``order`` as in ``FakePlane.recover``."""
        other = Bench(attach=False, ranks=len(self.planes), layout=self.layout, segments=1)
        other.planes = self.planes
        for plane in self.planes:
            plane.restart()
            plane.recover(**order)
        other.hear()
        return other

    # --- wishes -----------------------------------------------------------------------------------------------------

    def keys(self, blocks: int, seed: int = 0, *, shared: int = 0, extra_tokens: int = 1, root: Root = ROOT) -> Keys:
        """A sequence of ``blocks`` full blocks and some tokens; the first ``shared`` blocks are those of every seed."""
        common = np.random.default_rng(0).integers(0, 1000, shared * BLOCK)
        rest = np.random.default_rng(1 + seed).integers(0, 1000, (blocks - shared) * BLOCK + extra_tokens)
        return Keys.from_tokens(root, np.concatenate((common, rest)), BLOCK)

    def store(self, keys: Keys, **how: Any) -> Ticket:
        """Plan a store and send it; nothing has moved."""
        return self._note(self.planner.store(keys, PAGES, **how))

    def stored(self, keys: Keys, **how: Any) -> Ticket:
        """Store, and let everything come to rest."""
        ticket = self.store(keys, **how)
        self.run()
        assert ticket.finished
        return ticket

    def lookup(self, keys: Keys, **how: Any) -> Lease:
        return self.planner.lookup(keys, now_s=self.now_s, **how)

    def load(self, lease: Lease, start: int | None = None, stop: int | None = None, **how: Any) -> Ticket:
        start = lease.first_block * BLOCK if start is None else start
        stop = (lease.first_block + lease.blocks) * BLOCK if stop is None else stop
        return self._note(self.planner.load(lease, PAGES, start=start, stop=stop, **how))

    def loaded(self, keys: Keys, **how: Any) -> Ticket:
        """Look up, load, release, and let everything come to rest."""
        lease = self.lookup(keys, **how)
        ticket = self.load(lease)
        self.planner.release(lease)
        self.run()
        return ticket

    def prefetch(self, keys: Keys, **how: Any) -> Ticket:
        return self._note(self.planner.prefetch(keys, **how))

    def flush(self, durability: Durability = Durability.PROCESS) -> Ticket:
        return self._note(self.planner.flush(durability))

    def plan(self, wishes: Sequence[Wish]) -> None:
        """Plan wishes that come together, and send what follows."""
        self.planner.plan(wishes)
        if self.planner.follows:
            self.planner.follow_up()
        self.tickets += [wish.ticket for wish in wishes]
        self.send()

    def match(self, keys: Keys, **how: Any) -> int:
        """Blocks that would hit."""
        return self.planner.match(keys, **how) // BLOCK

    def _note(self, ticket: Ticket) -> Ticket:
        self.tickets.append(ticket)
        self.send()
        return ticket

    # --- what crosses -----------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Take what the planner has to send and to tell."""
        for plan in self.planner.take_plans():
            crossed = decode(encode(plan))
            assert isinstance(crossed, Plan)
            self.sent.append(crossed)
            if self.knows(self.planes[plan.rank]):
                self.planes[plan.rank].submit(crossed)
        self.news += self.planner.take_finished()

    def knows(self, plane: FakePlane) -> bool:
        """Whether the planner has heard of this life of ``plane``, and there is no end of it to be heard of.

        Plans that it sends at other times reach nobody.
        """
        return not plane.dead and self.planner._state.incarnations.get(plane.rank) == plane.incarnation

    def say(self, message: Message) -> None:
        """One message reaches the planner."""
        crossed = decode(encode(message))
        assert not isinstance(crossed, Plan)
        self.planner.hear([crossed])
        self.send()

    def hear(self) -> None:
        """All messages that are there reach the planner."""
        while any(plane.outbox for plane in self.planes):
            for plane in self.planes:
                if plane.outbox:
                    self.say(plane.outbox.pop(0))

    def run(self, outcome: Callable[[Plan, int], Any] | None = None) -> None:
        """Everything that is under way ends, in order; ``outcome`` says how a row of a plan does."""
        self.send()  # what a release let go on
        for _ in range(10_000):
            self.hear()
            plane = next((plane for plane in self.planes if plane.flights), None)
            if plane is None:
                return
            flight = next(iter(plane.flights.values()))
            plan = flight.plan
            if flight.open or not flight.quarantined:
                plane.finish(plan.plan_id, (lambda row, p=plan: outcome(p, row)) if outcome else lambda row: Status.OK)
            else:
                plane.release(plan.plan_id)
        raise AssertionError("it never comes to rest")

    def plans(self, kind: PlanKind) -> list[Plan]:
        """What was sent of this kind."""
        return [plan for plan in self.sent if plan.kind == kind]

    def written(self) -> list[bytes]:
        """Keys of all rows that were ever sent to disk, in order."""
        return [row.tobytes() for plan in self.plans(PlanKind.SPILL) for row in plan.rows["key"]]

    def in_flight(self, kind: PlanKind, rank: int = 0) -> int:
        """The number of the oldest plan of this kind under way on ``rank``."""
        return next(n for n, flight in self.planes[rank].flights.items() if flight.plan.kind == kind)

    # --- what has to be true ----------------------------------------------------------------------------------------

    @property
    def index(self) -> Any:
        return self.planner._state.index

    def live(self) -> list[int]:
        """Entries that are in use."""
        table = self.index.table
        free = table._released[: table._released_count].tolist()
        assert len(set(free)) == len(free), "a number is free twice"
        return sorted(set(range(table.touched)) - set(free))

    def check(self) -> None:
        """Everything that holds after every step."""
        live = self.live()
        self._check_links(live)
        self._check_pins(live)
        self._check_order(live)
        self._check_space(live)
        self._check_contents(live)

    def _check_links(self, live: list[int]) -> None:
        index = self.index
        assert index.count == len(live)
        children = Counter(int(index.parent[entry]) for entry in live)
        complete = [
            (book.copies, Counter(int(index.parent[e]) for e in live if book.copies.ranks[e] == index.all_ranks))
            for book in self.books.values()
        ]
        for entry in live:
            assert index.children[entry] == children[entry]
            assert all(copies.children[entry] == of_parent[entry] for copies, of_parent in complete)
            held = index.pins[entry] or index.having(np.array([entry]))[0] or children[entry]
            assert held, "an entry that nothing holds is not forgotten"
            found = index.table.find_one(index.table.keys[entry].tobytes(), int(index.table.groups[entry]))
            assert (found == entry) == bool(index.linked[entry])
        assert set(children) <= {-1, *live}, "an entry outlived its parent"

    def _check_pins(self, live: list[int]) -> None:
        state, pins = self.planner._state, np.zeros(self.index.table.capacity, np.int32)
        for lease in state.leases._open.values():
            for entries in lease.groups:
                pins[entries] += 1
        for hop in state.hops.values():
            pins[hop.entries] += 1
        for ticket in self.tickets:
            for entries, _ in ticket.held:
                pins[entries] += 1
        assert self.index.pins[live].tolist() == pins[live].tolist()
        storing = {
            e for hop in state.hops.values() if hop.kind == PlanKind.STORE and not hop.settled for e in hop.entries
        }
        assert set(state.storing) == storing

    def _check_order(self, live: list[int]) -> None:
        for book in self.books.values():
            ranks = book.copies.ranks
            assert {int(ranks[entry]) for entry in live} <= {0, int(self.index.all_ranks)}
            here = [entry for entry in live if ranks[entry]]
            assert len(book) == len(here)
            assert sorted(book.candidates()) == here

    def _check_space(self, live: list[int]) -> None:
        for tier, book in self.books.items():
            for rank, space in book.spaces.items():
                self._check_arena(live, tier, book, rank, space)

    def _check_arena(self, live: list[int], tier: Tier, book: Any, rank: int, space: Any) -> None:
        copies = book.copies
        used = [(int(copies.page[rank, e]), int(copies.pages[rank, e])) for e in live if copies.ranks[e]]
        used += [extent[1:] for extents in book._deferred.values() for extent in extents if extent[0] == rank]
        for hop in self.planner._state.hops.values():
            used += _reserved(hop, rank) if hop.tier == tier else []
        taken = sorted(used)
        for (page, pages), (following, _) in pairwise(taken):
            assert page + pages <= following, "two extents overlap"
        assert sum(pages for _, pages in taken) == space.used_pages
        free = space.free_runs()
        merged = sorted(taken + free)
        assert sum(pages for _, pages in merged) == space.capacity_pages
        assert all(a[0] + a[1] <= b[0] for a, b in pairwise(merged)), "taken and free overlap"

    @property
    def books(self) -> Any:
        """The memory tiers as control sees them."""
        return self.planner._state.books

    def _check_contents(self, live: list[int]) -> None:
        """Every copy that the index speaks of is there: same key, same group, no worse lineage."""
        index = self.index
        for entry in live:
            key, group = index.table.keys[entry].tobytes(), int(index.table.groups[entry])
            for plane in filter(self.knows, self.planes):
                found = []
                for tier, book in self.books.items():
                    if book.copies.ranks[entry] >> plane.rank & 1:
                        found.append(plane.memory[tier].get(int(book.copies.page[plane.rank, entry]), (None,))[0])
                if index.disk_ranks[entry] >> plane.rank & 1:
                    generation = index.generations(plane.rank, np.array([entry], np.int32))[0]
                    segment, page = int(index.disk_segment[plane.rank, entry]), int(index.disk_page[plane.rank, entry])
                    found.append(plane.disk.get(Place(segment, generation, page), (None,))[0])
                for content in found:
                    assert content is not None, f"nothing lies where the index says (entry {entry})"
                    assert (content.key, content.group) == (key, group)
                    assert content.lineage <= index.lineage[entry], "an approximate copy under an exact entry"

    def check_at_rest(self) -> None:
        """Nothing is under way and nobody holds anything: all levels are back at zero."""
        self.check()
        state, stats = self.planner._state, self.planner.stats()
        for level in ("hops", "leases", "pinned_entries", "write_backlog_entries"):
            assert stats[level] == 0, level
        assert not state.storing
        assert not state.row_waiters
        assert not state.plans
        assert not any(book._deferred for book in self.books.values())
        assert not any(state.in_flight_bytes.values())
        assert all(ticket.finished and not ticket.held and not ticket.waits for ticket in self.tickets)
        assert all(ticket.source_free for ticket in self.tickets)

    def place(self, keys: Keys, block: int, rank: int = 0, group: int = 0) -> dict[Tier, tuple[int, int, int]]:
        """Where the index says that the copies of a block are, as (segment, page, generation)."""
        index, entry = self.index, self.entry(keys, block, group)
        places = {}
        for tier, book in self.books.items():
            if book.copies.ranks[entry] >> rank & 1:
                places[tier] = (-1, int(book.copies.page[rank, entry]), 0)
        if index.disk_ranks[entry] >> rank & 1:
            generation = index.generations(rank, np.array([entry], np.int32))[0]
            places[Tier.DISK] = (int(index.disk_segment[rank, entry]), int(index.disk_page[rank, entry]), generation)
        return places

    def entry(self, keys: Keys, block: int, group: int = 0) -> int:
        entry = self.index.table.find_one(keys.digests[block], group)
        assert entry >= 0, "not in the index"
        return int(entry)

    def lose(self, keys: Keys, block: int, tier: Tier, rank: int = 0, group: int = 0) -> None:
        """The copy of a block on one rank turns out damaged."""
        self.planes[rank].lose(keys.digests[block], group, tier, self.place(keys, block, rank, group)[tier])
        self.hear()


def _reserved(hop: Any, rank: int) -> list[tuple[int, int]]:
    """Extents that a hop holds on ``rank``: reserved, quarantined, or landed and not published yet."""
    targets, answers = hop.targets.get(rank), hop.answers.get(rank)
    if targets is None:
        return []
    if answers is None:
        return [
            (page, pages)
            for page, pages in zip(targets.page.tolist(), targets.pages.tolist(), strict=True)
            if page >= 0
        ]
    held = []
    for row, page in enumerate(targets.page.tolist()):
        status = int(answers["status"][row])
        if page >= 0 and status in (SILENT, Status.QUARANTINED):
            held.append((page, int(targets.pages[row])))
        elif page >= 0 and status == Status.OK and answers["tier"][row] == hop.tier and not hop.settled:
            held.append((int(answers["page"][row]), int(answers["pages"][row])))
    return held


__all__ = ["BACK", "BLOCK", "PAGES", "PAGE_BYTES", "ROOT", "Bench", "Durability", "Lineage", "Priority"]
