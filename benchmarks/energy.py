"""Counters of the energy that this machine takes: of the processor, of a GPU, of a whole board."""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


class Rapl(contextlib.AbstractContextManager["Rapl | None"]):
    """Intel's and AMD's counters of each processor package, in the kernel's powercap folder."""

    def __init__(self, folder: Path = Path("/sys/class/powercap")) -> None:
        self._packages = sorted(folder.glob("intel-rapl:?"))
        self._before: list[int] = []
        self._after: list[int] = []

    def __enter__(self) -> Rapl | None:
        try:
            self._before = self._read()
        except (OSError, ValueError):  # only root may read it
            return None
        return self if self._before else None

    def __exit__(self, *_: object) -> None:
        if self._before:
            self._after = self._read()

    def joules(self, seconds: float) -> dict[str, float]:
        """What all packages used between enter and exit."""
        limits = [int((package / "max_energy_range_uj").read_text()) for package in self._packages]
        used = [(b - a) % (limit + 1) for a, b, limit in zip(self._before, self._after, limits, strict=True)]  # it begins again at 0
        return {"cpu": sum(used) / 1e6}

    def _read(self) -> list[int]:
        return [int((package / "energy_uj").read_text()) for package in self._packages]


@dataclass
class Sampled(contextlib.AbstractContextManager["Sampled | None"]):
    """A program that prints watts again and again: their mean, times the seconds."""

    name: str
    command: Sequence[str]
    pattern: str  # of one sample
    watts: float  # of 1 in it
    _process: subprocess.Popen[str] | None = field(default=None, init=False)
    _said: str = field(default="", init=False)

    @classmethod
    def nvidia_smi(cls) -> Sampled:
        """Of the GPUs, every 100 ms."""
        return cls("gpu", ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "100"), r"^([\d.]+)$", 1.0)

    @classmethod
    def tegrastats(cls) -> Sampled:
        """Of a whole Jetson, every 100 ms."""
        return cls("board", ("tegrastats", "--interval", "100"), r"(?:VDD_IN|POM_5V_IN) (\d+)", 1e-3)

    def __enter__(self) -> Sampled | None:
        program = shutil.which(self.command[0])
        if program is None:
            return None
        self._process = subprocess.Popen([program, *self.command[1:]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._said = self._process.communicate()[0]

    def joules(self, seconds: float) -> dict[str, float]:
        """The mean of the samples times the seconds; empty where none was printed."""
        samples = [float(x) * self.watts for x in re.findall(self.pattern, self._said, re.MULTILINE)]
        return {self.name: statistics.fmean(samples) * seconds} if samples else {}
