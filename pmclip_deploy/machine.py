"""What this machine is, for `doctor` and for the stamp that results carry: nothing in it names the machine, its user or a folder.

Standard library only, and whatever is missing or broken here is None: it is asked where nothing else may work.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmclip_deploy.sessions import backends
from pmclip_deploy.threads import FLAGS, cpu_quota, cpu_threads, performance_cores

PACKAGES = (
    *("pmclip-deploy", "numpy", "pillow", "pydicom", "python-gdcm", "pylibjpeg-openjpeg", "pyjpegls", "tokenizers"),
    *dict.fromkeys(package for backend in backends().values() for package in backend.packages),
)
GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "power.limit")  # of nvidia-smi


def stamp(threads: int | None = None) -> dict[str, Any]:
    """What must be known of a machine to read its figures."""
    driver = nvidia_driver()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "memory_gib": _memory_gib(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "gpus": gpus(),
        "nvidia_driver": None if driver is None else (re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", driver) or [None])[0],
        "jetson": jetson(),
        "threads": threads,
        "packages": versions(*PACKAGES),
    }


def cpu() -> dict[str, Any]:
    lines = (line.partition(":") for line in reversed(_text("/proc/cpuinfo").splitlines()))
    info = {key.strip(): value.strip() for key, _, value in lines}
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "name": info.get("model name") or platform.processor() or platform.machine(),
        "logical": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "quota": cpu_quota(),
        "threads": cpu_threads(),
        "fast_cores": performance_cores(),
    }


def nvidia_driver() -> str | None:
    """The kernel module's own line; whoever built it may stand in it, so the stamp takes its version alone."""
    return _text("/proc/driver/nvidia/version").partition("\n")[0] or None


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each."""
    said = output_of(["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]) or ""
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(GPU_FIELDS)]


def jetson() -> dict[str, str | None] | None:
    """Model, L4T, JetPack and power mode; None on any other machine."""
    release = _text("/etc/nv_tegra_release")
    if not release:
        return None
    l4t = re.search(r"R(\d+)\D+REVISION: ([\d.]+)", release)
    mode = re.search(r"NV Power Mode:\s*(\S+)", output_of(["nvpmodel", "-q"]) or "")
    return {
        "model": _text("/proc/device-tree/model").strip("\x00") or None,
        "l4t": ".".join(l4t.groups()) if l4t else None,
        "jetpack": output_of(["dpkg-query", "--showformat=${Version}", "--show", "nvidia-jetpack"]),
        "power_mode": mode.group(1) if mode else None,
    }


def versions(*names: str) -> dict[str, str]:
    """Of those that are installed."""
    return {name: found for name in names if (found := version(name))}


def version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of

    try:
        return of(name)
    except PackageNotFoundError:
        return None


def output_of(command: Sequence[str], seconds: float = 10) -> str | None:
    """What a program prints; None where it is not there, fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, errors="replace", timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _memory_gib() -> float | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return round(int(found.group(1)) / (1 << 20), 1) if found else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
