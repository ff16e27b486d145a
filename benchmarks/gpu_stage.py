"""What a stage of `benchmarks.gpu` measures with: its device, its deadline, and rows that are written as soon as they are known."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy.benchmarks.results import Row, Run, append, read

Figures = dict[str, Any]

MOST = 50  # calls that a median is of


class NotMeasuredError(Exception):
    """Why a figure cannot be had here: one line."""


@dataclass
class Stage:
    """One stage. A figure that fails or comes too late is a row too, which says why."""

    name: str  # the scenario of its rows
    run: Run
    output: Path
    device: str  # "cuda", or "cpu" for a rehearsal with tiny sizes
    deadline: float  # of time.monotonic()
    compiled: dict[str, Path] = field(default_factory=dict)  # folders of compiled kernels, by name; one may still be in the making
    files: dict[str, Path] = field(default_factory=dict)  # of the stage heads

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def need_gpu(self) -> None:
        if self.is_rehearsal:
            raise NotMeasuredError("needs an NVIDIA GPU")

    def measure(self, part: str, system: str, job: Callable[[], Figures], model: str = "any") -> Figures:
        """Writes the row of ``job()``, whose "samples" are the row's; returns the figures, none if it failed."""
        figures, why = Figures(), None
        try:
            if self.left <= 0:
                raise NotMeasuredError("the time of its stage was over")
            figures = job()
            self.synchronize()  # an error of a kernel belongs to the row that launched it
        except Exception as error:
            figures, why = Figures(), reason(error)
            self.forget()
        self.write(part, system, figures, why, model)
        return figures

    def write(self, part: str, system: str, figures: Figures, not_measured: str | None = None, model: str = "any") -> None:
        about, samples = {**figures}, int(figures.get("samples", 0))
        about.pop("samples", None)
        finite = {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in about.items()}
        row = self.run.row(model, system, part, self.name, finite, threads=None, samples=samples, not_measured=not_measured)
        append(self.output, [row])
        said = ", ".join(f"{name} {value}" for name, value in row["figures"].items()) or f"not measured: {not_measured}"
        print(f"{self.name:9} {model:10} {part:40} {system:28} {said}", flush=True)

    def known(self, part: str, figure: str) -> list[Any]:
        """What this run has measured of it before, whatever the system."""
        rows: list[Row] = read(self.output) if self.output.is_file() else []
        found = [row["figures"].get(figure) for row in rows if (row["run"], row["part"]) == (self.run.run, part)]
        return [value for value in found if value is not None]

    def timed(self, call: Callable[[], object], seconds: float = 2.0) -> Figures:
        """Quartiles of warm calls that follow each other, by CUDA's events; in a rehearsal of one call, by this machine's clock."""
        if self.is_rehearsal:
            start = time.perf_counter()
            call()
            return {**quartiles([1e3 * (time.perf_counter() - start)]), "samples": 1}
        import torch

        call()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        each = time.perf_counter() - start
        count = int(min(MOST, max(3 if each < seconds else 1, min(seconds, self.left) / max(each, 1e-6))))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return {**quartiles([a.elapsed_time(b) for a, b in pairwise(events)]), "samples": count}

    def synchronize(self) -> None:
        if not self.is_rehearsal:
            import torch

            torch.cuda.synchronize()

    def forget(self) -> None:
        """Gives back what a failed job held of the GPU's memory."""
        if not self.is_rehearsal:
            import torch

            with suppress(Exception):  # a GPU that reports errors reports the same one again
                torch.cuda.empty_cache()

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """What one call takes of the GPU's memory above what is held before it; None in a rehearsal."""
        if self.is_rehearsal:
            call()
            return None
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / (1 << 20)


def quartiles(times: list[float]) -> Figures:
    return {name: float(np.percentile(times, of)) for name, of in (("p50_ms", 50), ("p25_ms", 25), ("p75_ms", 75))}


def reason(error: BaseException) -> str:
    """One line, without any path of this machine."""
    if isinstance(error, ImportError) and error.name:
        return f"needs {error.name.partition('.')[0]}, which cannot be imported here"
    said = without_paths(str(error))
    return said if isinstance(error, NotMeasuredError) else f"{type(error).__name__}: {said}" if said else type(error).__name__


def without_paths(text: str) -> str:
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][\w.+@~-]+){2,}[/\\]?", "PATH", " ".join(text.split()))[:200]
