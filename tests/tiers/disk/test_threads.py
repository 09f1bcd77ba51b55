"""Lanes, control and housekeeping at once, on real threads that take turns as often as they can."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random

import pytest

from kvtier.tiers.disk import Place
from tests.tiers.disk.workbench import RECORD_PAGES, SEGMENT_PAGES, Workbench

WRITERS = 4
RECORDS_EACH = 120


@pytest.fixture(autouse=True)
def fast_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Crew:
    """Threads around one tier; the first error of any of them is raised by ``work``."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.placed: dict[int, Place] = {}
        self.kept: set[int] = set()
        self.given_back: set[tuple[int, int]] = set()
        self.errors: list[BaseException] = []
        self.writing = WRITERS
        self.lock = threading.Lock()

    def work(self) -> None:
        jobs = [*((self.write, seed) for seed in range(WRITERS)), (self.keep_house, 0), (self.sync, 0)]
        threads = [threading.Thread(target=self.guarded, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def guarded(self, job: Callable[[int], None], seed: int) -> None:
        try:
            job(seed)
        except BaseException as error:
            self.errors.append(error)
        finally:
            if job == self.write:
                self.writing -= 1

    def write(self, seed: int) -> None:
        rng, tier = Random(seed), self.bench.tier
        for number in range(seed * RECORDS_EACH, (seed + 1) * RECORDS_EACH):
            while (place := tier.place(RECORD_PAGES)) is None:
                if self.errors:
                    return
            self.placed[number] = place
            image = self.bench.image_for(number, place)
            chance = rng.random()
            if chance < 0.03:
                tier.abandoned(place)
            else:
                self.bench.files.write_at(place.fd, place.page * 4096, image)
                tier.written(place, image[:4096])
                self.kept.add(number)

    def keep_house(self, _: int) -> None:
        """Housekeeping, and control that gives back whatever is asked for."""
        tier = self.bench.tier
        sealed: list[tuple[int, int]] = []
        while self.writing and not self.errors:
            tier.housekeep()
            events = tier.take_events()
            if events is None:
                continue
            sealed.extend(events.sealed)
            for _ in range(min(events.reclaims_wanted, len(sealed))):
                life = sealed.pop(0)
                self.given_back.add(life)
                tier.reclaim(*life)

    def sync(self, _: int) -> None:
        tier = self.bench.tier
        while self.writing and not self.errors:
            for target in tier.unsynced():
                if tier.begin_sync(target):
                    self.bench.files.sync(target.fd)
                    tier.synced(target, None)


def test_many_threads_lose_nothing_and_never_share_a_place(workbench: Callable[..., Workbench]) -> None:
    bench = workbench(segments=8, clean_segments=2).open()
    crew = Crew(bench)
    crew.work()
    spans: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for place in crew.placed.values():
        spans[place.segment, place.generation].append((place.page, place.page + place.pages))
    for of_one_life in spans.values():
        ordered = sorted(of_one_life)
        assert all(first[1] <= second[0] for first, second in pairwise(ordered))
        assert ordered[0][0] >= 2
        assert ordered[-1][1] <= SEGMENT_PAGES - 2
    assert len({place.sequence for place in crew.placed.values()}) == len(crew.placed)
    bench.tier.close()
    again = workbench(segments=8, clean_segments=2).open()
    alive = {
        number for number in crew.kept
        if (crew.placed[number].segment, crew.placed[number].generation) not in crew.given_back
    }  # fmt: skip
    found = again.recovered()
    assert alive <= set(found) <= crew.kept
    assert all(again.read(number, row) for number, row in found.items())
    assert len(crew.given_back) > 10, "segments went round"
