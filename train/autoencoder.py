"""`train autoencoder`: MEVF's denoising auto-encoder, trained on the grey images of folders."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pmclip_deploy.atomic import write_errors, written
from pmclip_deploy.console import counted
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.train.cpu import autocast
from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, AutoEncoder, grey_from_path
from pmclip_deploy.train.loop import Settings, fit
from pmclip_deploy.train.processes import device_named, run_on

NOISE = 0.1  # standard deviation of the noise that is to be taken off, for pixels in 0..1 (MEVF, auto_encoder.py)
HELD_OUT = 10  # every tenth image is for measuring


@dataclass(frozen=True)
class Step:
    """The mean squared error between a batch of images and what is made of them with noise."""

    model: AutoEncoder
    pixels: Tensor  # (N, 1, S, S) u8, on the CPU
    device: torch.device
    mixed: bool = False  # bf16 where the device computes in it

    def __call__(self, indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        pixels = self.pixels[indices] / 255
        noisy = pixels + NOISE * torch.randn(pixels.shape, generator=generator)
        with autocast(self.device, self.mixed):
            made = self.model(noisy.to(self.device))
        return F.mse_loss(made.float(), pixels.to(self.device))


def train_autoencoder(folders: list[Path], output: Path, settings: Settings) -> dict[str, Any]:
    """Trains on every image under ``folders``, writes the weights to ``output`` (safetensors). Raises InputError and UsageError.

    Loss: mean squared error between an image and what is made of it with noise. MEVF says neither rate nor epochs.
    """
    settings.start()
    device = device_named(settings.device)
    paths = [path for folder in folders for path in files_under(folder)]
    pixels, skipped = grey_images(paths[: settings.limit or None], AUTOENCODER_SIZE)
    held = torch.arange(len(pixels)) % HELD_OUT == HELD_OUT - 1
    training, validation = pixels[~held], pixels[held] if held.any() else pixels
    if len(training) < settings.batch_size:
        raise UsageError(f"{counted(len(training), 'training image')}: fewer than one batch of {settings.batch_size}", "lower --batch-size")
    model = AutoEncoder().to(device)
    step = Step(model, training, device, settings.is_mixed(device.type == "cuda"))
    made_with = {**settings.to_json(), "images": len(pixels), "data_sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}
    groups = [(list(model.parameters()), settings.learning_rate)]
    seconds = fit("train autoencoder", model, step, len(training), groups, settings, made_with, state_beside(output))
    with torch.no_grad():
        x = validation / 255
        error = F.mse_loss(torch.cat([model(part.to(device)).cpu() for part in x.split(32)]), x)
    metrics = {"mse": round(error.item(), 6), "variance": round(x.var().item(), 6), "held_out": int(held.sum()), "skipped": skipped}
    return save_network(model, output, {"metrics": metrics, "provenance": {**made_with, "seconds": round(seconds), **run_on(device)}})


def files_under(folder: Path) -> list[Path]:
    """Sorted, without hidden ones. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", "give a folder with images")
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def grey_images(paths: list[Path], size: int) -> tuple[Tensor, int]:
    """((N, 1, size, size) u8, how many files were no readable image and are left out). Raises InputError if none is left."""
    images, first, console = [], "", Console(stderr=True)
    for path in track(paths, "reading images", console=console, disable=not console.is_terminal):
        try:
            images.append((grey_from_path(path, size) * 255).round().byte())  # a quarter of the memory
        except InputError as error:
            first = first or str(error)
    if not images:
        raise InputError(first or "no image to train on; give a folder with images")
    return torch.stack(images), len(paths) - len(images)


def state_beside(output: Path) -> Path:
    """Where the training state of what is written to ``output`` stands: in a folder of its own, with the curves. Raises UsageError."""
    folder = output.with_name(f"{output.name}.training")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made a folder ({error.strerror})", "move what is there, or give another --output") from None
    return folder / "state.pt"


def save_network(network: nn.Module, output: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Writes the weights, with ``meta`` in the file's header; returns ``meta``."""
    with write_errors(f"{output}:", "make room and go on with --resume"), written(output) as new:
        save_file({k: v.contiguous().cpu() for k, v in network.state_dict().items()}, new, {"made_with": json.dumps(meta)})
    return meta
