"""pmclip-lite as it is trained: towers and head, what the head sees of images, and what it remembers of them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import Backbone, LiteTowers
from pmclip_deploy.train.checkpoint import Checkpoint, towers_from_checkpoint
from pmclip_deploy.train.clip.questions import locked_and_fast
from pmclip_deploy.train.cpu import autocast
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.images import Images
from pmclip_deploy.train.lite.rows import Rows
from pmclip_deploy.train.rounding import RoundedTower


class Model(nn.Module):
    def __init__(self, clip: LiteTowers, head: LiteHead) -> None:
        super().__init__()
        self.clip = clip
        self.head = head


@dataclass(frozen=True)
class Source:
    """The checkpoint that training starts from."""

    folder: Path
    meta: Checkpoint
    spec: Backbone
    towers: LiteTowers
    locked: list[nn.Module]  # these stay in eval mode
    visual: RoundedTower  # the image tower, with INT8's roundings once it is ``on``

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"


def source_from_checkpoint(folder: Path) -> Source:
    """Raises BundleError and UsageError."""
    plain, meta, _ = towers_from_checkpoint(folder)
    spec = BACKBONES[meta["backbone"]]
    towers = spec.lite(plain)
    locked = locked_and_fast(towers)
    return Source(folder, meta, spec, towers.eval(), locked, towers.rounded(locked))


@torch.no_grad()
def seen_from_images(clip: LiteTowers, images: Images) -> Tensor:
    """(N, D + E) f32: all that the head sees of each image."""
    return torch.cat([clip.features_for_head(images.clean(i)).float() for i in torch.arange(len(images)).split(32)])


def remember(model: Model, images: Images, rows: Rows, mixed: bool) -> None:
    """Fills the head's memory with the training images, and leaves the findings to it."""
    with autocast(torch.device("cpu"), mixed):
        seen = seen_from_images(model.clip, images)
    model.head.remember(seen, rows.padded_slots(), rows.balance)
    model.head.leave_to_memory([i for (kind, _), i in rows.vocabulary.column.items() if kind.startswith("finding: ")])
