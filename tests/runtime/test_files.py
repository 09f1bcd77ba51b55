"""Files: the contract, on the real machine and in the simulation, and what only the real ones can show."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.runtime import SystemFiles, blocking
from kvtier.runtime.seam import Files
from kvtier.testing.simulation import Simulation
from tests.runtime.contract_files import PAGE, FilesContract, aligned, pattern


class TestSystemFiles(FilesContract):
    @pytest.fixture
    def files(self) -> Files:
        return SystemFiles()

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return str(tmp_path)


class TestSimFiles(FilesContract):
    @pytest.fixture
    def files(self) -> Files:
        return Simulation(seed=1).machine().files

    @pytest.fixture
    def root(self, files: Files) -> str:
        files.make_directory("/cache")
        return "/cache"


@pytest.fixture
def files() -> SystemFiles:
    return SystemFiles()


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def test_nobody_else_may_look_into_what_is_created(files: SystemFiles, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.make_directory(f"{tmp_path}/a/b")
        fd = files.open(f"{tmp_path}/a/b/x", create=True)
    finally:
        os.umask(before)
    assert [(tmp_path / path).stat().st_mode & 0o777 for path in ("a", "a/b", "a/b/x")] == [0o700, 0o700, 0o600]
    assert not os.get_inheritable(fd)
    files.close(fd)


def test_a_link_is_not_followed(files: SystemFiles, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for create in (True, False):
        with pytest.raises(OSError) as caught:
            files.open(f"{tmp_path}/link", create=create)
        assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_no_regular_file_is_an_error_and_nobody_waits_for_it(
    files: SystemFiles, tmp_path: Path, direct: bool, writable: bool
) -> None:
    """A FIFO that nobody writes to would be waited for without end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    before = os.listdir("/proc/self/fd")
    for name in ("fifo", "directory"):
        with pytest.raises(OSError) as caught:
            files.open(f"{tmp_path}/{name}", direct=direct, writable=writable)
        assert caught.value.errno in (errno.ENOTSUP, errno.EISDIR)
        assert caught.value.filename == f"{tmp_path}/{name}"
    assert os.listdir("/proc/self/fd") == before


def test_the_lock_excludes_another_process(files: SystemFiles, tmp_path: Path) -> None:
    fd = files.open(f"{tmp_path}/LOCK", create=True, direct=False)
    assert files.lock(fd)
    code = (
        "import sys; from kvtier.runtime import SystemFiles as F; f = F(); "
        "sys.exit(f.lock(f.open(sys.argv[1], direct=False)))"
    )
    locked = subprocess.run([sys.executable, "-c", code, f"{tmp_path}/LOCK"], timeout=60, check=False).returncode
    assert locked == 0
    files.close(fd)


def test_a_file_system_that_refuses_direct_io_at_open_is_used_buffered(
    files: SystemFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refusing_open(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing_open)
    fd = files.open(f"{tmp_path}/x", create=True)
    assert not is_direct(fd)
    files.close(fd)


def refusing(call: blocking.VectorCall) -> blocking.VectorCall:
    """A file system that takes O_DIRECT at open and refuses it at the first transfer."""

    def transfer(fd: int, buffers: object, offset: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, "no direct I/O here")
        return call(fd, buffers, offset)  # type: ignore[arg-type]

    return transfer


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_file_system_that_refuses_direct_io_at_the_first_transfer_is_used_buffered(
    files: SystemFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    fd = files.open(f"{tmp_path}/x", create=True)
    if not is_direct(fd):
        pytest.skip("this file system has no direct I/O to refuse")
    data, out = pattern(4 * PAGE, 1), aligned(4 * PAGE)
    files.write_at(fd, 0, data)
    monkeypatch.setattr(blocking, call, refusing(getattr(blocking, call)))
    if call == "pwritev":
        files.write_at(fd, 0, data)
    assert files.read_at(fd, 0, out) == out.nbytes
    assert not is_direct(fd)
    assert out.tobytes() == data.tobytes()
    files.close(fd)


def refuse_to_reserve(monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "posix_fallocate", refuse)


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_reserve_room_leaves_it_to_whoever_writes(
    files: SystemFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    refuse_to_reserve(monkeypatch, refusal)
    fd = files.open(f"{tmp_path}/x", create=True)
    files.allocate(fd, 4 * PAGE)
    files.write_at(fd, 0, aligned(4 * PAGE))
    assert files.size(fd) == 4 * PAGE
    files.close(fd)


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO], ids=errno.errorcode.get)
def test_room_that_is_not_there_is_an_error(
    files: SystemFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    refuse_to_reserve(monkeypatch, refusal)
    fd = files.open(f"{tmp_path}/x", create=True)
    with pytest.raises(OSError) as caught:
        files.allocate(fd, 4 * PAGE)
    assert caught.value.errno == refusal
    files.close(fd)


def test_an_unaligned_transfer_stays_an_error_and_leaves_direct_io_on(
    files: SystemFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller's mistake must not turn every later transfer into a buffered one."""
    fd = files.open(f"{tmp_path}/x", create=True)
    if not is_direct(fd):
        pytest.skip("this file system has no direct I/O to keep")
    monkeypatch.setattr(blocking, "pwritev", refusing(blocking.pwritev))
    with pytest.raises(OSError) as caught:
        files.write_at(fd, 0, aligned(PAGE)[1:])
    assert caught.value.errno == errno.EINVAL
    assert is_direct(fd)
    files.close(fd)


def test_transfers_that_move_only_a_part_are_continued(
    files: SystemFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, writes = [], []

    def short_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(offset)
        return os.preadv(fd, [buffers[0][:1000]], offset)

    def short_write(fd: int, buffers: list[memoryview], offset: int) -> int:
        writes.append(offset)
        return os.pwritev(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(blocking, "preadv", short_read)
    monkeypatch.setattr(blocking, "pwritev", short_write)
    fd = files.open(f"{tmp_path}/x", create=True, direct=False)
    data, out = pattern(2500, 3), aligned(2500)
    blocking.write_all(fd, 0, (data[:700], data[700:]))
    assert blocking.read_up_to(fd, 0, (out[:1600], out[1600:])) == 2500
    assert writes == [0, 700, 1700]
    assert reads == [0, 1000, 1600]
    assert out.tobytes() == data.tobytes()
    files.close(fd)


def test_the_end_of_a_file_is_no_error_where_it_cannot_be_asked_for_directly(
    files: SystemFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading on from an unaligned end of file under O_DIRECT is EINVAL on some file systems."""

    def strict_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset % 512:
            raise OSError(errno.EINVAL, "unaligned")
        return os.preadv(fd, buffers, offset)

    (tmp_path / "x").write_bytes(b"7" * (PAGE + 100))
    monkeypatch.setattr(blocking, "preadv", strict_read)
    fd = files.open(f"{tmp_path}/x")
    assert files.read_at(fd, 0, aligned(2 * PAGE)) == PAGE + 100
    files.close(fd)


def test_a_write_that_moves_nothing_is_an_error_and_not_a_loop(
    files: SystemFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "pwritev", lambda *_: 0)
    fd = files.open(f"{tmp_path}/x", create=True)
    with pytest.raises(OSError) as caught:
        files.write_at(fd, 0, aligned(PAGE))
    assert caught.value.errno == errno.EIO
    files.close(fd)


def test_a_process_that_runs_out_of_descriptors_uses_what_it_may_have(tmp_path: Path) -> None:
    """One descriptor per segment: the soft limit is raised when it is met, up to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    files = SystemFiles()
    try:
        fd = files.open(str(tmp_path / "segment"), create=True)
        files.close(fd)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
