"""Gather, seal and deliver against the engine's own bytes, for small, large and padded blocks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.codecs.headers import Places
from kvtier.core.memory import PageTable
from kvtier.core.plan import PAGE_BYTES, ROW, Plan, PlanKind, Priority, Reason
from kvtier.metrics import Metrics
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.pages import PagedTensors
from kvtier.runtime import system_machine
from kvtier.testing.simulation import SimArena
from kvtier.transfer.delivery import Delivery
from kvtier.transfer.endpoint import Endpoint, first_tokens
from kvtier.transfer.equipment import Equipment
from kvtier.transfer.images import Extents
from kvtier.transfer.records import encode_record, fill_records, gather_record, seal_records
from kvtier.transfer.staging import Staging

BLOCKS = 5
PAGE_TOKENS = 4
AXES = ("token", "head", "dim")
KINDS = {"small": [4, 4, 2], "padded": [3 * 1024, 5000, 17, 2048], "large": [2048] * 6}


def _layout(kind: str) -> KVLayout:
    parts = tuple(Part(layer, "kv", "float32", AXES, (PAGE_TOKENS, 8, dim)) for layer, dim in enumerate(KINDS[kind]))
    return KVLayout(2 * PAGE_TOKENS, PAGE_TOKENS, (KVGroup("attention", parts),))


class _Bench:
    """Two engine memories of one layout, the plan of a store or load of all blocks, and a record for each."""

    def __init__(self, kind: str, start: int = 0, stop: int = BLOCKS * 2 * PAGE_TOKENS) -> None:
        self.layout = layout = _layout(kind)
        machine = system_machine("threads")
        arena = machine.arena("test", 4 * BLOCKS * max(layout.record_pages) * PAGE_BYTES)
        self.equipment = Equipment(
            rank=0, incarnation=1, layout=layout, verify_memory=True, clock=machine.runtime.clock, host=arena,
            staging=Staging(arena, 1), headers=Staging(arena, 1), paths=[], metrics=Metrics(machine.runtime.lock()),
        )  # fmt: skip
        self.shape = self.equipment.shapes[0]
        random = np.random.default_rng(1)
        shapes = [(4 * BLOCKS, *part.shape) for part in layout.groups[0].parts]
        self.source = [random.random(shape, np.float32) for shape in shapes]
        self.target = [np.zeros(shape, np.float32) for shape in shapes]
        self.pages = random.permutation(4 * BLOCKS)[: 2 * BLOCKS]
        rows = np.zeros(BLOCKS, ROW)
        rows["key"] = random.integers(0, 256, (BLOCKS, 32))
        rows["block"], rows["tokens"] = np.arange(BLOCKS), layout.block_tokens
        self.plan = Plan(1, 0, PlanKind.LOAD, Priority.DEMAND, rows, start=start, stop=stop)
        self.rows = list(range(BLOCKS))
        arena.data[:] = 0xAA
        first = random.permutation(3 * BLOCKS)[:BLOCKS] * self.shape.pages
        rows["host_page"], rows["host_pages"] = first, self.shape.pages
        self.extents = Extents(arena, first, rows["host_pages"])
        self.records = [self.extents.one(row) for row in self.rows]

    def endpoint(self, tensors: list[np.ndarray]) -> Endpoint:
        pages = PagedTensors(self.layout, tensors).pages(self.pages)
        return Endpoint(pages.memory, PageTable(0, pages.table.groups), self.plan.start, self.plan.stop)

    def store(self) -> None:
        tokens = first_tokens(self.equipment, self.plan, self.rows)
        source = self.endpoint(self.source)
        if self.shape.batch > 1:
            fill_records(self.plan, source, self.shape, self.rows, tokens, self.extents)
            return
        for row, record in zip(self.rows, self.records, strict=True):
            gather_record(source, self.shape, tokens[row : row + 1], record)
        seal_records(self.plan, self.shape, self.rows, self.extents)

    def load(
        self, places: Places | None = None, *, verify: bool = True, records: Extents | None = None
    ) -> list[Reason]:
        return Delivery(
            self.equipment, self.plan, self.shape, self.rows, records or self.extents, places,
            self.endpoint(self.target), verify,
        ).deliver()  # fmt: skip

    def staged(self) -> Extents:
        """Copies of the records in another arena."""
        arena = SimArena(BLOCKS * self.shape.pages * PAGE_BYTES)
        arena.data[:] = np.concatenate(self.records)
        first = np.arange(BLOCKS) * self.shape.pages
        return Extents(arena, first, self.plan.rows["host_pages"])

    def loaded(self, block: int) -> bool:
        pages = self.pages[2 * block : 2 * block + 2]
        return all(
            np.array_equal(there[pages], here[pages]) for here, there in zip(self.source, self.target, strict=True)
        )

    def untouched(self, block: int) -> bool:
        return not any(tensor[self.pages[2 * block : 2 * block + 2]].any() for tensor in self.target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["host memory", "staging"])
def test_what_was_stored_is_delivered_page_by_page(kind: str, where: str) -> None:
    bench = _Bench(kind)
    bench.store()
    records = bench.extents if where == "host memory" else bench.staged()
    assert bench.load(records=records) == [Reason.NONE] * BLOCKS
    assert all(map(bench.loaded, range(BLOCKS)))
    others = np.setdiff1d(np.arange(4 * BLOCKS), bench.pages)
    assert not any(tensor[others].any() for tensor in bench.target)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_zero_and_not_what_lay_there(kind: str) -> None:
    bench = _Bench(kind)
    bench.store()
    assert not any(record[start:stop].any() for record in bench.records for start, stop in bench.shape.padding)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_tokens_of_the_plan_are_written(kind: str) -> None:
    bench = _Bench(kind, start=PAGE_TOKENS + 1, stop=3 * PAGE_TOKENS)
    bench.store()
    assert bench.load() == [Reason.NONE] * BLOCKS
    first, second, third = bench.pages[1:4]
    for here, there in zip(bench.source, bench.target, strict=True):
        assert not there[first, 0].any()
        assert np.array_equal(there[first, 1:], here[first, 1:])
        assert np.array_equal(there[second], here[second])
        assert not there[third].any()


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(KINDS)), st.integers(0, BLOCKS - 1), st.floats(0, 1, exclude_max=True), st.integers(1, 255)
)
def test_one_damaged_byte_is_one_damaged_block_whatever_it_hits(kind: str, block: int, where: float, flip: int) -> None:
    """In the header, in a slice or in the padding, which nobody reads."""
    bench = _Bench(kind)
    bench.store()
    at = int(where * bench.records[block].nbytes)
    bench.records[block][at] ^= flip
    harmless = any(start <= at < stop for start, stop in bench.shape.padding)
    damaged = [] if harmless else [block]
    assert [row for row, reason in enumerate(bench.load()) if reason == Reason.DAMAGED] == damaged
    assert all(bench.loaded(other) for other in range(BLOCKS) if other not in damaged)
    if damaged and at < PAGE_BYTES:
        assert bench.untouched(block)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_record_of_another_block_is_damage_and_writes_nothing(kind: str) -> None:
    bench = _Bench(kind)
    bench.store()
    bench.records[1][:], bench.records[3][:] = bench.records[3].copy(), bench.records[1].copy()
    assert bench.load() == [Reason.NONE, Reason.DAMAGED, Reason.NONE, Reason.DAMAGED, Reason.NONE]
    assert bench.untouched(1)
    assert bench.untouched(3)


@pytest.mark.parametrize("kind", KINDS)
def test_records_from_disk_must_say_that_they_lie_where_they_were_read(kind: str) -> None:
    bench = _Bench(kind)
    bench.store()
    places = Places(bytes(16), *(np.zeros(BLOCKS, dtype) for dtype in (np.int32, np.int32, np.int64)))
    assert bench.load(places) == [Reason.DAMAGED] * BLOCKS


@pytest.mark.parametrize("kind", KINDS)
def test_coded_and_raw_records_are_delivered_side_by_side(kind: str) -> None:
    """Zeros compress, random numbers do not: the coded ones go the careful way, the others all at once."""
    bench = _Bench(kind)
    for tensor in bench.source:
        tensor[bench.pages[2:6]] = 0
    bench.store()
    encoded = []
    for record in bench.records:
        out = np.zeros(record.nbytes, np.uint8)
        pages, _ = encode_record(record, "raw+lz4", out)
        encoded.append(out[: pages * PAGE_BYTES])
    if kind != "small":
        assert encoded[1].nbytes < bench.records[1].nbytes
    bench.records = encoded
    for tensor in bench.target:
        tensor[:] = 1
    assert bench.load() == [Reason.NONE] * BLOCKS
    assert all(map(bench.loaded, range(BLOCKS)))


def test_without_verification_only_the_header_is_looked_at() -> None:
    bench = _Bench("large")
    bench.store()
    bench.records[2][-1] ^= 1
    assert bench.load(verify=False) == [Reason.NONE] * BLOCKS
    assert not bench.loaded(2)


def test_without_a_target_records_are_checked_and_nothing_is_written() -> None:
    bench = _Bench("small")
    bench.store()
    bench.records[4][PAGE_BYTES] ^= 1
    delivery = Delivery(bench.equipment, bench.plan, bench.shape, bench.rows, bench.extents, None, None, True)
    assert delivery.deliver() == [Reason.NONE] * 4 + [Reason.DAMAGED]
    assert all(map(bench.untouched, range(BLOCKS)))


def test_a_plan_whose_memory_is_gone_has_no_endpoint() -> None:
    bench = _Bench("small")
    table = bench.endpoint(bench.source).table
    assert Endpoint.of(bench.equipment, bench.plan) is None
    assert Endpoint.of(bench.equipment, replace(bench.plan, pages=table)) is None
