"""The processes of a stage that torchrun starts: this one's device, its part of a batch, and sums over all of them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pmclip_deploy.errors import DeviceError, TrainingError, UsageError

DEVICES = ("auto", "cpu", "cuda")
T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(x: T) -> T:
    """This process's share of a batch that all processes hold, (B, ...) -> (B / processes, ...), up to one row more or less."""
    first, end = (of * len(x) // processes() for of in (rank(), rank() + 1))  # type: ignore[arg-type]
    part: T = x[first:end]  # type: ignore[index]
    return part


def refuse_unlike(what: Any) -> None:
    """Raises UsageError where the processes do not all train ``what``, which json can write: their sums would mean nothing."""
    if dist.is_initialized():
        own = torch.frombuffer(bytearray(hashlib.sha256(json.dumps(what, sort_keys=True).encode()).digest()), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(processes())]
        dist.all_gather(every, own)
        if any(not torch.equal(other, own) for other in every):
            raise UsageError(
                "the processes differ in version, data, options or state",
                "give every node the same ones, and one folder --output that all of them share",
            )


def device_named(name: str) -> torch.device:
    """Of DEVICES; "auto" is a GPU if torch finds one. Raises DeviceError and UsageError."""
    if name not in DEVICES:
        raise UsageError(f"device {name!r} is unknown", f"choose {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("torch finds no CUDA device", "give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def run_on(device: torch.device) -> dict[str, Any]:
    """What a checkpoint says of the run, and what its weights do not depend on but for rounding."""
    return {"threads": torch.get_num_threads(), "device": device.type}


@contextmanager
def device_of_process(name: str = "auto") -> Iterator[torch.device]:
    """This process's device; joins those that torchrun started, over nccl for GPUs and gloo for CPUs.

    Raises DeviceError and UsageError, and TrainingError where another process ended before its time.
    """
    local, several = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    cuda = device_named(name).type == "cuda"
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if several:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # images are checked in between
    try:
        yield device
        if several:
            dist.barrier()  # gloo may abort a process whose peer is gone before it
            dist.destroy_process_group()
    except RuntimeError as error:
        if not several or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError("another process of this run ended", "go on with --resume from the last whole epoch") from None


def sum_over_processes(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    """The loss of the whole batch, whose gradients the parameters then hold."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        for work in [dist.all_reduce(x, async_op=True) for x in (loss, *gradients)]:
            work.wait()
    return loss.item()


def copy_statistics_of_the_first_process(model: nn.Module) -> None:
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
