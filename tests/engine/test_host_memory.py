"""The limits of control groups, in the layouts that systemd, Docker and Kubernetes make."""

from pathlib import Path

import psutil
import pytest

from paceline.engine.host_memory import host_memory

MIB = 1 << 20
LIMIT = 1024 * MIB
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"
UNIFIED = "sys/fs/cgroup/unified"


def write(folder: Path, **files: str | int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def processes_group(root: Path, *lines: str) -> None:
    write(root / "proc/self", cgroup="\n".join(lines))


def version_2(folder: Path, limit: str | int = LIMIT, high: str | int = "max") -> None:
    stat = f"anon 5\ninactive_file {20 * MIB}\nactive_file {10 * MIB}"
    write(folder, memory__max=limit, memory__high=high, memory__current=100 * MIB)
    write(folder, memory__stat=stat)


def version_1(folder: Path, limit: int = LIMIT) -> None:
    stat = f"inactive_file 7\ntotal_inactive_file {20 * MIB}\ntotal_active_file {10 * MIB}"
    write(folder, memory__limit_in_bytes=limit, memory__usage_in_bytes=100 * MIB, memory__stat=stat)


def is_limited(root: Path) -> bool:
    memory = host_memory(root)
    available = min(psutil.virtual_memory().available, LIMIT - 70 * MIB)
    return memory == (LIMIT, available)


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    memory = host_memory(tmp_path)
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.available_bytes <= memory.total_bytes


@pytest.mark.parametrize("path", ["/", "/system.slice/x.service", "/../other"])
def test_a_container_of_version_2_sees_its_limit_at_the_mount(tmp_path: Path, path: str) -> None:
    processes_group(tmp_path, f"0::{path}")
    version_2(tmp_path / V2)
    assert is_limited(tmp_path)


@pytest.mark.parametrize("limited", ["a.slice", "a.slice/b.service", "a.slice/b.service/c"])
def test_each_group_above_the_processs_own_counts(tmp_path: Path, limited: str) -> None:
    processes_group(tmp_path, "0::/a.slice/b.service/c")
    for group in ("a.slice", "a.slice/b.service", "a.slice/b.service/c", "other.slice"):
        version_2(tmp_path / V2 / group, limit="max" if group != "other.slice" else MIB)
    version_2(tmp_path / V2 / limited)
    assert is_limited(tmp_path)


def test_the_soft_limit_of_version_2_counts_too(tmp_path: Path) -> None:
    processes_group(tmp_path, "0::/a")
    version_2(tmp_path / V2 / "a", limit=4 * LIMIT, high=LIMIT)
    assert is_limited(tmp_path)


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/a/b"])
def test_version_1_is_read_at_the_mount_and_in_the_processs_group(
    tmp_path: Path, path: str
) -> None:
    processes_group(tmp_path, "5:cpu:/elsewhere", f"4:memory:{path}")
    version_1(tmp_path / V1, limit=LIMIT if path != "/a/b" else 9223372036854771712)
    if path == "/a/b":
        version_1(tmp_path / V1 / "a", limit=LIMIT)
        version_1(tmp_path / V1 / "a" / "b", limit=9223372036854771712)
    assert is_limited(tmp_path)


def test_a_path_that_begins_outside_of_the_container_is_found_within(tmp_path: Path) -> None:
    processes_group(tmp_path, "4:memory:/docker/0123/inner")
    version_1(tmp_path / V1 / "inner")
    assert is_limited(tmp_path)


def test_version_2_beside_version_1_is_read(tmp_path: Path) -> None:
    processes_group(tmp_path, "4:memory:/", "0::/a")
    version_1(tmp_path / V1, limit=9223372036854771712)
    version_2(tmp_path / UNIFIED / "a")
    assert is_limited(tmp_path)


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / V2, memory__max=MIB, memory__current=5 * MIB)
    assert host_memory(tmp_path) == (MIB, 0)
