"""Cold start: a new process from nothing to an answer on one CT, the runtime's INT8 bundle against open_clip in PyTorch.

    python -m pmclip_deploy.benchmarks.cold_start [--repeats 9] [--output FILE.csv]

Both do the same job with the same trained weights: read the DICOM file, preprocess, encode image and question, answer.
Runs are interleaved; medians and their ratio are printed, with the peak resident memory that the kernel counted.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pmclip_deploy.models import DEFAULT_CHECKPOINT

QUESTION = "is there a fracture?"

# What a user of open_clip writes: DICOM and preprocessing are the project's, so that only the model's runtime differs.
OPEN_CLIP = """
import sys, json
from pathlib import Path
import torch
from pmclip_deploy.pixels import picture_from_path, tensor_from_pixels
from pmclip_deploy.spec import BACKBONES
from pmclip_deploy.tokens import tokenizer_from_file, tokens_from_text
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.towers import towers_from_checkpoint, under
checkpoint, path, question = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
model, meta, tensors = towers_from_checkpoint(checkpoint)
head = LiteHead.from_tensors(under(tensors, "head"))
spec = BACKBONES[meta["backbone"]]
with torch.inference_mode():
    image = model.encode_image(torch.from_numpy(tensor_from_pixels(picture_from_path(path).pixels, spec.preprocess))[None])
    tokens = tokens_from_text(tokenizer_from_file(checkpoint / "tokenizer.json"), [question], spec.context_length, spec.pad_id)
    answer, kind, _ = head(image, model.encode_text(torch.from_numpy(tokens)))
    chosen = meta["kinds"][int(kind.argmax())]
    best = max(chosen["answers"], key=lambda i: float(answer[0, i]))
print(json.dumps({"candidate": meta["answers"][best]}))
"""


def run(command: list[str]) -> tuple[float, float, str]:
    """(wall seconds, peak resident MiB, stdout) of one new process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"error: {' '.join(command[:4])} ... ended with status {status}")
    return seconds, usage.ru_maxrss / 1024, out


def main() -> None:
    from pydicom.data import get_testdata_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--image", default=str(get_testdata_file("CT_small.dcm")))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    jobs = {
        "pmclip-deploy infer, INT8": [str(Path(sys.executable).with_name("pmclip-deploy")), "infer", options.image, QUESTION, "--json"],
        "open_clip in PyTorch, fp32": [sys.executable, "-c", OPEN_CLIP, str(DEFAULT_CHECKPOINT), options.image, QUESTION],
    }
    rows = []
    for repeat in range(-1, options.repeats):  # the first round warms the file cache
        for name, command in jobs.items():
            seconds, memory, _ = run(command)
            if repeat >= 0:
                rows.append({"job": name, "repeat": repeat, "seconds": round(seconds, 4), "peak_mib": round(memory, 1)})
    medians = {
        name: [statistics.median(r[key] for r in rows if r["job"] == name) for key in ("seconds", "peak_mib")] for name in jobs
    }
    for name, (seconds, memory) in medians.items():
        print(f"{name:28}  {seconds:6.2f} s  {memory:7.0f} MiB")
    (fast, small), (slow, large) = medians.values()
    print(f"ratio: {fast / slow:.3f} of the time, {small / large:.3f} of the memory (medians of {options.repeats} interleaved runs)")
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
