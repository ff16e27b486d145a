"""How many threads are worth starting, in trees of /proc and /sys as machines and containers have them."""

import os
from pathlib import Path

import pytest

from pmclip_deploy.threads import FLAGS, affinity, cpu_quota, cpu_threads, performance_cores, processor

CPU = "sys/devices/system/cpu"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


def siblings(*groups: str) -> dict[str, str]:
    """Of each logical processor in a list such as "0-1", the list."""
    found = {}
    for group in groups:
        first, _, last = group.partition("-")
        found |= {f"{CPU}/cpu{cpu}/topology/thread_siblings_list": group for cpu in range(int(first), int(last or first) + 1)}
    return found


# An Intel desktop: 8 performance cores of 2 threads, 8 efficiency cores of one.
HYBRID = {
    **siblings(*(f"{2 * i}-{2 * i + 1}" for i in range(8)), *(str(cpu) for cpu in range(16, 24))),
    "sys/devices/cpu_core/cpus": "0-15",
    "sys/devices/cpu_atom/cpus": "16-23",
}
# An ARM board: 4 small cores, 3 large ones and one that is a little faster.
BIG_LITTLE = {
    **siblings(*map(str, range(8))),
    **{f"{CPU}/cpu{cpu}/cpu_capacity": str(of) for cpu, of in enumerate([325] * 4 + [906] * 3 + [1024])},
}
SERVER = siblings(*(f"{2 * i}-{2 * i + 1}" for i in range(16)))


@pytest.mark.parametrize(
    ("files", "allowed", "threads", "fast"),
    [
        (HYBRID, range(24), 16, 8),
        (HYBRID, range(16, 24), 8, 8),  # a cpuset of efficiency cores alone: they are the fastest that there are
        (HYBRID, [0, 1, 2, 16], 3, 2),
        (BIG_LITTLE, range(8), 8, 4),
        (BIG_LITTLE, range(4), 4, 4),
        (SERVER, range(32), 16, 16),
        (SERVER, [0, 1, 4], 2, 2),
        ({}, range(3), 3, 3),  # nothing is known
    ],
)
def test_physical_cores_and_those_of_the_fastest_kind(
    tmp_path: Path, files: dict[str, str], allowed: "range | list[int]", threads: int, fast: int
) -> None:
    root = tree(tmp_path, files)
    assert (cpu_threads(root, {*allowed}), performance_cores(root, {*allowed})) == (threads, fast)


@pytest.mark.parametrize(
    ("files", "quota", "threads"),
    [
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5, 3),  # version 2, in a container
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None, 16),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1),
        ({"sys/fs/cgroup/cpu.max": "3200000 100000"}, 32, 16),  # more than there are
        # a service of systemd: the slice above it has the limit
        ({"proc/self/cgroup": "0::/system.slice/pacs.service", "sys/fs/cgroup/system.slice/cpu.max": "400000 100000",
          "sys/fs/cgroup/system.slice/pacs.service/cpu.max": "max 100000"}, 4, 4),
        # version 1: in a container, where the group of /proc is the host's name of it, and by its path
        ({"proc/self/cgroup": "5:cpu,cpuacct:/docker/ab12\n4:memory:/docker/ab12", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 2, 2),
        ({"proc/self/cgroup": "5:cpu,cpuacct:/a/b", "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "150000",
          "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "50000"}, 3, 3),
        ({"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None, 16),
        # what is no quota
        ({"sys/fs/cgroup/cpu.max": "100000 0"}, None, 16),
        ({"sys/fs/cgroup/cpu.max": "100000"}, None, 16),
        ({"sys/fs/cgroup/cpu.max": "² 100000"}, None, 16),
        ({"proc/self/cgroup": "nonsense\n::\n0::/../../other", "sys/fs/cgroup/cpu.max": "\x00"}, None, 16),
    ],
)  # fmt: skip
def test_a_containers_quota(tmp_path: Path, files: dict[str, str], quota: float | None, threads: int) -> None:
    root = tree(tmp_path, {**SERVER, **files})
    assert (cpu_quota(root), cpu_threads(root, {*range(32)})) == (quota, threads)
    assert performance_cores(root, {*range(32)}) == threads


def test_a_quota_is_shared_by_fast_cores_too(tmp_path: Path) -> None:
    root = tree(tmp_path, {**HYBRID, "sys/fs/cgroup/cpu.max": "400000 100000"})
    assert (cpu_threads(root, {*range(24)}), performance_cores(root, {*range(24)})) == (4, 4)


CPUINFO = "processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx2 avx512_vnni amx_bf16\n\nprocessor\t: 1\nmodel name\t: Another\n"


def test_what_a_measurement_depends_on(tmp_path: Path) -> None:
    here = processor(tree(tmp_path / "a", {"proc/cpuinfo": CPUINFO}))
    assert here.startswith("A Processor; avx2 avx512_vnni amx_bf16; ") and {"avx2", "avx512_vnni", "amx_bf16"} <= {*FLAGS}
    fewer = processor(tree(tmp_path / "b", {"proc/cpuinfo": CPUINFO.replace("avx512_vnni ", "")}))
    quota = processor(tree(tmp_path / "c", {"proc/cpuinfo": CPUINFO, "sys/fs/cgroup/cpu.max": "10000 100000"}))
    assert len({here, fewer, quota} if len(affinity()) > 1 else {here, fewer}) == (3 if len(affinity()) > 1 else 2)
    arm = "processor: 0\nFeatures: fp asimddp i8mm\nCPU implementer: 0x41\nCPU part: 0xd4f\n"
    assert processor(tree(tmp_path / "d", {"proc/cpuinfo": arm})).startswith("0x41 0xd4f; asimddp i8mm; ")
    assert processor(tmp_path / "nothing")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's affinity")
def test_the_process_own_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpu_threads() == performance_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
