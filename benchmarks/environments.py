"""The peers' environments: one virtual environment each, built by one command, so that no peer's requirements bend another's.

    python -m pmclip_deploy.benchmarks.environments --folder peers [--only NAME ...] [--use NAME=VENV ...]

A run that was cut off goes on where it stopped. ``--use`` takes an environment that exists instead, by a link. What cannot be installed is
said with pip's reason, which stands in FOLDER/NAME.failed too: ``compare`` reports its systems as not measured.
"""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.errors import DeviceError, UsageError


@dataclass(frozen=True)
class Environment:
    """What pip installs for one or more peers, in an environment of its own."""

    requirements: tuple[str, ...]
    modules: tuple[str, ...]  # what must import
    gigabytes: float  # what it took on Linux x86-64, where torch came with CUDA for the first and without it for the second


ENVIRONMENTS = {
    "open_clip": Environment(
        ("torch>=2.6,<3", "torchvision>=0.21,<1", "open_clip_torch>=2.30,<4", "timm>=1.0.12,<2", "transformers>=4.46,<6",
         "safetensors>=0.4.5,<1", "numpy>=1.26,<3", "setuptools>=77"),  # torch.compile builds with setuptools and a C++ compiler
        ("open_clip", "torchvision", "transformers", "safetensors"), 6.4,
    ),
    "transformers": Environment(
        ("torch>=2.6,<2.14", "transformers>=4.53,<4.58", "optimum-onnx[onnxruntime]>=0.1,<0.2", "numpy>=1.26,<3"),
        ("optimum.onnxruntime", "optimum.exporters.onnx"), 1.3,
    ),
    "openvino": Environment(("openvino>=2025.2,<2027", "nncf>=2.17,<4", "numpy>=1.26,<3"), ("openvino", "nncf"), 0.6),
    "fastembed": Environment(("fastembed>=0.7,<1", "numpy>=1.26,<3"), ("fastembed",), 0.3),
}  # fmt: skip
OF = {  # system to the environment it runs in
    "open_clip-eager": "open_clip",
    "open_clip-compiled": "open_clip",
    "open_clip-int8": "open_clip",
    "transformers-onnx": "transformers",
    "openvino-fp32": "openvino",
    "openvino-bf16": "openvino",
    "openvino-int8": "openvino",
    "fastembed": "fastembed",
}
INSTALLED = "installed.txt"  # the requirements it was built from


def python_of(folder: Path, name: str) -> Path:
    """Raises DeviceError where it isn't there, with pip's reason where that is known."""
    python, failed = _python(folder / name), folder / f"{name}.failed"
    if failed.is_file():
        raise DeviceError(f"environment {name} could not be built: {failed.read_text(encoding='utf-8').strip()}")
    if not python.is_file() or not ((folder / name).is_symlink() or (folder / name / INSTALLED).is_file()):
        command = f"python -m pmclip_deploy.benchmarks.environments --folder {folder} --only {name}"
        raise DeviceError(f"{folder / name}: no environment", f"build it with `{command}`")
    return python


def build(folder: Path, name: str) -> str | None:
    """None, or why it cannot be."""
    environment, target, failed = ENVIRONMENTS[name], folder / name, folder / f"{name}.failed"
    wanted, marker = "\n".join(environment.requirements) + "\n", target / INSTALLED
    failed.unlink(missing_ok=True)
    reason = None
    if not target.is_symlink() and not (marker.is_file() and marker.read_text(encoding="utf-8") == wanted):
        if not _python(target).is_file():
            shutil.rmtree(target, ignore_errors=True)
            reason = _reason([sys.executable, "-m", "venv", str(target)])
        command = [str(_python(target)), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *environment.requirements]
        reason = reason or _reason(command)
    imports = f"import sys; sys.modules['openvino_telemetry'] = None; import {', '.join(environment.modules)}"  # as systems.py
    reason = reason or _reason([str(_python(target)), "-c", imports])
    if reason:
        failed.write_text(reason + "\n", encoding="utf-8")
    elif not target.is_symlink():
        marker.write_text(wanted, encoding="utf-8")
    return reason


def link(folder: Path, name: str, existing: Path) -> None:
    """Raises UsageError where there is no such environment, or another one has the place."""
    target = folder / name
    if not _python(existing).is_file():
        raise UsageError(f"{existing}: no virtual environment", "give the folder that has bin/python in it")
    if target.exists() and not target.is_symlink():
        raise UsageError(f"{target}: is there already", f"remove it, or leave out --use {name}=...")
    target.unlink(missing_ok=True)
    target.symlink_to(existing.resolve(), target_is_directory=True)


def size(folder: Path) -> int:
    """Bytes, without what links lead to."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _reason(command: list[str]) -> str | None:
    """None where it does; else its last error, or its last line."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"ended with status {done.returncode}"])[-1][:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS), metavar="NAME")
    parser.add_argument("--use", nargs="+", default=[], metavar="NAME=VENV")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        for given in options.use:
            name, _, existing = given.partition("=")
            if name not in ENVIRONMENTS:
                raise UsageError(f"--use {given}: no environment of that name", f"there are {', '.join(ENVIRONMENTS)}")
            link(options.folder, name, Path(existing))
    except UsageError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    missing = []
    for name in options.only:
        environment, target = ENVIRONMENTS[name], options.folder / name
        if not target.is_symlink():
            free = shutil.disk_usage(options.folder).free / 1e9
            print(f"{name}: {', '.join(environment.requirements)}; about {environment.gigabytes} GB, {free:.1f} GB are free", flush=True)
        if reason := build(options.folder, name):
            missing.append(name)
            print(f"{name}: not measured: {reason}", flush=True)
        else:
            print(f"{name}: ready, {'a link' if target.is_symlink() else f'{size(target) / 1e9:.2f} GB'}", flush=True)
    if missing:
        parser.exit(DeviceError.exit_code, f"error: {', '.join(missing)} could not be built; the others are ready\n")


if __name__ == "__main__":
    main()
