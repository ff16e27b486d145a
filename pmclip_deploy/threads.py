"""What the processor is, and how many threads are worth starting on it. ``root`` is where /proc and /sys stand."""

import os
from collections.abc import Iterator, Set
from functools import cache
from math import ceil
from pathlib import Path, PurePosixPath

# Instruction sets that decide which kernels run, and in which precision.
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
NAMES = ("model name", "CPU implementer", "CPU part")  # in /proc/cpuinfo; ARM's has no name
FIRST = 8 << 10  # bytes of /proc/cpuinfo that describe one processor
ROOT = Path("/")
ALIKE = 0.75  # of the largest capacity: cores that have it are of the fastest kind


def cpu_threads(root: Path = ROOT, allowed: Set[int] | None = None) -> int:
    """Physical cores that this process may use: a container's quota counts, hyper-threads do not.

    ``allowed`` are logical processors, by default those of the process's affinity. The kernel keeps the affinity within the cpuset.
    """
    return _threads(root, frozenset(affinity() if allowed is None else allowed))


def performance_cores(root: Path = ROOT, allowed: Set[int] | None = None) -> int:
    """Those of ``cpu_threads`` that are of the fastest kind; all of them where there is one kind."""
    allowed = affinity() if allowed is None else allowed
    return min(cpu_threads(root, allowed), _cores(root, _fastest(root, allowed)))


def affinity() -> Set[int]:
    """The logical processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}


def cpu_quota(root: Path = ROOT) -> float | None:
    """How many processors' time the control groups of this process grant, versions 1 and 2; None without a limit."""
    return min(_quotas(root), default=None)


def processor(root: Path = ROOT) -> str:
    """What a measurement of speed depends on: name, instruction sets, and how many threads and fast cores there are to use."""
    try:
        with (root / "proc/cpuinfo").open("rb") as file:
            said = file.read(FIRST).decode(errors="replace")
    except OSError:
        said = ""
    lines = (line.partition(":") for line in reversed(said.splitlines()))  # the first processor's lines come last, and stay
    info = {key.strip(): value.strip() for key, _, value in lines}
    names = [info[name] for name in NAMES if name in info] or [os.environ.get("PROCESSOR_IDENTIFIER", "unknown processor")]
    flags = (info.get("flags") or info.get("Features") or "").split()
    counts = f"{cpu_threads(root)} threads, {performance_cores(root)} fast cores"
    return "; ".join((" ".join(names), " ".join(flag for flag in FLAGS if flag in flags), counts))


@cache  # each graph that is opened asks
def _threads(root: Path, allowed: Set[int]) -> int:
    quota = cpu_quota(root)
    return max(1, min(_cores(root, allowed), len(allowed) if quota is None else ceil(quota)))


def _cores(root: Path, allowed: Set[int]) -> int:
    of_each = (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in allowed)
    return len({_text(file) or str(file) for file in of_each})


def _fastest(root: Path, allowed: Set[int]) -> Set[int]:
    """Intel's kernel drivers list the performance cores; ARM's kernel gives each core's capacity, 1024 for the largest."""
    if listed := _numbers(_text(root / "sys/devices/cpu_core/cpus")) & allowed:
        return listed
    said = {cpu: _text(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in allowed}
    capacities = {cpu: int(text) for cpu, text in said.items() if text.isdecimal()}
    largest = max(capacities.values(), default=0)
    return {cpu for cpu in allowed if capacities.get(cpu, 0) >= ALIKE * largest}


def _quotas(root: Path) -> Iterator[float]:
    """Of each group from the top down to the one of this process. In a container the top of what is mounted is its own group."""
    top, groups = root / "sys/fs/cgroup", list[tuple[tuple[str, ...], str]]([(("",), "/")])  # where /proc does not say, the top alone
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            groups.append((("",), path))
        elif "cpu" in controllers.split(","):
            groups.append((("cpu", controllers), path))
    for folders, path in groups:
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for folder in folders:
            for depth in range(len(parts) + 1):
                yield from _quota(top.joinpath(folder, *parts[:depth]))


def _quota(group: Path) -> Iterator[float]:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period):  # without a limit the quota is "max" or -1
        yield int(quota) / int(period)


def _numbers(listed: str) -> Set[int]:
    """"0-3,8" -> {0, 1, 2, 3, 8}"""
    found = set[int]()
    for part in listed.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found |= {*range(int(first), int(last or first) + 1)}
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
