"""How much memory processes here may use: the machine's, or what control groups leave of it.

A container's limit is that of a control group (cgroup). Groups nest, and each bounds all below it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

PROCESS_GROUPS = "proc/self/cgroup"
MOUNTS_2 = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
"""Of control groups of version 2; the second one where version 1 is mounted beside it."""
MOUNT_1 = "sys/fs/cgroup/memory"
"""Of the memory controller of version 1."""


class HostMemory(NamedTuple):
    """Of the machine and of each control group that this process is in, the least."""

    total_bytes: int
    available_bytes: int


class GroupMemory(NamedTuple):
    """A control group's limit and what of it is in use."""

    limit_bytes: int
    used_bytes: int
    """Without the page cache, which is given back on demand."""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Read the memory there is for this process. Groups are read below `root`."""
    machine = psutil.virtual_memory()
    groups = list(group_limits(root))
    return HostMemory(
        min([machine.total, *(group.limit_bytes for group in groups)]),
        min([machine.available, *(max(0, g.limit_bytes - g.used_bytes) for g in groups)]),
    )


def group_limits(root: Path) -> Iterator[GroupMemory]:
    """Yield the limits of the process's groups and of all above them. Most groups have none."""
    paths = _group_paths(root)
    for mount in MOUNTS_2:
        for group in _levels(root / mount, paths.get("", "/")):  # version 2 names no controller
            yield from _version_2(group)
    for group in _levels(root / MOUNT_1, paths.get("memory", "/")):
        yield from _version_1(group)


def _group_paths(root: Path) -> dict[str, str]:
    """Return the path of the process's group by controller."""
    try:
        lines = (root / PROCESS_GROUPS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return {name: path for _, names, path in fields for name in names.split(",")}


def _levels(mount: Path, path: str) -> list[Path]:
    """Return a group's folder and those above it, up to the mount.

    A container may see its own group as the mount, and still a path that begins outside of it: the
    first parts that are not there are left out.
    """
    parts = path.strip("/").split("/")
    if ".." in parts:  # the group is outside of the namespace, and only the mount can be read
        return [mount]
    candidates = (mount.joinpath(*parts[start:]) for start in range(len(parts)))
    group = next((group for group in candidates if group.is_dir()), mount)
    return [level for level in (group, *group.parents) if level.is_relative_to(mount)]


def _version_2(group: Path) -> Iterator[GroupMemory]:
    limits = [_number(group / name) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit is not None]
    used = _number(group / "memory.current")
    if known and used is not None:
        yield GroupMemory(min(known), used - _page_cache(group, ""))


def _version_1(group: Path) -> Iterator[GroupMemory]:
    limit = _number(group / "memory.limit_in_bytes")
    used = _number(group / "memory.usage_in_bytes")
    if limit is not None and used is not None:
        yield GroupMemory(limit, used - _page_cache(group, "total_"))


def _page_cache(group: Path, prefix: str) -> int:
    try:
        words = (group / "memory.stat").read_text(encoding="ascii").split()
    except OSError:
        return 0
    values = dict(zip(words[::2], words[1::2], strict=False))
    return sum(int(values.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))


def _number(path: Path) -> int | None:
    """Read a number; None if there is no such file, or if it says max."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
