"""How many threads are worth starting here."""

import os
from pathlib import Path


def cpu_threads() -> int:
    """Physical cores this process may use: affinity and a container's quota count, hyper-threads do not."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    siblings = {_text(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu) for cpu in allowed}
    quota, _, period = _text(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    granted = -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else len(siblings)
    return max(1, min(len(siblings), granted))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
