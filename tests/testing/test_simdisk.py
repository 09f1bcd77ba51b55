"""The simulated disk: what a kill and a power cut leave, how long things take, and how full it gets."""

import errno
import math

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.errors import ClosedError
from kvtier.runtime.seam import IORequest, Op
from kvtier.testing.simdisk import SimDisk
from kvtier.testing.simulation import Simulation
from tests.runtime.contract_files import PAGE, aligned
from tests.runtime.contract_io import collect, run_one

SEEDS = range(40)


def new_disk(seed: int) -> tuple[Simulation, SimDisk]:
    simulation = Simulation(seed)
    disk = simulation.disk
    simulation.machine()
    disk.make_directory("/cache")
    return simulation, disk


def new_file(disk: SimDisk, name: str = "x") -> int:
    fd = disk.open(f"/cache/{name}", create=True)
    disk.sync_directory("/cache")
    return fd


def content(disk: SimDisk, name: str = "x") -> list[int]:
    """First byte of every page; checks that each page is whole."""
    fd = disk.open(f"/cache/{name}")
    out = aligned(disk.size(fd))
    assert disk.read_at(fd, 0, out) == out.nbytes
    disk.close(fd)
    pages = out.reshape(-1, PAGE)
    assert (pages == pages[:, :1]).all(), "a page is torn"
    return [int(page[0]) for page in pages]


# -- power cuts


def test_what_was_synced_survives_a_power_cut() -> None:
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        fd = new_file(disk)
        disk.write_at(fd, 0, aligned(8 * PAGE, 1))
        disk.sync(fd)
        simulation.power_cut()
        assert content(disk) == [1] * 8


def test_of_what_was_not_synced_a_random_part_of_whole_pages_survives() -> None:
    seen = set()
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        fd = new_file(disk)
        disk.write_at(fd, 0, aligned(8 * PAGE, 1))
        disk.sync(fd)
        disk.write_at(fd, 0, aligned(8 * PAGE, 2))
        simulation.power_cut()
        assert set(content(disk)) <= {1, 2}
        seen.add(tuple(content(disk)))
    assert len(seen) > 20


def test_a_length_that_was_not_synced_survives_or_not() -> None:
    lengths = set()
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        fd = new_file(disk)
        disk.allocate(fd, 4 * PAGE)
        simulation.power_cut()
        lengths.add(len(content(disk)))
    assert lengths == {0, 4}


def test_a_write_in_flight_may_land_in_part() -> None:
    seen = set()
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        fd = new_file(disk)
        disk.allocate(fd, 4 * PAGE)
        disk.sync(fd)
        disk.io_engine("io", 1).submit(IORequest(Op.WRITE, fd, 0, [aligned(3 * PAGE, 1), aligned(PAGE, 2)], None))
        simulation.power_cut()
        seen.add(tuple(content(disk)))
    assert (0, 0, 0, 0) in seen
    assert {pages[3] for pages in seen} == {0, 2}
    assert len(seen) > 5


def test_a_sync_covers_what_was_written_before_it_began_and_no_more() -> None:
    older, younger = set(), set()
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        fd = new_file(disk)
        disk.allocate(fd, 2 * PAGE)
        disk.sync(fd)
        disk.write_at(fd, 0, aligned(PAGE, 1))
        engine = disk.io_engine("io", 1)
        engine.submit(IORequest(Op.SYNC, fd, 0, (), None))
        disk.write_at(fd, PAGE, aligned(PAGE, 2))
        collect(engine, 1)
        simulation.power_cut()
        older.add(content(disk)[0])
        younger.add(content(disk)[1])
    assert older == {1}
    assert younger == {0, 2}


def test_a_page_that_was_written_again_during_a_sync_keeps_at_least_what_the_sync_covered() -> None:
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        fd = new_file(disk)
        disk.write_at(fd, 0, aligned(PAGE, 1))
        engine = disk.io_engine("io", 1)
        engine.submit(IORequest(Op.SYNC, fd, 0, (), None))
        disk.write_at(fd, 0, aligned(PAGE, 2))
        collect(engine, 1)
        assert content(disk) == [2]
        simulation.power_cut()
        assert content(disk) in ([1], [2])


def test_a_sync_that_had_not_ended_promises_nothing() -> None:
    seen = set()
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        fd = new_file(disk)
        disk.allocate(fd, PAGE)
        disk.sync(fd)
        disk.write_at(fd, 0, aligned(PAGE, 1))
        disk.io_engine("io", 1).submit(IORequest(Op.SYNC, fd, 0, (), None))
        simulation.power_cut()
        seen.add(content(disk)[0])
    assert seen == {0, 1}


def names_after_power_cut(seed: int, *, sync: bool) -> tuple[str, ...]:
    simulation, disk = new_disk(seed)
    for name in ("a", "b"):
        disk.close(new_file(disk, name))
    disk.close(disk.open("/cache/c", create=True))
    disk.rename("/cache/a", "/cache/d")
    disk.unlink("/cache/b")
    if sync:
        disk.sync_directory("/cache")
    simulation.power_cut()
    return tuple(disk.list_directory("/cache"))


def test_changes_of_a_directory_survive_up_to_a_random_one() -> None:
    seen = {names_after_power_cut(seed, sync=False) for seed in SEEDS}
    assert seen == {("a", "b"), ("a", "b", "c"), ("b", "c", "d"), ("c", "d")}


def test_changes_of_a_synced_directory_survive() -> None:
    assert {names_after_power_cut(seed, sync=True) for seed in SEEDS} == {("c", "d")}


def test_syncing_one_directory_does_not_sync_another_but_what_it_builds_on() -> None:
    seen = set()
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        disk.make_directory("/other")
        for path in ("/cache/stays", "/cache/moves"):
            disk.close(disk.open(path, create=True))
        disk.rename("/cache/moves", "/other/moved")
        disk.sync_directory("/other")
        simulation.power_cut()
        assert disk.list_directory("/other") == ["moved"]
        seen.add(tuple(disk.list_directory("/cache")))
    assert seen == {(), ("stays",)}


def test_directories_are_durable_at_once() -> None:
    simulation, disk = new_disk(1)
    disk.make_directory("/cache/a/b")
    simulation.power_cut()
    assert disk.list_directory("/cache/a") == ["b"]


# -- kills


def test_a_kill_keeps_what_was_written_and_the_names() -> None:
    simulation, disk = new_disk(1)
    fd = disk.open("/cache/x", create=True)
    disk.write_at(fd, 0, aligned(4 * PAGE, 1))
    simulation.kill()
    assert content(disk) == [1] * 4


def test_what_a_kill_kept_a_power_cut_can_still_take() -> None:
    kept = set()
    for seed in SEEDS:
        simulation, disk = new_disk(seed)
        disk.write_at(disk.open("/cache/x", create=True), 0, aligned(PAGE, 1))
        simulation.kill()
        simulation.power_cut()
        kept.add(tuple(disk.list_directory("/cache")))
    assert kept == {(), ("x",)}


@pytest.mark.parametrize("death", [Simulation.kill, Simulation.power_cut])
def test_the_dead_hold_no_locks_descriptors_or_engines(death: object) -> None:
    simulation, disk = new_disk(1)
    fd, engine = new_file(disk), disk.io_engine("io", 1)
    assert disk.lock(fd)
    death(simulation)  # type: ignore[operator]
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.size(fd)
    with pytest.raises(ClosedError):
        engine.submit(IORequest(Op.SYNC, fd, 0, (), None))
    assert disk.lock(disk.open("/cache/x"))


def test_a_disk_that_loses_power_alone_ends_no_request_of_before() -> None:
    simulation, disk = new_disk(1)
    fd, engine = new_file(disk), disk.io_engine("io", 1)
    engine.submit(IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], None))
    disk.crash()
    simulation.run_for(1.0)
    assert engine.reap() == []


# -- time


def test_two_threads_overlap_their_latency_and_share_the_bandwidth() -> None:
    def seconds(threads: int, nbytes: int) -> float:
        simulation = Simulation(1)
        disk = SimDisk(simulation, latency_s=1e-3, bytes_per_s=1e9, jitter=0.0)
        disk.make_directory("/cache")
        fd, engine = disk.open("/cache/x", create=True), disk.io_engine("io", threads)
        begun_s = simulation.clock.monotonic()
        for _ in range(16):
            engine.submit(IORequest(Op.WRITE, fd, 0, [aligned(nbytes)], None))
        collect(engine, 16)
        return simulation.clock.monotonic() - begun_s

    assert seconds(1, PAGE) == pytest.approx(16 * 1.004e-3, rel=0.01)
    assert seconds(16, PAGE) == pytest.approx(1e-3 + 16 * PAGE / 1e9, rel=0.01)
    assert seconds(16, 1 << 20) == pytest.approx(1e-3 + 16 * (1 << 20) / 1e9, rel=0.01)


def test_requests_end_in_the_order_that_their_latency_gives() -> None:
    orders = set()
    for seed in SEEDS:
        _, disk = new_disk(seed)
        fd, engine = new_file(disk), disk.io_engine("io", 4)
        for tag in range(4):
            engine.submit(IORequest(Op.WRITE, fd, tag * PAGE, [aligned(PAGE)], tag))
        orders.add(tuple(done.request.tag for done in collect(engine, 4)))
    assert len(orders) > 5


def test_a_write_takes_what_its_buffer_holds_when_it_ends() -> None:
    """So a caller that reuses a buffer too early writes wrong bytes here, as it may on a real disk."""
    _, disk = new_disk(1)
    fd, engine, buffer = new_file(disk), disk.io_engine("io", 1), aligned(PAGE, 1)
    engine.submit(IORequest(Op.WRITE, fd, 0, [buffer], None))
    buffer[:] = 2
    collect(engine, 1)
    assert content(disk) == [2]


def test_a_disk_that_hangs_is_counted_at_close() -> None:
    class HungDisk(SimDisk):
        def service_s(self, request: IORequest) -> float:
            return math.inf if request.tag == "hang" else super().service_s(request)

    simulation = Simulation(1)
    disk = HungDisk(simulation)
    simulation.machine(disk)
    disk.make_directory("/cache")
    fd, engine = disk.open("/cache/x", create=True), disk.io_engine("io", 2)
    for tag in ("hang", "moves", "moves too"):
        engine.submit(IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], tag))
    assert [done.request.tag for done in collect(engine, 2)] == ["moves", "moves too"]
    assert engine.close(5.0) == 1


# -- limits


def test_a_full_disk_refuses_to_allocate_and_to_write_until_there_is_room() -> None:
    simulation = Simulation(1)
    disk = SimDisk(simulation, capacity_bytes=8 * PAGE)
    disk.make_directory("/cache")
    fd, other = (disk.open(f"/cache/{name}", create=True) for name in "xy")
    disk.allocate(fd, 6 * PAGE)
    assert disk.free_bytes("/cache") == 2 * PAGE
    with pytest.raises(OSError, match="No space left"):
        disk.allocate(other, 3 * PAGE)
    error = run_one(disk.io_engine("io", 1), IORequest(Op.WRITE, other, 0, [aligned(3 * PAGE)], None))
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert disk.size(other) == 0
    disk.write_at(fd, 0, aligned(6 * PAGE))
    disk.unlink("/cache/x")
    with pytest.raises(OSError, match="No space left"):
        disk.allocate(other, 3 * PAGE)
    disk.close(fd)
    disk.allocate(other, 8 * PAGE)


def test_direct_io_wants_offsets_lengths_and_addresses_in_whole_pages() -> None:
    _, disk = new_disk(1)
    fd = new_file(disk)
    whole = aligned(3 * PAGE)
    for offset, buffer in ((512, whole), (0, whole[:512]), (0, whole[512 : 512 + PAGE])):
        with pytest.raises(OSError) as caught:
            disk.write_at(fd, offset, buffer)
        assert caught.value.errno == errno.EINVAL


def test_a_directory_that_is_removed_leaves_open_files_without_a_name() -> None:
    simulation, disk = new_disk(1)
    fd = new_file(disk)
    disk.write_at(fd, 0, aligned(PAGE, 4))
    disk.remove_tree("/cache")
    out = aligned(PAGE)
    assert disk.links(fd) == 0
    assert disk.read_at(fd, 0, out) == PAGE
    with pytest.raises(FileNotFoundError):
        disk.open("/cache/x", create=True)
    simulation.power_cut()
    with pytest.raises(FileNotFoundError):
        disk.list_directory("/cache")


# -- against a model


class DiskAgainstModel(RuleBasedStateMachine):
    """One file of 6 pages: what is read is what was written last; a power cut leaves, page for page, something that
    was written since the last sync, or what the last sync covered."""

    PAGES = 6

    def __init__(self) -> None:
        super().__init__()
        self.simulation, self.disk = new_disk(3)
        self.fd = new_file(self.disk)
        self.disk.allocate(self.fd, self.PAGES * PAGE)
        self.disk.sync(self.fd)
        self.current = [0] * self.PAGES
        self.possible = [{0} for _ in range(self.PAGES)]
        self.version = 0

    @rule(first=st.integers(0, PAGES - 1), pages=st.integers(1, PAGES), by_engine=st.booleans())
    def write(self, first: int, pages: int, by_engine: bool) -> None:
        pages = min(pages, self.PAGES - first)
        self.version = self.version % 255 + 1
        data = aligned(pages * PAGE, self.version)
        if by_engine:
            engine = self.disk.io_engine("io", 1)
            assert run_one(engine, IORequest(Op.WRITE, self.fd, first * PAGE, [data], None)) is None
        else:
            self.disk.write_at(self.fd, first * PAGE, data)
        for page in range(first, first + pages):
            self.current[page] = self.version
            self.possible[page].add(self.version)

    @rule()
    def sync(self) -> None:
        self.disk.sync(self.fd)
        self.possible = [{value} for value in self.current]

    @rule()
    def kill(self) -> None:
        self.simulation.kill()
        self.fd = self.disk.open("/cache/x")

    @rule()
    def power_cut(self) -> None:
        self.simulation.power_cut()
        self.fd = self.disk.open("/cache/x")
        self.current = content(self.disk)
        assert all(value in possible for value, possible in zip(self.current, self.possible, strict=True))
        self.possible = [{value} for value in self.current]

    @invariant()
    def what_is_read_was_written_last(self) -> None:
        assert content(self.disk) == self.current
        out = aligned(self.PAGES * PAGE)
        self.disk.read_at(self.fd, 0, out)
        assert np.array_equal(out[::PAGE], np.array(self.current, np.uint8))


TestDiskAgainstModel = DiskAgainstModel.TestCase
TestDiskAgainstModel.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
