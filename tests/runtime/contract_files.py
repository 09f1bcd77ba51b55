"""What every ``seam.Files`` must do. A subclass gives the fixtures ``files`` and ``root`` (a directory)."""

import errno

import numpy as np
import pytest

from kvtier.runtime.seam import Buffer, Files

PAGE = 4096


def aligned(nbytes: int, fill: int = 0) -> Buffer:
    """Page-aligned bytes, as direct I/O wants them."""
    whole = np.full(nbytes + PAGE, fill, np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + nbytes]


def pattern(nbytes: int, seed: int) -> Buffer:
    """Page-aligned random bytes."""
    out = aligned(nbytes)
    out[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return out


class FilesContract:
    @pytest.fixture(params=[True, False], ids=["direct", "buffered"])
    def direct(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    def test_a_missing_file_is_an_error_unless_it_is_to_be_created(self, files: Files, root: str) -> None:
        with pytest.raises(FileNotFoundError):
            files.open(f"{root}/x")
        with pytest.raises(FileNotFoundError):
            files.open(f"{root}/no/x", create=True)
        files.close(files.open(f"{root}/x", create=True))
        files.close(files.open(f"{root}/x"))
        assert files.list_directory(root) == ["x"]

    def test_directories_are_made_with_their_parents_and_may_be_there_already(self, files: Files, root: str) -> None:
        files.make_directory(f"{root}/a/b/c")
        files.make_directory(f"{root}/a/b/c")
        assert files.list_directory(f"{root}/a/b") == ["c"]
        assert files.list_directory(f"{root}/a/b/c") == []

    def test_a_file_in_the_place_of_a_directory_is_an_error(self, files: Files, root: str) -> None:
        files.close(files.open(f"{root}/x", create=True))
        for path in (f"{root}/x", f"{root}/x/y"):
            with pytest.raises(NotADirectoryError):
                files.make_directory(path)

    def test_names_are_listed_in_order(self, files: Files, root: str) -> None:
        for name in ("b", "c", "a"):
            files.close(files.open(f"{root}/{name}", create=True))
        assert files.list_directory(root) == ["a", "b", "c"]
        with pytest.raises(FileNotFoundError):
            files.list_directory(f"{root}/nowhere")

    def test_what_was_written_is_read_back(self, files: Files, root: str, direct: bool) -> None:
        fd = files.open(f"{root}/x", create=True, direct=direct)
        data, out = pattern(8 * PAGE, 1), aligned(8 * PAGE)
        files.write_at(fd, 4 * PAGE, data)
        assert files.size(fd) == 12 * PAGE
        assert files.read_at(fd, 4 * PAGE, out) == 8 * PAGE
        assert np.array_equal(out, data)
        assert files.read_at(fd, 0, out[: 4 * PAGE]) == 4 * PAGE
        assert not out[: 4 * PAGE].any()
        files.sync(fd)
        files.close(fd)

    def test_a_file_that_was_removed_cannot_be_synced(self, files: Files, root: str) -> None:
        """It would succeed, and mean nothing."""
        fd = files.open(f"{root}/x", create=True)
        files.unlink(f"{root}/x")
        with pytest.raises(FileNotFoundError, match="removed"):
            files.sync(fd)
        files.close(fd)

    def test_a_read_across_the_end_returns_what_there_is(self, files: Files, root: str, direct: bool) -> None:
        fd = files.open(f"{root}/x", create=True, direct=direct)
        files.write_at(fd, 0, aligned(2 * PAGE, 7))
        files.truncate(fd, PAGE + 100)
        out = aligned(4 * PAGE)
        assert files.read_at(fd, 0, out) == PAGE + 100
        assert (out[: PAGE + 100] == 7).all()
        assert not out[PAGE + 100 :].any()
        assert files.read_at(fd, 8 * PAGE, out) == 0
        files.close(fd)

    def test_buffered_files_take_any_offset_and_length(self, files: Files, root: str) -> None:
        fd = files.open(f"{root}/x", create=True, direct=False)
        text = np.frombuffer(b"1234567890", np.uint8)
        files.write_at(fd, PAGE - 5, text)
        files.write_at(fd, PAGE - 3, text[:2])
        out = np.zeros(10, np.uint8)
        assert files.read_at(fd, PAGE - 5, out) == 10
        assert out.tobytes() == b"1212567890"
        files.close(fd)

    def test_allocated_room_counts_and_is_zero(self, files: Files, root: str) -> None:
        fd = files.open(f"{root}/x", create=True)
        files.allocate(fd, 4 * PAGE)
        files.write_at(fd, 0, aligned(PAGE, 1))
        files.allocate(fd, 4 * PAGE)
        out = aligned(4 * PAGE, 9)
        assert files.size(fd) == 4 * PAGE
        assert files.read_at(fd, 0, out) == 4 * PAGE
        assert (out[:PAGE] == 1).all()
        assert not out[PAGE:].any()
        assert files.free_bytes(root) > 0
        files.close(fd)

    def test_what_truncation_cut_off_comes_back_as_zeros(self, files: Files, root: str) -> None:
        fd = files.open(f"{root}/x", create=True)
        files.write_at(fd, 0, aligned(3 * PAGE, 5))
        files.sync(fd)
        files.truncate(fd, PAGE + 10)
        files.truncate(fd, 3 * PAGE)
        out = aligned(3 * PAGE)
        assert files.read_at(fd, 0, out) == 3 * PAGE
        assert (out[: PAGE + 10] == 5).all()
        assert not out[PAGE + 10 :].any()
        files.close(fd)

    def test_rename_replaces_and_the_replaced_file_has_no_name_left(self, files: Files, root: str) -> None:
        old, new = (files.open(f"{root}/{name}", create=True) for name in ("old", "new"))
        files.write_at(old, 0, aligned(PAGE, 1))
        files.rename(f"{root}/old", f"{root}/new")
        files.sync_directory(root)
        assert files.list_directory(root) == ["new"]
        assert (files.links(old), files.links(new)) == (1, 0)
        fd, out = files.open(f"{root}/new"), aligned(PAGE)
        files.read_at(fd, 0, out)
        assert (out == 1).all()
        with pytest.raises(FileNotFoundError):
            files.rename(f"{root}/old", f"{root}/new")
        for each in (old, new, fd):
            files.close(each)

    def test_a_removed_file_is_still_readable_where_it_is_open(self, files: Files, root: str) -> None:
        fd, out = files.open(f"{root}/x", create=True), aligned(PAGE)
        files.write_at(fd, 0, aligned(PAGE, 3))
        files.unlink(f"{root}/x")
        assert files.links(fd) == 0
        assert files.read_at(fd, 0, out) == PAGE
        assert (out == 3).all()
        files.close(fd)
        with pytest.raises(FileNotFoundError):
            files.unlink(f"{root}/x")

    def test_the_lock_excludes_every_other_open_until_it_is_closed(self, files: Files, root: str) -> None:
        first, second = (files.open(f"{root}/LOCK", create=True, direct=False) for _ in range(2))
        assert files.lock(first)
        assert files.lock(first)
        assert not files.lock(second)
        files.close(first)
        assert files.lock(second)
        files.close(second)

    def test_a_file_opened_for_reading_takes_no_writes(self, files: Files, root: str) -> None:
        files.close(files.open(f"{root}/x", create=True))
        fd = files.open(f"{root}/x", writable=False)
        with pytest.raises(OSError) as caught:
            files.write_at(fd, 0, aligned(PAGE))
        assert caught.value.errno == errno.EBADF
        assert files.size(fd) == 0
        files.close(fd)

    def test_a_closed_descriptor_is_of_no_use(self, files: Files, root: str) -> None:
        fd = files.open(f"{root}/x", create=True)
        files.close(fd)
        for call in (files.size, files.close, files.sync, files.links):
            with pytest.raises(OSError) as caught:
                call(fd)
            assert caught.value.errno == errno.EBADF
