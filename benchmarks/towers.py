"""How fast a backbone's towers run on this CPU: PyTorch eager, onnxruntime fp32, and the INT8 bundle, in one interleaved run.

python -m pmclip_deploy.benchmarks.towers --backbone ViT-B/32 --output benchmarks/results/towers.csv

Weights are random: they prove speed, and nothing of accuracy. Each step of `export` is the product's own, gates included.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pmclip_deploy.benchmarks.peers import BIOMED, LITE, VIT
from pmclip_deploy.export.pack import bundle_from_checkpoint
from pmclip_deploy.export.probes import sample_pictures
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.opening import load
from pmclip_deploy.sessions import SessionOptions, open_session
from pmclip_deploy.threads import cpu_threads
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import Checkpoint, save_checkpoint

BURST = 4  # queries one upon the other (MLPerf's single stream) that are counted at each system's turn, after one that follows a pause
LENGTH = 12  # tokens of a question; eager takes the padded 77, as open_clip's own encode_text does


def checkpoint_of_random_weights(folder: Path, backbone: str) -> Any:
    """Writes it; returns the model."""
    torch.manual_seed(0)
    model = BACKBONES[backbone].build().eval()
    folder.mkdir()
    # BiomedCLIP's tokenizer is in no package; pmclip-lite's has as many word pieces
    (folder / "bpe.json").write_text(BACKBONES[LITE if backbone == BIOMED else backbone].tokenizer_json())
    meta: Checkpoint = {"name": "random", "version": "0", "backbone": backbone, "logit_scale": 14.3, "metrics": {}, "provenance": {}}
    save_checkpoint(folder, {f"clip.{k}": v for k, v in model.state_dict().items()}, meta, folder / "bpe.json")
    return model


def pictures_for_calibration(folder: Path) -> Path:
    """Writes those in pydicom's wheel; returns where."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for path in sample_pictures():
        Image.fromarray(picture_from_path(path).pixels).save(pictures / f"{path.stem}.png")
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=[name for name, b in BACKBONES.items() if b.open_clip_name], default=VIT)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(cpu_threads())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = checkpoint_of_random_weights(folder / "checkpoint", options.backbone)
        pictures = pictures_for_calibration(folder)
        predictors = {}
        for precision in ("fp32", "int8"):
            images = pictures if precision == "int8" else None
            made = bundle_from_checkpoint(folder / "checkpoint", folder / precision, precision, calibration_images=images)
            size_on_disk = sum(file.bytes for file in made.manifest.files.values())
            predictors[precision] = load(folder / precision, "cpu")
            kept = {name: len(graph.float_layers) for name, graph in made.manifest.graphs.items()}
            print(f"{precision}: {size_on_disk:,} bytes, layers above it {kept}, {made.manifest.parity['tensors']}")
        size = BACKBONES[options.backbone].preprocess.size
        pixels = np.random.default_rng(0).normal(size=(3, size, size)).astype(np.float32)
        tokens = np.r_[49406, np.random.default_rng(0).integers(1, 49000, LENGTH - 2), 49407][None]
        padded = torch.zeros(1, 77, dtype=torch.int64)
        padded[:, :LENGTH] = torch.from_numpy(tokens)

        @torch.inference_mode()
        def eager_image() -> None:
            model.encode_image(torch.from_numpy(pixels)[None])

        @torch.inference_mode()
        def eager_text() -> None:
            model.encode_text(padded)

        jobs: dict[tuple[str, str], Callable[[], Any]] = {("image", "eager"): eager_image, ("text", "eager, 77"): eager_text}
        for precision, predictor in predictors.items():
            text = open_session(folder / precision / predictor.manifest.graphs["text"].file, SessionOptions("cpu"))
            jobs["image", precision] = partial(predictor.embedding_from_tensor, pixels)
            jobs["text", f"{precision}, {LENGTH}"] = partial(text.run, {"tokens": tokens})
        times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
        paused: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
        for _ in range(options.repeats):
            for job, run in jobs.items():
                time.sleep(0.02)  # until threads of the job before have stopped spinning
                for i in range(1 + BURST):
                    start = time.perf_counter()
                    run()
                    (times if i else paused)[job].append(time.perf_counter() - start)
    rows = []
    for (tower, system), of in times.items():
        first = next(job for job in times if job[0] == tower)
        median, low, high = (1e3 * float(np.percentile(of, p)) for p in (50, 25, 75))
        ratio, after = (float(np.median(x[first]) / np.median(x[tower, system])) for x in (times, paused))
        rows.append({"backbone": options.backbone, "tower": tower, "system": system, "median_ms": round(median, 2),
                     "p25_ms": round(low, 2), "p75_ms": round(high, 2), "times_eager": round(ratio, 2),
                     "times_eager_after_pause": round(after, 2), "threads": cpu_threads(), "repeats": options.repeats * BURST})  # fmt: skip
        print(f"{tower:6} {system:12} {median:8.2f} ms ({low:.2f} to {high:.2f})  {ratio:6.2f} times eager, after a pause {after:.2f}")
    if options.output:
        known = list(csv.DictReader(options.output.open())) if options.output.is_file() else []
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows([row for row in known if row["backbone"] != options.backbone] + rows)


if __name__ == "__main__":
    main()
