"""What outlier channels do to the answers of an INT8 ViT: planted into trained weights, with and without SmoothQuant.

python -m pmclip_deploy.benchmarks.outliers CHECKPOINT --data vqa-med-2019

In the image tower a few channels of each layer norm grow by a factor, and what the matrices make of them shrinks by it: the same function
in floats (Dettmers et al. 2022 describe such channels in large transformers). The rest of the bundle stays fp32.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from open_clip.transformer import VisionTransformer

from pmclip_deploy.evaluation.rows import rows_from_jsonl
from pmclip_deploy.export.calibration import measured_from_feeds
from pmclip_deploy.export.int8_dynamic import int8_dynamic
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.export.parity import answer_parity, tensor_difference
from pmclip_deploy.export.reference import Reference, outputs_for, tokenizers_of
from pmclip_deploy.export.smooth import smoothed
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions import SessionOptions, open_session

CHANNELS, FACTOR = 8, 40.0
IMAGES = 64  # to calibrate on, and to compare


@torch.no_grad()
def plant(tower: VisionTransformer) -> None:
    """In each block, scales eight channels of both layer norms by 40, and divides the weights that read them: the same function."""
    channels = torch.randperm(tower.ln_post.normalized_shape[0], generator=torch.Generator().manual_seed(0))[:CHANNELS]
    for block in tower.transformer.resblocks:
        for norm, weight in ((block.ln_1, block.attn.in_proj_weight), (block.ln_2, block.mlp.c_fc.weight)):
            norm.weight[channels] *= FACTOR
            norm.bias[channels] *= FACTOR
            weight[:, channels] /= FACTOR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    images = options.data / "images"
    modules = modules_from_checkpoint(options.checkpoint)
    rows = rows_from_jsonl(options.data / "val.jsonl", images)
    reference = Reference(modules, rows, images)
    said = reference.row_outputs  # of the weights as they were trained
    assert said is not None
    plant(modules.clip.visual)
    graphs = onnx_from_modules(modules, dense=False)
    names = sorted({row.image for row in rows_from_jsonl(options.data / "train.jsonl", images)})
    names = names[:: max(1, len(names) // IMAGES)][:IMAGES]
    preprocess = reference.predictor.manifest.preprocess
    tensors = [tensor_from_pixels(picture_from_path(images / name).pixels, preprocess)[None] for name in names]
    calibration = measured_from_feeds(graphs["image"], ({"pixels": x} for x in tensors))
    smooth, _ = smoothed(graphs["image"], {name: t.largest for name, t in calibration.items() if t.largest})
    recipes = {  # neither with bias correction
        "fp32": graphs["image"],
        "INT8 without SmoothQuant": int8_dynamic(graphs["image"], {}),
        "INT8 with SmoothQuant": int8_dynamic(smooth, {}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        sessions = {}
        for name, model in {**graphs, **{f"image, {name}": model for name, model in recipes.items()}}.items():
            path = Path(scratch, f"{name}.onnx")
            path.write_bytes(model.SerializeToString())
            sessions[name] = open_session(path, SessionOptions("cpu"))
        exact = None
        for name in recipes:
            mine = {**{graph: sessions[graph] for graph in graphs}, "image": sessions[f"image, {name}"]}
            predictor = Predictor(None, reference.predictor.manifest, mine, tokenizers_of(modules))
            embedded = np.concatenate([mine["image"].run({"pixels": x})["embedding"] for x in tensors])
            exact = embedded if exact is None else exact
            answers = answer_parity(rows, said, outputs_for(predictor, rows, images))
            kept = ("agreement", "accuracy_fp32", "accuracy", "difference_ci95")
            print(name, json.dumps({**tensor_difference(exact, embedded), **{key: answers[key] for key in kept}}), flush=True)


if __name__ == "__main__":
    main()
