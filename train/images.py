"""Training images: decoded once, kept as uint8, augmented in batches in a way that respects radiology."""

from pathlib import Path

import torch
from rich.progress import track
from torch import Generator, Tensor
from torch.nn import functional as F

from pmclip_deploy.pixels import picture_from_path, resized, tensor_from_pixels
from pmclip_deploy.spec import Preprocess


class Images:
    """``clean(indices)`` is what inference sees; ``augmented(indices, generator)`` is for training. Both (B, 3, S, S) f32.

    No mirroring (side markers, situs) and no strong rotation. Edge strips are blacked out at random, because watermarks and
    captions stand there and a model takes such a shortcut if it can.
    """

    def __init__(self, paths: list[Path], preprocess: Preprocess, quiet: bool = False) -> None:
        self.paths = paths
        self.preprocess = preprocess
        margin = Preprocess(preprocess.size * 9 // 8, preprocess.resize, preprocess.mean, preprocess.std)
        self.pixels: list[Tensor] = []  # (1 or 3, M, M) u8
        for path in track(paths, "reading images", disable=quiet):
            pixels = torch.from_numpy(resized(picture_from_path(path).pixels, margin).copy())
            self.pixels.append(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous())
        self.mean = torch.tensor(preprocess.mean).view(3, 1, 1)
        self.std = torch.tensor(preprocess.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.paths)

    def clean(self, indices: Tensor) -> Tensor:
        arrays = [tensor_from_pixels(picture_from_path(self.paths[i]).pixels, self.preprocess) for i in indices.tolist()]
        return torch.stack([torch.from_numpy(a) for a in arrays]).contiguous(memory_format=torch.channels_last)

    def augmented(self, indices: Tensor, generator: Generator) -> Tensor:
        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(n, generator=generator)

        n, size = len(indices), self.preprocess.size
        x = torch.stack([self.pixels[i].expand(3, -1, -1) for i in indices.tolist()]).float() / 255
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
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
