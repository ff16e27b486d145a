"""A CLIP of two small layers in each tower as backbone "tiny", its checkpoint and captions; as a script, the command line that knows it."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from pmclip_deploy.spec import BACKBONES, Backbone, Preprocess
from pmclip_deploy.train.bpe import clip_tokenizer_json
from pmclip_deploy.train.towers import save_checkpoint, towers_from_spec

COLOURS = ("black", "dark grey", "light grey", "white")


def add_tiny(folder: Path) -> None:
    """Registers "tiny", a transformer, and "tiny-resnet", which has BatchNorm."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    seen = {"tiny": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16}, "tiny-resnet": {"layers": [1, 1, 1, 1], "width": 8}}
    for name, vision in seen.items():
        config = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": text}
        partial = folder / f"{name}.{os.getpid()}"  # torchrun's other process may be reading
        partial.write_text(json.dumps(config))
        partial.replace(folder / f"{name}.json")
        open_clip.add_model_config(folder / f"{name}.json")
        preprocess = Preprocess(32, "shortest", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        BACKBONES[name] = Backbone(name, preprocess, embed_dim=32, context_length=77, pad_id=0, open_clip_name=name)


def remove_tiny() -> None:
    for name in ("tiny", "tiny-resnet"):
        del BACKBONES[name]


def checkpoint(folder: Path, name: str = "tiny") -> Path:
    torch.manual_seed(0)
    model = towers_from_spec(BACKBONES[name])
    folder.mkdir()
    (folder / "bpe.json").write_text(clip_tokenizer_json())
    meta = {"name": name, "version": "0", "backbone": name, "logit_scale": 14.3, "metrics": {}, "provenance": {"import": "random"}}
    save_checkpoint(folder, {f"clip.{k}": v for k, v in model.state_dict().items()}, meta, folder / "bpe.json")
    return folder


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


if __name__ == "__main__":
    from pmclip_deploy.cli.app import main

    add_tiny(Path(sys.argv.pop(1)))
    main()
