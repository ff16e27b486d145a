"""The state of a stage between two epochs, as a file: what --resume goes on from."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pmclip_deploy.atomic import written
from pmclip_deploy.errors import BundleError
from pmclip_deploy.train.pickles import check_pickles
from pmclip_deploy.train.processes import rank


def read_state(state: Path) -> dict[str, Any]:
    """Raises BundleError."""
    try:
        check_pickles(state)
        saved: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True)
        if not {"model", "optimizer", "schedule", "epoch", "seconds", "history", "made_with"} <= saved.keys():
            raise ValueError
    except Exception:
        raise BundleError(f"{state}: not a readable training state", "train again without --resume") from None
    return saved


def write_state(saved: dict[str, Any], state: Path) -> None:
    """``state`` is always whole. Raises OSError."""
    if rank() == 0:
        with written(state, state.with_suffix(".partial")) as new, new.open("wb") as file:  # a killed run's remains go with the next epoch
            torch.save(saved, file)
    if dist.is_initialized():
        dist.barrier()
