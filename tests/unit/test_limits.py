"""The limits of a container, read from files as kernels and container runtimes lay them out."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from shards.executor import default_workers
from tidali.hardware import cpu_threads, limits
from tidali.hardware.limits import affinity_count, cpu_count, free_memory, raise_open_files_limit, rank_threads

MIB = 2**20
V1 = "30 25 0:27 {root} /sys/fs/cgroup/{name} rw,nosuid - cgroup cgroup rw,{name}\n"
V2 = "30 25 0:27 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
UNLIMITED = 9223372036854771712
"""What cgroup v1 states where there is no limit: the largest 64-bit number in whole pages."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 cores and 8,000 MiB available."""
    monkeypatch.setattr(limits, "affinity_count", lambda: 64)
    write(tmp_path, {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:    {8000 * 1024} kB\n"})
    return tmp_path


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))


def v2(folder: str, limit_mib: object, used_mib: int, cached_mib: int = 0, *, file: str = "memory.max") -> dict[str, object]:
    limit = limit_mib * MIB if isinstance(limit_mib, int) else limit_mib
    stat = f"anon 5\nfile {2 * cached_mib * MIB}\ninactive_file {cached_mib * MIB}\n"
    return {f"{folder}/{file}": limit, f"{folder}/memory.current": used_mib * MIB, f"{folder}/memory.stat": stat}


def v1(folder: str, limit_mib: int | None, used_mib: int, cached_mib: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.limit_in_bytes": UNLIMITED if limit_mib is None else limit_mib * MIB,
        f"{folder}/memory.usage_in_bytes": used_mib * MIB,
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cached_mib * MIB}\n",
    }


UNIFIED, MEMORY = "sys/fs/cgroup", "sys/fs/cgroup/memory"

MEMORY_CASES: dict[str, tuple[str, str, dict[str, object], int]] = {
    "no cgroups": ("", "", {}, 8000),
    "v2, without a limit": ("0::/\n", V2.format(root="/", point="/sys/fs/cgroup"), v2(UNIFIED, "max", 100), 8000),
    "v2, a container that sees itself as the root": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        v2(UNIFIED, 1200, 700, 300),
        1200 - (700 - 300),
    ),
    "v2, a service whose slice has the limit": (
        "0::/user.slice/user-1.slice/x.scope\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        v2(f"{UNIFIED}/user.slice/user-1.slice/x.scope", "max", 100)
        | v2(f"{UNIFIED}/user.slice/user-1.slice", 2000, 900)
        | v2(f"{UNIFIED}/user.slice", 3000, 900),
        1100,
    ),
    "v2, nested, the inner one is less": (
        "0::/a/b\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        v2(f"{UNIFIED}/a/b", 500, 100) | v2(f"{UNIFIED}/a", 3000, 900),
        400,
    ),
    "v2, memory.high": (
        "0::/a\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        v2(f"{UNIFIED}/a", "max", 100) | v2(f"{UNIFIED}/a", 900, 100, file="memory.high"),
        800,
    ),
    "v2, above the limit": ("0::/\n", V2.format(root="/", point="/sys/fs/cgroup"), v2(UNIFIED, 100, 150, 20), 0),
    "v2, the host's own mount in the container": (
        "0::/docker/1f\n",
        V2.format(root="/docker/1f", point="/sys/fs/cgroup"),
        v2(UNIFIED, 700, 100),
        600,
    ),
    "v2, a group outside of the namespace": (
        "0::/../x\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        v2(UNIFIED, 700, 100),
        600,
    ),
    "v2, mounted elsewhere": ("0::/a\n", V2.format(root="/", point="/mnt/groups"), v2("mnt/groups/a", 700, 100), 600),
    "v1, docker without a namespace": (
        "4:memory:/docker/1f\n0::/\n",
        V1.format(root="/docker/1f", name="memory"),
        v1(MEMORY, 1200, 700, 300),
        800,
    ),
    "v1, a group inside of docker's": (
        "4:memory:/docker/1f/job\n",
        V1.format(root="/docker/1f", name="memory"),
        v1(MEMORY, 1200, 100) | v1(f"{MEMORY}/job", 300, 100),
        200,
    ),
    "v1, a batch system": (
        "9:cpuset:/slurm\n4:memory:/slurm/uid_1/job_2/step_0\n1:name=systemd:/x\n",
        V1.format(root="/", name="memory"),
        v1(f"{MEMORY}/slurm/uid_1/job_2/step_0", None, 100)
        | v1(f"{MEMORY}/slurm/uid_1/job_2", 1000, 400, 50)
        | v1(f"{MEMORY}/slurm", None, 5000),
        650,
    ),
    "hybrid: v1 has the memory": (
        "4:memory:/a\n0::/b\n",
        V2.format(root="/", point="/sys/fs/cgroup/unified") + V1.format(root="/", name="memory"),
        v1(f"{MEMORY}/a", 600, 100),
        500,
    ),
    "hybrid: v2 has the memory": (
        "4:pids:/a\n0::/b\n",
        V2.format(root="/", point="/sys/fs/cgroup/unified") + V1.format(root="/", name="pids"),
        v2(f"{UNIFIED}/unified/b", 600, 100),
        500,
    ),
    "v1, without mountinfo": ("4:memory:/a\n", "", v1(f"{MEMORY}/a", 600, 100), 500),
    "the machine has less than the container": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        v2(UNIFIED, 100_000, 700),
        8000,
    ),
}


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_free_memory(machine: Path, case: str) -> None:
    groups, mounts, files, expected_mib = MEMORY_CASES[case]
    write(machine, {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files})
    found = free_memory(machine)
    assert found.size_bytes == expected_mib * MIB
    assert (found.limited_by == "") == (expected_mib == 8000)
    assert found.limited_by == "" or Path(found.limited_by).is_file()


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        ("", "", {}, 64),
        ("0::/\n", V2.format(root="/", point="/sys/fs/cgroup"), {f"{UNIFIED}/cpu.max": "max 100000"}, 64),
        ("0::/\n", V2.format(root="/", point="/sys/fs/cgroup"), {f"{UNIFIED}/cpu.max": "400000 100000"}, 4),
        ("0::/\n", V2.format(root="/", point="/sys/fs/cgroup"), {f"{UNIFIED}/cpu.max": "150000 100000"}, 2),
        ("0::/\n", V2.format(root="/", point="/sys/fs/cgroup"), {f"{UNIFIED}/cpu.max": "20000 100000"}, 1),
        ("0::/\n", V2.format(root="/", point="/sys/fs/cgroup"), {f"{UNIFIED}/cpu.max": "9900000 100000"}, 64),
        (
            "0::/a/b\n",
            V2.format(root="/", point="/sys/fs/cgroup"),
            {f"{UNIFIED}/a/b/cpu.max": "max 100000", f"{UNIFIED}/a/cpu.max": "300000 100000"},
            3,
        ),
        (
            "2:cpu,cpuacct:/docker/1f\n",
            V1.format(root="/docker/1f", name="cpu,cpuacct"),
            {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 250_000, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100_000},
            3,
        ),
        (
            "2:cpu:/\n",
            V1.format(root="/", name="cpu"),
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100_000},
            64,
        ),
    ],
)
def test_cpu_count(machine: Path, groups: str, mounts: str, files: dict[str, object], expected: int) -> None:
    write(machine, {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files})
    assert cpu_count(machine) == expected


def test_cores_of_this_machine() -> None:
    assert affinity_count() == len(os.sched_getaffinity(0))
    assert 1 <= cpu_count() <= affinity_count()


def test_a_quota_decides_the_threads_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "affinity_count", lambda: 64)
    monkeypatch.setattr(limits, "_cpu_quotas", lambda root: iter([6.0]))
    assert default_workers() == 7
    assert rank_threads() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert rank_threads() == 1


@pytest.mark.parametrize(("cores", "set_before", "expected"), [(3, None, "3"), (3, "2", "2"), (64, None, None)])
def test_a_quota_decides_openmps_threads(
    monkeypatch: pytest.MonkeyPatch, cores: int, set_before: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(cpu_threads, "affinity_count", lambda: 64)
    monkeypatch.setattr(cpu_threads, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_before is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_before)
    cpu_threads.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_the_limit_of_open_files_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert raise_open_files_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
