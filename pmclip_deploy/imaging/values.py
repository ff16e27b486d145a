"""What a viewer that windows by itself needs of a file: its windows, and a frame's values with the table that shows them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import ImageInfo
from pmclip_deploy.files import JPEG, PNG
from pmclip_deploy.imaging.dicom import Frame, frame_from_image, picture_from_frame
from pmclip_deploy.imaging.dicom_file import image_from_file, reading
from pmclip_deploy.imaging.elements import Window, frame_group, numbers_of
from pmclip_deploy.imaging.grayscale import Modality, Voi, gray_from_modality, gray_from_stored
from pmclip_deploy.imaging.read import picture_from_bytes

Grays = NDArray[np.uint8]
LEVELS = 1 << 16


@dataclass(frozen=True)
class GrayFrame:
    """A grayscale frame as 16-bit samples. ``sample * slope + intercept`` is the modality value, Hounsfield units of a CT."""

    samples: NDArray[np.uint16]  # (H, W)
    slope: float
    intercept: float
    inverse: bool  # whether large values are dark
    function: str  # LINEAR, LINEAR_EXACT or SIGMOID (PS3.3 C.11.2.1): what a window means here
    table: Grays  # (65536,): the gray level of each sample as the file is shown, or through the window that was asked for
    info: ImageInfo


@dataclass(frozen=True)
class ColorFrame:
    """A frame that takes no window."""

    pixels: Grays  # (H, W, 3), or (H, W) of a PNG or JPEG file
    info: ImageInfo


def frame_from_bytes(where: str, data: bytes, frame: int | None = None, window: Window | None = None) -> GrayFrame | ColorFrame:
    """Raises InputError where it cannot be read."""
    if not data or data.startswith((PNG, JPEG)):
        picture = picture_from_bytes(where, data, frame, window)
        return ColorFrame(picture.pixels, picture.info)
    with reading(where) as stack:
        decoded = frame_from_image(where, image_from_file(where, stack, data), stack, frame)
        picture = picture_from_frame(where, decoded, window)
        if picture.pixels.ndim == 3:
            return ColorFrame(picture.pixels, picture.info)
        return _gray(decoded, window, picture.info)


def windows_from_bytes(where: str, data: bytes) -> tuple[Window, ...]:
    """The windows of the middle frame of a DICOM file that was read before, in the file's order."""
    if data.startswith((PNG, JPEG)):
        return ()
    with reading(where) as stack:
        decoded = frame_from_image(where, image_from_file(where, stack, data), stack, None)
        group = frame_group(decoded.image.dataset, decoded.index, "FrameVOILUTSequence")
        pairs = zip(numbers_of(group, "WindowCenter") or [], numbers_of(group, "WindowWidth") or [], strict=False)
        return tuple(pair for pair in pairs if all(map(math.isfinite, pair)) and pair[1] > 0)


def _gray(decoded: Frame, window: Window | None, info: ImageInfo) -> GrayFrame:
    shown = gray_from_stored(decoded.image, decoded.layout, decoded.stored, decoded.index, window, [])
    samples, slope, intercept = _samples(decoded.stored, shown.modality)
    table = gray_from_modality(np.arange(LEVELS, dtype=np.float64) * slope + intercept, shown.voi, shown.inverse)
    function = Voi.asked(decoded.image, decoded.index, (0.0, 2.0)).function
    return GrayFrame(samples, slope, intercept, shown.inverse, function, table, info)


def _samples(stored: NDArray[Any], modality: Modality) -> tuple[NDArray[np.uint16], float, float]:
    """Stored values, or what a Modality LUT makes of them, from 0 to 65535, and how they become modality values.

    Values of 32 bits that spread wider are rounded to 65,536 steps.
    """
    slope, intercept = modality.slope, modality.intercept
    if modality.table is not None:
        stored, slope, intercept = modality.table(stored).astype(np.int64), 1.0, 0.0
    low, high = int(stored.min()), int(stored.max())
    step = max(1.0, (high - low) / (LEVELS - 1))
    shifted = stored.astype(np.int64) - low
    return (shifted if step == 1 else np.rint(shifted / step)).astype(np.uint16), slope * step, intercept + slope * low
