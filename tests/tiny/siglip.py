"""SigLIP in its published layouts: transformers' folder and open_clip's, with random weights under which every layer matters."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import SiglipConfig, SiglipModel
from transformers.convert_slow_tokenizer import import_protobuf

from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.siglip import SigLip
from pmclip_deploy.train.bpe import charsmap

SCALE, BIAS = 4.765625, -12.9375  # the scale as a logarithm: 117.4, more than CLIP's bound
OUTLIERS = (5, 77, 308, 381)  # channels
GAINS = {"q_proj": 1.5, "k_proj": 1.5, "v_proj": 2, "out_proj": 1.5, "in_proj": 1.5}  # so that what is read depends on all places
READERS = ("q_proj", "k_proj", "v_proj", "fc1", "text_model.head", "in_proj")  # of what a norm gives
PIXELS = {  # preprocessor_config.json, as published
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "rescale_factor": 0.00392156862745098,
}
WORDS = (
    "is there a fracture what imaging modality was used in which plane this image taken organ system shown the ct mri of chest abdomen "
    "brain x-ray with large pneumothorax on left right an no yes not without contrast study normal"
)


def shallow(name: str, layers: int = 2) -> SigLip:
    """The backbone with fewer layers in each tower and no other change."""
    backbone = BACKBONES[name]
    assert isinstance(backbone, SigLip)
    return replace(backbone, layers=layers)


def config_of(backbone: SigLip) -> SiglipConfig:
    """transformers' configuration of it."""
    config = backbone.config()
    text, width = config["text_cfg"], backbone.embed_dim
    hidden = int(width * text.get("mlp_ratio", 4))
    both = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": backbone.layers, "num_attention_heads": text["heads"]}
    vision = {**both, "image_size": backbone.preprocess.size, "patch_size": backbone.patch}
    return SiglipConfig(text_config={**both, "vocab_size": text["vocab_size"]}, vision_config=vision)


@cache
@torch.no_grad()
def lively(name: str, layers: int = 2) -> Any:
    """transformers' model: every bias and norm off its initial value, attention that tells places apart, a few channels far larger.

    All numbers are ones that fp16 holds, as a checkpoint has them.
    """
    generator = torch.Generator().manual_seed(0)
    config = config_of(shallow(name, layers))
    config._attn_implementation = "eager"
    model = SiglipModel(config).eval().requires_grad_(False)
    for of, x in model.named_parameters():
        noise = torch.randn(x.shape, generator=generator)
        if "norm" in of:
            x.copy_(1 + 0.3 * noise.clamp(-2, 2) if of.endswith("weight") else 0.2 * noise)
            if of.endswith("weight"):
                x[list(OUTLIERS)] *= 8
        elif "embedding.weight" in of or of.endswith("probe"):
            x.copy_(0.5 * noise)
        elif x.ndim > 1:
            x.copy_(noise * next((gain for part, gain in GAINS.items() if part in of), 1) / x[0].numel() ** 0.5)
            if any(part in of for part in READERS) and "head.mlp" not in of:
                x[:, list(OUTLIERS)] /= 8
        else:
            x.copy_(torch.full_like(x, SCALE if of == "logit_scale" else BIAS) if of.startswith("logit") else 0.1 * noise)
        x.copy_(x.half())
    return model


def hub_folder(folder: Path, name: str, layers: int = 2, shards: int = 1, resample: int | None = 3) -> Path:
    """As the hub lays it out for transformers."""
    folder.mkdir(parents=True)
    model = lively(name, layers)
    model.save_pretrained(folder, max_shard_size="50MB" if shards > 1 else "50GB")
    (folder / "config.json").write_text(json.dumps(config_of(shallow(name, layers)).to_dict()))
    size = BACKBONES[name].preprocess.size
    pixels = {**PIXELS, "size": {"height": size, "width": size}, **({} if resample is None else {"resample": resample})}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    if name.startswith("SigLIP2"):
        gemma().save(str(folder / "tokenizer.json"))
    else:
        (folder / "spiece.model").write_bytes(spiece())
    return folder


def open_clip_folder(folder: Path, backbone: SigLip, state: dict[str, Any], weights: str = "open_clip_model.safetensors") -> Path:
    """As the hub lays it out for open_clip: ``state`` by open_clip's names."""
    folder.mkdir(parents=True)
    config = {**backbone.config(), "custom_text": True}
    config["text_cfg"]["layers"] = backbone.layers
    half = [0.5, 0.5, 0.5]
    pixels = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    if weights.endswith(".safetensors"):
        save_file({name: x.contiguous() for name, x in state.items()}, folder / weights)
    else:
        torch.save(state, folder / weights)
    second = backbone.name.startswith("SigLIP2")
    (gemma() if second else t5()).save(str(folder / "tokenizer.json"))
    marks = ("<eos>", "<pad>") if second else ("</s>", "</s>")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": marks[0], "pad_token": marks[1], "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def _pieces() -> list[tuple[str, float]]:
    letters = [chr(c) for c in range(32, 127) if chr(c) != " "] + ["\u2581", "\u00e9", "\u00e0"]
    words = dict.fromkeys([*(f"\u2581{word}" for word in WORDS.split()), "ing", "al", "ed"])
    rows = {**{piece: -4.0 - 0.01 * i for i, piece in enumerate(words)}, **{letter: -9.0 - 0.01 * i for i, letter in enumerate(letters)}}
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *rows.items()]


def _characters() -> bytes:
    """Characters that are replaced, in blocks of 1,024 bytes, as sentencepiece asks."""
    made = charsmap({0xFF0C: ",", 0xFB01: "fi", 0xA0: " ", 0x2581: " "})
    end = 4 + int.from_bytes(made[:4], "little")
    trie = made[4:end] + bytes((4 - end) % 1024)
    return len(trie).to_bytes(4, "little") + trie + made[end:]


@cache
def spiece() -> bytes:
    """A sentencepiece model of few pieces, laid out as SigLIP's: unigrams, characters replaced, a blank before the text."""
    proto = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    for i, (piece, score) in enumerate(_pieces()):
        proto.pieces.add(piece=piece, score=score, type=(3, 3, 2)[i] if i < 3 else 1)
    proto.trainer_spec.model_type, proto.trainer_spec.unk_id, proto.trainer_spec.vocab_size = 1, 2, len(_pieces())
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id, proto.trainer_spec.bos_id = 0, 1, -1
    proto.normalizer_spec.name, proto.normalizer_spec.precompiled_charsmap = "nmt_nfkc", _characters()
    content: bytes = proto.SerializeToString()
    return content


def t5() -> Tokenizer:
    """The same pieces as open_clip's repositories have them: T5's fast tokenizer."""
    tokenizer = Tokenizer(models.Unigram(_pieces(), 2, False))
    tokenizer.normalizer = normalizers.Precompiled(_characters())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def gemma() -> Tokenizer:
    """A byte-pair tokenizer of few pieces, laid out as Gemma's: blanks are pieces, bytes stand for what is unknown."""
    marks, letters = ["<pad>", "<eos>", "<bos>", "<unk>"], [chr(c) for c in range(33, 127)] + ["\u2581"]
    pieces = dict.fromkeys([*marks, *(f"<0x{b:02X}>" for b in range(256)), *letters, "\n", "\u2581\u2581"])
    merges = []
    for word in WORDS.split():
        for end in range(2, len(word) + 1):
            if (pair := (word[: end - 1], word[end - 1])) not in merges:
                merges.append(pair)
            pieces[word[:end]] = None
    numbers = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(numbers, merges, fuse_unk=True, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(marks)
    tokenizer.add_tokens(["\n", "\u2581\u2581"])
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer
