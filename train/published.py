"""Published weights, whatever they come in, as named tensors; nothing in the file is ever run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pmclip_deploy.errors import BundleError
from pmclip_deploy.train.backbones.base import Tensors
from pmclip_deploy.train.backbones.configs import pixels_of_transformers
from pmclip_deploy.train.fitting import Config, Weights, first, importable, likeness_of, refuse_misfit
from pmclip_deploy.train.foreign import kind_of_file
from pmclip_deploy.train.lora import CONFIG as ADAPTER
from pmclip_deploy.train.lora import Adapter, adapter_of_folder, merged
from pmclip_deploy.train.pickles import check_pickles
from pmclip_deploy.train.torchscript import is_torchscript, tensors_from_torchscript

HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
SHARDS = tuple(f"{name}.index.json" for name in HUGGING_FACE_FILES)  # which names them
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_SHARDS = tuple(f"{name}.index.json" for name in OPEN_CLIP_FILES)
CONFIGS = {  # and the weights that each is about
    "config.json": HUGGING_FACE_FILES + SHARDS,
    "open_clip_config.json": OPEN_CLIP_FILES + OPEN_CLIP_SHARDS + HUGGING_FACE_FILES + SHARDS,
}
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")  # keys of training checkpoints
ADDED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # by torch, anywhere in a name

# From a file to tensors. The first bytes tell how it is packed, the names of the tensors who made it.


def weights_from_file(source: Path, adapter: Path | None = None) -> Weights:
    """Reads without running anything: safetensors, a pickle of tensors alone, or the data of a TorchScript archive.

    ``adapter`` is the folder of a LoRA adapter, by default that of the weights if it has one; it is merged.
    """
    before = _parts(source)
    source = next(iter(before)) if before else _file_of_folder(source) if source.is_dir() else source
    if not source.is_file():
        raise BundleError(f"{source}: not found", "pass the weights' file, or a Hugging Face folder with config.json")
    before = before or (dict.fromkeys(_shards(source), "") if source.name in SHARDS + OPEN_CLIP_SHARDS else {})
    scripted, data = (False, _joined(before)) if before else _loaded(source)

    kind = "OpenAI TorchScript archive" if scripted else "state dict with OpenAI's names"
    for _ in WRAPPERS:  # and no deeper: a pickle's mapping may hold itself
        if (inside := _unwrapped(data)) is None:
            break
        kind = "training checkpoint with OpenAI's names"
        if "optimizer_state_dict" in data and "state_dict" in data:
            kind = "PubMedCLIP training checkpoint"
        elif "pytorch-lightning_version" in data:
            kind = "PyTorch Lightning checkpoint"
        data = inside
    tensors = {k: v for k, v in data.items() if isinstance(k, str) and isinstance(v, Tensor)} if isinstance(data, Mapping) else {}
    if not tensors:
        raise BundleError(f"{source}: holds no named tensors", "pass a state dict, a training checkpoint or a safetensors file")
    if all(k.startswith("module.") for k in tensors):  # of torch's DataParallel, as open_clip saves it
        kind = "open_clip state dict"
    tensors = _without_prefix(tensors, source)
    lora = _adapter(adapter or source.parent, asked=adapter is not None)
    if lora is not None:
        tensors = merged(tensors, _joined({lora.file: ""}), lora)
    families = {type(b): b for b in importable()}.values()
    renamed = [named for family in families if (named := family.from_published(tensors)) is not None]
    made_by, tensors = max(renamed, key=_fit, default=(None, tensors))
    config, config_file = _config_beside(source, made_by is not None)
    adapted = lora.file if lora else None
    return Weights(made_by or kind, source, tensors, config, config_file, _bert_beside(source), tuple(before), adapted)


def _adapter(folder: Path, asked: bool) -> Adapter | None:
    path = folder / ADAPTER
    if not path.is_file():
        if asked:
            raise BundleError(f"{folder}: has no {ADAPTER}", "pass the folder that PEFT's save_pretrained wrote")
        return None
    return adapter_of_folder(folder, read_config(path))


def _bert_beside(source: Path) -> Config:
    """What the config.json of a BERT says that stands beside the weights; empty if it is of something else."""
    path = source.with_name("config.json")
    config = read_config(path) if path.is_file() else {}
    return config if "bert" in str(config.get("model_type")) else {}


def _fit(named: tuple[str | None, Tensors]) -> tuple[float, int]:
    """How well tensors fit a backbone: by what it has of them, and then by how few are left over."""
    return max(likeness_of(named[1]).values()), -len(named[1])


def _joined(before: Mapping[Path, str]) -> Tensors:
    """The tensors of several files, each with what stands before its names; a tensor alone has that for its name."""
    joined: Tensors = {}
    for file, prefix in before.items():
        data = _loaded(file)[1]
        named = {prefix: data} if isinstance(data, Tensor) else {f"{prefix}{name}": x for name, x in (_unwrapped(data) or data).items()}
        if twice := sorted(joined.keys() & named.keys()):
            raise BundleError(f"{file}: {len(twice)} of its tensors are in another file too: {first(twice)}", "get the folder again")
        joined |= named
    return joined


def _parts(source: Path) -> dict[Path, str]:
    """If ``source`` is a folder of weights that are published as several files, or one of these: each, and what stands before its names."""
    folder = source if source.is_dir() else source.parent
    for backbone in importable():
        there = [name for name in backbone.parts if (folder / name).is_file()]
        if not there or not (source.is_dir() or source.name in backbone.parts):
            continue
        if missing := [name for name in backbone.parts if name not in there]:
            raise BundleError(f"{folder}: has {first(there)} of {backbone.name}, and not {first(missing)}", "put all of them in one folder")
        return {folder / name: prefix for name, prefix in backbone.parts.items()}
    return {}


def _unwrapped(data: Any) -> Any:
    """What a training checkpoint has under a usual key, or else the only mapping in it that has tensors; None if there is none."""
    if not isinstance(data, Mapping):
        return None
    if usual := [data[key] for key in WRAPPERS if isinstance(data.get(key), Mapping)]:
        return usual[0]
    full = [of for of in data.values() if isinstance(of, Mapping) and any(isinstance(x, Tensor) for x in of.values())]
    return full[0] if len(full) == 1 else None


def _loaded(source: Path) -> tuple[bool, Any]:
    """(whether it is a TorchScript archive, what it holds)"""
    with source.open("rb") as file:
        head = file.read(9)
    if said := kind_of_file(head):
        raise BundleError(f"{source}: is {said[0]}", said[1])
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= source.stat().st_size:
        return False, load_file(source)
    scripted = head.startswith(b"PK\x03\x04") and is_torchscript(source)
    check_pickles(source)
    if scripted:
        return True, tensors_from_torchscript(source)
    return False, torch.load(source, map_location="cpu", weights_only=True)


def _without_prefix(tensors: Tensors, source: Path) -> Tensors:
    """Without what wrappers put before or into names: ``module.``, ``model.``, ``clip.``, ``_orig_mod.`` and their like, in any order."""
    for added in ADDED:
        tensors = {k.replace(added, ""): v for k, v in tensors.items()}
    anchors = {anchor for backbone in importable() for anchor in backbone.anchors}
    before = sorted({k[: -len(anchor)] for k in tensors for anchor in anchors if k == anchor or k.endswith(f".{anchor}")})
    if len(before) > 1:
        named = first([of or "(nothing)" for of in before])
        raise BundleError(f"{source}: holds several models, named {named}", "save the tensors of one alone")
    if not before:
        return {k.removeprefix("module."): v for k, v in tensors.items()}
    return {k.removeprefix(before[0]): v for k, v in tensors.items()}


def _file_of_folder(folder: Path) -> Path:
    """The weights in a Hugging Face folder, once its config.json is one backbone's at least."""
    if (folder / "checkpoint.json").is_file():
        raise BundleError(f"{folder}: is a checkpoint already", "use it as it is")
    configs = _configs(folder)
    for config in configs:
        if there := [name for name in CONFIGS[config] if (folder / name).is_file()]:
            refuse_misfit(folder / config, read_config(folder / config))  # before gigabytes are read
            return folder / there[0]
    if (folder / ADAPTER).is_file():
        raise BundleError(f"{folder}: is a LoRA adapter", f"merge it into its base model: `pmclip-deploy import BASE --adapter {folder}`")
    for config in configs:
        refuse_misfit(folder / config, read_config(folder / config))
        raise BundleError(f"{folder}: has none of {', '.join(CONFIGS[config])}", "pass the weights' file")
    raise BundleError(f"{folder}: has no config.json, so it is no Hugging Face folder", "pass the weights' file")


def _configs(folder: Path) -> list[str]:
    """The configurations in a folder, first the one that its weights are read by: a BERT's own says nothing of the whole model."""
    there = [name for name in CONFIGS if (folder / name).is_file()]
    return there[1:] if len(there) == 2 and read_config(folder / there[0]).get("model_type") != "clip" else there


def _config_beside(file: Path, of_hugging_face: bool) -> tuple[Config | None, Path]:
    """(what the config.json of Hugging Face or open_clip says that stands beside a file, its path)"""
    named = [name for name in _configs(file.parent) if file.name in CONFIGS[name]]
    for name in named or (["config.json"] if of_hugging_face else reversed(list(CONFIGS))):
        if not (path := file.with_name(name)).is_file():
            continue
        config = read_config(path)
        if not named and not of_hugging_face and "model_cfg" not in config and config.get("model_type") != "clip":
            continue  # of something else in a folder of all kinds
        refuse_misfit(path, config)
        beside = file.with_name("preprocessor_config.json")
        pixels = read_config(beside) if name == "config.json" and beside.is_file() else {}
        return {"preprocess_cfg": pixels_of_transformers(pixels), **config}, path
    return None, Path("config.json")


def read_config(path: Path) -> Config:
    config = json.loads(path.read_bytes())
    config = config if isinstance(config, dict) else {}
    return {"model_cfg": config} if "vision_cfg" in config else config  # as open_clip's own model_configs have it


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that a Hugging Face index names, in its folder. Raises BundleError if one is missing."""
    listed = read_config(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise BundleError(f"{index}: has no weight_map, which names the files", "get the folder again")
    names = sorted({str(name) for name in listed.values()})
    if wrong := [name or '""' for name in names if not name or Path(name).name != name]:
        raise BundleError(f"{index}: names {first(wrong)}, which is no file beside it", "get the folder again")
    if missing := [name for name in names if not index.with_name(name).is_file()]:
        raise BundleError(f"{index}: {len(missing)} of its {len(names)} files are missing: {first(missing)}", "get the folder again")
    return tuple(index.with_name(name) for name in names)
