"""Thousands of random wishes, answers, failures and restarts; after every one, everything that must be true is."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest

from kvtier.core.keys import Keys, Root
from kvtier.core.plan import Hello, Lineage, PlanKind, Priority, Reason, Status, Tier
from kvtier.planner import Durability, Lease, LoadWish, Outcome, StoreWish, Ticket, TicketKind, Wish
from tests.planner.bench import BLOCK, PAGES, Bench, windowed_layout
from tests.planner.fake_plane import FakePlane

FAILURES = [Reason.DAMAGED, Reason.IO_ERROR, Reason.NO_SPACE, Reason.GONE]


class Storm:
    """A bench with random hands. ``trouble`` is the share of rows that fail."""

    def __init__(self, seed: int, *, trouble: float, **bench: Any) -> None:
        self.random = Random(seed)
        self.trouble = trouble
        self.bench = Bench(**bench)
        for plane in self.bench.planes:
            plane.compress = self.random.random() < 0.5
        self.versions = ["", "v1"]
        self.leases: list[Lease] = []
        self.tenants = ["", "acme"]
        self.checked: set[Ticket] = set()
        self.followed: set[tuple[bytes, str]] = set()
        self.bench.planner.events.listening = True
        self.keys_of: dict[Ticket, Keys] = {}
        self.joint: dict[Ticket, tuple[int, int]] = {}

    # --- wishes -----------------------------------------------------------------------------------------------------

    def some_keys(self) -> Keys:
        """Sequences of a tree: few tenants, few branches, many lengths."""
        random = self.random
        version = self.bench.planner.weights_version if random.random() < 0.95 else random.choice(self.versions)
        root = Root("model", version, tenant=random.choice(self.tenants))
        blocks = random.randint(0, 9)
        return self.bench.keys(
            blocks, random.randint(0, 3), shared=min(blocks, random.randint(0, 4)),
            extra_tokens=random.randint(0, BLOCK - 1), root=root,
        )  # fmt: skip

    def store(self) -> None:
        keys, random = self.some_keys(), self.random
        lineage = Lineage.APPROXIMATE if random.random() < 0.3 else Lineage.EXACT
        durability = random.choice([Durability.MEMORY, Durability.MEMORY, Durability.PROCESS, Durability.DURABLE])
        start = random.choice([0, 0, 0, random.randint(0, max(0, keys.num_tokens))])
        ticket = self.bench.store(keys, start=start, lineage=lineage, durability=durability)
        self.keys_of[ticket] = keys

    def lookup(self) -> None:
        keys, random, bench = self.some_keys(), self.random, self.bench
        exact = random.random() < 0.3
        start = random.choice([0, 0, random.randint(0, keys.num_tokens)])
        owner = random.choice([None, None, 1, 2])
        matched = bench.planner.match(keys, start=start, exact=exact)
        lease = bench.lookup(keys, start=start, exact=exact, owner=owner)
        if lease not in self.leases:
            assert (lease.first_block + lease.blocks) * BLOCK == matched
            self.leases.append(lease)
            self._check_hit(lease, keys, exact=exact)

    def _check_hit(self, lease: Lease, keys: Keys, *, exact: bool) -> None:
        """It is the longest prefix, and one token at least is left; of windows and states its end has what it needs."""
        bench, index, first = self.bench, self.bench.index, lease.first_block
        assert not lease.blocks or (first + lease.blocks) * BLOCK < keys.num_tokens
        if keys.root.weights_version != bench.planner.weights_version:
            assert not lease.blocks
            return
        last = max(first, (keys.num_tokens - 1) // BLOCK)

        def has(group: int, blocks: range) -> bool:
            entries = [index.table.find_one(keys.digests[block], group) for block in blocks]
            return all(e >= 0 and self._readable(e, exact=exact) for e in entries)

        windows = bench.planner._state.windows
        ends = [
            end
            for end in range(first, last + 1)
            if all(has(group, range(first, end)) for group in windows.whole)
            and all(has(group, windows.needed(group, first, end)) for group in windows.required)
        ]
        assert first + lease.blocks == max(ends)

    def _readable(self, entry: int, *, exact: bool) -> bool:
        index = self.bench.index
        ranks = int(index.having(np.array([entry]))[0])
        return ranks == int(index.all_ranks) and not (exact and index.lineage[entry] != Lineage.EXACT)

    def release(self) -> None:
        if self.leases:
            lease = self.leases.pop(self.random.randrange(len(self.leases)))
            for _ in range(self.random.randint(1, 2)):
                self.bench.planner.release(lease)

    def load(self) -> None:
        leases = [lease for lease in self.leases if lease.blocks]
        if leases:
            lease = self.random.choice(leases)
            low, high = lease.first_block * BLOCK, (lease.first_block + lease.blocks) * BLOCK
            start = self.random.randint(low, high - 1)
            ticket = self.bench.load(lease, start, self.random.randint(start + 1, high))
            self.keys_of[ticket] = lease.keys

    def burst(self) -> None:
        """Small wishes of all kinds at once; where in which joint plan their blocks stand is noted."""
        wishes: list[Wish] = []
        for _ in range(self.random.randint(2, 8)):
            leases = [lease for lease in self.leases if lease.blocks]
            if leases and self.random.random() < 0.5:
                lease = self.random.choice(leases)
                first = self.random.randrange(lease.first_block, lease.first_block + lease.blocks)
                stop = min(first + self.random.randint(1, 2), lease.first_block + lease.blocks)
                wishes.append(self.small_load(lease, first * BLOCK, stop * BLOCK))
                self.keys_of[wishes[-1].ticket] = lease.keys
            else:
                keys = self.some_keys()
                start = max(0, len(keys) - self.random.randint(1, 2)) * BLOCK
                wishes.append(self.small_store(keys, start))
                self.keys_of[wishes[-1].ticket] = keys
        self.bench.plan(wishes)
        for number, hop in self.bench.planner._state.hops.items():
            self.joint.update({share.ticket: (number, share.rows.start) for share in hop.shares})

    def small_load(self, lease: Lease, start: int, stop: int) -> LoadWish:
        return LoadWish.of(
            lease, PAGES, start=start, stop=stop, priority=Priority.DEMAND, deadline_s=None, is_paged=True
        )

    def small_store(self, keys: Keys, start: int) -> StoreWish:
        return StoreWish.of(
            keys, len(keys), PAGES, start=start, lineage=Lineage.EXACT, durability=Durability.MEMORY, is_paged=True
        )

    def prefetch(self) -> None:
        self.bench.prefetch(self.some_keys(), to_device=self.random.random() < 0.5)

    def flush(self) -> None:
        self.bench.flush(self.random.choice(list(Durability)))

    # --- answers ----------------------------------------------------------------------------------------------------

    def move(self) -> None:
        """One plane answers some rows of one plan."""
        plane = self.random.choice(self.bench.planes)
        if not plane.flights:
            return
        flight = self.random.choice(list(plane.flights.values()))
        number = flight.plan.plan_id
        if not len(flight.plan.rows):
            fails = flight.plan.kind == PlanKind.SYNC and self.random.random() < self.trouble
            plane.finish(number, lambda _: Reason.IO_ERROR if fails else Status.OK)
        elif flight.open:
            count = self.random.choice([len(flight.open), self.random.randint(1, len(flight.open))])
            rows = self.random.sample(sorted(flight.open), count)
            plane.answer(number, {row: self.outcome() for row in rows}, source_free=self.random.random() < 0.5)
        elif flight.quarantined:
            some = self.random.sample(sorted(flight.quarantined), self.random.randint(1, len(flight.quarantined)))
            plane.release(number, set(some))

    def outcome(self) -> Status | Reason:
        if self.random.random() >= self.trouble:
            return Status.OK
        return self.random.choice([*FAILURES, Status.QUARANTINED])

    def deliver(self) -> None:
        plane = self.random.choice(self.bench.planes)
        if plane.outbox:
            self.bench.say(plane.outbox.pop(0))
        elif plane.dead and self.random.random() < 0.05:
            self.restart(plane)

    # --- trouble ----------------------------------------------------------------------------------------------------

    def lose(self) -> None:
        """A copy that nobody is about to hear of otherwise turns out damaged."""
        bench, index = self.bench, self.bench.index
        copies = [entry for entry in bench.live() if index.linked[entry]]
        if not copies:
            return
        entry, plane = self.random.choice(copies), self.random.choice(bench.planes)
        tier = self.random.choice([*bench.books, Tier.DISK])
        if tier in bench.books:
            copies = bench.books[tier].copies
            ranks, place = copies.ranks, (-1, int(copies.page[plane.rank, entry]), 0)
        else:
            ranks = index.disk_ranks
            segment = int(index.disk_segment[plane.rank, entry])
            generation = index.segment_generation[plane.rank].get(segment, 0)
            place = (segment, int(index.disk_page[plane.rank, entry]), generation)
        if ranks[entry] >> plane.rank & 1 and not plane.dead:
            key, group = index.table.keys[entry].tobytes(), int(index.table.groups[entry])
            plane.lose(key, group, tier, place)

    def die(self) -> None:
        """A rank is gone, for a while."""
        plane = self.random.choice(self.bench.planes)
        if not plane.dead:
            plane.die()

    def restart(self, plane: FakePlane | None = None) -> None:
        """A rank begins a new life; what it has on disk is reported in any order."""
        plane = plane or self.random.choice(self.bench.planes)
        late = [message for message in plane.outbox if not isinstance(message, Hello)]
        plane.restart()
        plane.outbox += self.random.sample(late, len(late) // 2)
        if plane.segments:
            plane.recover(batch=self.random.randint(1, 20), order=self.random.shuffle)

    def disk_off_and_on(self) -> None:
        plane = self.random.choice(self.bench.planes)
        if plane.segments and not plane.dead:
            plane.off ^= {self.random.choice(plane.directories)}
            plane.disk_state()

    def change_version(self) -> None:
        self.bench.planner.set_weights_version(self.random.choice(self.versions))

    # --- checks -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        wishes = (
            [self.store] * 5 + [self.lookup] * 6 + [self.release] * 5 + [self.load] * 3 + [self.burst] * 2
            + [self.prefetch, self.flush]
        )  # fmt: skip
        answers = [self.move] * 20 + [self.deliver] * 25
        rare = [self.lose, self.restart, self.die, self.disk_off_and_on, self.change_version]
        roll = self.random.random()
        pool = rare if roll < 0.01 * bool(self.trouble) else answers if roll < 0.65 else wishes
        self.random.choice(pool)()
        self.bench.check()
        self.check_tickets()
        self.check_events()

    def check_events(self) -> None:
        """Whoever follows the events knows which blocks are complete in which tier (per key: of one group)."""
        index = self.bench.index
        for event in self.bench.planner.events.take():
            (self.followed.add if event.change == "stored" else self.followed.discard)((event.key, event.tier))
        if len(self.bench.layout.groups) == 1:
            complete = set()
            tiers = [(tier.label, book.copies.ranks) for tier, book in self.bench.books.items()]
            for tier, ranks in (*tiers, ("disk", index.disk_ranks)):
                for entry in self.bench.live():
                    if index.linked[entry] and ranks[entry] == index.all_ranks:
                        complete.add((index.table.keys[entry].tobytes(), tier))
            assert self.followed == complete

    def check_tickets(self) -> None:
        """A block that was loaded really came, on every rank and in every group; what was acknowledged is on disk."""
        for ticket in self.bench.tickets:
            if ticket.finished and ticket not in self.checked:
                self.checked.add(ticket)
                assert Outcome.WAITING not in ticket.outcome
                if ticket.kind == TicketKind.LOAD:
                    self.check_loaded(ticket)
                if ticket.kind == TicketKind.STORE and ticket.durability > Durability.MEMORY:
                    self.check_written(ticket)

    def check_loaded(self, ticket: Ticket) -> None:
        keys = self.keys_of[ticket]
        for at, outcome in enumerate(ticket.outcome):
            for plane in self.bench.planes if outcome == Outcome.DONE else ():
                block = ticket.first_block + at
                plan, row = self.joint.get(ticket, (None, 0))
                numbers, place = (ticket.plan_ids, block) if plan is None else ([plan], row + at)
                came = {c.group for n, b, c in plane.loaded if n in numbers and b == place
                        and c.key == keys.digests[block]}  # fmt: skip
                assert came >= set(self.bench.planner._state.windows.whole)

    def check_written(self, ticket: Ticket) -> None:
        keys = self.keys_of[ticket]
        for at, outcome in enumerate(ticket.outcome):
            for plane in self.bench.planes if outcome != Outcome.FAILED else ():
                wanted = keys.digests[ticket.first_block + at]
                groups = {content.group for content, _, _ in plane.disk.values() if content.key == wanted}
                assert groups >= set(self.bench.planner._state.windows.whole)

    def end(self) -> None:
        """Everybody lets go, everything comes to rest: nothing is left behind."""
        while self.leases:
            self.release()
        self.bench.run()
        self.bench.check_at_rest()
        self.check_tickets()


WRITE_POLICIES = ["write_through", "write_back", "write_through_selective"]
SHAPES: dict[str, dict[str, Any]] = {
    "memory only": {},
    "two groups in memory": {"groups": 2, "host_blocks": 12},
    "small disk": {"segments": 5},
    "two ranks": {"ranks": 2, "segments": 5},
    "two directories": {"segments": 8, "directories": 2},
    "two ranks in memory": {"ranks": 2, "host_blocks": 10},
    "two ranks, two groups": {"ranks": 2, "groups": 2, "segments": 6, "host_blocks": 12},
    "windows and states": {"layout": windowed_layout(replay_tokens=3 * BLOCK), "segments": 6, "host_blocks": 12},
    "windows and states in memory": {"layout": windowed_layout(), "host_blocks": 10},
    "a device": {"device_blocks": 8},
    "a device and a disk": {"device_blocks": 6, "host_blocks": 10, "segments": 6},
    "a device larger than host memory": {"device_blocks": 20, "host_blocks": 6, "segments": 6},
    "two ranks, two groups with devices": {
        "ranks": 2,
        "groups": 2,
        "segments": 6,
        "host_blocks": 12,
        "device_blocks": 6,
        "host": {"high_watermark": 0.8, "low_watermark": 0.5},
    },
    "watermarks": {"segments": 6, "host": {"high_watermark": 0.7, "low_watermark": 0.4}},
}


@pytest.fixture(autouse=True)
def short_hops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores and writes of more than five blocks are several hops."""
    for name in ("stores.STORE_HOP_BYTES", "stores.WRITE_HOP_BYTES", "upkeep.WRITE_HOP_BYTES"):
        monkeypatch.setattr(f"kvtier.planner.{name}", 5 * 2 * 4096)


@pytest.mark.parametrize("trouble", [0.0, 0.15], ids=["calm", "trouble"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("write", WRITE_POLICIES)
def test_whatever_comes_in_whatever_order_the_books_are_right(shape: str, write: str, trouble: float) -> None:
    for seed in range(2):
        storm = Storm(seed, trouble=trouble, policy={"write": write}, **SHAPES[shape])
        for _ in range(300):
            storm.step()
        storm.end()
        if not trouble:
            assert not any(plane.misplaced for plane in storm.bench.planes), (
                "a plan named a place that held something else"
            )


@pytest.mark.stress
@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_storm(shape: str) -> None:
    for seed in range(100, 115):
        storm = Storm(seed, trouble=0.1, policy={"write": WRITE_POLICIES[seed % 3]}, **SHAPES[shape])
        for _ in range(1500):
            storm.step()
        storm.end()
