"""This project and its peers on one model: the same weights, inputs and threads, outputs checked equal before anything is timed.

    python -m pmclip_deploy.benchmarks.compare --model ViT-B/32 --peers peers --output benchmarks/results/bench.jsonl.gz

``peers`` is what environments.py builds; a peer whose environment is not there, or that gives other numbers, becomes "not measured" with
the reason. Every system is a process of its own, and all are timed in turn, round by round. Rows are results.py's.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.benchmarks import environments
from pmclip_deploy.benchmarks.harness import SYSTEMS, Measurement, SystemFailed, Worker, interleaved, offline, pooled, ratio, single_stream
from pmclip_deploy.benchmarks.peers import MODELS, VIT
from pmclip_deploy.benchmarks.results import Row, Run, append
from pmclip_deploy.benchmarks.systems import CONTEXT, TUNED
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.export.precisions import TENSOR_GATES
from pmclip_deploy.machine import stamp
from pmclip_deploy.threads import cpu_threads

PARTS = ("image", "text")
SCENARIOS = ("single-stream", "offline")
BATCH = 16  # of offline
OURS = ("pmclip-deploy fp32", "pmclip-deploy fp16", "pmclip-deploy int8")
COARSER = ("int8", "bf16", TUNED)  # their cosines stand beside their times
AFTER_TUNE = tuple(f"{name}{TUNED}" for name in OURS)  # on the CPU alone
REFERENCE = "open_clip-eager"  # where it is there, else our own fp32
HAS_NOT = {  # models a peer has no class for
    "transformers-onnx": "transformers' CLIPModel has no such towers, a vision transformer is all it knows",
    "fastembed": "fastembed's image path takes no model but those it lists, of CLIP ViT-B/32 alone",
}
PREPARED_BY = {"fastembed": "transformers-onnx", "openvino-bf16": "openvino-fp32"}  # whose graphs it reads
TO_77 = {name for name, environment in environments.OF.items() if environment == "open_clip"}  # what pads texts to all that there may be


@dataclass
class System:
    """A system under test: its process, and why a part of it is not measured."""

    name: str
    worker: Worker | None = None  # what is timed; None where it is not, or not yet
    why_not: dict[str, str] = field(default_factory=dict)  # by part

    def refuse(self, reason: str, parts: Sequence[str] = PARTS) -> None:
        """Parts that are not measured, each with its first reason."""
        self.why_not |= {part: self.why_not.get(part, reason) for part in parts}


class Comparison:
    """One model on this machine: where its weights and the peers' environments are, and what every row shares."""

    def __init__(self, model: str, peers: Path, weights: Path, threads: int, device: str, run: Run) -> None:
        self.model, self.peers, self.weights, self.threads, self.device, self.run = model, peers, weights, threads, device, run

    def row(self, system: str, part: str, scenario: str, figures: Mapping[str, Any], samples: int = 0, why: str | None = None) -> Row:
        """A row of results.py; one of our own names a device other than the CPU."""
        on = system if self.device == "cpu" or not is_ours(system) else f"{system} {self.device}"
        return self.run.row(self.model, on, part, scenario, figures, threads=self.threads, samples=samples, not_measured=why)

    def worker(self, name: str) -> Worker:
        """Raises DeviceError where its environment is not there."""
        if name not in environments.OF:
            return Worker(name)
        python = environments.python_of(self.peers, environments.OF[name])
        return Worker(name, [str(python), str(SYSTEMS)], {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})

    def asked(self, name: str) -> dict[str, Any]:
        """What a worker gets to open a system."""
        device = self.device if is_ours(name) else "cpu"
        return {"system": name, "model": self.model, "weights": str(self.weights), "threads": self.threads, "device": device}

    def systems(self, names: Sequence[str]) -> list[System]:
        """Those that run here are prepared: what their own tools make of the weights is there."""
        out = []
        for name in names:
            system = System(name)
            out.append(system)
            if name in HAS_NOT and self.model != VIT:
                system.refuse(HAS_NOT[name])
                continue
            if name in AFTER_TUNE and self.device != "cpu":
                system.refuse("what tune chooses is compared on the CPU alone")
                continue
            try:
                maker = PREPARED_BY.get(name, name)
                with self.worker(maker) as worker:
                    worker.ask({"prepare": self.asked(maker)})
            except PmclipError as error:
                system.refuse(_reason(error, name))
        return out

    # --- a new process to its first embeddings ------------------------------------------------------------------------------------

    def cold(self, systems: Sequence[System], repeats: int) -> Iterator[Row]:
        """Round by round; the first is not counted, which reads the files."""
        found: dict[str, list[dict[str, float]]] = {system.name: [] for system in systems}
        about: dict[str, dict[str, Any]] = {}
        first = {part: self.weights / f"first-{part}.npy" for part in PARTS}
        for part, file in first.items():
            np.save(file, np.load(self.weights / f"{part}.npy")[:1])
        for repeat in range(1 + repeats):
            for system in systems:
                if len(system.why_not) == len(PARTS):
                    continue
                try:
                    start = time.perf_counter()
                    with self.worker(system.name) as worker:
                        ready = worker.ask({"open": {**self.asked(system.name), "single_use": True}})["ready"]
                        for part, file in first.items():
                            worker.embed(part, file)
                        seconds, peak = time.perf_counter() - start, worker.memory()
                except PmclipError as error:
                    system.refuse(_reason(error, system.name))
                    continue
                about[system.name] = ready
                if repeat:
                    found[system.name].append({"seconds": seconds, "open": ready["open_seconds"], "peak": peak})
        for system in systems:
            runs = found[system.name]
            if not runs or system.name == "null":
                for scenario in ("cold", "size") if not runs else ():
                    yield self.row(system.name, "both", scenario, {}, 0, next(iter(system.why_not.values())))
                continue
            quartiles: list[float] = np.percentile([run["seconds"] for run in runs], (25, 50, 75)).tolist()
            low, median, high = quartiles
            opened, peak = (statistics.median(run[name] for run in runs) for name in ("open", "peak"))
            figures = {"p50_ms": 1e3 * median, "p25_ms": 1e3 * low, "p75_ms": 1e3 * high, "open_ms": 1e3 * opened, "peak_mib": peak}
            yield self.row(system.name, "both", "cold", {**figures, "versions": _said(about[system.name]["versions"])}, len(runs))
            sizes = {"model_bytes": about[system.name]["bytes"], "environment_bytes": self.environment_bytes(system.name)}
            yield self.row(system.name, "both", "size", sizes, 1)

    def environment_bytes(self, name: str) -> int | None:
        """Of ours the distributions that the runtime needs; of a peer its environment, where it is one that environments.py built."""
        if is_ours(name):
            return size_of_distributions("pmclip-deploy")
        folder = self.peers / environments.OF[name]
        return None if folder.is_symlink() else environments.size(folder)

    # --- equal, or not timed ------------------------------------------------------------------------------------------------------

    def checked(self, systems: Sequence[System]) -> Iterator[Row]:
        """Opens each and compares what it embeds, one by one; all but COARSER must be equal within export's gates."""
        reference = self.reference(systems)
        for system in systems:
            if system.worker is None or system.name == "null":
                continue
            for part in PARTS:
                try:
                    embedding = np.concatenate([system.worker.embed(part, file) for file in self.singles(part)])
                    figures = difference(reference[part], embedding)
                except PmclipError as error:
                    system.refuse(_reason(error, system.name), [part])
                    continue
                gate = TENSOR_GATES["fp16" if system.name.endswith("fp16") else "fp32"]["cosine"]
                least = min(figures["cosine"], figures["centred_cosine"])
                if not system.name.endswith(COARSER) and not least >= gate:
                    system.refuse(f"not equal, and so not timed: least cosine {least:.6f} (limit {gate})", [part])
                yield self.row(system.name, part, "parity", figures, len(embedding), system.why_not.get(part))

    def reference(self, systems: Sequence[System]) -> dict[str, NDArray[Any]]:
        """{part: (N, D) f32} of the system that all are compared with. Raises SystemFailed."""
        running = {system.name: system.worker for system in systems if system.worker}
        name = REFERENCE if REFERENCE in running else OURS[0]
        if name not in running:
            raise SystemFailed(f"neither {REFERENCE} nor {OURS[0]} runs, so nothing can be compared; see what they say above")
        return {part: np.concatenate([running[name].embed(part, file) for file in self.singles(part)]) for part in PARTS}

    def singles(self, part: str) -> list[Path]:
        """The inputs one by one, as files: what a system makes of one must not depend on what else is in a batch."""
        rows, folder = np.load(self.weights / f"{part}.npy"), self.weights / "singles"
        folder.mkdir(exist_ok=True)
        files = [folder / f"{part}-{i}.npy" for i in range(len(rows))]
        for file, row in zip(files, rows, strict=True):
            if not file.is_file():
                np.save(file, row[None])
        return files

    # --- timed ----------------------------------------------------------------------------------------------------------------------

    def timed(self, systems: Sequence[System], part: str, scenario: str, seconds: float, repeats: int) -> Iterator[Row]:
        """A row for each system. One that fails is refused, and the others are timed again from the start."""
        inputs = self.weights / f"{part}.npy"
        scenario_of = single_stream if scenario == "single-stream" else partial(offline, batch=BATCH)
        running = [system for system in systems if system.worker and part not in system.why_not]
        made: dict[str, list[Measurement]] = {}
        while running:
            try:
                made = interleaved({s.name: partial(scenario_of, s.worker, part, inputs, seconds) for s in running if s.worker}, repeats)
                break
            except SystemFailed as error:  # begins again without it
                failed = next(s for s in running if str(error).startswith(f"{s.name}:"))
                failed.refuse(_reason(error, failed.name), [part])
                running.remove(failed)
        for system in systems:
            if system.name not in made:
                yield self.row(system.name, part, scenario, {}, 0, system.why_not[part])
                continue
            measured = pooled(made[system.name])
            figures: dict[str, Any] = {"batch": measured.batch, **measured.figures}
            if part == "text" and system.name != "null":
                figures["tokens"] = tokens_computed(system.name, self.model, np.load(inputs), measured.batch)
            if is_ours(system.name):
                for other in made:
                    if other != "null" and not is_ours(other):
                        figures |= {f"{key} to {other}": value for key, value in ratio(made[system.name], made[other]).items()}
            yield self.row(system.name, part, scenario, figures, measured.samples)


def is_ours(system: str) -> bool:
    return system.startswith("pmclip-deploy")


def difference(reference: NDArray[Any], other: NDArray[Any]) -> dict[str, float]:
    """Of two (N, D): least and mean cosine of their unit rows, also with the reference's mean row taken off: random weights embed all
    pictures much alike (RN50's to a cosine of 0.999), and that part says nothing."""
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (reference, other))
    figures: dict[str, float] = {}
    for name, mean in (("cosine", 0.0), ("centred_cosine", a.mean(0) if len(a) > 1 else 0.0)):
        x, y = a - mean, b - mean
        cosine = (x * y).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)
        figures |= {name: float(cosine.min()), f"{name}_mean": float(cosine.mean())}
    return figures


def tokens_computed(system: str, model: str, tokens: NDArray[Any], batch: int) -> float:
    """Of each text, on the mean: its own length with ours; with peers the longest's in a batch, or all that there may be, as they pad."""
    lengths = np.array([np.flatnonzero(row)[-1] + 1 for row in tokens])
    if system in TO_77:
        return float(CONTEXT.get(model, 77))
    if not is_ours(system):
        batches = [lengths[i : i + batch] for i in range(0, max(len(lengths) - batch + 1, 1), batch)]
        return float(np.mean([of.max() for of in batches]))
    return float(lengths.mean())


def size_of_distributions(name: str, seen: set[str] | None = None) -> int | None:
    """Bytes of a distribution and of all that it requires without extras; None where it is not installed."""
    seen = set() if seen is None else seen
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen:
        return 0
    seen.add(key)
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return None
    total = sum(file.size or 0 for file in files)
    for requirement in requires(name) or []:
        if "extra ==" not in requirement:
            total += size_of_distributions(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0], seen) or 0
    return total


def _reason(error: PmclipError, name: str) -> str:
    return str(error).removeprefix(f"{name}: ")


def _said(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def line_of(row: Row) -> str:
    """A row as a line to print."""
    figures = {name: x for name, x in row["figures"].items() if x is not None and not re.search("p25|p75|bound", name)}
    said = ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in figures.items())
    if row["not_measured"]:
        said = f"not measured: {row['not_measured']}"
    return f"{row['system']:20} {row['part']:6} {row['scenario']:14} {said}"


def command_of(options: argparse.Namespace, every: Sequence[str]) -> str:
    """With what decides figures, and no path."""
    told = {name: getattr(options, name) for name in ("model", "device", "threads", "seconds", "repeats")}
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    chosen = [] if options.systems == every else ["--systems", *options.systems]
    calibration = ["--calibration", "PATH"] if options.calibration else []
    return shlex.join(["python", "-m", "pmclip_deploy.benchmarks.compare", "--peers", "PATH", *words, *calibration, *chosen])


def compare(comparison: Comparison, names: Sequence[str], seconds: float, repeats: int) -> Iterator[Row]:
    """All rows: cold starts, then what is equal, then what is timed."""
    systems = comparison.systems(names)
    yield from comparison.cold(systems, repeats)
    with ExitStack() as stack:
        for system in systems:
            if len(system.why_not) < len(PARTS):
                try:
                    system.worker = stack.enter_context(comparison.worker(system.name))
                    system.worker.ask({"open": comparison.asked(system.name)})
                except PmclipError as error:
                    system.worker = None
                    system.refuse(_reason(error, system.name))
        yield from comparison.checked(systems)
        for part in PARTS:
            for scenario in SCENARIOS:
                yield from comparison.timed(systems, part, scenario, seconds, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default=VIT)
    parser.add_argument("--peers", type=Path, required=True, help="the folder of environments.py; the weights are kept in it too")
    parser.add_argument("--output", type=Path, help="rows are added to it")
    parser.add_argument("--systems", nargs="+", default=["null", *OURS, *AFTER_TUNE, *environments.OF], metavar="NAME")
    parser.add_argument("--calibration", type=Path, help="training images to calibrate on, as weights.py takes them")
    parser.add_argument("--device", default="cpu", help="of our own; peers are measured on the CPU")
    parser.add_argument("--threads", type=int, default=cpu_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="of each system, part, scenario and round")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    every = parser.get_default("systems")
    if unknown := set(options.systems) - {*every}:
        parser.error(f"unknown system {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    weights = options.peers / "weights" / MODELS[options.model]
    if not (weights / "ready").is_file():
        command = [sys.executable, "-m", "pmclip_deploy.benchmarks.weights", "--model", options.model, "--output", str(weights)]
        subprocess.run([*command, *(["--calibration", str(options.calibration)] if options.calibration else [])], check=True)
    run = Run(command_of(options, every), stamp(options.threads))
    comparison = Comparison(options.model, options.peers, weights, options.threads, options.device, run)
    try:
        for row in compare(comparison, options.systems, options.seconds, options.repeats):
            if options.output:
                append(options.output, [row])
            print(line_of(row), flush=True)
    except PmclipError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main()
