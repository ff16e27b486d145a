"""What published SigLIP models say of themselves: their configurations, and transformers' names of their tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from pmclip_deploy.train.backbones.base import Tensors
from pmclip_deploy.train.backbones.configs import part_of, short

PROBE, LATENT, POSITIONS = "vision_model.head.probe", "visual.trunk.attn_pool.latent", "visual.trunk.pos_embed"
TANH = "gelu_pytorch_tanh"
# Of open_clip's configurations.
TOWERS: dict[str, Any] = {"timm_pool": "map", "timm_proj": "none", "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}


def told_of_config(config: Mapping[str, Any]) -> dict[str, Any] | str | None:
    """The sizes that a configuration names, what is wrong with it, or None if it is of no SigLIP. Defaults are transformers'."""
    if model := part_of(config, "model_cfg"):
        seen, read = part_of(model, "vision_cfg"), part_of(model, "text_cfg")
        if not (patch := re.search(r"patch(\d+)_siglip", str(seen.get("timm_model_name")))):
            return None
        told = {**seen, **read}
        if wrong := [key for key in TOWERS if told.get(key) != TOWERS[key]]:
            return f"its {wrong[0]} is {short(told.get(wrong[0]))}, SigLIP's {TOWERS[wrong[0]]}"
        sizes = {"image": seen.get("image_size", 224), "patch": int(patch[1]), "width": read.get("width", 512)}
        return {**sizes, "layers": read.get("layers", 12), "heads": read.get("heads", 8), **_words(read, "vocab_size", "context_length")}
    if config.get("model_type") != "siglip":
        return None
    usual: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": TANH}
    seen = {"image_size": 224, "patch_size": 16, **usual, **part_of(config, "vision_config")}
    read = {"vocab_size": 32000, "max_position_embeddings": 64, **usual, **part_of(config, "text_config")}
    for key in usual:
        if seen[key] != read[key]:
            return f"its towers have {key} {short(seen[key])} and {short(read[key])}, SigLIP's the same"
    if seen["hidden_act"] != TANH:
        return f"its hidden_act is {short(seen['hidden_act'])}, SigLIP's {TANH}"
    sizes = {"image": seen["image_size"], "patch": seen["patch_size"], "width": seen["hidden_size"]}
    layers = {"layers": seen["num_hidden_layers"], "heads": seen["num_attention_heads"]}
    return {**sizes, **layers, **_words(read, "vocab_size", "max_position_embeddings")}


def _words(read: Mapping[str, Any], words: str, places: str) -> dict[str, Any]:
    return {"words": read.get(words), "places": read.get(places)}


TRANSFORMERS = [  # their names, and open_clip's
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", POSITIONS),
    (r"^vision_model\.encoder\.layers\.", "visual.trunk.blocks."),
    (r"^vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"^vision_model\.head\.probe$", LATENT),
    (r"^vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"^vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"^vision_model\.head\.mlp\.", "visual.trunk.attn_pool.mlp."),
    (r"^(visual\.trunk\.blocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
    (r"^(visual\.trunk\.blocks\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^text_model\.embeddings\.token_embedding\.", "text.token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "text.positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "text.transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "text.ln_final."),
    (r"^text_model\.head\.", "text.text_projection."),
    (r"^(text\.transformer\.resblocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.out_proj."),
    (r"^(text\.transformer\.resblocks\.\d+)\.layer_norm([12])\.", r"\1.ln_\2."),
    (r"^(text\.transformer\.resblocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"^(text\.transformer\.resblocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
]
HEAD = "vision_model.head.attention.in_proj_"


def open_clip_from_transformers(tensors: Tensors) -> Tensors:
    """Renamed; queries, keys and values as one, and the head's query apart. What has no counterpart keeps its name, to be reported."""
    parts, out = {k: v for k, v in tensors.items() if not k.endswith(".position_ids")}, {}
    for query in [k for k in parts if ".self_attn.q_proj." in k]:
        names = [query.replace(".q_proj.", f".{p}_proj.") for p in "qkv"]
        small = parts[query].numel() < 2**24  # of any SigLIP; strides can declare more than a file holds, and this makes it real
        if small and all(n in parts and parts[n].shape == parts[query].shape for n in names):
            one = ".attn.qkv." if query.startswith("vision_model.") else ".attn.in_proj_"
            parts[query.replace(".self_attn.q_proj.", one)] = torch.cat([parts.pop(n) for n in names])
    for kind in ("weight", "bias"):
        joined = parts.get(HEAD + kind)
        if joined is not None and joined.ndim and len(joined) % 3 == 0:
            width = len(parts.pop(HEAD + kind)) // 3
            parts |= {f"visual.trunk.attn_pool.q.{kind}": joined[:width], f"visual.trunk.attn_pool.kv.{kind}": joined[width:]}
    for name, value in parts.items():
        for pattern, new in TRANSFORMERS:
            name = re.sub(pattern, new, name)
        out[name] = value[None] if name == POSITIONS and value.ndim == 2 else value
    return out
