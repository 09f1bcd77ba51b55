"""What every ``seam.IOEngine`` must do. A subclass gives the fixtures ``machine`` and ``root``."""

import errno
import random
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from kvtier.errors import ClosedError
from kvtier.runtime.seam import IODone, IOEngine, IORequest, Machine, Op
from tests.runtime.contract_files import PAGE, aligned, pattern

PATIENCE_S = 60.0


def collect(engine: IOEngine, count: int) -> list[IODone]:
    """Reap ``count`` requests as a lane does: clear first, then drain."""
    done: list[IODone] = []
    while len(done) < count:
        assert engine.ready.wait(PATIENCE_S), f"only {len(done)} of {count} requests ended"
        engine.ready.clear()
        done += engine.reap()
    return done


def run_one(engine: IOEngine, request: IORequest) -> OSError | None:
    """Run one request alone."""
    engine.submit(request)
    (done,) = collect(engine, 1)
    assert done.request is request
    assert done.elapsed_s >= 0.0
    return done.error


class IOEngineContract:
    @pytest.fixture
    def engine(self, machine: Machine) -> Iterator[IOEngine]:
        engine = machine.io_engine("io", 4)
        yield engine
        assert engine.close(PATIENCE_S) == 0

    @pytest.fixture
    def fd(self, machine: Machine, root: str) -> Iterator[int]:
        fd = machine.files.open(f"{root}/data", create=True)
        yield fd
        machine.files.close(fd)

    def test_several_buffers_are_written_and_read_as_one_run_of_bytes(self, engine: IOEngine, fd: int) -> None:
        data = [pattern(pages * PAGE, pages) for pages in (1, 3, 2)]
        assert run_one(engine, IORequest(Op.WRITE, fd, PAGE, data, "w")) is None
        out = [aligned(pages * PAGE) for pages in (4, 2)]
        assert run_one(engine, IORequest(Op.READ, fd, PAGE, out, "r")) is None
        assert np.array_equal(np.concatenate(out), np.concatenate(data))

    def test_more_buffers_than_one_system_call_takes_are_no_limit(self, engine: IOEngine, fd: int) -> None:
        data, out = pattern(1100 * PAGE, 1), aligned(1100 * PAGE)
        for op, memory in ((Op.WRITE, data), (Op.READ, out)):
            pieces = [memory[start : start + PAGE] for start in range(0, memory.nbytes, PAGE)]
            assert run_one(engine, IORequest(op, fd, 0, pieces, op)) is None
        assert np.array_equal(out, data)

    def test_a_read_that_meets_the_end_of_the_file_is_an_error(self, engine: IOEngine, fd: int) -> None:
        run_one(engine, IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], 0))
        for offset in (0, PAGE, 9 * PAGE):
            error = run_one(engine, IORequest(Op.READ, fd, offset, [aligned(2 * PAGE)], 1))
            assert error is not None
            assert error.errno == errno.EIO

    def test_an_error_of_the_operation_comes_with_its_request(self, machine: Machine, root: str, fd: int) -> None:
        engine, readable = machine.io_engine("io", 1), machine.files.open(f"{root}/data", writable=False)
        error = run_one(engine, IORequest(Op.WRITE, readable, 0, [aligned(PAGE)], 0))
        assert error is not None
        assert error.errno == errno.EBADF
        assert run_one(engine, IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], 0)) is None, "the engine goes on"
        assert engine.close(PATIENCE_S) == 0
        machine.files.close(readable)

    def test_a_sync_ends_without_error(self, engine: IOEngine, fd: int) -> None:
        assert run_one(engine, IORequest(Op.WRITE, fd, 0, [aligned(PAGE, 1)], 0)) is None
        assert run_one(engine, IORequest(Op.SYNC, fd, 0, (), 1)) is None

    @pytest.mark.parametrize("op", [Op.SYNC, Op.WRITE])
    def test_a_write_or_sync_of_a_file_that_was_removed_is_an_error(
        self, machine: Machine, engine: IOEngine, root: str, fd: int, op: Op
    ) -> None:
        """It would succeed, and mean nothing."""
        assert run_one(engine, IORequest(Op.WRITE, fd, 0, [aligned(PAGE, 1)], 0)) is None
        machine.files.unlink(f"{root}/data")
        error = run_one(engine, IORequest(op, fd, 0, [aligned(PAGE)] if op is Op.WRITE else (), 1))
        assert error is not None
        assert error.errno == errno.ENOENT

    def test_every_request_ends_once_and_in_its_own_place(self, engine: IOEngine, fd: int) -> None:
        order = random.Random(5).sample(range(64), 64)
        for place in order:
            engine.submit(IORequest(Op.WRITE, fd, place * PAGE, [aligned(PAGE, place)], place))
        done = collect(engine, 64)
        assert sorted(each.request.tag for each in done) == list(range(64))
        assert all(each.error is None for each in done)
        assert engine.reap() == []
        out = aligned(64 * PAGE)
        assert run_one(engine, IORequest(Op.READ, fd, 0, [out], None)) is None
        assert np.array_equal(out, np.repeat(np.arange(64, dtype=np.uint8), PAGE))

    def test_the_owner_may_listen_on_an_event_of_its_own(self, machine: Machine, engine: IOEngine, fd: int) -> None:
        before, engine.ready = engine.ready, machine.runtime.event()
        assert run_one(engine, IORequest(Op.SYNC, fd, 0, (), 0)) is None
        assert not before.wait(0.0)

    def test_an_idle_engine_holds_no_buffer(self, engine: IOEngine, fd: int) -> None:
        buffer, gone = aligned(PAGE), threading.Event()
        weakref.finalize(buffer, gone.set)
        assert run_one(engine, IORequest(Op.WRITE, fd, 0, [buffer], 0)) is None
        del buffer
        assert gone.wait(10.0)

    def test_after_close_every_request_has_ended_once_moved_or_cancelled(self, machine: Machine, fd: int) -> None:
        engine = machine.io_engine("io", 1)
        requests = [IORequest(Op.WRITE, fd, tag * PAGE, [aligned(PAGE)], tag) for tag in range(200)]
        for request in requests:
            engine.submit(request)
        assert engine.close(PATIENCE_S) == 0
        assert engine.close(PATIENCE_S) == 0
        done = engine.reap()
        assert sorted(each.request.tag for each in done) == list(range(200))
        assert {each.error.errno for each in done if each.error is not None} <= {errno.ECANCELED}
        assert engine.ready.wait(0.0)

    def test_a_closed_engine_takes_nothing_more(self, machine: Machine, fd: int) -> None:
        engine = machine.io_engine("io", 2)
        assert engine.close(PATIENCE_S) == 0
        with pytest.raises(ClosedError):
            engine.submit(IORequest(Op.SYNC, fd, 0, (), 0))
        assert engine.reap() == []
