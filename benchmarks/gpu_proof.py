"""`pmclip-deploy bench --gpu-proof`: proves and measures on an RTX card or a Jetson all that can be, and writes one file of rows.

The steps are commands that a user could type: `export` for each precision, which builds engines; `bench` of each bundle, which opens them,
checks their answers and measures; and `benchmarks.gpu`. A step that fails leaves a row with the reason, and the next one begins.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.benchmarks.gpu_stage import without_paths
from pmclip_deploy.benchmarks.harness import CLI
from pmclip_deploy.benchmarks.results import Run, append, command_line
from pmclip_deploy.bundle.files import manifest_from_bundle
from pmclip_deploy.errors import DeviceError, UsageError
from pmclip_deploy.machine import stamp
from pmclip_deploy.sessions.engines import EngineBackend, engine_backends

PRECISIONS = ("fp16", "int8")
REHEARSAL = "cpu"  # the device that stands in for a GPU
GPU_BUDGET = 5  # times the seconds of a `bench`


class Step(NamedTuple):
    name: str
    command: list[str]
    bundle: Path | None = None  # that it writes


def prove(bundle: Path | None, device: str, seconds: float, file: Path) -> list[tuple[str, int]]:
    """Writes the rows to ``file``, again after every step. -> steps that failed, with their exit codes. Raises DeviceError, UsageError."""
    device, backend = device_and_builder(device)
    run = Run(command_line("pmclip-deploy"), {**stamp(), "device": device})
    failed = list[tuple[str, int]]()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        for step in steps(bundle, device, backend, seconds, Path(folder)):
            start = time.perf_counter()
            code, said = ran(step.command)
            figures = {"seconds": time.perf_counter() - start}
            if code:
                failed.append((step.name, code))
            elif step.bundle is not None:
                manifest = manifest_from_bundle(step.bundle)
                figures |= {f"{engine.file}_bytes": manifest.files[engine.file].bytes for engine in manifest.engines}
            why = (said or f"it ended with status {code}") if code else None
            row = run.row("any", "pmclip-deploy", step.name, "proof", {} if why else figures, threads=None, samples=1, not_measured=why)
            append(rows, [row])
            with write_errors(f"{file}:", "give another --submit-file"):
                write(file, rows.read_text(encoding="utf-8"))
    return failed


def device_and_builder(device: str) -> tuple[str, EngineBackend | None]:
    """Where bundles run, and who builds their engines. A rehearsal builds those that need no GPU, if it can."""
    backends = engine_backends()
    if device == REHEARSAL:
        return device, next((backend for backend in backends.values() if backend.built_ahead and backend.version()), None)
    if device in backends:
        backends[device].check()
        return device, backends[device]
    if device != "auto":
        raise UsageError(f"--gpu-proof has no --device {device[:60]}", f"choose one of auto, {', '.join(backends)} and {REHEARSAL}")
    reasons = {name: backend.why_not() for name, backend in backends.items()}
    for name, why in reasons.items():
        if why is None:
            return name, backends[name]
    said = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    raise DeviceError(f"no engine can run here ({said})", f'rehearse it with device="{REHEARSAL}"')


def steps(bundle: Path | None, device: str, backend: EngineBackend | None, seconds: float, folder: Path) -> Iterator[Step]:
    """A `bench` follows its `export` if that wrote the bundle."""
    rows, rehearsed = str(folder / "rows.jsonl"), device == REHEARSAL
    bench = [*CLI, "bench", "--device", device, "--seconds", f"{seconds:g}", "--output", rows, "--bundle"]
    for precision in PRECISIONS if bundle is None else ():
        out = folder / precision
        engines = ["--target", backend.target] if backend else []
        if backend and backend.built_ahead and not rehearsed:
            engines += ["--compute-capability", backend.machine().compute_capability]
        yield Step(f"export {precision}", [*CLI, "export", "--precision", precision, *engines, "--output", str(out)], out)
        if out.is_dir():
            yield Step(f"bench {precision}", [*bench, str(out)])
    if bundle is not None:
        yield Step("bench", [*bench, str(bundle)])
    on = ["--device", "cpu" if rehearsed else "cuda", "--budget", f"{GPU_BUDGET * seconds:g}"]
    yield Step("benchmarks.gpu", [sys.executable, "-m", "pmclip_deploy.benchmarks.gpu", "--output", rows, *on])


def ran(command: Sequence[str]) -> tuple[int, str]:
    """Runs it, with what it prints shown. -> its status, and the last line of its standard error without any path"""
    last = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    return process.returncode, without_paths(last)
