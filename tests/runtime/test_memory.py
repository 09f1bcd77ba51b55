"""How much memory a process may take, by files as the kernel shows them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvtier.runtime.memory import available_memory_bytes

KERNEL = 8 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable:  {KERNEL >> 10} kB\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def second_version(root: Path, group: str, limit: str, used: int, cached: tuple[int, int, int] = (0, 0, 0)) -> None:
    write(root, f"sys/fs/cgroup{group}/memory.max", f"{limit}\n")
    write(root, f"sys/fs/cgroup{group}/memory.current", f"{used}\n")
    names = ("inactive_file", "active_file", "slab_reclaimable")
    lines = [f"{name} {nbytes}\n" for name, nbytes in zip(names, cached, strict=True)]
    write(root, f"sys/fs/cgroup{group}/memory.stat", "anon 5\n" + "".join(lines))


def test_without_limits_it_is_what_the_kernel_has(root: Path) -> None:
    assert available_memory_bytes(root) == KERNEL
    second_version(root, "/a", "max", 100)
    write(root, "proc/self/cgroup", "0::/a\n")
    assert available_memory_bytes(root) == KERNEL


def test_where_nothing_says_anything_there_is_no_bound(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) >= sys.maxsize >> 11


def test_a_limit_leaves_what_is_not_used_and_what_is_only_cached(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/pod/container\n")
    second_version(root, "/pod/container", str(1 << 30), 300 << 20, (100 << 20, 50 << 20, 6 << 20))
    assert available_memory_bytes(root) == (1024 - 144) << 20


def test_the_tightest_of_the_groups_around_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/pod/container\n")
    second_version(root, "/pod/container", str(1 << 30), 0)
    second_version(root, "/pod", str(512 << 20), 0)
    assert available_memory_bytes(root) == 512 << 20


def test_a_container_sees_its_own_group_as_the_root(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/docker/of-the-host\n")
    second_version(root, "", str(1 << 30), 24 << 20)
    assert available_memory_bytes(root) == 1000 << 20


@pytest.mark.parametrize("mount", ["memory", "memory,cpu"])
def test_the_first_version_has_other_names(root: Path, mount: str) -> None:
    write(root, "proc/self/cgroup", f"11:cpuset:/x\n4:{mount}:/job\n0::/\n")
    group = f"sys/fs/cgroup/{mount}/job"
    write(root, f"{group}/memory.limit_in_bytes", f"{1 << 30}\n")
    write(root, f"{group}/memory.usage_in_bytes", f"{600 << 20}\n")
    write(root, f"{group}/memory.stat", f"total_inactive_file {70 << 20}\ntotal_active_file {6 << 20}\n")
    assert available_memory_bytes(root) == 500 << 20


def test_more_than_the_limit_in_use_leaves_nothing(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/a\n")
    second_version(root, "/a", "1000", 2000)
    assert available_memory_bytes(root) == 0


def test_this_machine_has_some() -> None:
    assert available_memory_bytes() > 0
