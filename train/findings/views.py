"""What the network's locked part gives of augmented views of films: computed once for all folds, kept in memory-mapped files."""

import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Generator, Tensor
from torch.nn import functional as F

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.console import counted, print_note
from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.imaging.preprocess import resized
from pmclip_deploy.train.cpu import autocast
from pmclip_deploy.train.findings.films import PREPROCESS, Film
from pmclip_deploy.train.findings.net import FindingsNet
from pmclip_deploy.train.findings.strata import placed

MARGIN = PREPROCESS.size * 9 // 8  # side of the square that views are cut from
PLACE = 16  # pixels of a place's side
BATCH = 32
FOLDER, KEY, LOCK = "views", "views.json", ".lock"


@dataclass(frozen=True)
class Views:
    """Of film i the rows first[i] to first[i] + views: (H, W, C) bf16, kept as int16, of each view, and where in it the finding is."""

    first: NDArray[np.int64]  # (N,)
    count: NDArray[np.int64]  # (N,), 0 for films that never train
    features: NDArray[np.int16]  # (rows, H, W, C)
    masks: NDArray[np.uint8]  # (rows, H / 2, W / 2), of the boxes


def views_of_films(
    films: Sequence[Film], net: FindingsNet, folder: Path, made_with: dict[str, Any], seed: int, resume: bool, device: torch.device
) -> Views:
    """Those in ``folder`` where they are of the same ``made_with``, else made there; of several processes, one makes them.

    What an interrupted one made is kept. Raises InputError, UsageError where there is no room, BundleError where ``resume`` finds others.
    """
    with one_process_at_a_time(folder):
        views, done = _opened(films, net, folder, made_with, resume)
        writer = _Writer(films, views, net, device)
        of = np.repeat(np.arange(len(films)), views.count)
        left = [i for i in range(len(done)) if not done[i]]
        if left:
            about = f"{counted(len(of), 'view')} of {counted(len(films), 'film')}, {views.features.nbytes / 1e9:.1f} GB, on {device.type}"
            print_note(f"features of the locked stages: {about}")
        console = Console(stderr=True)

        def drawn(i: int) -> tuple[Tensor, Tensor]:
            return writer.drawn(of[i * BATCH : (i + 1) * BATCH].tolist(), Generator().manual_seed(seed * 1_000_003 + i))

        batches = zip(left, _ahead(drawn, left, device), strict=True)
        for i, (pixels, mask) in track(batches, "features of views", len(left), console=console, disable=not console.is_terminal):
            writer.write(i * BATCH, pixels, mask)
            done[i] = 1
    return views


def _ahead(drawn: Callable[[int], tuple[Tensor, Tensor]], left: Sequence[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """What ``drawn`` gives of each; for a GPU, which would wait, by as many threads as there are cores, a few batches ahead."""
    if device.type == "cpu":
        yield from map(drawn, left)
        return
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
        for i in left:
            waiting.append(pool.submit(drawn, i))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def remove_views(folder: Path) -> None:
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def tensor_of_features(rows: NDArray[np.int16], device: torch.device) -> Tensor:
    """(B, H, W, C) int16 -> (B, C, H, W) bf16, channels last."""
    return torch.from_numpy(rows).to(device).view(torch.bfloat16).permute(0, 3, 1, 2)


def augmented(squares: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """(B, 4, M, M) f32 in 0..1, of colours and mask -> ((B, 3, S, S) f32 in 0..1, (B, S / 16, S / 16) f32: the mask's most in each place).

    Turned (a fifth of them by quarters besides), mirrored, cropped, stretched; gamma, gain and brightness; some inverted, noisy or coarse.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    n, size = len(squares), PREPROCESS.size
    zoom, stretch = uniform(0.7, 1.12), uniform(-0.14, 0.14).exp()
    quarters = (uniform(0, 1) < 0.2) * torch.randint(0, 4, (n,), generator=generator)
    turn = uniform(-0.45, 0.45) + quarters * math.pi / 2
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    wide, high, cos, sin = zoom * stretch, zoom / stretch, turn.cos(), turn.sin()
    dx, dy = (1 - wide).abs() * uniform(-1, 1), (1 - high).abs() * uniform(-1, 1)
    theta = torch.stack(
        [torch.stack([wide * cos * mirror, -high * sin, dx], 1), torch.stack([wide * sin * mirror, high * cos, dy], 1)], dim=1
    )
    seen = F.grid_sample(squares, F.affine_grid(theta, [n, 4, size, size], align_corners=False), align_corners=False)
    x, mask = seen[:, :3], seen[:, 3:]
    gamma, gain, shift = uniform(-0.4, 0.4).exp(), uniform(0.75, 1.25), uniform(-0.12, 0.12)
    x = (x.clamp(min=1e-4) ** gamma.view(-1, 1, 1, 1) * gain.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)).clamp(0, 1)
    for i in range(n):
        inverted, noisy, strength, coarse = torch.rand(4, generator=generator).tolist()
        if inverted < 0.05:
            x[i] = 1 - x[i]
        if noisy < 0.15:
            x[i] += torch.randn(1, size, size, generator=generator) * strength * 0.06
        if coarse < 0.15:
            small = F.interpolate(x[i : i + 1], size=int(size * (0.4 + 0.4 * strength)), mode="area")
            x[i : i + 1] = F.interpolate(small, size=size, mode="bilinear")
    return x.clamp(0, 1), F.max_pool2d(mask, PLACE)[:, 0]


def square_of_film(film: Film) -> Tensor:
    """(4, M, M) u8: the picture as the network will see it, with room for crops, and a mask of the film's boxes. Raises InputError."""
    pixels = film.pixels()
    mask = torch.zeros(1, MARGIN, MARGIN, dtype=torch.uint8)
    for box in film.boxes or ():
        left, top, right, bottom = placed(box, pixels, MARGIN)
        mask[0, max(0, int(top)) : max(0, math.ceil(bottom)), max(0, int(left)) : max(0, math.ceil(right))] = 255
    return torch.cat([_colours(resized(pixels, replace(PREPROCESS, size=MARGIN))), mask])


def _opened(
    films: Sequence[Film], net: FindingsNet, folder: Path, made_with: dict[str, Any], resume: bool
) -> tuple[Views, NDArray[np.uint8]]:
    """(the files, with what they hold already, (batches,) u8: which are done)"""
    count = np.array([0 if film.part == "val" else film.views for film in films], np.int64)
    rows = int(count.sum())
    with torch.no_grad():
        device = net.pool.weight.device
        channels, height, width = net.stem(torch.zeros(1, 3, PREPROCESS.size, PREPROCESS.size, device=device)).shape[1:]
    home, key = folder / FOLDER, json.dumps(made_with, sort_keys=True)
    there = (home / KEY).is_file() and (home / KEY).read_text(encoding="utf-8") == key
    if resume and (home / KEY).is_file() and not there:
        raise BundleError(f"{home}: made with other settings", "train again without --resume, or give the same options")
    sizes: dict[str, tuple[type, tuple[int, ...]]] = {
        "features": (np.int16, (rows, height, width, channels)),
        "masks": (np.uint8, (rows, PREPROCESS.size // PLACE, PREPROCESS.size // PLACE)),
        "done": (np.uint8, (math.ceil(rows / BATCH),)),
    }
    if not there:
        remove_views(folder)
        home.mkdir(parents=True)
        needed, free = sum(math.prod(shape) * np.dtype(kind).itemsize for kind, shape in sizes.values()), shutil.disk_usage(home).free
        if needed > free:
            raise UsageError(f"{home}: needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free", "make room, or give another --output")
        for name, (kind, shape) in sizes.items():
            np.lib.format.open_memmap(home / f"{name}.npy", "w+", kind, shape)
        with write_errors(f"{home}:", "make room, or give another --output"):
            write(home / KEY, key)
    files = {name: np.load(home / f"{name}.npy", mmap_mode="r+") for name in sizes}
    first = np.cumsum(count) - count
    return Views(first, count, files["features"], files["masks"]), files["done"]


class _Writer:
    """Fills the files of ``views``."""

    def __init__(self, films: Sequence[Film], views: Views, net: FindingsNet, device: torch.device) -> None:
        self.films, self.views, self.net, self.device = films, views, net, device

    def drawn(self, of: list[int], generator: Generator) -> tuple[Tensor, Tensor]:
        """A view of each of the films ``of``, as ``augmented`` gives them. A film's views stand in a row: it is read once."""
        squares = {i: square_of_film(self.films[i]) for i in dict.fromkeys(of)}
        return augmented(torch.stack([squares[i] for i in of]).float() / 255, generator)

    def write(self, start: int, pixels: Tensor, mask: Tensor) -> None:
        """What ``drawn`` gave, in the rows from ``start`` on."""
        rows = slice(start, start + len(pixels))
        self.views.features[rows] = self._features(pixels)
        self.views.masks[rows] = (mask * 255).byte().numpy()

    @torch.no_grad()
    def _features(self, unit: Tensor) -> NDArray[np.int16]:
        """(B, 3, S, S) f32 in 0..1 -> (B, H, W, C)"""
        mean, std = torch.tensor(PREPROCESS.mean).view(3, 1, 1), torch.tensor(PREPROCESS.std).view(3, 1, 1)
        x = ((unit - mean) / std).to(self.device).contiguous(memory_format=torch.channels_last)
        with autocast(self.device, True):
            features = self.net.stem(x)
        return np.asarray(features.to(torch.bfloat16).permute(0, 2, 3, 1).contiguous().view(torch.int16).cpu().numpy())


def _colours(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W) or (H, W, 3) -> (3, H, W) u8"""
    x = torch.from_numpy(pixels.copy())
    return x.expand(3, -1, -1) if x.ndim == 2 else x.permute(2, 0, 1)


@contextmanager
def one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Others that share ``folder`` wait."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_note(f"{folder}: another process makes its views or its checkpoint; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
