"""PMC-CLIP in its two published layouts, with random weights under which every layer matters; made without our own towers."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import Transformer
from transformers import BertConfig, BertModel

from pmclip_deploy.train.backbones import BACKBONES
from tests.tiny.biomed import BERT_TOKENIZER
from tests.tiny.clip import look_at, pictures

NAMES = {"checkpoint": "PMC-CLIP", "parts": "PMC-CLIP-parts"}
PARTS = {"visual.": "image_encoder(resnet50).pth", "text_encoder.": "text_encoder.pth", "text_projection": "text_projection_layer.pth"}
OUTLIERS = (5, 77, 308, 681)  # channels
SCALE = 4.4292

Tensors = dict[str, Any]


def image_tower(heads: int) -> Any:
    """open_clip's, as the authors' own ``ModifiedResNet`` but for the head count that each of their ways to compute has."""
    return ModifiedResNet([3, 4, 6, 3], output_dim=768, heads=heads, image_size=224, width=64).eval()


def text_tower(layers: int) -> Any:
    return BertModel(BertConfig(num_hidden_layers=layers)).eval()  # whose other defaults are BERT-base


@cache
@torch.no_grad()
def lively(layers: int = 2) -> Tensors:
    """The state dict of `checkpoint.pt`: every bias and norm off its initial value, a few channels far larger than the others, in fp16."""
    torch.manual_seed(0)
    visual, text = image_tower(32), text_tower(layers)
    for module in visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.1, 0.5), module.bias.normal_(0, 0.1)
    visual.layer4[2].bn3.weight[list(OUTLIERS)] *= 8
    look_at(visual, pictures(96, 8))
    pool = visual.attnpool
    pool.q_proj.weight *= 4  # so that the number of heads matters
    for part in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        part.bias.normal_(0, 0.2)
    for name, x in text.named_parameters():
        noise = torch.randn(x.shape)
        if "LayerNorm" in name:
            x.copy_(1 + 0.3 * noise.clamp(-2, 2) if name.endswith("weight") else 0.2 * noise)
            if name.endswith("weight"):
                x[list(OUTLIERS)] *= 4
        elif name.endswith("embeddings.weight"):
            x.copy_(0.5 * noise)
        elif x.ndim > 1:
            x.copy_(1.5 * noise / x.shape[1] ** 0.5)
            if any(part in name for part in ("query", "key", "value", "intermediate.dense", "pooler")):
                x[:, list(OUTLIERS)] /= 4
        else:
            x.copy_(0.1 * noise)
    state = {f"visual.{k}": v for k, v in visual.state_dict().items()}
    state |= {f"text_encoder.{k}": v for k, v in text.state_dict().items()}
    state["text_projection"] = torch.randn(768, 768) / 768**0.5
    state["logit_scale"] = torch.tensor(4.25)
    # Beside them, what is of another loss, and what transformers of 2022 stored.
    fusion = Transformer(width=768, layers=4, heads=8)
    state |= {f"fusion_module.{k}": v for k, v in fusion.state_dict().items()}
    state |= {"img_special_token": torch.zeros(1, 1, 768), "mlm_projection": torch.randn(768, 30522).half()}
    state |= {"positional_embedding": torch.randn(77, 768), "ln_final.weight": torch.ones(768), "ln_final.bias": torch.zeros(768)}
    state["text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()}


def folder_of(kind: str, folder: Path, layers: int = 2) -> Path:
    """A folder with the files of a layout, and PubMedBERT's place taken by another BERT tokenizer of as many pieces."""
    folder.mkdir(parents=True)
    state = lively(layers)
    if kind == "checkpoint":
        optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
        wrapped = {f"module.{k}": v for k, v in state.items()}
        data = {"epoch": 60, "name": "x", "state_dict": wrapped, "optimizer": optimizer, "scaler": {"scale": 65536.0}}
        torch.save(data, folder / "checkpoint.pt")
    else:
        for prefix, name in PARTS.items():
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            torch.save(part.get("", part), folder / name)  # the projection is a tensor alone
    (folder / "tokenizer.json").write_bytes(BERT_TOKENIZER.read_bytes())
    return folder


def source_of(kind: str, folder: Path) -> Path:
    return folder / "checkpoint.pt" if kind == "checkpoint" else folder


@torch.no_grad()
def reference(kind: str, pixels: Any, tokens: Any, layers: int = 2) -> tuple[Any, Any]:
    """(image, text) embeddings as the authors compute them: training code for the checkpoint, notebook for the three files.

    ``tokens`` are padded to 77; neither passes a mask.
    """
    state = lively(layers)
    visual, text = image_tower(32 if kind == "checkpoint" else 8), text_tower(layers)
    visual.load_state_dict({k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")})
    of_text = {k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text_encoder.")}
    text.load_state_dict({k: v for k, v in of_text.items() if not k.endswith("position_ids")})
    out = text(input_ids=tokens)
    pooled = out.last_hidden_state[:, 0] if kind == "checkpoint" else out.pooler_output
    return visual(pixels), pooled @ state["text_projection"]


def shallow(kind: str, layers: int = 2) -> Any:
    from dataclasses import replace

    backbone: Any = BACKBONES[NAMES[kind]]
    return replace(backbone, text_layers=layers)
