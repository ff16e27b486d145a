"""A picture to the image tower's input: the one preprocessing for training, calibration and inference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.imaging.decoders.layout import LARGE
from pmclip_deploy.imaging.margins import inner_box
from pmclip_deploy.spec import Interpolation, Preprocess


def resized(pixels: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.uint8]:
    """The uint8 stage: Pillow's antialiased filter, then the centre crop, as open_clip's ``image_transform``. -> (S, S) or (S, S, 3)

    Pillow resamples each channel by itself, so one gray channel gives what three equal ones would, in a third of the time.
    """
    size, interpolation = preprocess.size, preprocess.interpolation
    if preprocess.trim:
        pixels = pixels[inner_box(pixels)]
    if preprocess.resize == "squash":
        return _scaled(pixels, size, size, interpolation)
    height, width = pixels.shape[:2]
    if preprocess.resize == "pad":
        rows, columns = padded_place(height, width, size)
        canvas = np.zeros((size, size, *pixels.shape[2:]), np.uint8)
        canvas[rows, columns] = _scaled(pixels, rows.stop - rows.start, columns.stop - columns.start, interpolation)
        return canvas
    if width <= height:  # torchvision's Resize(int): the long side is cut down to a whole number
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)  # torchvision's CenterCrop: half to even
    return _scaled(pixels, height, width, interpolation)[top : top + size, left : left + size]


def padded_place(height: int, width: int, size: int) -> tuple[slice, slice]:
    """(rows, columns) that a picture takes on the square of "pad"."""
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - rows) // 2, (size - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def _scaled(pixels: NDArray[np.uint8], height: int, width: int, interpolation: Interpolation) -> NDArray[np.uint8]:
    """Pillow's; bicubic in a kernel that gives the same, where it is large and grey."""
    if interpolation == "bicubic" and pixels.ndim == 2 and pixels.size >= LARGE:
        from pmclip_deploy.kernels.pixels import bicubic

        small: NDArray[np.uint8] | None = bicubic(np.ascontiguousarray(pixels), height, width)
        if small is not None:
            return small
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling[interpolation.upper()]))


def tensor_from_pixels(pixels: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """Resize, scale to 0..1 and normalise, in float32. -> (3, S, S), C-contiguous"""
    small = resized(pixels, preprocess)
    unit = np.arange(256, dtype=np.float32) / np.float32(255)  # a table of the 256 values: the same arithmetic, done once per value
    tensor = np.empty((3, preprocess.size, preprocess.size), np.float32)
    for channel, (mean, std) in enumerate(zip(preprocess.mean, preprocess.std, strict=True)):
        table = (unit - np.float32(mean)) / np.float32(std)
        np.take(table, small if small.ndim == 2 else small[:, :, channel], out=tensor[channel], mode="clip")  # "raise" copies
    return tensor


def grey_from_pixels(pixels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """(H, W) or (H, W, 3) -> (1, size, size) in 0..1, both sides scaled to ``size``, as MEVF prepares its images."""
    from PIL import Image

    if pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    small = resized(pixels, Preprocess(size, "squash", (0, 0, 0), (1, 1, 1)))
    return small[None].astype(np.float32) / np.float32(255)
