"""The backbones, by name: the files here that have a list ``BACKBONES``. What a backbone is stands in its file, and nowhere else."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pmclip_deploy.errors import UsageError
from pmclip_deploy.train.backbones.base import Backbone
from pmclip_deploy.train.backbones.open_clip_config import backbone_of_towers

BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for module in pkgutil.iter_modules(__path__, f"{__name__}.")
    for backbone in getattr(import_module(module.name), "BACKBONES", ())
}
DEFAULT = "pmclip-lite"  # what `train clip` makes where it is given no checkpoint


def backbone_named(name: str) -> Backbone:
    """Raises UsageError."""
    if name not in BACKBONES:
        raise UsageError(f"backbone {name!r} is unknown", f"choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name]


def known_by_towers(towers: Mapping[str, Any]) -> Backbone:
    """The backbone of "towers" in a checkpoint.json, and from now on one of BACKBONES. Raises what ``backbone_of_towers`` raises."""
    backbone = backbone_of_towers(towers)
    return BACKBONES.setdefault(backbone.name, backbone)
