"""Seeded lives of a disk tier on a simulated disk, each ended by a power cut or a kill at a random moment.

What was acknowledged as durable is there after a power cut, what was written is there after a kill, nothing that was
reclaimed comes back, and whatever is recovered is exactly what was written.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import pytest

from kvtier.core.plan import PAGE_BYTES
from kvtier.runtime.seam import IODone, IOEngine, IORequest, Op
from kvtier.testing.simulation import Simulation
from kvtier.tiers.disk import Place, SyncTarget
from kvtier.tiers.disk.traffic import QUIET_S
from tests.tiers.disk.workbench import RECORD_PAGES, RECORDS, Workbench

SEEDS = int(os.environ.get("KVTIER_CRASH_SEEDS", "60"))
LIVES = 6


@dataclass
class Model:
    """What must be there, what may be there, and what must not."""

    written: dict[int, Place] = field(default_factory=dict)
    durable: set[int] = field(default_factory=set)
    reclaimed: set[tuple[int, int]] = field(default_factory=set)
    lives: set[tuple[int, int]] = field(default_factory=set)
    sequence: int = 0
    next_block: int = 0

    def forget_segment(self, segment: int, generation: int) -> None:
        for number, place in list(self.written.items()):
            if (place.segment, place.generation) == (segment, generation):
                del self.written[number]
                self.durable.discard(number)


class Life:
    """One opening of the tier; random things happen to it until it ends."""

    def __init__(self, simulation: Simulation, model: Model, rng: Random) -> None:
        self.simulation = simulation
        self.model = model
        self.rng = rng
        self.engine: IOEngine = simulation.disk.io_engine("lane", 4)
        self.bench = Workbench(simulation.disk, simulation, "/kv", segments=5)
        for table in self.bench.tier.open():
            self.bench.rows.extend(table)
        self.sealed: list[tuple[int, int]] = []
        self.reclaiming: list[tuple[int, int]] = []
        self.covered: dict[int, set[int]] = {}

    def check(self, must: set[int]) -> None:
        """Compare what was recovered with the model, and go on from it. No crash does what is complained of."""
        assert not self.bench.tier.recovery.complaint(read_only=False)
        found = self.bench.recovered()
        assert must <= set(found), f"lost: {sorted(must - set(found))}"
        for row in self.bench.rows:
            assert (row["segment"], row["generation"]) not in self.model.reclaimed, f"block {row['depth']} came back"
            assert self.bench.read(int(row["depth"]), row), f"block {row['depth']} is not what was written"
        self.model.written = {number: _place(row) for number, row in found.items()}
        self.model.durable &= set(found)

    def live(self, steps: int) -> None:
        for _ in range(steps):
            self.rng.choices(
                (self.write, self.keep_house, self.sync, self.let_time_pass, self.reclaim), (8, 4, 1, 4, 1)
            )[0]()

    def write(self) -> None:
        place = self.bench.tier.place(RECORD_PAGES)
        if place is None:
            return
        assert place.sequence > self.model.sequence, "a sequence is used twice"
        self.model.sequence = place.sequence
        number, self.model.next_block = self.model.next_block, self.model.next_block + 1
        if self.rng.random() < 0.05:
            self.bench.tier.abandoned(place)
            return
        image = self.bench.image_for(number, place)
        self.engine.submit(IORequest(Op.WRITE, place.fd, place.page * PAGE_BYTES, (image,), (number, place)))

    def sync(self) -> None:
        for target in self.bench.tier.unsynced():
            if self.bench.tier.begin_sync(target):
                covered = {
                    number
                    for number, place in self.model.written.items()
                    if (place.segment, place.generation) == (target.segment, target.generation)
                }
                self.engine.submit(IORequest(Op.SYNC, target.fd, 0, (), (target, covered)))

    def let_time_pass(self) -> None:
        self.simulation.run_for(self.rng.choice((10e-6, 100e-6, 1e-3, 2 * QUIET_S)))
        for done in self.engine.reap():
            self.reaped(done)

    def reaped(self, done: IODone) -> None:
        assert done.error is None
        what, of = done.request.tag
        if isinstance(what, SyncTarget):
            self.bench.tier.synced(what, None)
            self.model.durable |= of & set(self.model.written)
        else:
            self.bench.tier.written(of, done.request.buffers[0][:PAGE_BYTES])
            self.model.written[what] = of

    def keep_house(self) -> None:
        self.bench.tier.housekeep()
        events = self.bench.tier.take_events()
        if events is not None:
            self.sealed.extend(events.sealed)
            for life in [life for life in self.reclaiming if life[0] in events.reclaimed]:
                self.reclaiming.remove(life)
                self.model.reclaimed.add(life)

    def reclaim(self) -> None:
        if self.sealed and self.rng.random() < 0.7:
            life = self.sealed.pop(0)
            self.model.forget_segment(*life)
            self.reclaiming.append(life)
            self.bench.tier.reclaim(*life)


def _place(row: object) -> Place:
    return Place(*(int(row[name]) for name in ("segment", "page", "pages", "generation", "sequence")), fd=-1)  # type: ignore[index]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_crash_loses_what_was_acknowledged_or_brings_back_anything_wrong(seed: int) -> None:
    rng = Random(seed)
    simulation = Simulation(seed)
    simulation.machine()
    model = Model()
    must: set[int] = set()
    for _ in range(LIVES):
        life = Life(simulation, model, rng)
        life.check(must)
        life.live(rng.randint(1, 150))
        end = rng.random()
        if end < 0.45:
            simulation.power_cut()
            must = set(model.durable)
        elif end < 0.8:
            simulation.kill()
            must = set(model.written)
        else:
            simulation.run_idle()
            life.let_time_pass()
            life.bench.tier.close()
            must = set(model.written)
            simulation.power_cut()
    Life(simulation, model, rng).check(must)


@pytest.mark.parametrize("seed", range(10))
def test_closing_makes_everything_durable(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.machine()
    bench = Workbench(simulation.disk, simulation, "/kv").open()
    bench.fill(range(13))
    bench.tier.close()
    simulation.power_cut()
    again = Workbench(simulation.disk, simulation, "/kv").open()
    assert set(again.recovered()) == set(range(13))
    assert all(again.read(number, row) for number, row in again.recovered().items())


class PowerCut(BaseException):
    """The power goes now."""


class CuttingFiles:
    """Files whose n-th call never comes to pass."""

    def __init__(self, simulation: Simulation, calls_left: int) -> None:
        self._simulation = simulation
        self.calls_left = calls_left

    def __getattr__(self, name: str) -> object:
        call = getattr(self._simulation.disk, name)

        def cutting(*args: object, **kwargs: object) -> object:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise PowerCut
            return call(*args, **kwargs)

        return cutting


def script(bench: Workbench, durable: set[int], gone: set[int]) -> None:
    """One life in which everything happens once: making, filling, syncing, sealing, reclaiming, closing."""
    bench.open()
    for number in range(2 * RECORDS + 3):
        bench.put(number)
        if number % 3 == 0 and bench.sync():
            durable.update(range(number + 1))
        bench.keep_house()
    events = bench.tier.take_events()
    assert events is not None
    first = set(range(RECORDS))
    durable -= first
    bench.tier.reclaim(*events.sealed[0])
    bench.keep_house()
    gone.update(first)
    for number in range(100, 100 + RECORDS):
        bench.put(number)
    bench.keep_house()
    bench.tier.close()
    durable.update(range(RECORDS, 2 * RECORDS + 3), range(100, 100 + RECORDS))


def calls_of_the_script() -> int:
    simulation = Simulation(0)
    files = CuttingFiles(simulation, 1 << 40)
    script(Workbench(files, simulation, "/kv", segments=5), set(), set())  # type: ignore[arg-type]
    return (1 << 40) - files.calls_left


@pytest.mark.parametrize("seed", range(4))
def test_the_power_may_go_before_any_single_operation(seed: int) -> None:
    """Exhaustive over the operations of a life; the seed decides which un-synced pages survive."""
    for calls in range(calls_of_the_script()):
        simulation = Simulation(1000 * seed + calls)
        simulation.machine()
        durable: set[int] = set()
        gone: set[int] = set()
        with suppress(PowerCut):
            script(Workbench(CuttingFiles(simulation, calls), simulation, "/kv", segments=5), durable, gone)  # type: ignore[arg-type]
        simulation.power_cut()
        again = Workbench(simulation.disk, simulation, "/kv", segments=5).open()
        found = again.recovered()
        assert durable <= set(found), f"call {calls}: lost {sorted(durable - set(found))}"
        assert not gone & set(found), f"call {calls}: came back {sorted(gone & set(found))}"
        assert all(again.read(number, row) for number, row in found.items()), f"call {calls}"
        assert not again.tier.recovery.complaint(read_only=False), f"call {calls}"
        assert again.read(500, again.put(500))
        again.tier.close()
