"""A ViT-B/32 whose weights mean something where none can be downloaded: its image tower learns to embed as pmclip-lite's does.

python -m pmclip_deploy.benchmarks.distil_vit --data vqa-med-2019 --output runs/vit

It writes a checkpoint for `train vqa --head mevf` and `export`, to prove INT8 on trained weights: outlier channels are what breaks INT8
transformers, and random weights have none. It is no PubMedCLIP: its text tower is random.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import PatchDropout
from torch.nn import functional as F

from pmclip_deploy.benchmarks.peers import LITE, VIT
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import Checkpoint, save_checkpoint, towers_from_checkpoint
from pmclip_deploy.train.cpu import keep_freed_memory
from pmclip_deploy.train.images import radiology_augmented, with_margin
from pmclip_deploy.train.questions import questions_for_training

BATCH, RATE, WARMUP = 32, 5e-4, 50
DROPPED = 0.5  # of the patches of each picture, while it trains: half the time a step (Li et al. 2023)


@torch.inference_mode()
def embeddings(model: CLIP | CustomTextCLIP, paths: list[Path], backbone: str) -> torch.Tensor:
    """(N, D), of length 1."""
    preprocess = BACKBONES[backbone].preprocess
    tensors = (torch.from_numpy(tensor_from_pixels(picture_from_path(path).pixels, preprocess))[None] for path in paths)
    return F.normalize(torch.cat([model.encode_image(x) for x in tensors]), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(1)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    training, validation = (sorted({q.image for q in questions}) for questions in questions_for_training([options.data]))
    teacher = towers_from_checkpoint(DEFAULT_CHECKPOINT)[0]
    wanted, held = (embeddings(teacher, paths, LITE) for paths in (training, validation))

    spec = BACKBONES[VIT]
    model = spec.build()
    model.visual.patch_dropout = PatchDropout(DROPPED)
    pixels = [with_margin(picture_from_path(path).pixels, spec.preprocess) for path in training]
    groups = [
        {"params": [p for p in model.visual.parameters() if (p.ndim > 1) == decayed], "weight_decay": 0.05 * decayed}
        for decayed in (True, False)
    ]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    steps, generator, step, history = len(training) // BATCH * options.epochs, torch.Generator().manual_seed(1), 0, []
    for epoch in range(options.epochs):
        start, losses = time.perf_counter(), []
        model.train()
        for indices in torch.randperm(len(training), generator=generator)[: len(training) // BATCH * BATCH].split(BATCH):
            shown = torch.stack([pixels[i].expand(3, -1, -1) for i in indices.tolist()])
            out = F.normalize(model.encode_image(radiology_augmented(shown, spec.preprocess, generator)), dim=-1)
            similar = out @ wanted[indices].T / 0.1  # its own teacher's among the batch's, and near it
            loss = F.cross_entropy(similar, torch.arange(BATCH)) + 5 * (1 - (out * wanted[indices]).sum(-1)).mean()
            rate = min((step + 1) / WARMUP, 0.5 * (1 + np.cos(np.pi * step / steps)))
            for group in optimiser.param_groups:
                group["lr"] = RATE * rate
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.visual.parameters(), 1.0)
            optimiser.step()
            step += 1
            losses.append(loss.item())
        cosine = (embeddings(model.eval(), validation, spec.name) * held).sum(-1).mean().item()
        history.append({"epoch": epoch + 1, "loss": round(float(np.mean(losses)), 4), "validation_cosine": round(cosine, 4)})
        print(json.dumps({**history[-1], "seconds": round(time.perf_counter() - start)}), flush=True)
        options.output.mkdir(parents=True, exist_ok=True)
        vocabulary = options.output / "tokenizer.json"
        vocabulary.write_text(spec.tokenizer_json())
        made = {"distilled_from": LITE, "data": [options.data.name], "images": len(training), "epochs": epoch + 1, "seed": 1}
        meta: Checkpoint = {
            "name": "vit-distilled",
            "version": "0.1.0",
            "backbone": spec.name,
            "logit_scale": 14.2857,
            "metrics": {"history": history},
            "provenance": {"clip": made},
        }
        save_checkpoint(options.output, {f"clip.{k}": v for k, v in model.state_dict().items()}, meta, vocabulary)


if __name__ == "__main__":
    main()
