"""`import`: published CLIP weights, whatever they come in, as a checkpoint of ours; nothing in the file is ever run."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pmclip_deploy.atomic import write_errors, written_folder
from pmclip_deploy.bundle.files import name_of_output, sha256_of_file
from pmclip_deploy.errors import BundleError, PmclipError, UsageError
from pmclip_deploy.train.backbones import BACKBONES, backbone_named
from pmclip_deploy.train.backbones.base import ACTIVATIONS, Backbone, Tensors
from pmclip_deploy.train.backbones.configs import pixels_of_transformers
from pmclip_deploy.train.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from pmclip_deploy.train.contrastive import logits_of
from pmclip_deploy.train.foreign import kind_of_file, kind_of_tensors
from pmclip_deploy.train.pickles import Costly, check_pickles
from pmclip_deploy.train.torchscript import is_torchscript, tensors_from_torchscript

FILES = {"model.safetensors", "checkpoint.json", "tokenizer.json"}  # of a checkpoint
HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
SHARDS = tuple(f"{name}.index.json" for name in HUGGING_FACE_FILES)  # which names them
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIGS = {"config.json": HUGGING_FACE_FILES + SHARDS, "open_clip_config.json": OPEN_CLIP_FILES}  # and the weights that each is about
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")  # keys of training checkpoints
ADDED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # by torch, anywhere in a name
NAMED = 3  # tensors that a message names

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """Tensors by our names, and where they come from."""

    kind: str
    file: Path
    tensors: Tensors
    config: Config | None  # the config.json or open_clip_config.json beside them
    config_file: Path = Path("config.json")
    shards: tuple[Path, ...] = ()  # if ``file`` only names them


@dataclass(frozen=True)
class Chosen:
    """An activation, and who says so."""

    activation: str
    by: str


def import_weights(
    source: Path, output: Path, backbone: str | None = None, name: str | None = None, activation: str | None = None
) -> Checkpoint:
    """Writes ``source`` as a checkpoint to ``output``, all of it or nothing; returns what checkpoint.json says.

    ``source`` is OpenAI's TorchScript archive or state dict, PubMedCLIP's training checkpoint, open_clip's state dict, or a
    Hugging Face ``CLIPModel`` (file or folder, in shards too); its content tells which. Floats of any width are stored in fp16.
    ``activation`` is "quick_gelu" or "gelu"; by default what config.json or open_clip_config.json says, or else OpenAI's quick_gelu.
    Raises BundleError where the file is unreadable, would run code, or does not hold the backbone; UsageError for bad arguments.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise UsageError(f"activation {activation[:60]!r} is unknown", f"choose one of {', '.join(ACTIVATIONS)}")
    wanted = backbone_named(backbone) if backbone else None
    if wanted and not wanted.importable:
        raise UsageError(f"backbone {wanted.name} has no published weights to import", f"choose one of {_names()}")
    name = name_of_output(output, name)
    try:
        _refuse_foreign_folder(output)
    except OSError as error:
        raise BundleError(f"{output}: cannot be written ({error.strerror})", "choose another folder") from error
    try:
        weights = weights_from_file(source)
    except PmclipError:
        raise
    except Costly as error:
        raise BundleError(f"{source}: {error}, so it is refused", "get the weights as safetensors or as a state dict") from None
    except Exception as error:  # whatever a damaged or hostile file makes its reader raise
        raise _unreadable(source, error) from error
    spec, tensors = fitted(weights, wanted)
    spec, chosen = _activated(spec, weights, activation)
    spec, told = spec.as_told(weights.config)
    tokenizer_json = spec.tokenizer_beside(weights.file)
    meta: Checkpoint = {
        "name": name,
        "version": "0.1.0",
        "backbone": spec.name,
        **logits_of(tensors),  # type: ignore[typeddict-item]
        "metrics": {},
        "provenance": {
            "import": {
                "kind": weights.kind,
                "source": weights.file.name,
                "sha256": sha256_of_file(weights.file),
                **({"shards": {path.name: sha256_of_file(path) for path in weights.shards}} if weights.shards else {}),
                **({"activation": chosen.activation, "activation_from": chosen.by} if chosen else {}),
                **told,
                "licence": "the user's: these weights were brought by whoever imported them, under their own terms",
            }
        },
    }
    _write_folder(output, {f"clip.{k}": v for k, v in tensors.items()}, meta, tokenizer_json)
    return meta


# From a file to tensors. The first bytes tell how it is packed, the names of the tensors who made it.


def weights_from_file(source: Path) -> Weights:
    """Reads without running anything: safetensors, a pickle of tensors alone, or the data of a TorchScript archive."""
    source = _file_of_folder(source) if source.is_dir() else source
    if not source.is_file():
        raise BundleError(f"{source}: not found", "pass the weights' file, or a Hugging Face folder with config.json")
    shards = _shards(source) if source.name in SHARDS else ()
    scripted, data = _loaded(source) if not shards else (False, {k: v for shard in shards for k, v in _loaded(shard)[1].items()})

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
    families = {type(b): b for b in _importable()}.values()
    renamed = [named for family in families if (named := family.from_published(tensors)) is not None]
    made_by, tensors = max(renamed, key=lambda named: max(_likeness(named[1]).values()), default=(None, tensors))
    return Weights(made_by or kind, source, tensors, *_config_beside(source, made_by is not None), shards)


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
    anchors = {anchor for backbone in _importable() for anchor in backbone.anchors}
    before = sorted({k[: -len(anchor)] for k in tensors for anchor in anchors if k == anchor or k.endswith(f".{anchor}")})
    if len(before) > 1:
        named = _first([of or "(nothing)" for of in before])
        raise BundleError(f"{source}: holds several models, named {named}", "save the tensors of one alone")
    if not before:
        return {k.removeprefix("module."): v for k, v in tensors.items()}
    return {k.removeprefix(before[0]): v for k, v in tensors.items()}


def _file_of_folder(folder: Path) -> Path:
    """The weights in a Hugging Face folder, once its config.json is one backbone's at least."""
    if (folder / "checkpoint.json").is_file():
        raise BundleError(f"{folder}: is a checkpoint already", "use it as it is")
    if (folder / "adapter_config.json").is_file():
        raise BundleError(f"{folder}: is a LoRA adapter", "merge it into its base model, and save that")
    for config, files in CONFIGS.items():
        if there := [name for name in files if (folder / name).is_file() and (folder / config).is_file()]:
            _refuse_misfit(folder / config, _config(folder / config))  # before gigabytes are read
            return folder / there[0]
    for config, files in CONFIGS.items():
        if (folder / config).is_file():
            _refuse_misfit(folder / config, _config(folder / config))
            raise BundleError(f"{folder}: has none of {', '.join(files)}", "pass the weights' file")
    raise BundleError(f"{folder}: has no config.json, so it is no Hugging Face folder", "pass the weights' file")


def _config_beside(file: Path, of_hugging_face: bool) -> tuple[Config | None, Path]:
    """(what the config.json of Hugging Face or open_clip says that stands beside a file, its path)"""
    named = [name for name, files in CONFIGS.items() if file.name in files]
    for name in named or (["config.json"] if of_hugging_face else reversed(list(CONFIGS))):
        if not (path := file.with_name(name)).is_file():
            continue
        config = _config(path)
        if not named and not of_hugging_face and "model_cfg" not in config and config.get("model_type") != "clip":
            continue  # of something else in a folder of all kinds
        _refuse_misfit(path, config)
        beside = file.with_name("preprocessor_config.json")
        pixels = _config(beside) if name == "config.json" and beside.is_file() else {}
        return {"preprocess_cfg": pixels_of_transformers(pixels), **config}, path
    return None, Path("config.json")


def _config(path: Path) -> Config:
    config = json.loads(path.read_bytes())
    config = config if isinstance(config, dict) else {}
    return {"model_cfg": config} if "vision_cfg" in config else config  # as open_clip's own model_configs have it


def _refuse_misfit(path: Path, config: Config) -> None:
    misfits = [b.misfit(config) for b in _importable() if b.activation in (None, ACTIVATIONS[0])]
    if all(misfits):
        raise BundleError(f"{path}: fits none of {_names()}: {', '.join(dict.fromkeys(filter(None, misfits)))}")


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that a Hugging Face index names, in its folder. Raises BundleError if one is missing."""
    names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    if wrong := [name or '""' for name in names if not name or Path(name).name != name]:
        raise BundleError(f"{index}: names {_first(wrong)}, which is no file beside it", "get the folder again")
    if missing := [name for name in names if not index.with_name(name).is_file()]:
        raise BundleError(f"{index}: {len(missing)} of its {len(names)} files are missing: {_first(missing)}", "get the folder again")
    return tuple(index.with_name(name) for name in names)


def _activated(spec: Backbone, weights: Weights, wanted: str | None) -> tuple[Backbone, Chosen | None]:
    """(the backbone with the activation that was trained, who says which that is)"""
    if spec.activation is None:
        if wanted is not None:
            raise UsageError(f"backbone {spec.name} has one activation only", "leave out --activation")
        return spec, None
    try:
        told = None if weights.config is None else spec.activation_of(weights.config)
    except ValueError as error:
        if wanted is None:
            raise BundleError(f"{weights.config_file}: {error}") from None
        told = None
    if wanted is not None:
        chosen = Chosen(wanted, "--activation")
    elif told is not None:
        chosen = Chosen(told, weights.config_file.name)
    else:
        chosen = Chosen(spec.activation, "assumed" if spec.activation == ACTIVATIONS[0] else "--backbone")
    return spec.with_activation(chosen.activation), chosen


# Which backbone the tensors are, and what is wrong with them.


def _importable() -> list[Backbone]:
    return [b for b in BACKBONES.values() if b.importable]


def _names() -> str:
    return ", ".join(dict.fromkeys(b.family or b.name for b in _importable() if b.activation in (None, ACTIVATIONS[0])))


@cache
def _shapes(backbone: Backbone) -> Shapes:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in backbone.build().state_dict().items()}


def _likeness(tensors: Tensors) -> dict[str, float]:
    """Of each backbone that these may be, the share of its tensors that are there, in their shape: to build one takes up to seconds."""
    likely = [b for b in _importable() if b.may_be(tensors)] or [b for b in _importable() if not b.needs_anchor]
    shapes = {b.name: _shapes(b) for b in likely}
    return {name: sum(k in tensors and tensors[k].shape == shape for k, shape in of.items()) / len(of) for name, of in shapes.items()}


def fitted(weights: Weights, wanted: Backbone | None) -> tuple[Backbone, Tensors]:
    """(backbone, its tensors in fp32). Raises BundleError naming the first tensors that are missing, extra, misshapen or not finite."""
    found: Shapes = {k: tuple(v.shape) for k, v in weights.tensors.items()}
    likeness = _likeness(weights.tensors)
    nearest = BACKBONES[max(likeness, key=lambda name: likeness[name])]
    spec = wanted or nearest
    if likeness[nearest.name] < 0.9 and (said := kind_of_tensors(found)):
        raise BundleError(f"{weights.file}: is {said[0]}; it fits none of {_names()}", said[1])
    if likeness[nearest.name] < 0.1:
        raise BundleError(
            f"{weights.file}: fits none of {_names()} ({len(found)} tensors, first {_first(sorted(found))})", "give one's published weights"
        )
    if spec != nearest and likeness.get(spec.name, 0.0) < likeness[nearest.name]:
        raise BundleError(
            f"{weights.file}: these are weights of {nearest.name}, not of {spec.name}", "leave --backbone out or give that one"
        )
    if weights.config is not None and (misfit := spec.misfit(weights.config)):
        raise BundleError(f"{weights.config_file}: {misfit}")

    expected = _shapes(spec)
    # Counts of batches that torch's batch norm only counts; older files lack them.
    counters = {k for k in expected if k.endswith(".num_batches_tracked")}
    tensors = weights.tensors
    faults = {
        "missing": sorted(expected.keys() - found.keys() - counters),
        "extra": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{k} is {_shape(found[k])}, must be {_shape(expected[k])}"
            for k in sorted(expected.keys() & found.keys())
            if found[k] != expected[k]
        ],
        "not floats": sorted(k for k, v in tensors.items() if k in expected.keys() - counters and not _is_plain_float(v)),
    }
    if any(faults.values()):
        misfits = "; ".join(f"{len(names)} {fault}: {_first(names)}" for fault, names in faults.items() if names)
        raise BundleError(f"{weights.file}: does not fit {spec.name}: {misfits}")
    tensors = {k: torch.tensor(0) if k in counters - found.keys() else _fp32(tensors[k]) for k in expected}
    if broken := [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise BundleError(f"{weights.file}: {len(broken)} tensors hold NaN or infinity: {_first(broken)}", "get the file again")
    return spec, tensors


def _is_plain_float(x: Tensor) -> bool:
    """Not sparse, not a promise without data (meta), and not 8 bits, whose scale would be missing."""
    return x.is_floating_point() and x.layout == torch.strided and x.device.type == "cpu" and x.dtype.itemsize > 1


def _fp32(x: Tensor) -> Tensor:
    return x.detach().float() if x.is_floating_point() else x.detach().long().clone()


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _first(names: list[str]) -> str:
    return ", ".join(" ".join(n[:120].split()) for n in names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _unreadable(source: Path, error: Exception) -> BundleError:
    if isinstance(error, OSError) and error.strerror:
        return BundleError(f"{source}: cannot be read ({error.strerror})")
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return BundleError(
            f"{source}: names {refused[1]}, which no file of tensors needs and which could run code, so it is refused",
            "get the weights as safetensors or as a state dict",
        )
    return BundleError(f"{source}: no weights that can be read, or a damaged file", "get it again")


# Writing.


def _refuse_foreign_folder(output: Path) -> None:
    """Raises BundleError where a checkpoint must not be written: over a file, over something else, or over a training state."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or {path.name for path in output.iterdir()} - FILES:
        raise BundleError(f"{output}: exists and is not just a checkpoint, so it is not overwritten", "choose another folder")
    read_checkpoint(output)


def _write_folder(output: Path, tensors: Tensors, meta: Checkpoint, tokenizer_json: str) -> None:
    output = output.resolve()
    with write_errors(f"{output}:", "check the space left and the permissions", BundleError), written_folder(output) as new:
        (new / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        save_checkpoint(new, tensors, meta, new / "tokenizer.json")
