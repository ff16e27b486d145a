"""How long one bundle takes on each of several devices of this machine: its graphs, whole answers, and `infer` in a new process.

    python -m pmclip_deploy.benchmarks.backends [--devices cpu openvino] [--bundle FOLDER] [--repeats 15] [--cold 9]

Batch 1. The devices take turns, and each ratio is to the first of them, round by round: its median and quartiles. Every question is new to
the predictor. A new process has the file cache warm, and what a device keeps of a bundle is there or is missing. "auto" is what `tune`
chose, if the tuning stands beside the bundle: the user's cache, and the tuning of the embedded bundle in it, is not used here.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy.benchmarks import harness
from pmclip_deploy.bundle.files import manifest_from_bundle
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.opening import load

PICTURE = DEFAULT_BUNDLE.parents[1] / "demo" / "leg-1.dcm"
LENGTH = 10  # tokens of a text
INFER = ["infer", str(PICTURE), "is there a fracture?", "--json", "--bundle"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cpu", "openvino"])
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cold", type=int, default=9, help="new processes")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
                os.environ[name] = scratch
            for device in options.devices:
                cold(options.bundle, device, None)  # warms the file cache, and makes what is kept
            for kept in (True, False):  # first: a new process begins with the peak memory of this one
                new = {device: partial(cold, options.bundle, device, None if kept else Path(scratch)) for device in options.devices}
                said(f"infer in a new process, {'with' if kept else 'without'} what is kept", harness.interleaved(new, options.cold))
            of = {device: jobs(options.bundle, device) for device in options.devices}
            for stage in of[options.devices[0]]:
                turns = {device: partial(harness.burst, made[stage]) for device, made in of.items() if stage in made}
                said(stage, harness.interleaved(turns, options.repeats))
    except PmclipError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def jobs(bundle: Path, device: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by name. Each is run once, so that what a device compiles for its shapes is there."""
    predictor, manifest, drawn = load(bundle, device), manifest_from_bundle(bundle), np.random.default_rng(0)
    size, new = manifest.preprocess.size, count()
    inputs: dict[str, dict[str, Any]] = {
        "image": {"pixels": drawn.normal(size=(1, 3, size, size)).astype(np.float32)},
        "text": {"tokens": drawn.integers(1000, 4000, (1, LENGTH))},
    }
    made: dict[str, Callable[[], Any]] = {}
    if manifest.head is not None and manifest.head.words is None:
        seen, asked = predictor.image_features(PICTURE), predictor.question_features(["what organ is this?"])
        inputs["head"] = {"image": seen[None], "text": asked}
        made["an answer"] = lambda: predictor.ask(PICTURE, f"what is shown in picture {next(new)}?")
    if manifest.findings:
        made["an answer about a finding"] = lambda: predictor.ask(PICTURE, f"is there a fracture in picture {next(new)}?")
    graphs = {f"graph {name}": partial(predictor._sessions[name].run, of) for name, of in inputs.items()}
    made = {**graphs, **made}
    for job in made.values():
        job()
    return made


def cold(bundle: Path, device: str, scratch: Path | None) -> harness.Measurement:
    if scratch is not None:
        shutil.rmtree(scratch / "pmclip-deploy", ignore_errors=True)
    seconds, peak, _ = harness.process([*harness.CLI, *INFER, str(bundle), "--device", device])
    return harness.Measurement("cold", 1, np.array([seconds]), seconds, {"peak_mib": peak})


def said(stage: str, measured: Mapping[str, list[harness.Measurement]]) -> None:
    first = next(iter(measured.values()))
    for device, of in measured.items():
        milliseconds, ratio = 1e3 * float(np.median([np.median(m.latencies) for m in of])), harness.ratio(of, first)
        peaks = [peak for m in of if (peak := m.figures.get("peak_mib")) is not None]
        memory = f"  {statistics.median(peaks):5.0f} MiB" if peaks else ""
        print(f"{stage:48} {device:12} {milliseconds:9.2f} ms  {ratio['ratio']:5.2f} "
              f"({ratio['ratio_p25']:.2f} to {ratio['ratio_p75']:.2f}){memory}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
