"""Which backbone published tensors are, and what is wrong with them."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmclip_deploy.errors import BundleError
from pmclip_deploy.train.backbones import BACKBONES, known_by_towers
from pmclip_deploy.train.backbones.base import ACTIVATIONS, Backbone, Tensors
from pmclip_deploy.train.backbones.configs import open_clip_of_transformers
from pmclip_deploy.train.backbones.open_clip_config import backbone_of_config, refusal_of
from pmclip_deploy.train.foreign import TWO_TOWERS, kind_of_config, kind_of_tensors

NAMED = 3  # tensors that a message names

SUPPORTED = "read are CLIP's ResNets and vision transformers, with CLIP's text transformer or a BERT"

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
    of_bert: Config = field(default_factory=dict)  # BERT's own config.json, if open_clip_config.json names a BERT
    shards: tuple[Path, ...] = ()  # if there are several files
    adapter: Path | None = None  # the file of the LoRA adapter that is merged into them


def refuse_misfit(path: Path, config: Config) -> None:
    """Raises BundleError if no backbone fits, and so that no gigabytes are read for nothing."""
    if said := kind_of_config(config):
        raise BundleError(f"{path}: is of {said}", TWO_TOWERS)
    misfits = [b.misfit(config) for b in importable() if b.activation in (None, ACTIVATIONS[0])]
    told = open_clip_of_transformers(config)
    refusal = refusal_of(told) if "model_cfg" in told else ""
    if all(misfits) and refusal is not None:
        named = ", ".join(dict.fromkeys(filter(None, misfits)))
        other = f"; nor a CLIP of other sizes: {refusal}" if refusal else ""
        raise BundleError(f"{path}: fits none of {names_of_importable()}: {named}{other}", SUPPORTED if other else "")


def _described(weights: Weights, nearest: Backbone, exact: bool) -> Backbone | None:
    """The backbone that open_clip_config.json or a CLIPModel's config.json describes; None if neither is there, or describes ``nearest``.

    A CLIPModel of a known size must be as OpenAI's: its config.json may be of another model.
    """
    told = open_clip_of_transformers(weights.config or {})
    if weights.config is None or "model_cfg" not in told or (exact and told is not weights.config):
        return None
    misfit = nearest.misfit(weights.config)
    if misfit is None and (exact or refusal_of(told)):
        return None
    if refusal := refusal_of(told):
        raise BundleError(f"{weights.config_file}: {misfit if exact else refusal}", SUPPORTED)
    shapes = {k: tuple(v.shape) for k, v in weights.tensors.items()}
    try:
        described = backbone_of_config(told, shapes, weights.of_bert)
        return None if misfit is None and _shapes(described) == _shapes(nearest) else known_by_towers(json.loads(described.described))
    except ValueError as error:
        raise BundleError(f"{weights.config_file}: {error}", SUPPORTED) from None


def importable() -> list[Backbone]:
    return [b for b in BACKBONES.values() if b.importable]


def names_of_importable() -> str:
    return ", ".join(dict.fromkeys(b.family or b.name for b in importable() if b.activation in (None, ACTIVATIONS[0])))


@cache
def _shapes(backbone: Backbone) -> Shapes:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in backbone.build().state_dict().items()}


def likeness_of(tensors: Tensors) -> dict[str, float]:
    """Of each backbone that these may be, the share of its tensors that are there, in their shape; the logit scale does not count.

    To build one takes up to seconds.
    """
    likely = [b for b in importable() if b.may_be(tensors)] or [b for b in importable() if not b.needs_anchor]
    shapes = {b.name: {k: shape for k, shape in _shapes(b).items() if k != "logit_scale"} for b in likely}
    return {name: sum(k in tensors and tensors[k].shape == shape for k, shape in of.items()) / len(of) for name, of in shapes.items()}


def _refuse_foreign(weights: Weights, found: Shapes, spec: Backbone, nearest: Backbone, likeness: dict[str, float]) -> None:
    """Raises BundleError if the tensors are of something else, or of another backbone, or the configuration is of another model."""
    if likeness[nearest.name] < 0.9 and (said := kind_of_tensors(found)):
        raise BundleError(f"{weights.file}: is {said[0]}; it fits none of {names_of_importable()}", said[1])
    if likeness[nearest.name] < 0.1:
        raise BundleError(
            f"{weights.file}: fits none of {names_of_importable()} ({len(found)} tensors, first {first(sorted(found))})",
            "give one's published weights",
        )
    if spec != nearest and likeness.get(spec.name, 0.0) < likeness[nearest.name]:
        raise BundleError(
            f"{weights.file}: these are weights of {nearest.name}, not of {spec.name}", "leave --backbone out or give that one"
        )
    if weights.config is not None and (misfit := spec.misfit(weights.config)):
        raise BundleError(f"{weights.config_file}: {misfit}")


def fitted(weights: Weights, wanted: Backbone | None) -> tuple[Backbone, Tensors]:
    """(backbone, its tensors in fp32). Raises BundleError naming the first tensors that are missing, extra, misshapen or not finite."""
    found: Shapes = {k: tuple(v.shape) for k, v in weights.tensors.items()}
    likeness = likeness_of(weights.tensors)
    nearest = BACKBONES[max(likeness, key=lambda name: likeness[name])]
    described = None if wanted else _described(weights, nearest, likeness[nearest.name] == 1)
    spec = wanted or described or nearest
    found = {k: v for k, v in found.items() if spec.reads(k)}
    if described is None:
        _refuse_foreign(weights, found, spec, nearest, likeness)
    expected = _shapes(spec)
    # Counts of batches that torch's batch norm only counts; older files lack them.
    counters = {k for k in expected if k.endswith(".num_batches_tracked")}
    tensors = dict(weights.tensors)
    if expected.keys() - found.keys() - counters == {"logit_scale"}:  # which the caller says
        tensors["logit_scale"], found["logit_scale"] = torch.tensor(spec.usual_logit_scale), ()
    faults = {
        "missing": sorted(expected.keys() - found.keys() - counters),
        "extra": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{k} is {_shape(found[k])}, must be {_shape(expected[k])}"
            for k in sorted(expected.keys() & found.keys())
            if found[k] != expected[k]
        ],
        "not floats": sorted(k for k, v in tensors.items() if k in expected.keys() - counters and not is_plain_float(v)),
    }
    if any(faults.values()):
        misfits = "; ".join(f"{len(names)} {fault}: {first(names)}" for fault, names in faults.items() if names)
        raise BundleError(f"{weights.file}: does not fit {spec.name if described is None else weights.config_file.name}: {misfits}")
    tensors = {k: torch.tensor(0) if k in counters - found.keys() else _fp32(tensors[k]) for k in expected}
    if broken := [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise BundleError(f"{weights.file}: {len(broken)} tensors hold NaN or infinity: {first(broken)}", "get the file again")
    return spec, tensors


def is_plain_float(x: Tensor) -> bool:
    """Not sparse, not a promise without data (meta), and not 8 bits, whose scale would be missing."""
    return x.is_floating_point() and x.layout == torch.strided and x.device.type == "cpu" and x.dtype.itemsize > 1


def _fp32(x: Tensor) -> Tensor:
    return x.detach().float() if x.is_floating_point() else x.detach().long().clone()


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def first(names: list[str]) -> str:
    return ", ".join(" ".join(n[:120].split()) for n in names[:NAMED]) + (", ..." if len(names) > NAMED else "")
