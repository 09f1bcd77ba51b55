"""The directory of one placement: who may use it, what store it holds, and which files are in it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import numpy as np

from kvtier.core.memory import Bytes1D
from kvtier.core.plan import PAGE_BYTES
from kvtier.errors import CorruptBlockError, TierError
from kvtier.models import KVLayout
from kvtier.runtime.seam import Files
from kvtier.tiers.disk.format import FORMAT_MAJOR, UUID_BYTES, Superblock, new_pages

log = logging.getLogger(__name__)

LOCK: Final = "LOCK"
SUPERBLOCKS: Final = ("superblock.a", "superblock.b")
LAYOUT: Final = "layout.json"
UNFINISHED: Final = ".new"
KNOWN_FEATURES: Final = 0
_PLACEMENT: Final = re.compile(r"[0-9a-f]{64}")
_SEGMENT: Final = re.compile(r"seg-(\d{6})\.kvs")
_TEXT_BYTES_MAX: Final = 1 << 20


class PlacementDirectory:
    """``<directory>/<placement hex>``, locked for as long as it is open."""

    def __init__(
        self, files: Files, directory: str, layout: KVLayout, *, owner: str, random_bytes: Callable[[int], bytes]
    ) -> None:
        """``owner`` is left in the lock file for people. Nothing is touched before ``open``."""
        self.base = directory.rstrip("/") or "/"
        self.path = f"{self.base}/{layout.placement}"
        self.read_only = False
        self._files = files
        self._layout = layout
        self._owner = owner
        self._random_bytes = random_bytes
        self._lock_fd = -1
        self.superblock = Superblock(0, 0.0, b"", b"", bytes.fromhex(layout.placement))

    def open(self, now_s: float) -> None:
        """Take the lock, and begin a life of the store that is there, or of a new one.

        Raises:
            TierError: what is wrong and what to do; nothing that was there is changed.
        """
        with explained(self.path):
            self._files.make_directory(self.path)
            self._warn_of_neighbours()
            try:
                self._lock()
                self._begin_life(now_s)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Give the lock back."""
        fd, self._lock_fd = self._lock_fd, -1  # first: a second time it may be a stranger's
        if fd >= 0:
            self._files.close(fd)

    @property
    def gone(self) -> bool:
        """Whether somebody removed the directory under us."""
        try:
            return self._files.links(self._lock_fd) == 0
        except OSError:
            return True

    def segment_path(self, number: int) -> str:
        """Where segment ``number`` is."""
        return f"{self.path}/seg-{number:06d}.kvs"

    def segment_numbers(self) -> list[int]:
        """The segments that are there."""
        return segment_numbers(self._files, self.path)

    def remove_unfinished(self) -> None:
        """Remove segments that an earlier life had not finished making; nothing was ever written to them."""
        with suppress(OSError):
            for name in self._files.list_directory(self.path):
                if name.endswith(UNFINISHED) and _SEGMENT.fullmatch(name.removesuffix(UNFINISHED)):
                    self._files.unlink(f"{self.path}/{name}")

    # --- the lock ---------------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        path = f"{self.path}/{LOCK}"
        self._lock_fd = self._files.open(path, create=True, direct=False)
        if not self._files.lock(self._lock_fd):
            holder = read_text(self._files, path) or "unknown"
            raise TierError(
                f"disk directory {self.path}: in use by another cache ({holder}); give each one a directory of its "
                "own, or close the other one"
            )
        text = np.frombuffer(self._owner.encode(), np.uint8)
        self._files.truncate(self._lock_fd, 0)
        if text.nbytes:
            self._files.write_at(self._lock_fd, 0, text)

    # --- the store --------------------------------------------------------------------------------------------------

    def _begin_life(self, now_s: float) -> None:
        found = read_superblocks(self._files, self.path)
        if found is None:
            self._create(now_s)
            return
        self._check(found)
        if found.ro_compat & ~KNOWN_FEATURES:
            log.warning("disk directory %s: made by a newer version; it is read, and not written", self.path)
            self.superblock, self.read_only = found, True
            return
        self.superblock = replace(found, sequence=found.sequence + 1)
        self._write_superblocks()
        self._mend_layout()

    def _create(self, now_s: float) -> None:
        if numbers := self.segment_numbers():
            raise TierError(
                f"disk directory {self.path}: holds {len(numbers)} segments and no whole superblock, so that its "
                "blocks cannot be told from foreign ones; move it away to begin anew"
            )
        placement = bytes.fromhex(self._layout.placement)
        uuid, nonce = self._random_bytes(UUID_BYTES), self._random_bytes(UUID_BYTES)
        self.superblock = Superblock(1, now_s, uuid, nonce, placement)
        self._write_layout()
        self._write_superblocks()
        self._files.sync_directory(self.path)

    def _check(self, found: Superblock) -> None:
        if found.major != FORMAT_MAJOR or found.incompat & ~KNOWN_FEATURES:
            raise TierError(
                f"disk directory {self.path}: has format {found.major}.{found.minor} (features {found.incompat:#x}) "
                f"and this kvtier reads format {FORMAT_MAJOR}; use the version that made it, or another directory. "
                "Nothing was read or changed"
            )
        if found.placement.hex() != self._layout.placement:
            raise TierError(
                f"disk directory {self.path}: holds blocks of placement {found.placement.hex()}; it was renamed by "
                "somebody. Give it back its name, or move it away"
            )

    def _write_superblocks(self) -> None:
        """Both, one after the other: whichever tears, the other is whole."""
        page = self.superblock.pack()
        for name in SUPERBLOCKS:
            self._write_file(f"{self.path}/{name}", page)

    def _mend_layout(self) -> None:
        """Write the description anew where it was lost: only tools miss it, and its digest names the directory."""
        found = _described(read_text(self._files, f"{self.path}/{LAYOUT}"))
        if all(found.get(name) == value for name, value in self._layout.describe().items()):
            return
        try:
            self._write_layout()
            self._files.sync_directory(self.path)
        except OSError as error:
            log.warning(
                "disk directory %s: %s is missing or damaged and cannot be written anew: %s. Blocks are found all the "
                "same; `kvtier stat` needs it",
                self.path, LAYOUT, error,
            )  # fmt: skip

    def _write_layout(self) -> None:
        text = json.dumps(self._layout.describe(), indent=1).encode()
        unfinished = f"{self.path}/{LAYOUT}{UNFINISHED}"
        self._write_file(unfinished, np.frombuffer(text, np.uint8))
        self._files.rename(unfinished, f"{self.path}/{LAYOUT}")

    def _write_file(self, path: str, data: Bytes1D) -> None:
        fd = self._files.open(path, create=True, direct=False)
        try:
            self._files.write_at(fd, 0, data)
            self._files.truncate(fd, data.nbytes)
            self._files.sync(fd)
        finally:
            self._files.close(fd)

    # --- neighbours -------------------------------------------------------------------------------------------------

    def _warn_of_neighbours(self) -> None:
        own = _of_all_ranks(json.dumps(self._layout.describe()))
        strangers = [
            name
            for name in placements(self._files, self.base)
            if name != self._layout.placement
            and _of_all_ranks(read_text(self._files, f"{self.base}/{name}/{LAYOUT}")) != own
        ]
        if strangers:
            log.warning(
                "disk directory %s also holds blocks of %d other placements, which take room and are never read: %s. "
                "`kvtier stat %s` shows them",
                self.base, len(strangers), ", ".join(strangers), self.base,
            )  # fmt: skip


def placements(files: Files, directory: str) -> list[str]:
    """The placements that have a directory in ``directory``, as hex."""
    return [name for name in files.list_directory(directory) if _PLACEMENT.fullmatch(name)]


def segment_numbers(files: Files, path: str) -> list[int]:
    """The segments in the directory of one placement."""
    matches = map(_SEGMENT.fullmatch, files.list_directory(path))
    return [int(match[1]) for match in matches if match]


def read_superblocks(files: Files, path: str) -> Superblock | None:
    """The younger of the two superblocks in ``path``; None when neither is whole.

    Raises:
        OSError: none is whole, and one cannot be read.
    """
    found, errors = [], []
    for name in SUPERBLOCKS:
        try:
            found.append(_read_superblock(files, f"{path}/{name}"))
        except OSError as error:
            errors.append(error)
    whole = [block for block in found if block is not None]
    if errors and not whole:
        raise errors[0]
    return max(whole, key=lambda block: block.sequence, default=None)


def read_text(files: Files, path: str) -> str:
    """A small file as text; empty when it cannot be read."""
    try:
        fd = files.open(path, direct=False, writable=False)
    except OSError:
        return ""
    try:
        buffer = np.empty(min(files.size(fd), _TEXT_BYTES_MAX), np.uint8)
        return buffer[: files.read_at(fd, 0, buffer)].tobytes().decode(errors="replace")
    except OSError:
        return ""
    finally:
        files.close(fd)


def _read_superblock(files: Files, path: str) -> Superblock | None:
    try:
        fd = files.open(path, direct=False, writable=False)
    except FileNotFoundError:
        return None
    try:
        page = new_pages(1)
        if files.read_at(fd, 0, page) < PAGE_BYTES:
            return None
        return Superblock.unpack(page)
    except CorruptBlockError:
        return None
    finally:
        files.close(fd)


def _of_all_ranks(text: str) -> str:
    """A layout without its rank: directories of the other ranks of one model are no strangers.

    Those of a model that was cut into another number of ranks are: nobody will read them any more.
    """
    layout = _described(text)
    if not isinstance(layout.get("ranks"), list):
        return ""
    sizes = layout["ranks"][1::2]  # each rank is followed by how many there are
    return json.dumps(layout | {"ranks": sizes}, sort_keys=True)


def _described(text: str) -> dict[str, Any]:
    """What ``KVLayout.describe`` wrote down; nothing of anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn an ``OSError`` into a ``TierError`` that says what a directory needs."""
    try:
        yield
    except OSError as error:
        raise TierError(
            f"disk directory {path}: {error.strerror or error}; kvtier needs a directory that it can create, lock and "
            "write, with room for at least one segment"
        ) from error
