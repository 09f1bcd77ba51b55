"""What the figures were measured on, and what else it did meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from benchmarks.suite import BenchmarkError

SECTOR_BYTES: Final = 512
ROOT: Final = Path(__file__).parent.parent
CHANGED: Final = "+changes"


def describe() -> str:
    """The machine in one line."""
    parts = [
        _field("/proc/cpuinfo", "model name") or platform.machine(),
        f"{len(os.sched_getaffinity(0))} cores",
        f"L3 {last_level_cache_bytes() >> 20} MiB",
        f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / (1 << 20):.0f} GiB",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        f"torch {metadata.version('torch')}",
    ]
    return ", ".join([*parts, *gpu_names()])


def commit() -> str:
    """The commit of this checkout, marked where tracked code differs from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + (CHANGED if _git("status", "--porcelain", "-uno", "--", "kvtier", "benchmarks") else "")


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the kernel names; a guest may see less than it shares."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("K")) << 10 for size in sizes), default=0)


def gpu_names() -> list[str]:
    """NVIDIA devices, as their driver names them."""
    found = Path("/proc/driver/nvidia/gpus").glob("*/information")
    return [_field(str(path), "Model") for path in sorted(found)]


def huge_pages() -> dict[str, str | float]:
    """Which memory may use huge pages, private and of memory files, and the share of our arenas that does.

    Direct I/O is up to three times slower into memory that is scattered over small pages.
    """
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    chosen: dict[str, str | float] = {}
    for name, file in (("private", "enabled"), ("shared", "shmem_enabled")):
        words = (folder / file).read_text().split() if (folder / file).exists() else []
        chosen[name] = next((word.strip("[]") for word in words if word.startswith("[")), "unknown")
    chosen["arenas_share"] = huge_share(Path("/proc/self/smaps").read_text())
    return chosen


def huge_share(smaps: str) -> float:
    """Share of the resident memory of all memory files that lies in huge pages."""
    resident = huge = 0
    in_arena = False
    for line in smaps.splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            in_arena = "/memfd:" in line
        elif in_arena and name == "Rss:":
            resident += int(rest.split()[0])
        elif in_arena and name == "ShmemPmdMapped:":
            huge += int(rest.split()[0])
    return round(huge / resident, 3) if resident else 0.0


class Bystanders:
    """CPU time that others take from now on."""

    def __init__(self) -> None:
        self._busy_s, self._own_s, self._since_s = _busy_s(), time.process_time(), time.monotonic()

    def cores(self) -> float:
        """Cores that everything but this process kept busy on average; time stolen by the host included."""
        busy_s, own_s = _busy_s() - self._busy_s, time.process_time() - self._own_s
        return round(max(0.0, busy_s - own_s) / max(1e-3, time.monotonic() - self._since_s), 2)


@dataclass(frozen=True, slots=True)
class DeviceCounters:
    """What the block device under a directory has read and written, for everybody, and what this process asked of it.

    The device's counters prove that bytes did not come from a page cache; those of the process, that they were ours.
    """

    stat: Path

    @classmethod
    def under(cls, directory: Path) -> DeviceCounters:
        """Counters of the device that ``directory`` lies on.

        Raises:
            BenchmarkError: it is no block device (tmpfs, overlay, network), so nothing there could be shown to be cold.
        """
        device = directory.stat().st_dev
        stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
        if not stat.exists():
            raise BenchmarkError(f"{directory}: lies on no block device with counters; pass --dir on a local disk")
        return cls(stat)

    def read_bytes(self) -> tuple[int, int]:
        """(by the device, by this process) since they began."""
        return int(self.stat.read_text().split()[2]) * SECTOR_BYTES, int(_field("/proc/self/io", "read_bytes"))


def _busy_s() -> float:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
