"""The backbones, by name: the files here that have a list ``BACKBONES``. What a backbone is stands in its file, and nowhere else."""

import pkgutil
from importlib import import_module

from pmclip_deploy.errors import UsageError
from pmclip_deploy.train.backbones.base import Backbone

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
