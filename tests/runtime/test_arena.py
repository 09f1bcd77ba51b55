"""Arenas: the contract of both, and memory shared with another process."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from kvtier.errors import ConfigError, TierError
from kvtier.runtime import MemfdArena
from kvtier.runtime import arena as arena_module
from kvtier.runtime.seam import Arena
from kvtier.testing.simulation import SimArena
from tests.interrupts import open_files

PAGE = 4096
PATIENCE_S = 30.0


@pytest.fixture(params=[lambda nbytes: MemfdArena("test", nbytes), SimArena], ids=["memfd", "sim"])
def arena(request: pytest.FixtureRequest) -> Arena:
    return request.param(64 * PAGE)  # type: ignore[no-any-return]


def test_an_arena_is_aligned_zero_and_as_long_as_asked_for(arena: Arena) -> None:
    assert arena.data.nbytes == 64 * PAGE
    assert arena.data.ctypes.data % PAGE == 0
    assert not arena.data.any()
    arena.close()


def test_views_are_the_pages_they_name(arena: Arena) -> None:
    view = arena.view(3, 2)
    view[:] = 9
    assert view.nbytes == 2 * PAGE
    assert np.flatnonzero(arena.data).tolist() == list(range(3 * PAGE, 5 * PAGE))
    del view
    arena.close()


def test_close_is_idempotent_and_takes_the_bytes_away(arena: Arena) -> None:
    arena.close()
    arena.close()
    assert arena.data.nbytes == 0


def test_a_view_that_outlives_its_arena_still_points_at_memory() -> None:
    arena = MemfdArena("test", 4 * PAGE)
    view = arena.view(0, 4)
    arena.close()
    view[:] = 5
    assert int(view.sum()) == 5 * 4 * PAGE


def test_all_pages_are_there_before_the_first_use() -> None:
    nbytes = 16 << 20
    arena = MemfdArena("test", nbytes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arena.data.fill(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < nbytes // PAGE // 16
    arena.close()


def test_another_process_sees_the_same_bytes() -> None:
    arena = MemfdArena("test", 16 * PAGE)
    arena.view(2, 1)[:] = 7
    code = (
        "import sys; from kvtier.runtime import MemfdArena; arena = MemfdArena.attach(int(sys.argv[1])); "
        "assert (arena.view(2, 1) == 7).all() and arena.data.nbytes == 16 * 4096; arena.view(5, 1)[:] = 8"
    )
    command = [sys.executable, "-c", code, str(arena.fd)]
    subprocess.run(command, pass_fds=[arena.fd], timeout=60, check=True)
    assert np.array_equal(np.unique(arena.view(5, 1)), [8])
    arena.close()
    assert arena.fd == -1


def test_attaching_keeps_a_descriptor_of_its_own() -> None:
    arena = MemfdArena("test", 2 * PAGE)
    other = MemfdArena.attach(arena.fd)
    arena.data[:] = 3
    arena.close()
    assert (other.data == 3).all()
    other.close()


def test_nobody_who_has_the_descriptor_can_shrink_it_under_us() -> None:
    arena = MemfdArena("test", 4 * PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, PAGE)
    arena.close()


@pytest.mark.parametrize("nbytes", [0, -4096, 4097])
def test_a_size_that_is_no_multiple_of_a_page_is_refused(nbytes: int) -> None:
    with pytest.raises(ConfigError, match="not a positive multiple of 4096"):
        MemfdArena("host", nbytes)


def test_more_than_the_machine_has_is_refused_and_not_tried() -> None:
    with pytest.raises(ConfigError, match=r"arena 'host'.*make the capacity smaller"):
        MemfdArena("host", 1 << 50)


def test_a_failed_arena_leaves_no_descriptor_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(arena_module, "map_shared", failing)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no memory"):
        arena_module.MemfdArena("test", PAGE)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("can_start", range(3))
def test_an_arena_that_gets_no_thread_to_touch_it_with_leaves_none_behind(
    fewer_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, can_start: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    before, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    fewer_threads(can_start)
    with pytest.raises(TierError, match=rf"'kvtier-touch', {can_start + 1} of 3: can't start new thread; raise the"):
        MemfdArena("test", 4 * arena_module.TOUCH_RUN_BYTES)
    assert len(os.listdir("/proc/self/fd")) == before
    assert set(threading.enumerate()) == threads


def test_ctrl_c_while_an_arena_is_touched_ends_all_who_touch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    files, threads, us = open_files(), set(threading.enumerate()), threading.current_thread()
    touching, given_up = threading.Semaphore(0), threading.Event()

    def touch(_: object) -> None:
        if threading.current_thread() is us:
            for _ in range(3):
                assert touching.acquire(timeout=PATIENCE_S)
            raise KeyboardInterrupt
        touching.release()
        given_up.wait(PATIENCE_S)

    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(arena_module, "_clear", touch)
    monkeypatch.setattr(arena_module, "Event", lambda: given_up)
    with pytest.raises(KeyboardInterrupt):
        MemfdArena("test", 8 * arena_module.TOUCH_RUN_BYTES)
    left = set(threading.enumerate()) - threads
    given_up.set()
    assert not left
    assert open_files() == files


def test_an_arena_begins_at_a_huge_page_boundary_and_goes_with_its_last_view() -> None:
    """Collapsing needs the boundary; a view that outlives the arena keeps the mapping, and nothing else does."""
    arena = MemfdArena("test", 8 * PAGE)
    address = arena.data.ctypes.data
    assert address % (2 << 20) == 0
    view = arena.view(1, 2)
    arena.close()
    view[:] = 7
    assert view.sum() == 7 * 2 * PAGE
    del view
    with open("/proc/self/maps") as maps:
        assert not [line for line in maps if line.startswith(f"{address:x}-")]
