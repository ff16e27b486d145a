"""Proves and measures on an NVIDIA GPU all that was written for one, in a few minutes, and rehearses it on a CPU.

    python -m pmclip_deploy.benchmarks.gpu --output gpu.jsonl --budget 480 [--slake slake --glove glove.6B.300d.txt]
    python -m pmclip_deploy.benchmarks.gpu --output rehearsal.jsonl --budget 30 --device cpu

Stages run one after the other, each in a process of its own, so that a crash, a hang or a GPU that reports errors ends one stage alone.
Each has its deadline, a share of the budget; time that a stage leaves goes to the next. Rows are appended as they are measured: a run that
is cut off keeps them. A rehearsal runs the Triton kernels in Triton's interpreter, at tiny sizes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from pmclip_deploy.benchmarks.gpu_stage import NotMeasuredError, Stage, reason
from pmclip_deploy.benchmarks.results import Run, command_line
from pmclip_deploy.errors import PmclipError, UsageError
from pmclip_deploy.kernels.manifest import MANIFEST

STAGES = {"machine": 0.05, "right": 0.2, "fast": 0.25, "towers": 0.16, "training": 0.26, "session": 0.06}  # and their shares
GRACE = 0.05, 10.0  # of the budget, and the most seconds: how long a stage may go on after its deadline before it is killed
WHOLE = "the whole stage"
HEADS, HEADS_SHARE = "heads", 0.6  # the last stage, which needs data
FILES = ("slake", "glove", "autoencoder")  # the options that name it
PACKAGES = ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "open_clip_torch", "timm", "torchao", "transformers")  # beside the stamp's
LARGEST_K = {"k16": 16, "k128": 128}  # of the kernels that are compiled here


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pmclip_deploy.benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines, to which rows are appended")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="for all stages together (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal (default: %(default)s)")
    parser.add_argument("--stage", action="append", choices=[*STAGES, HEADS], help="measure this stage; repeat for more (default: all)")
    parser.add_argument(
        "--kernels", type=Path, action="append", default=[], metavar="DIR",
        help="folder of `python -m pmclip_deploy.kernels.compile` to measure beside the kernels that are compiled here; repeat for more",
    )  # fmt: skip
    parser.add_argument("--slake", type=Path, metavar="DIR", help="SLAKE, for the stage heads, which is left out otherwise")
    parser.add_argument("--glove", type=Path, metavar="FILE", help="text file of GloVe's word vectors, with --slake")
    parser.add_argument("--autoencoder", type=Path, metavar="FILE", help="weights of MEVF's auto-encoder, with --slake (default: none)")
    options = parser.parse_args(arguments)
    try:
        measure(options)
    except PmclipError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def measure(options: argparse.Namespace) -> None:
    """Runs the stages. Raises UsageError."""
    if options.output.is_dir() or not options.output.absolute().parent.is_dir():
        raise UsageError(f"{options.output}: cannot be written", "give a file in a folder that exists")
    for folder in options.kernels:
        if not (folder / MANIFEST).is_file():
            raise UsageError(f"{folder}: no compiled kernels", "give a folder that `python -m pmclip_deploy.kernels.compile` wrote")
    if (options.slake is None) != (options.glove is None):
        raise UsageError("--slake and --glove go together", "give both, or neither")
    if options.slake is None and HEADS in (options.stage or ()):
        raise UsageError(f"--stage {HEADS} needs --slake", "give the folder of SLAKE, and --glove")
    if options.budget <= 0:
        raise UsageError(f"--budget {options.budget:g} leaves no time", "give seconds above 0")
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    begin = time.monotonic()
    import_ahead()
    run = Run(command_line("python -m pmclip_deploy.benchmarks.gpu"), environment(options.device))
    files = {name: path for name, path in vars(options).items() if name in FILES and path is not None}
    stages = {**STAGES, HEADS: HEADS_SHARE} if files else STAGES
    chosen = {name: share for name, share in stages.items() if name in (options.stage or stages)}
    with tempfile.TemporaryDirectory() as folder:
        compiled = {path.resolve().name: path for path in options.kernels} | {name: Path(folder, name) for name in LARGEST_K}
        compiling = started(compile_kernels, Path(folder)) if options.device == "cuda" and {"right", "fast"} & {*chosen} else None
        start, spent = time.monotonic(), 0.0
        left = max(options.budget - (start - begin), options.budget / 4)  # the imports count
        try:
            for name, share in chosen.items():
                spent += share / sum(chosen.values())
                stage = Stage(name, run, options.output, options.device, start + spent * left, compiled, files)
                run_stage(stage, f"pmclip_deploy.benchmarks.gpu_{name}", min(GRACE[0] * options.budget, GRACE[1]))
        finally:
            if compiling is not None:
                end(compiling)


def import_ahead() -> None:
    """What stages import and take seconds for, so that their processes begin with it. No GPU is touched, which would forbid to fork."""
    for name in ("torch", "triton", "pmclip_deploy.train.backbones"):
        with suppress(Exception):  # the stage that needs it says that it is missing
            import_module(name)


def environment(device: str) -> dict[str, Any]:
    from pmclip_deploy.machine import stamp, versions

    here = stamp()
    return {**here, "packages": {**here["packages"], **versions(*PACKAGES)}, "device": device}


def run_stage(stage: Stage, module: str, grace: float) -> None:
    """Runs ``module.measure(stage)`` in a process of its own until ``grace`` seconds after its deadline."""
    process = started(_stage, stage, module)
    try:
        process.join(max(0.0, stage.left) + grace)
        if process.exitcode is None:
            stage.write(WHOLE, "", {}, f"it was stopped {grace:.0f} s after its deadline; rows before this one are whole")
        elif process.exitcode:
            stage.write(WHOLE, "", {}, f"its process ended with status {process.exitcode}; rows before this one are whole")
    finally:
        end(process)


def _stage(stage: Stage, module: str) -> None:
    try:
        if stage.is_rehearsal:
            warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, on what the interpreter computes of rows that are masked out
            import_module(module).measure(stage)
            return
        import torch

        if not torch.cuda.is_available():
            raise NotMeasuredError("torch finds no NVIDIA GPU here")
        with torch.cuda.stream(torch.cuda.Stream()):  # the default stream has no handle that every library takes
            import_module(module).measure(stage)
    except Exception as error:
        stage.write(WHOLE, "", {}, reason(error))


def compile_kernels(folder: Path) -> None:
    """Leaves folders of kernels for this GPU under the names of LARGEST_K, each once it is whole, or a file NAME.failed that says why."""
    from pmclip_deploy.machine import gpus

    target = next((f"sm_{gpu['compute_cap'].replace('.', '')}" for gpu in gpus()), "")
    running = {}
    for name, k in LARGEST_K.items():
        command = [sys.executable, "-m", "pmclip_deploy.kernels.compile", "--output", str(folder / f"{name}.new"), "--arch", target]
        running[name] = subprocess.Popen([*command, "--k", str(k)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for name, process in running.items():
        said = process.communicate()[1].strip().rpartition("\n")[2]
        if process.returncode:
            (folder / f"{name}.failed").write_text(said or f"status {process.returncode}")
        else:
            (folder / f"{name}.new").rename(folder / name)


def started(function: Callable[..., None], *arguments: object) -> Any:
    """A new process, the first of a group of its own; a copy of this one where there is fork, so that it need not import again."""
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process = context.Process(target=_in_group, args=(function, *arguments))
    process.start()
    return process


def _in_group(function: Callable[..., None], *arguments: object) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    function(*arguments)


def end(process: Any) -> None:
    """Kills the process, if it still runs, with all that it started."""
    if process.exitcode is None:
        with suppress(AttributeError, ProcessLookupError, PermissionError):  # no groups on Windows; none yet if it has just begun
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()


if __name__ == "__main__":
    main()
