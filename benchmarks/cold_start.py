"""Cold start: a new process from nothing to its first answer or embeddings, the runtime's INT8 bundle against open_clip in PyTorch.

    python -m pmclip_deploy.benchmarks.cold_start [--backbone ViT-B/32] [--repeats 9] [--output FILE.jsonl]

Without a backbone both answer a question on one CT with pmclip-lite's weights: read the DICOM file, preprocess, encode image and
question, answer. With one, of random weights, both embed a picture and a question. Runs are interleaved; medians and their ratio are
printed, with the peak resident memory that the kernel counted.
"""

import argparse
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pmclip_deploy.benchmarks.harness import process
from pmclip_deploy.benchmarks.peers import LITE
from pmclip_deploy.benchmarks.results import Run, append, command_line
from pmclip_deploy.errors import PmclipError, UsageError
from pmclip_deploy.machine import stamp, versions
from pmclip_deploy.models import DEFAULT_CHECKPOINT

QUESTION = "is there a fracture?"

# What a user of open_clip writes, of a checkpoint that holds all weights. DICOM and preprocessing are the project's, so that only the
# model's runtime differs.
OPEN_CLIP = """
import sys, json
from pathlib import Path
import torch
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.tokens import tokenizer_from_file, tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import towers_from_checkpoint, under
from pmclip_deploy.train.heads.lite import LiteHead
checkpoint, path, question = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
model, meta, tensors = towers_from_checkpoint(checkpoint)
head = LiteHead.from_tensors(under(tensors, "head"))
spec = BACKBONES[meta["backbone"]]
with torch.inference_mode():
    pixels = torch.from_numpy(tensor_from_pixels(picture_from_path(path).pixels, spec.preprocess))[None]
    image = model.features_for_head(pixels, head.details > 0)
    tokens = tokens_from_text(tokenizer_from_file(checkpoint / "tokenizer.json"), [question], spec.context_length, spec.pad_id)
    answer, kind, _ = head(image, model.encode_text(torch.from_numpy(tokens)))
    chosen = meta["kinds"][int(kind.argmax())]
    best = max(chosen["answers"], key=lambda i: float(answer[0, i]))
print(json.dumps({"candidate": meta["answers"][best]}))
"""

# What open_clip's own README writes.
OPEN_CLIP_EMBED = """
import sys
import open_clip, torch
from PIL import Image
name, weights, path, question = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
model.eval()
with torch.inference_mode():
    image = model.encode_image(preprocess(Image.open(path))[None])
    text = model.encode_text(open_clip.get_tokenizer(name)([question]))
print(image.norm().item(), text.norm().item())
"""

EMBED = """
import sys
from concurrent.futures import ThreadPoolExecutor
import pmclip_deploy as pm
bundle, path, question = sys.argv[1:]
predictor = pm.load(bundle, single_use=True)
with ThreadPoolExecutor(1) as pool:  # each opens its tower
    text = pool.submit(predictor.embed_text, question)
    image = predictor.embed_image(path)
print((image**2).sum() ** 0.5, (text.result() ** 2).sum() ** 0.5)
"""


def whole_checkpoint(folder: Path) -> Path:
    """The embedded checkpoint and the weights that it leaves to their package: to verify and round those is not open_clip's to pay."""
    import shutil

    from safetensors.torch import save_file

    from pmclip_deploy.train.checkpoint import rounded_tensors

    folder.mkdir()
    save_file(rounded_tensors(DEFAULT_CHECKPOINT), folder / "model.safetensors")
    for name in ("checkpoint.json", "tokenizer.json"):
        shutil.copy(DEFAULT_CHECKPOINT / name, folder / name)
    return folder


def embedding_jobs(folder: Path, backbone: str, image: str) -> dict[str, list[str]]:
    """Writes the picture, the checkpoint as open_clip reads it, and the INT8 bundle."""
    import torch
    from PIL import Image

    from pmclip_deploy.benchmarks.towers import checkpoint_of_random_weights, pictures_for_calibration
    from pmclip_deploy.export.pack import bundle_from_checkpoint
    from pmclip_deploy.imaging.read import picture_from_path
    from pmclip_deploy.train.backbones import BACKBONES, backbone_named

    name = backbone_named(backbone).open_clip_name
    if name is None:
        has = ", ".join(known for known, spec in BACKBONES.items() if spec.open_clip_name)
        raise UsageError(f"--backbone {backbone}: open_clip has no such model", f"choose one of {has}")
    model = checkpoint_of_random_weights(folder / "checkpoint", backbone)
    weights, picture = folder / "open_clip.pt", folder / "picture.png"
    torch.save(model.state_dict(), weights)
    Image.fromarray(picture_from_path(image).pixels).convert("RGB").save(picture)
    bundle_from_checkpoint(folder / "checkpoint", folder / "bundle", "int8", calibration_images=pictures_for_calibration(folder))
    return {
        f"pmclip_deploy, {backbone} INT8": [sys.executable, "-c", EMBED, str(folder / "bundle"), str(picture), QUESTION],
        f"open_clip, {backbone} fp32": [sys.executable, "-c", OPEN_CLIP_EMBED, str(name), str(weights), str(picture), QUESTION],
    }


def main() -> None:
    from pydicom.data import get_testdata_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", help="one that open_clip has too")  # whose names would load torch into this process
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--image", default=str(get_testdata_file("CT_small.dcm")))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats: give 2 or more, for quartiles")
    try:
        measure(options)
    except PmclipError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def measure(options: argparse.Namespace) -> None:
    """Prints the medians, and appends the rows to ``options.output``. Raises PmclipError."""
    with tempfile.TemporaryDirectory() as scratch:
        alone = ProcessPoolExecutor(1, get_context("spawn"))  # a process begins with the peak memory of the one that starts it
        if options.backbone:
            with alone as pool:
                jobs = pool.submit(embedding_jobs, Path(scratch), options.backbone, options.image).result()
        else:
            with alone as pool:
                whole = pool.submit(whole_checkpoint, Path(scratch) / "checkpoint").result()
            infer = [str(Path(sys.executable).with_name("pmclip-deploy")), "infer", options.image, QUESTION, "--json"]
            jobs = {
                "pmclip-deploy infer, INT8": infer,
                "open_clip in PyTorch, fp32": [sys.executable, "-c", OPEN_CLIP, str(whole), options.image, QUESTION],
            }
        rows: list[dict[str, Any]] = []
        for repeat in range(-1, options.repeats):  # the first round warms the file cache
            for name, command in jobs.items():
                seconds, memory, out = process(command)
                if repeat < 0:
                    print(f"{name:28}  {' '.join(out.split())[:100]}")
                else:
                    rows.append({"job": name, "seconds": seconds, "peak_mib": memory or float("nan")})
    medians = {name: [statistics.median(r[key] for r in rows if r["job"] == name) for key in ("seconds", "peak_mib")] for name in jobs}
    for name, (seconds, memory) in medians.items():
        print(f"{name:28}  {seconds:6.2f} s  {memory:7.0f} MiB")
    (fast, small), (slow, large) = medians.values()
    print(f"ratio: {fast / slow:.3f} of the time, {small / large:.3f} of the memory (medians of {options.repeats} interleaved runs)")
    if options.output:
        beside = versions("torch", "torchvision", "open_clip_torch", "timm", "transformers")
        run = Run(command_line("python -m pmclip_deploy.benchmarks.cold_start"), {**stamp(), "beside": beside})
        for system, name in zip(("pmclip-deploy int8", "open_clip-eager"), jobs, strict=True):
            low, median, high = statistics.quantiles((1e3 * r["seconds"] for r in rows if r["job"] == name), method="inclusive")
            peak = medians[name][1]
            figures = {"p50_ms": median, "p25_ms": low, "p75_ms": high, "peak_mib": peak if peak == peak else None}
            model, part = (options.backbone, "both") if options.backbone else (LITE, "infer")
            append(options.output, [run.row(model, system, part, "cold", figures, threads=None, samples=options.repeats)])


if __name__ == "__main__":
    main()
