"""Did it get slower? Instructions of the hot paths, on one thread, against a stored baseline: a report, which fails on nothing.

    python -m pmclip_deploy.benchmarks.guard [--baseline FILE.json] [--update]

valgrind's cachegrind counts them: it takes no hardware counter, which virtual machines seldom have, and its CPU is the same on every x86-64
with AVX2. One process opens everything and runs each path once; then it forks for each path, and what a fork counts beyond one that does
nothing is the path's own. Without valgrind it takes the time of each path over that of a fixed NumPy workload in this process, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pmclip_deploy.machine import cpu, output_of, version

BASELINE = Path("benchmarks/results/guard.json")
SCHEMA = "pmclip-deploy/guard/1"
TOLERANCE = {"instructions": 0.02, "time": 0.25}  # what is within it may be noise
CALLS, ROUNDS = 3, 15
NOTHING = "nothing"
PACKAGES = ("pmclip-deploy", "numpy", "onnxruntime", "pillow", "pydicom", "python-gdcm", "pylibjpeg-openjpeg", "pyjpegls", "tokenizers")


def jobs(stack: contextlib.ExitStack) -> dict[str, Callable[[], Any]]:
    """Each of them has run once. On one thread: nothing that counts threads may have been imported before."""
    with contextlib.suppress(AttributeError):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    import numpy as np

    from pmclip_deploy import kernels
    from pmclip_deploy.benchmarks import stages
    from pmclip_deploy.imaging.preprocess import tensor_from_pixels
    from pmclip_deploy.imaging.read import picture_from_path
    from pmclip_deploy.opening import load

    predictor, rng = load(device="cpu"), np.random.default_rng(0)
    picture = picture_from_path(stages.picture_file(stages.CT))
    tensor = tensor_from_pixels(picture.pixels, predictor.manifest.preprocess)
    seen, asked = predictor.image_features(picture), predictor.question_features([stages.QUESTION])
    image, bank = rng.standard_normal((1, 512), np.float32), rng.standard_normal((10000, 512), np.float32)
    radiograph = stages.dataset_from_stored(stages.radiograph_from_ct())
    made: dict[str, Callable[[], Any]] = {
        "image tower": lambda: predictor.embedding_from_tensor(tensor),
        "text tower": lambda: predictor.towers.of_text(stages.QUESTION),
        "head": lambda: predictor.head_logits(seen[None], asked),
        "window and preprocess, radiograph": stages.rendering(radiograph, predictor.manifest.preprocess)[0],
        "similarity over 10,000 rows": lambda: kernels.contrastive_similarity(image, bank, 1.0, 10, threads=1),
    }
    for syntax in ("RLE Lossless", "JPEG Lossless", "JPEG-LS Lossless", "JPEG 2000"):
        made[f"decode {syntax}"] = stages.decoding(stages.picture_file(stages.PICTURES[syntax]), stack)[0]
    for job in made.values():
        job()
    return made


def counted() -> dict[str, float] | None:
    """Instructions of a call; None where valgrind is not there or cannot run this."""
    with tempfile.TemporaryDirectory() as folder:
        tool = ["--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={os.devnull}", f"--log-file={folder}/%p"]
        command = ["valgrind", *tool, sys.executable, "-m", "pmclip_deploy.benchmarks.guard", "--fork"]
        try:
            done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True)
            forks: dict[str, int] = json.loads(done.stdout.strip().rpartition("\n")[2])
            said = {name: (Path(folder) / str(pid)).read_text(errors="replace") for name, pid in forks.items()}
            count = {name: int(re.findall(r"I\s+refs:\s+([\d,]+)", text)[-1].replace(",", "")) for name, text in said.items()}
        except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
            print(f"valgrind counts nothing here: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return None
    return {name: (of - count[NOTHING]) / CALLS for name, of in count.items() if name != NOTHING}


def fork() -> None:
    """What `counted` runs under valgrind: the last line it prints has each fork's process id."""
    with contextlib.ExitStack() as stack:
        forks = {}
        for name, job in {NOTHING: lambda: None, **jobs(stack)}.items():
            forks[name] = os.fork()
            if not forks[name]:
                for _ in range(CALLS):
                    job()
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(forks[name], 0)[1]):
                sys.exit(f"{name} failed")
        print(json.dumps(forks))


def timed() -> dict[str, float]:
    """The time of each over that of a NumPy workload, round by round: the median."""
    with contextlib.ExitStack() as stack:
        made, taken = jobs(stack), dict[str, list[float]]()
        import numpy as np

        matrix = np.random.default_rng(0).standard_normal((256, 256), np.float32)
        for _ in range(ROUNDS):
            seconds = {}
            for name, job in {NOTHING: lambda: [matrix @ matrix for _ in range(20)], **made}.items():
                job()
                start = time.perf_counter()
                job()
                seconds[name] = time.perf_counter() - start
            for name in made:
                taken.setdefault(name, []).append(seconds[name] / seconds[NOTHING])
    return {name: float(f"{statistics.median(of):.4g}") for name, of in taken.items()}


def lines(now: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What is worth reading: each path, and how far it is from the baseline where the two can be compared."""
    unit = "instructions" if now["unit"] == "instructions" else "times a NumPy workload (no valgrind here: noisy, see --help)"
    out = [f"counted by {now['counter']}: {unit}"]
    if before is not None and before.get("unit") != now["unit"]:
        out, before = [*out, f"the baseline has {before.get('unit')}, which cannot be compared: --update writes another"], None
    tolerance = TOLERANCE[now["unit"]]
    for name, count in now["counts"].items():
        was = (before or {}).get("counts", {}).get(name)
        change = None if not was else count / was - 1
        said = "no baseline" if change is None else f"{change:+.1%}" + ("" if abs(change) <= tolerance else "  CHANGED")
        out.append(f"{name:36} {count:16,.4g}  {said}" if now["unit"] == "time" else f"{name:36} {count:16,.0f}  {said}")
    for kind in ("versions", "cpu_flags", "counter"):
        if before is not None and before.get(kind) != now[kind]:
            out.append(f"{kind} differ: {json.dumps(before.get(kind))} in the baseline, {json.dumps(now[kind])} here")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--fork", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fork:
        return fork()
    try:
        before = json.loads(options.baseline.read_text(encoding="utf-8")) if options.baseline.is_file() else None
        if before is not None and before.get("schema") != SCHEMA:
            raise ValueError
    except (OSError, ValueError, AttributeError):
        parser.exit(3, f"error: {options.baseline}: no baseline of {SCHEMA}; give another, or remove it and --update\n")
    counts = counted()
    unit = "time" if counts is None else "instructions"
    now = {
        "schema": SCHEMA, "unit": unit, "counter": output_of(["valgrind", "--version"]) if counts else "perf_counter",
        "versions": {"python": sys.version.partition(" ")[0], **{name: found for name in PACKAGES if (found := version(name))}},
        "cpu_flags": cpu()["flags"], "counts": {name: round(of) for name, of in counts.items()} if counts else timed(),
    }  # fmt: skip
    print("\n".join(lines(now, before)))
    if options.update:
        options.baseline.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
