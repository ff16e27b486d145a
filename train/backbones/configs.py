"""What the config.json or open_clip_config.json beside published weights says, and how an error quotes it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from open_clip import CLIPTextCfg, CLIPVisionCfg

from pmclip_deploy.spec import Preprocess, Resize

RESIZE: Mapping[str, Resize] = {"shortest": "shortest", "squash": "squash", "longest": "pad"}  # open_clip's names, and ours
# What an open_clip_config.json may say of a tower that is read; anything else must be what open_clip takes for it by default.
VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
BERT = {"hf_model_name", "hf_proj_type", "hf_pooler_type", *TEXT}  # these sizes are then BERT's own
ANY = {"patch_dropout", "hf_model_pretrained", "hf_tokenizer_name", "timm_model_pretrained", "timm_drop", "timm_drop_path"}  # of training
POOLERS, PROJECTIONS = ("cls_last_hidden_state_pooler", "cls_pooler", "mean_pooler"), ("linear", "mlp", None)
# What transformers' CLIPConfig takes by default, open_clip's names of it, and what CLIP computes with; the first is the default.
CLIP_MODEL: Mapping[str, Mapping[str, Any]] = {
    "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
               "patch_size": 32},
    "text": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 49408,
             "max_position_embeddings": 77},
}  # fmt: skip
OPEN_CLIP = {"hidden_size": "width", "num_hidden_layers": "layers", "image_size": "image_size", "patch_size": "patch_size",
             "vocab_size": "vocab_size", "max_position_embeddings": "context_length"}  # fmt: skip
CLIP_ONLY: Mapping[str, tuple[Any, ...]] = {"layer_norm_eps": (1e-5,), "num_channels": (3,), "eos_token_id": (2, 49407)}
TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "tag", "model_name"}


def part_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a config.json; in older ones NAME_dict stands beside it, and counts (transformers' CLIPConfig)."""
    parts = [part for key in (name, f"{name}_dict") if isinstance(part := config.get(key), dict)]
    return {key: value for part in parts for key, value in part.items()}


def pixels_of_transformers(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a preprocessor_config.json says, as ``preprocess_cfg`` of an open_clip_config.json does. It numbers filters as Pillow does."""
    filters = {2: "bilinear", 3: "bicubic"}
    said = {key: told[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in told}
    if "resample" in told:
        said["interpolation"] = filters.get(told["resample"], short(told["resample"]))
    if told.get("do_normalize") is False:
        said |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    if told.get("do_rescale") is False or abs(told.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        said["mode"] = "not RGB in 0..1"
    return said | ({"resize_mode": mode} if (mode := _resize_of_transformers(told)) else {})


def _resize_of_transformers(told: Mapping[str, Any]) -> str | None:
    """The resize_mode, or words that are none; None if it is not said."""
    if told.get("do_resize") is False:
        return "none"
    size, crop = told.get("size"), None if told.get("do_center_crop") is False else told.get("crop_size")
    if not isinstance(size, dict):
        return None
    cut = set(crop.values()) if isinstance(crop, dict) else {crop} - {None}
    if size.keys() == {"height", "width"} and size["height"] == size["width"]:
        return "squash" if not cut or cut == {size["height"]} else f"squash to {size['height']} and a crop"
    if size.keys() == {"shortest_edge"} and told.get("do_center_crop") is not False:
        return "shortest" if not cut or cut == {size["shortest_edge"]} else f"shortest edge to {size['shortest_edge']} and a smaller crop"
    return ", ".join(size)


def open_clip_of_transformers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ``CLIPModel``'s config.json as an open_clip_config.json that says the same, with CLIPConfig's defaults; any other as it is.

    What differs from CLIP's computation keeps its own name, to be refused by it.
    """
    if config.get("model_type") != "clip":
        return config
    towers: dict[str, dict[str, Any]] = {}
    for tower, usual in CLIP_MODEL.items():
        of = {**usual, **part_of(config, f"{tower}_config")}
        width, heads, inner = of["hidden_size"], of.pop("num_attention_heads"), of.pop("intermediate_size")
        numbers = all(isinstance(x, int) and x > 0 for x in (width, heads, inner))
        if not numbers or width % heads:
            towers[tower] = {"num_attention_heads": heads, "hidden_size": width, "intermediate_size": inner}
        else:
            split = {"heads": heads} if tower == "text" else {"head_width": width // heads}
            towers[tower] = {"mlp_ratio": inner / width, **split, **{OPEN_CLIP[key]: of[key] for key in OPEN_CLIP if key in of}}
        towers[tower] |= {key: of[key] for key, same in CLIP_ONLY.items() if of.get(key, same[0]) not in same}
    model = {"embed_dim": config.get("projection_dim", 512), "vision_cfg": towers["vision"], "text_cfg": towers["text"]}
    return {"model_cfg": model, "preprocess_cfg": part_of(config, "preprocess_cfg")}


def misfit_of_pixels(config: Mapping[str, Any], preprocess: Preprocess, ours: str) -> str | None:
    """How the pictures of ``config`` are normalised, if ``ours``, a backbone with ``preprocess``, normalises them otherwise."""
    told = part_of(config, "preprocess_cfg")
    if (resize := told.get("resize_mode")) and RESIZE.get(resize) != preprocess.resize:
        return f"its resize_mode is {short(resize)}, that of {ours} {preprocess.resize}"
    if said := _refusal_of_pixels(told):
        return said
    for key, mine in (("mean", preprocess.mean), ("std", preprocess.std)):
        if (theirs := told.get(key)) is not None and not _is_close(theirs, mine):
            return f"it normalises pictures by a {key} of {short(theirs)}, {ours} by {short(mine)}"
    return None


def _refusal_of_pixels(told: Mapping[str, Any]) -> str | None:
    usual = {"interpolation": "bicubic", "fill_color": 0, "mode": "RGB"}
    for key, mine in usual.items():
        if told.get(key, mine) not in (mine, None):
            return f"its {key} is {short(told[key])}; only {mine} is read"
    return None


def refusal_of_towers(config: Mapping[str, Any]) -> str | None:
    """What in an open_clip_config.json is of no tower of CLIP's own and of no BERT; None if all is."""
    model = part_of(config, "model_cfg")
    seen, read = part_of(model, "vision_cfg"), part_of(model, "text_cfg")
    for tower in ("vision_cfg", "text_cfg"):
        if not isinstance(model.get(tower), dict):
            return f"its {tower} is {short(model.get(tower))}"
    if trunk := seen.get("timm_model_name"):
        return f"its image tower is timm's {short(trunk)}"
    if unknown := [key for key in model if key not in TOP and model[key] not in (None, False)]:
        return f"it has {short(unknown[0])}"
    pixels = part_of(config, "preprocess_cfg")
    if (resize := pixels.get("resize_mode") or "shortest") not in RESIZE:
        return f"its resize_mode is {short(resize)}; read are {', '.join(RESIZE)}"
    if said := _refusal_of_pixels(pixels):
        return said
    for key in ("mean", "std"):
        if (of := pixels.get(key)) is not None and not (
            isinstance(of, list) and len(of) == 3 and all(_is_between(x, key == "std") for x in of)
        ):
            return f"its {key} is {short(of)}, which are no three numbers of pictures in 0..1"
    usual = ((seen, asdict(CLIPVisionCfg()), VISION), (read, asdict(CLIPTextCfg()), BERT if read.get("hf_model_name") else TEXT))
    for told, default, known in usual:
        for key, value in told.items():
            if key not in known | ANY and value != default.get(key) and value not in ({}, "tok" if key == "pool_type" else {}):
                return f"its {short(key)} is {short(value)}"
    if read.get("hf_model_name") and (pooler := read.get("hf_pooler_type", "mean_pooler")) not in POOLERS:
        return f"its hf_pooler_type is {short(pooler)}; read are {', '.join(POOLERS)}"
    if read.get("hf_model_name") and (proj := read.get("hf_proj_type", "mlp")) not in PROJECTIONS:
        return f"its hf_proj_type is {short(proj)}; read are linear and mlp"
    return None


def _is_between(x: object, positive: bool) -> bool:
    return isinstance(x, int | float) and (1e-6 if positive else 0) <= x <= 1


def _is_close(theirs: object, mine: tuple[float, ...]) -> bool:
    if not isinstance(theirs, list) or len(theirs) != len(mine):
        return False
    return all(isinstance(a, int | float) and abs(a - b) < 1e-3 for a, b in zip(theirs, mine, strict=True))


def short(value: object) -> str:
    return " ".join(str(value).split())[:60]
