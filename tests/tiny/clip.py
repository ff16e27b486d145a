"""A CLIP of two small layers in each tower as backbone "tiny", its checkpoint and captions; as a script, the command line that knows it."""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip import CLIP
from open_clip.modified_resnet import AttentionPool2d
from PIL import Image

from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.openai_clip import OpenAIClip
from pmclip_deploy.train.bpe import clip_tokenizer_json
from pmclip_deploy.train.checkpoint import save_checkpoint
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.qcr import QCR
from pmclip_deploy.train.heads.vision import AutoEncoder, ImageFeatures, MamlNetwork
from tests.tiny.tars import tar

COLOURS = ("black", "dark grey", "light grey", "white")

tokenizer_json = cache(clip_tokenizer_json)


def add_tiny(folder: Path) -> None:
    """Registers "tiny", a transformer, and "tiny-resnet", which has BatchNorm."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    seen = {"tiny": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16}, "tiny-resnet": {"layers": [1, 1, 1, 1], "width": 8}}
    for name, vision in seen.items():
        config = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": text}
        if not (folder / f"{name}.json").is_file():  # torchrun's processes share the folder
            (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        preprocess = Preprocess(32, "shortest", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        BACKBONES[name] = OpenAIClip(name, preprocess, embed_dim=32, context_length=77, pad_id=0, open_clip_name=name)


def shallow(name: str, folder: Path) -> OpenAIClip:
    """The backbone with two layers in each tower and no other change."""
    backbone = BACKBONES[name]
    config = open_clip.get_model_config(backbone.open_clip_name)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    made = f"{backbone.open_clip_name}-of-two"
    (folder / f"{made}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{made}.json")
    return replace(backbone, open_clip_name=made)


def remove_tiny() -> None:
    for name in ("tiny", "tiny-resnet"):
        del BACKBONES[name]


def checkpoint(
    folder: Path,
    name: str = "tiny",
    model: Any = None,
    of_head: MEVF | QCR | None = None,
    tokenizer: str | None = None,
    **about: Any,
) -> Path:
    """With random weights where no ``model`` is given, and CLIP's tokenizer; ``about`` is what checkpoint.json says of a head."""
    torch.manual_seed(0)
    model = model or BACKBONES[name].build()
    folder.mkdir()
    (folder / "bpe.json").write_text(tokenizer or tokenizer_json(), encoding="utf-8")
    meta = {"name": name.replace("/", "-"), "version": "0", "backbone": name, "logit_scale": 14.3, "metrics": {}}
    meta |= {"provenance": {"import": "random"}, **about}
    tensors = {f"clip.{k}": v for k, v in model.state_dict().items()}
    tensors |= {} if of_head is None else {f"head.{k}": v for k, v in of_head.state_dict().items()}
    save_checkpoint(folder, tensors, meta, folder / "bpe.json")
    return folder


def head_checkpoint(folder: Path, name: str, kind: str, hidden: int = 24, model: Any = None, tokenizer: str | None = None) -> Path:
    """Of MEVF or QCR with random weights, over the image tower, the auto-encoder and, for MEVF, the MAML network."""
    torch.manual_seed(0)
    words = ("is", "there", "a", "fracture", "what", "modality", "plane", "the", "image", "organ", "normal", "study", "in", "which")
    tables, mevf = [torch.randn(len(words), 12), torch.randn(len(words), 12)], kind == "mevf"
    features = ImageFeatures(BACKBONES[name].embed_dim, AutoEncoder(), MamlNetwork() if mevf else None)
    head = MEVF(features, tables, 7, hidden=hidden) if mevf else QCR(features, tables, 4, 3, glimpses=2, hidden=hidden)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.5)
    about = {"kind": kind, "features": ["clip", "ae", *(["maml"] if mevf else [])]}
    answers, closed = ["yes", "no", "left", "ct", "mri", "axial", "brain"], None if mevf else 3
    return checkpoint(folder, name, model, head.eval(), tokenizer, head=about, dictionary=words, answers=answers, closed_answers=closed)


def lively(name: str, shown: torch.Tensor | None = None) -> CLIP:
    """Random weights under which every layer matters: the usual ones leave residual branches at zero and attention flat.

    Batch norms take their statistics from ``shown``, else from noise.
    """
    torch.manual_seed(0)
    model = BACKBONES[name].build().eval().requires_grad_(False)
    model.token_embedding.weight.normal_()
    model.positional_embedding.normal_()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.1, 0.5), module.bias.normal_(0, 0.1)
        elif isinstance(module, torch.nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5), module.bias.normal_(0, 0.2)
        elif isinstance(module, AttentionPool2d):
            module.q_proj.weight *= 2
            for part in (module.q_proj, module.k_proj, module.v_proj, module.c_proj):
                part.bias.normal_(0, 0.2)
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.in_proj_weight *= 2
            module.in_proj_bias.normal_(0, 0.2)
    if hasattr(model.visual, "attnpool"):
        look_at(model.visual, pictures(96, 8) if shown is None else shown)  # small, so quick
        if shown is not None:
            calm(model.visual)
    return model


@torch.no_grad()
def look_at(tower: Any, shown: torch.Tensor) -> None:
    """A ResNet's norms take their statistics from pictures; else ReLU on ReLU makes all pictures alike."""
    pool, tower.attnpool = tower.attnpool, torch.nn.Identity()
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    tower.train()(shown)
    tower.eval().attnpool = pool


@torch.no_grad()
def calm(tower: Any) -> None:
    """Takes out of a ResNet what would blow up rounding errors: a score that takes all, and channels that few pictures stir."""
    tower.attnpool.q_proj.weight *= 0.1
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.clamp_(min=0.8 * float(module.running_var.mean()))


def pictures(size: int, count: int) -> torch.Tensor:
    """Noise in blocks of 8 pixels, so that pooling does not level it."""
    coarse = torch.randn(count, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


def captions(folder: Path, training: int = 16, validation: int = 6) -> Path:
    """Image-caption rows: four grey levels, some of them with a bright half."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", training), ("val", validation)):
        rows = []
        for i in range(count):
            level, half = i % 4, i // 4 % 2
            pixels = rng.integers(0, 40, (40, 48)) + 60 * level
            pixels[:, : 24 * half] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{split}{i}.png")
            rows.append({"image": f"{split}{i}.png", "caption": f"A {COLOURS[level]} picture{' with a bright half' * half}, number {i}."})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shards(folder: Path, source: Path, each: int = 5) -> Path:
    """The pairs of ``captions`` as WebDataset shards of ``each`` samples, with captions as text and as JSON in turn."""
    for split in ("train", "val"):
        entries = []
        for i, line in enumerate((source / f"{split}.jsonl").read_text().splitlines()):
            row = json.loads(line)
            ending, text = ("json", line) if i % 2 else ("txt", row["caption"])
            entries += [(row["image"], (source / "images" / row["image"]).read_bytes()), (f"{split}{i}.{ending}", text.encode())]
        for start in range(0, len(entries), 2 * each):
            tar(folder / f"{split}-{start:06}.tar", *entries[start : start + 2 * each])
    return folder


if __name__ == "__main__":
    from pmclip_deploy.cli.app import main

    add_tiny(Path(sys.argv.pop(1)))
    main()
