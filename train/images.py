"""Training images: kept as uint8 or read when asked for, augmented in a way that respects radiology, and checked before training."""

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from pmclip_deploy.errors import InputError, PmclipError
from pmclip_deploy.imaging.preprocess import resized, tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train.datasets.pictures import Place, picture_of

Augmentation = Literal["none", "crop and flip", "radiology"]
Pixels = NDArray[np.uint8]
Change = Callable[[Path, Pixels], Iterable[Pixels]]


class Images:
    """``clean(indices)`` is what inference sees; ``augmented(indices, generator)`` is for training. Both (B, 3, S, S) f32.

    With a ``change``, ``augmented`` takes one of the versions that it gives in half of the cases. They are made once.
    """

    def __init__(self, paths: list[Path], preprocess: Preprocess, change: Change | None = None) -> None:
        self.paths = paths
        self.preprocess = preprocess
        console = Console(stderr=True)

        def versions(path: Path) -> list[Tensor]:  # (1 or 3, M, M) u8
            pixels = picture_from_path(path).pixels
            return [with_margin(x, preprocess) for x in (pixels, *(change(path, pixels) if change else ()))]

        self.pixels = [versions(path) for path in track(paths, "reading images", console=console, disable=not console.is_terminal)]

    def __len__(self) -> int:
        return len(self.paths)

    def clean(self, indices: Tensor) -> Tensor:
        arrays = [tensor_from_pixels(picture_from_path(self.paths[i]).pixels, self.preprocess) for i in indices.tolist()]
        return torch.stack([torch.from_numpy(a) for a in arrays]).contiguous(memory_format=torch.channels_last)

    def augmented(self, indices: Tensor, generator: Generator) -> Tensor:
        drawn = torch.rand(len(indices), generator=generator).tolist()
        chosen = [
            of[max(0, math.ceil((2 * u - 1) * (len(of) - 1)))] for u, of in zip(drawn, (self.pixels[i] for i in indices), strict=True)
        ]
        return radiology_augmented(torch.stack([x.expand(3, -1, -1) for x in chosen]), self.preprocess, generator)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """``pairs[epoch, index]`` is (pixels (3, S, S) f32, tokens (T,) i64), read when asked for, drawn by (seed, epoch, index)."""

    def __init__(self, images: Sequence[Place], tokens: Tensor, preprocess: Preprocess, augmentation: Augmentation, seed: int) -> None:
        self.images = images
        self.tokens = tokens  # (N, T) i64
        self.preprocess = preprocess
        self.augmentation = augmentation
        self.seed = seed % (1 << 32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        drawn = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
        return self._pixels(self.images[index], Generator().manual_seed(int(drawn))), self.tokens[index]

    def _pixels(self, image: Place, generator: Generator) -> Tensor:
        pixels = picture_of(image).pixels
        if self.augmentation == "radiology":
            large = with_margin(pixels, self.preprocess)
            return radiology_augmented(large.expand(1, 3, -1, -1), self.preprocess, generator)[0]
        if self.augmentation == "none":
            return torch.from_numpy(tensor_from_pixels(pixels, self.preprocess))
        rows, columns = random_crop(pixels.shape[0], pixels.shape[1], generator)
        x = torch.from_numpy(tensor_from_pixels(pixels[rows, columns], replace(self.preprocess, resize="squash")))
        return x.flip(-1) if torch.rand((), generator=generator) < 0.5 else x

    def read(self, order: Iterable[Sequence[int]], epoch: int, workers: int, pinned: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``order``: (pixels (B, 3, S, S) f32, tokens (B, T) i64). ``workers`` processes read ahead. Raises InputError."""
        keys = [[(epoch, i) for i in indices] for indices in order]
        ahead, begin = (1, _begin_worker) if workers else (None, None)
        loader = DataLoader(self, batch_sampler=keys, num_workers=workers, pin_memory=pinned, prefetch_factor=ahead, worker_init_fn=begin)
        try:
            yield from loader
        except PmclipError as error:  # from a worker it comes with the text of its traceback
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("pmclip_deploy.errors.InputError: ")) from None


def _begin_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OPJ_NUM_THREADS"] = "0"  # JPEG 2000: each core has its process


def reading_processes(here: int) -> int:
    """How many read ahead beside each of ``here`` training processes on this machine: the other cores, eight at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // here - 1) if cores > here else 0


def with_margin(pixels: Pixels, preprocess: Preprocess) -> Tensor:
    """(H, W) or (H, W, 3) u8 -> (1 or 3, M, M) u8, M an eighth larger than the input: room for crops."""
    large = torch.from_numpy(resized(pixels, replace(preprocess, size=preprocess.size * 9 // 8)).copy())
    return large[None] if large.ndim == 2 else large.permute(2, 0, 1).contiguous()


def radiology_augmented(pixels: Tensor, preprocess: Preprocess, generator: Generator) -> Tensor:
    """(B, 3, M, M) u8 -> (B, 3, S, S) f32, normalised.

    No mirroring (side markers, situs) and no strong rotation. Edge strips are blacked out at random, because watermarks and
    captions stand there and a model takes such a shortcut if it can.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    n, size = len(pixels), preprocess.size
    x = pixels.float() / 255
    zoom, stretch, turn = uniform(0.72, 1.05), uniform(-0.12, 0.12).exp(), uniform(-0.2, 0.2)
    wide, high = zoom * stretch, zoom / stretch
    cos, sin = turn.cos(), turn.sin()
    dx, dy = (1 - wide).clamp(min=0) * uniform(-1, 1), (1 - high).clamp(min=0) * uniform(-1, 1)
    theta = torch.stack([torch.stack([wide * cos, -high * sin, dx], 1), torch.stack([wide * sin, high * cos, dy], 1)], 1)
    x = F.grid_sample(x, F.affine_grid(theta, [n, 3, size, size], align_corners=False), align_corners=False)
    gamma, gain, shift = uniform(-0.3, 0.3).exp(), uniform(0.8, 1.2), uniform(-0.1, 0.1)
    x = (x.clamp(min=1e-4) ** gamma.view(-1, 1, 1, 1) * gain.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)).clamp(0, 1)
    strips = (uniform(0, 0.12) * size).long(), (uniform(0, 0.12) * size).long()
    for i, masked in enumerate(torch.rand(n, generator=generator) < 0.3):
        if masked:
            x[i, :, : strips[0][i]] = 0
            x[i, :, size - int(strips[1][i]) :] = 0
    mean, std = torch.tensor(preprocess.mean).view(3, 1, 1), torch.tensor(preprocess.std).view(3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def random_crop(height: int, width: int, generator: Generator) -> tuple[slice, slice]:
    """Rows and columns of 8% to all of the area, sides 3:4 to 4:3 (Szegedy et al. 2015); the whole where ten draws do not fit."""
    for _ in range(10):
        area, shape, down, right = torch.rand(4, generator=generator).tolist()
        area, shape = height * width * (0.08 + 0.92 * area), math.exp(math.log(4 / 3) * (2 * shape - 1))
        high, wide = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < high <= height and 0 < wide <= width:
            top, left = round(down * (height - high)), round(right * (width - wide))
            return slice(top, top + high), slice(left, left + wide)
    return slice(0, height), slice(0, width)


def readable(images: Iterable[Place], share: float) -> set[Place]:
    """Those that can be read, each one tried now rather than hours later. Raises InputError where more than ``share`` of them cannot.

    Under torchrun the processes divide the work.
    """
    every = list(dict.fromkeys(images))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    broken, own = torch.zeros(len(every), dtype=torch.uint8), range(rank, len(every), world)
    console, pool = Console(stderr=True), ThreadPoolExecutor()
    try:
        tried = pool.map(_trouble, [every[i] for i in own])
        shown = console.is_terminal and rank == 0
        for i, trouble in zip(own, track(tried, "checking images", len(own), console=console, disable=not shown), strict=True):
            broken[i] = trouble is not None
    finally:
        pool.shutdown(cancel_futures=True)
    if dist.is_initialized():
        dist.all_reduce(broken)
    if count := int(broken.sum()):
        said = f"{count} of {len(every)} images cannot be read"
        first = _trouble(every[int(broken.argmax())])
        if count > share * len(every):
            raise InputError(f"{first} ({said}, more than {share:.0%})", "get them again; for captions --skip-share allows more")
        if rank == 0:
            console.print(f"{said} and are left out; the first: {first}", highlight=False, markup=False, soft_wrap=True)
    return {image for image, bad in zip(every, broken.tolist(), strict=True) if not bad}


def _trouble(image: Place) -> str | None:
    try:
        picture_of(image)
    except PmclipError as error:
        return str(error)
    return None
