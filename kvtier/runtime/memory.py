"""How much memory can be had: what the kernel has left, and what the container's limits leave of that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

_ROOT: Final = Path("/")


class _Names(NamedTuple):
    """How a version of cgroups calls its files, and what it gives back when asked for more (in ``memory.stat``)."""

    limit: str
    used: str
    reclaimable: frozenset[str]


_VERSION_2: Final = _Names(
    "memory.max", "memory.current", frozenset({"inactive_file", "active_file", "slab_reclaimable"})
)
_VERSION_1: Final = _Names(
    "memory.limit_in_bytes", "memory.usage_in_bytes", frozenset({"total_inactive_file", "total_active_file"})
)


def available_memory_bytes(root: Path = _ROOT) -> int:
    """What can be had without swapping, or being killed for it; no bound where nothing says so.

    ``root`` is where /proc and /sys are.
    """
    return min(_of_the_kernel(root), *_of_cgroups(root), sys.maxsize)


def _of_the_kernel(root: Path) -> int:
    return _sum(root / "proc/meminfo", frozenset({"MemAvailable:"}), sys.maxsize >> 10) << 10


def _of_cgroups(root: Path) -> Iterator[int]:
    """What each group around this process leaves it, by either version of cgroups."""
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, group = line.split(":", 2)
        if number == "0":
            yield from _around(mounts, group, _VERSION_2)
        elif "memory" in controllers.split(","):
            for mount in {"memory", controllers}:  # one of them may be a link to the other
                yield from _around(mounts / mount, group, _VERSION_1)


def _around(mount: Path, group: str, names: _Names) -> Iterator[int]:
    """From the innermost group outwards. In a container the mount may begin at a group whose name it does not know."""
    path = mount / group.strip("/")
    for at in (path, *path.parents):
        limit, used = _number(at / names.limit), _number(at / names.used)
        if limit is not None and used is not None:
            yield max(0, limit - used + _sum(at / "memory.stat", names.reclaimable, 0))
        if at == mount:
            return


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None  # "max" where there is no limit


def _sum(path: Path, names: frozenset[str], otherwise: int) -> int:
    """Of the entries that have one of ``names``; ``otherwise`` where there is none."""
    entries = (line.split() for line in _lines(path))
    found = [int(words[1]) for words in entries if len(words) > 1 and words[0] in names]
    return sum(found) if found else otherwise


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    return []


__all__ = ["available_memory_bytes"]
