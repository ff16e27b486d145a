"""CLIP of any size that an open_clip_config.json describes: a CLIP ResNet or a vision transformer, and CLIP's text transformer or a BERT.

Such a backbone has no row in a list. Its checkpoint says what its towers are ("towers" in checkpoint.json), and its name ends in that
description's hash.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip import CustomTextCLIP

from pmclip_deploy.errors import UsageError
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.backbones.base import Towers
from pmclip_deploy.train.backbones.bert import BASE, bert_text_graph, towers_from_config, wordpieces_beside
from pmclip_deploy.train.backbones.configs import RESIZE, TEXT, VISION, part_of, refusal_of_towers, short
from pmclip_deploy.train.backbones.openai_clip import CLIP_MEAN, CLIP_STD, ClipTowers, OpenAIClip

if TYPE_CHECKING:
    from onnx import ModelProto

TRANSFORMER = "text.transformer."
WORDS = f"{TRANSFORMER}embeddings.word_embeddings.weight"
OF_BERT = ("hf_proj_type", "hf_pooler_type")
MOST = {"layers": 200, "width": 8192, "heads": 512, "head_width": 8192, "image_size": 2048, "patch_size": 2048, "context_length": 4096,
        "embed_dim": 8192, "hidden_size": 8192, "num_hidden_layers": 200, "vocab_size": 1_000_000, "max_position_embeddings": 32768,
        "intermediate_size": 65536, "num_attention_heads": 512, "type_vocab_size": 16}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


class BertClipTowers(CustomTextCLIP, Towers):  # type: ignore[misc]
    """open_clip's, same names and same weights. A text of its own length gives what it gives padded: padding is masked."""

    visual: Any
    text: Any


@dataclass(frozen=True)
class OpenClip(OpenAIClip):
    importable = False  # by a configuration alone
    described: str = ""  # JSON of "model_cfg", "preprocess" and "bert"

    @property
    def model_cfg(self) -> dict[str, Any]:
        return dict(json.loads(self.described)["model_cfg"])

    @property
    def bert(self) -> dict[str, Any] | None:
        """BERT's configuration, if it is the text tower."""
        of: dict[str, Any] | None = json.loads(self.described)["bert"]
        return of

    def build(self) -> Any:
        return ClipTowers(**self.model_cfg) if self.bert is None else towers_from_config(BertClipTowers, self.model_cfg, self.bert)

    def tokenizer_json(self) -> str:
        if self.bert is not None:
            raise UsageError(f"no package has the tokenizer of backbone {self.name}", "give a checkpoint that `import` made")
        return super().tokenizer_json()

    def tokenizer_beside(self, weights: Path) -> str:
        if self.bert is None:
            return super().tokenizer_beside(weights)
        return wordpieces_beside(weights, "the model", self.pad_id, self.bert["vocab_size"], cased=True)

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        return None

    def with_activation(self, activation: str) -> "OpenClip":
        quick = activation == "quick_gelu"
        told = json.loads(self.described)
        return backbone_of_towers({**told, "model_cfg": {**told["model_cfg"], "quick_gelu": quick}})

    def text_graph(self, towers: Towers) -> "ModelProto":
        if self.bert is None:
            return super().text_graph(towers)
        model: Any = towers
        return bert_text_graph(model.text, self.context_length, self.embed_dim)


def refusal_of(config: Mapping[str, Any]) -> str | None:
    """What in an open_clip_config.json is of no model that is read here; None if all is. Needs no weights."""
    model = part_of(config, "model_cfg")
    if said := refusal_of_towers(config):
        return said
    seen, read = part_of(model, "vision_cfg"), part_of(model, "text_cfg")
    size, patch = seen.get("image_size", 224), 32 if isinstance(seen.get("layers", 12), list) else seen.get("patch_size", 16)
    for part, key, value in (("", "embed_dim", model.get("embed_dim")), *(("vision_cfg's ", k, v) for k, v in seen.items() if k in VISION),
                             *(("text_cfg's ", k, v) for k, v in read.items() if k in TEXT)):  # fmt: skip
        numbers = value if key == "layers" and isinstance(value, list) and len(value) == 4 and part.startswith("vision") else [value]
        if key in MOST and not all(_is_count(n, MOST[key]) for n in numbers):
            return f"its {part}{key} is {short(value)}, which is no whole number between 1 and {MOST[key]}"
    for tower in (seen, read):
        if not isinstance(ratio := tower.get("mlp_ratio", 4), int | float) or not 0.1 <= ratio <= 16:
            return f"its mlp_ratio is {short(ratio)}"
    if said := _refusal_of_heads(seen, read):
        return said
    if size % patch:
        return f"its image_size {size} is no multiple of {patch}"
    if not read.get("hf_model_name") and read.get("vocab_size", 49408) != 49408:
        return f"its text_cfg's vocab_size is {short(read['vocab_size'])}; CLIP's tokenizer has 49408"
    return None


def _refusal_of_heads(seen: Mapping[str, Any], read: Mapping[str, Any]) -> str | None:
    """Of the towers that are no BERT, with what open_clip takes for what is left out."""
    width = seen.get("width", 768) * (32 if isinstance(seen.get("layers", 12), list) else 1)
    heads = {"vision_cfg": (width, width // seen.get("head_width", 64))}
    if not read.get("hf_model_name"):
        heads["text_cfg"] = (read.get("width", 512), read.get("heads", 8))
    wrong = [f"its {part} has a width of {width} and {count} heads" for part, (width, count) in heads.items() if not count or width % count]
    return wrong[0] if wrong else None


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def backbone_of_config(config: Mapping[str, Any], shapes: Shapes, of_bert: Mapping[str, Any]) -> OpenClip:
    """Of an open_clip_config.json that ``refusal_of`` lets through, and of the tensors' shapes: open_clip would ask the hub for BERT's.

    ``of_bert`` is BERT's own config.json, or empty. Raises ValueError with what is wrong.
    """
    model, told = part_of(config, "model_cfg"), part_of(config, "preprocess_cfg")
    seen, read = part_of(model, "vision_cfg"), part_of(model, "text_cfg")
    bert = None
    if read.get("hf_model_name"):
        bert = _bert_of(shapes, of_bert)
        if (length := read.get("context_length", 77)) > bert["max_position_embeddings"]:
            raise ValueError(f"its context_length is {length}, and BERT has {bert['max_position_embeddings']} positions")
        text = {"hf_model_name": "bert", "context_length": length, **{k: read[k] for k in OF_BERT if k in read}}
    else:
        text = {k: v for k, v in read.items() if k in TEXT}
    size = seen.get("image_size", 224)
    preprocess = {
        "size": size[0] if isinstance(size, list) else size,
        "resize": RESIZE[told.get("resize_mode") or "shortest"],
        "mean": list(told.get("mean") or CLIP_MEAN),
        "std": list(told.get("std") or CLIP_STD),
    }
    vision = {k: v for k, v in seen.items() if k in VISION}
    model = {"embed_dim": model["embed_dim"], "quick_gelu": bool(model.get("quick_gelu")), "vision_cfg": vision, "text_cfg": text}
    return backbone_of_towers({"model_cfg": model, "preprocess": preprocess, "bert": bert})


def _bert_of(shapes: Shapes, told: Mapping[str, Any]) -> dict[str, Any]:
    names = {"positions": "position_embeddings", "types": "token_type_embeddings"}
    try:
        vocabulary, width = shapes[WORDS]
        positions, types = (shapes[f"{TRANSFORMER}embeddings.{name}.weight"][0] for name in names.values())
        inner = shapes[f"{TRANSFORMER}encoder.layer.0.intermediate.dense.weight"][0]
    except (KeyError, ValueError, IndexError):
        raise ValueError("its hf_model_name is of a text tower that is no BERT, by the names of its tensors") from None
    if types < 2:
        raise ValueError("its text tower is a RoBERTa, by its one type of tokens; of these only BERT is read")
    if (kind := told.get("model_type", "bert")) != "bert":
        raise ValueError(f"its text tower is {short(kind)}; only BERT is read")
    layers = len({name.split(".")[4] for name in shapes if name.startswith(f"{TRANSFORMER}encoder.layer.")})
    heads = told.get("num_attention_heads", max(1, width // 64))
    if not _is_count(heads, 512) or width % heads:
        raise ValueError(f"BERT's num_attention_heads is {short(heads)}, of a width of {width}")
    if told.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"BERT's hidden_act is {short(told['hidden_act'])}; only gelu is read")
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    more = {"intermediate_size": inner, "max_position_embeddings": positions, "type_vocab_size": types}
    return {**BASE, **sizes, **more, "layer_norm_eps": told.get("layer_norm_eps", BASE["layer_norm_eps"])}


def backbone_of_towers(towers: Mapping[str, Any]) -> OpenClip:
    """Of "towers" in a checkpoint.json. Raises ValueError, KeyError, TypeError or AttributeError if these are no towers."""
    model, pixels, bert = towers["model_cfg"], towers["preprocess"], towers["bert"]
    if said := refusal_of({"model_cfg": model}):
        raise ValueError(said)
    if bert is not None and not all(_is_count(bert[key], MOST[key]) for key in BASE if key in MOST):
        raise ValueError("no BERT")
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (pixels["mean"], pixels["std"]))
    if pixels["resize"] not in RESIZE.values() or not all(of > 0 for of in std):
        raise ValueError("no preprocessing")
    preprocess = Preprocess(int(pixels["size"]), pixels["resize"], mean, std)
    described = json.dumps({"model_cfg": model, "preprocess": asdict(preprocess), "bert": bert}, sort_keys=True)
    return OpenClip(
        name=f"open_clip-{hashlib.sha256(described.encode()).hexdigest()[:8]}",
        preprocess=preprocess,
        embed_dim=model["embed_dim"],
        context_length=model["text_cfg"].get("context_length", 77),
        pad_id=0 if bert is None else bert["pad_token_id"],
        activation="quick_gelu" if model["quick_gelu"] else "gelu",
        described=described,
    )
