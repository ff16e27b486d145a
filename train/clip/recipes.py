"""How a backbone is fine-tuned on captions: the paper's recipe, and a modern one."""

from dataclasses import dataclass, replace
from typing import Any

from pmclip_deploy.errors import UsageError
from pmclip_deploy.train.images import Augmentation
from pmclip_deploy.train.loop import Optimiser, Settings


@dataclass(frozen=True)
class Recipe(Settings):
    """How a backbone is fine-tuned on captions; the options of `train clip` override its values."""

    augmentation: Augmentation = "radiology"
    largest_scale: float | None = None  # of the cosines, held after each step as CLIP does
    mixed: bool = False  # bf16 where the device computes in it
    micro_batch: int = 0  # pairs encoded at a time; 0 takes all of a process's
    lock_image: bool = False
    lock_text: bool = False


RECIPES = {
    # Eslami et al. 2023: configs/medclip_roco_all.yaml, main/train.py and the two default transforms of their code.
    "paper": Recipe(
        epochs=50,
        learning_rate=1e-5,
        batch_size=64,
        optimiser=Optimiser("Adam", weight_decay=5e-4, eps=1e-6, warmup=None, longest=None),
        augmentation="crop and flip",
    ),
    "modern": Recipe(
        epochs=20,
        learning_rate=5e-5,
        batch_size=512,
        optimiser=Optimiser("AdamW", weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, warmup=200, longest=1.0),
        largest_scale=100.0,
        mixed=True,
        micro_batch=128,
    ),
}


def recipe_named(name: str, **chosen: Any) -> Recipe:
    """The recipe with ``chosen`` in place of its own values. Raises UsageError."""
    if name not in RECIPES:
        raise UsageError(f"recipe {name!r} is unknown", f"choose one of {', '.join(RECIPES)}")
    return replace(RECIPES[name], **chosen)
