"""Opening a data plane: what fails leaves nothing open, and what was pinned is unpinned before it goes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier import load_config
from kvtier.errors import ConfigError, TierError
from kvtier.runtime import MemfdArena, system_machine
from kvtier.runtime import arena as arena_module
from kvtier.runtime.seam import Arena, Buffer, IOEngine, Machine, Runtime
from kvtier.runtime.system import SystemRuntime
from kvtier.testing.contents import tiny_layout
from kvtier.transfer import DataPlane, streams
from tests.interrupts import interrupt_start, open_files

LAYOUT = tiny_layout()


def opened(machine: Machine, directory: Path | None = None, **more: Any) -> DataPlane:
    settings: dict[str, Any] = {"host": {"capacity": "1MiB", "staging": "1MiB", "copy_threads": 2}}
    if directory is not None:
        settings["disk"] = {"directories": [str(directory)], "capacity": "8MiB", "segment": "1MiB"}
    return DataPlane(load_config(settings), LAYOUT, machine, **more)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Nothing is open, and nothing runs, that was not before."""
    files, threads = open_files(), set(threading.enumerate())
    yield
    assert open_files() == files
    assert not set(threading.enumerate()) - threads


def refuse(*_: object) -> Any:
    raise TierError("no")


@pytest.mark.usefixtures("nothing_left")
def test_memory_that_cannot_be_pinned_is_given_back() -> None:
    with pytest.raises(TierError):
        opened(system_machine(), pin=refuse)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("which", ["host", "staging", "headers"])
def test_an_arena_that_cannot_be_had_takes_no_other_with_it(which: str) -> None:
    def arena(name: str, nbytes: int) -> Arena:
        if name == which:
            raise ConfigError(f"arena {name!r}: more than there is")
        return MemfdArena(name, nbytes)

    with pytest.raises(ConfigError, match=which):
        opened(replace(system_machine(), arena=arena))


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("which", ["host", "staging", "headers"])
def test_memory_that_the_operating_system_refuses_is_told_with_a_remedy(which: str) -> None:
    def arena(name: str, nbytes: int) -> Arena:
        if name == which:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return MemfdArena(name, nbytes)

    remedy = (
        r"\d+ bytes of memory cannot be had: Cannot allocate memory; lower host\.capacity or host\.staging, or raise"
    )
    with pytest.raises(TierError, match=f"arena '{which}': {remedy}") as caught:
        opened(replace(system_machine(), arena=arena))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.usefixtures("nothing_left")
def test_an_arena_whose_pages_cannot_be_touched_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = MemfdArena("whole", 4096)
    monkeypatch.setattr(arena_module, "_in_runs", refuse)
    with pytest.raises(TierError):
        MemfdArena("broken", 4096)
    with pytest.raises(TierError):
        MemfdArena.attach(arena.fd)
    arena.close()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("failed", [1, 2])
def test_a_directory_whose_io_engine_cannot_be_made_is_unlocked(tmp_path: Path, failed: int) -> None:
    """Whichever of two directories it is; both can be opened at once afterwards."""
    machine, made = system_machine(), []

    def io_engine(name: str, threads: int) -> IOEngine:
        made.append(name)
        if len(made) == failed:
            raise RuntimeError("can't start new thread")
        return machine.io_engine(name, threads)

    config = load_config(
        {
            "host": {"capacity": "1MiB", "staging": "1MiB"},
            "disk": {"directories": [str(tmp_path / "a"), str(tmp_path / "b")], "capacity": "16MiB", "segment": "1MiB"},
        }
    )
    with pytest.raises(RuntimeError, match="start new thread"):
        DataPlane(config, LAYOUT, replace(machine, io_engine=io_engine))
    assert DataPlane(config, LAYOUT, machine).close(60)


class FewThreads(SystemRuntime):
    """A machine that starts a few loops and then no more."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._threads = threads

    def spawn(self, name: str, *arguments: Any) -> Any:
        self._threads -= 1
        if self._threads < 0:
            raise RuntimeError("can't start new thread")
        return super().spawn(name, *arguments)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("threads", range(3))
def test_loops_that_were_started_end_when_another_cannot_be(tmp_path: Path, threads: int) -> None:
    runtime: Runtime = FewThreads(threads)
    with pytest.raises(RuntimeError, match="start new thread"):
        opened(replace(system_machine(), runtime=runtime), tmp_path)
    assert opened(system_machine(), tmp_path).close(60)


@pytest.mark.usefixtures("nothing_left")
def test_a_recovery_that_breaks_off_unlocks_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(system_machine(), tmp_path).close(60)
    with monkeypatch.context() as patched:
        patched.setattr("kvtier.tiers.disk.tier.SegmentReader", refuse)
        with pytest.raises(TierError):
            opened(system_machine(), tmp_path)
    assert opened(system_machine(), tmp_path).close(60)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", ["disk-0-1", "disk-0-loop", "copy-0", "copy-1", "housekeeping-0", "deadlines"])
def test_ctrl_c_while_a_thread_is_started_ends_it_and_all_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    machine = system_machine("aiofiles" if name == "disk-0-loop" else "threads")
    with monkeypatch.context() as patched:
        interrupt_start(patched, name)
        with pytest.raises(KeyboardInterrupt):
            opened(machine, tmp_path)
    assert opened(machine, tmp_path).close(60)


# --- pinning ------------------------------------------------------------------------------------------------------


class FakeCudart:
    """CUDA's book of pinned memory. Whether what is unpinned is still mapped shows when it is written to."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.left = 10

    def is_available(self) -> bool:
        return True

    def cudart(self) -> FakeCudart:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 0
        assert address not in self.pinned, "a second registration of one address fails on a GPU"
        self.left -= 1
        if self.left < 0:
            return 2
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        nbytes = self.pinned.pop(address, None)
        return 713 if nbytes is None else 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr(streams.torch, "cuda", fake)
    return fake


def pin_on(buffer: Buffer) -> Callable[[], None]:
    return streams.pin(buffer, "on")


class Watched:
    """An arena that must not be pinned any more when it goes."""

    def __init__(self, nbytes: int, cuda: FakeCudart) -> None:
        self._arena, self._cuda = MemfdArena("watched", nbytes), cuda
        self.data = self._arena.data

    def view(self, page: int, pages: int) -> Buffer:
        return self._arena.view(page, pages)

    def close(self) -> None:
        assert self.data.ctypes.data not in self._cuda.pinned, "unmapped while CUDA has it"
        self._arena.close()


def watched(cuda: FakeCudart) -> Machine:
    return replace(system_machine(), arena=lambda name, nbytes: Watched(nbytes, cuda))


@pytest.mark.usefixtures("nothing_left")
def test_arenas_are_unpinned_before_they_are_given_back(cuda: FakeCudart) -> None:
    plane = opened(watched(cuda), pin=pin_on)
    assert sorted(cuda.pinned.values()) == [1 << 20, 1 << 20]
    assert plane.close(60)
    assert cuda.pinned == {}


@pytest.mark.usefixtures("nothing_left")
def test_an_opening_that_fails_unpins_what_it_pinned(cuda: FakeCudart) -> None:
    cuda.left = 1
    with pytest.raises(TierError, match=r"refused to pin 1048576 bytes \(error 2\)"):
        opened(watched(cuda), pin=pin_on)
    assert cuda.pinned == {}


def test_memory_that_cuda_does_not_unpin_is_told_in_the_log(cuda: FakeCudart, caplog: pytest.LogCaptureFixture) -> None:
    unpin = streams.pin(np.zeros(4096, np.uint8), "auto")
    cuda.pinned.clear()
    unpin()
    assert "did not unpin" in caplog.text
    assert "error 713" in caplog.text


def test_nothing_is_pinned_where_nobody_asked_for_it(cuda: FakeCudart) -> None:
    streams.pin(np.zeros(4096, np.uint8), "off")()
    assert cuda.pinned == {}
