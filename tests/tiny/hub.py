"""Folders of the hub with an open_clip_config.json: small models of every kind that is read, made by open_clip, random and lively."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from transformers import BertConfig

from tests.tiny.biomed import BERT_TOKENIZER
from tests.tiny.clip import pictures

VIT = {"image_size": 64, "layers": 2, "width": 96, "head_width": 32, "patch_size": 16}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "head_width": 64}
TEXT = {"context_length": 40, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
BERT = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256}
OF_BERT = {"hf_model_name": "some/bert", "hf_tokenizer_name": "some/bert", "context_length": 60}
CLS = "cls_last_hidden_state_pooler"
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT},
    "quick": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "custom-text": {"embed_dim": 48, "custom_text": True, "vision_cfg": {**VIT, "no_ln_pre": True, "mlp_ratio": 2.0}, "text_cfg": TEXT},
    "resnet": {"embed_dim": 48, "vision_cfg": RESNET, "text_cfg": TEXT},
    "resnet-bert": {
        "embed_dim": 48,
        "vision_cfg": RESNET,
        "text_cfg": {**OF_BERT, "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"},
    },
    "vit-bert": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": {**OF_BERT, "hf_pooler_type": CLS}},
    "bert-pooler": {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": {**OF_BERT, "hf_pooler_type": "cls_pooler", "hf_proj_type": "mlp"}},
    "bert-alone": {"embed_dim": 128, "vision_cfg": VIT, "text_cfg": {**OF_BERT, "hf_pooler_type": CLS, "hf_proj_type": None}},
}
PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "squash"}


@torch.no_grad()
def model_of(name: str, folder: Path) -> Any:
    """open_clip's own; BERT's shape comes from a folder, since open_clip would ask the hub for it."""
    config = json.loads(json.dumps(MODELS[name]))
    config.pop("custom_text", None)
    torch.manual_seed(0)
    bert = "hf_model_name" in config["text_cfg"]
    if bert:
        BertConfig(**BERT).save_pretrained(folder)
        config["text_cfg"].update(hf_model_name=str(folder), hf_model_pretrained=False)
        config["text_cfg"].pop("hf_tokenizer_name")
    custom = bert or MODELS[name].get("custom_text")
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    for key, x in model.state_dict().items():
        if x.ndim and x.is_floating_point() and not key.endswith("running_var"):
            x.add_(torch.randn(x.shape) * (0.1 if x.ndim == 1 else 0.5 / x[0].numel() ** 0.5 if x.ndim > 1 else 0))
        elif not x.ndim and x.is_floating_point():
            x.fill_(3.25)
    if hasattr(model.visual, "attnpool"):
        for module in model.visual.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        model.visual.train()(pictures(64, 8))
    for x in model.state_dict().values():
        if x.is_floating_point():
            x.copy_(x.half())
    return model.eval()


def folder_of(name: str, folder: Path, model: Any, weights: str = "open_clip_model.safetensors", **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODELS[name], "preprocess_cfg": PIXELS, **config}))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if weights.endswith(".json"):  # in two shards
        safe, names = ".safetensors" in weights, sorted(state)
        halves = [names[::2], names[1::2]]
        files = [f"part-{i}.{'safetensors' if safe else 'bin'}" for i in (1, 2)]
        for half, file in zip(halves, files, strict=True):
            part = {k: state[k] for k in half}
            save_file(part, folder / file) if safe else torch.save(part, folder / file)
        index = {"weight_map": {k: file for half, file in zip(halves, files, strict=True) for k in half}}
        (folder / weights).write_text(json.dumps(index))
    elif weights.endswith(".safetensors"):
        save_file(state, folder / weights)
    else:
        torch.save(state, folder / weights)
    if "hf_model_name" in MODELS[name]["text_cfg"]:
        (folder / "tokenizer.json").write_bytes(BERT_TOKENIZER.read_bytes())
    return folder
