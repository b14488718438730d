"""What this process may use of the machine: processors, memory and open files, as the kernel and the cgroups of a container or
a batch system limit them. Standard library only, because the packer asks too.

Each function takes the folder that ``/proc`` and ``/sys`` are in, so that tests can describe other machines by files.
"""

from __future__ import annotations

import errno
import math
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_ROOT = Path("/")
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),  # above it the kernel slows the process down until it frees memory
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""cgroup v2's files, and v1's: the limit, what is used of it, and the field of ``memory.stat`` with the part of that which is
file contents that the kernel drops before it kills anything."""


class FreeMemory(NamedTuple):
    """The memory that this process can still take, and what limits it."""

    size_bytes: int
    limited_by: str
    """The file that states a cgroup's limit; empty where the machine has less."""


# ------------------------------------------------------------------------------------------------------------------ processors


def cpu_count(root: Path = _ROOT) -> int:
    """Cores that this process may use: those that taskset and cpusets allow, or a container's CPU quota where that is less.
    A quota of 1.5 cores counts as two, because one thread could not use it up."""
    return max(min([affinity_count(), *(math.ceil(quota) for quota in _cpu_quotas(root))]), 1)


def affinity_count() -> int:
    """Cores that this process may run on, without regard to a quota of their time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_on_machine() -> int:
    """Ranks that torchrun started on this machine, which share its memory and cores; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_threads() -> int:
    """Cores for each rank on this machine, at least 1."""
    return max(cpu_count() // ranks_on_machine(), 1)


def _cpu_quotas(root: Path) -> Iterator[float]:
    """In cores: the kernel's documents cgroup-v2.rst, ``cpu.max``, and sched-bwc.rst for v1."""
    for folder in _cgroup_folders("cpu", root):
        words = [*_read(folder / "cpu.max").split(), _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        quota, period = (_integer(word) for word in words[:2])
        if quota is not None and quota > 0 and period:
            yield quota / period


# ---------------------------------------------------------------------------------------------------------------------- memory


def free_memory(root: Path = _ROOT) -> FreeMemory:
    """The least of what the machine has available and what each cgroup of this process leaves of its limit. File contents in
    the page cache do not count as used, because the kernel drops them when memory is needed."""
    found = [_available(root)]
    for folder in _cgroup_folders("memory", root):
        fields = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
        for limit_name, used_name, cached_name in _MEMORY_FILES:
            limit, used = _integer(_read(folder / limit_name)), _integer(_read(folder / used_name))
            if limit is not None and used is not None:
                used -= min(_integer(fields.get(cached_name, "")) or 0, used)
                found.append(FreeMemory(max(limit - used, 0), str(folder / limit_name)))
    return min(found)


def _available(root: Path) -> FreeMemory:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return FreeMemory(int(line.split()[1]) * 1024, "")
    # Not Linux: half of what the machine has.
    return FreeMemory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, "")


# ------------------------------------------------------------------------------------------------------------------ open files


def raise_open_files_limit() -> int:
    """Let this process open as many files as it may ask for: raise its soft limit to the hard one. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses the 'unlimited' that it states itself
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


def way_out(error: OSError) -> str:
    """What to do where a call failed because this process may have no more of something; empty for other errors."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"this process may open {limit} files: allow it more with 'ulimit -n'"
    if error.errno == errno.ENOMEM:
        return "allow this process more memory, or with vm.max_map_count more mapped files"
    return ""


# --------------------------------------------------------------------------------------------------------------------- cgroups


def _cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """The folders that may limit this process, of cgroup v1's controller and of v2: its own group's and those above it, up to
    the one that is mounted. Some may not exist: the fields are those of the manual pages cgroups(7) and proc_pid_mountinfo(5).
    """
    groups: dict[str, str] = {}  # v1's controllers, and "" for v2 -> the path of this process's group
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        groups.update(dict.fromkeys(names.split(","), path))
    mounts = [("", "/", "/sys/fs/cgroup"), (controller, "/", f"/sys/fs/cgroup/{controller}")]  # where they usually are
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            mounts.append(("", fields.split()[3], fields.split()[4]))
        elif kind.startswith("cgroup ") and controller in kind.split()[-1].split(","):
            mounts.append((controller, fields.split()[3], fields.split()[4]))
    for name, mounted, mount_point in mounts:
        group = PurePosixPath(groups.get(name, "/"))
        if group.is_relative_to(mounted):  # a container sees the mounted group as the root, but not always in /proc/self/cgroup
            group = group.relative_to(mounted)
        parts = [part for part in group.parts if part not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(mount_point.lstrip("/"), *parts[:depth])


def _read(path: Path) -> str:
    """A file's text; empty where there is no such file, or it may not be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _integer(text: str) -> int | None:
    """None for text that is not an integer, such as the ``max`` of a cgroup without a limit."""
    return int(text) if text.removeprefix("-").isdecimal() else None
