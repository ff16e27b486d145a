"""Pictures (DICOM, PNG, JPEG, arrays) to the image tower's input: the one preprocessing for training, calibration and inference.

    path or array -> Picture (uint8) -> resized (uint8) -> tensor_from_pixels (float32)

Pillow loads inside the functions, and pydicom only where the bytes are DICOM, so that nothing pays for what it does not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import ImageInfo
from pmclip_deploy.decoders import LARGE
from pmclip_deploy.errors import InputError, PmclipError
from pmclip_deploy.margins import inner_box
from pmclip_deploy.spec import Preprocess

if TYPE_CHECKING:
    from PIL import Image

    from pmclip_deploy.header import Header

MAX_PIXELS = 1 << 26  # 8192 x 8192, twice the largest mammogram: more is a mistake or an attack

MAX_SCANS = 200  # of a progressive JPEG and its thumbnails: each passes over the whole picture
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Picture:
    """What a person would see on a viewer, and where it came from."""

    pixels: NDArray[np.uint8]  # (H, W) grayscale with 0 = black, or (H, W, 3) RGB
    info: ImageInfo
    header: Header | None = None  # what a DICOM file says of it


def picture_from_path(path: str | PathLike[str], frame: int | None = None, window: tuple[float, float] | None = None) -> Picture:
    """Read a DICOM, PNG or JPEG file, recognised by its first bytes. ``frame`` and ``window`` are for DICOM."""
    source = fspath(path)
    head = head_of_file(source)
    if not head.startswith((PNG, JPEG)):
        from pmclip_deploy.dicom import picture_from_dicom

        return picture_from_dicom(source, frame, window)
    if frame not in (None, 0):
        raise InputError(f"{source}: frame {frame} was asked for and the picture has only frame 0; leave the frame out")
    if window is not None:
        raise InputError(f"{source}: a window can be set for DICOM files only; leave it out, or give the DICOM file")
    return _picture_from_raster(source, "png" if head.startswith(PNG) else "jpeg")


def picture_from_array(array: Any) -> Picture:
    """Take uint8 (H, W) or (H, W, 3) RGB as it is; spread other numbers, (H, W) only, from their smallest to their largest finite value."""
    pixels = np.asarray(array)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise InputError(f"array: the shape is {pixels.shape}; give (height, width) grayscale or (height, width, 3) RGB")
    window = None
    if pixels.dtype != np.uint8:
        if pixels.ndim == 3 or pixels.dtype.kind not in "buif":
            raise InputError(f"array: {pixels.dtype} of shape {pixels.shape} has no defined brightness; scale it to uint8 in 0..255")
        pixels, window = _spread(pixels)
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    return Picture(pixels, ImageInfo("array", "array", rows=pixels.shape[0], columns=pixels.shape[1], window=window))


def resized(pixels: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.uint8]:
    """The uint8 stage: Pillow's antialiased bicubic, then the centre crop, as open_clip's ``image_transform``. -> (S, S) or (S, S, 3)

    Pillow resamples each channel by itself, so one gray channel gives what three equal ones would, in a third of the time.
    """
    size = preprocess.size
    if preprocess.trim:
        pixels = pixels[inner_box(pixels)]
    if preprocess.resize == "squash":
        return _bicubic(pixels, size, size)
    height, width = pixels.shape[:2]
    if preprocess.resize == "pad":
        rows, columns = padded_place(height, width, size)
        canvas = np.zeros((size, size, *pixels.shape[2:]), np.uint8)
        canvas[rows, columns] = _bicubic(pixels, rows.stop - rows.start, columns.stop - columns.start)
        return canvas
    if width <= height:  # torchvision's Resize(int): the long side is cut down to a whole number
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)  # torchvision's CenterCrop: half to even
    return _bicubic(pixels, height, width)[top : top + size, left : left + size]


def padded_place(height: int, width: int, size: int) -> tuple[slice, slice]:
    """(rows, columns) that a picture takes on the square of "pad"."""
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - rows) // 2, (size - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def _bicubic(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Pillow's; in a kernel that gives the same, where it is large and grey."""
    if pixels.ndim == 2 and pixels.size >= LARGE:
        from pmclip_deploy.kernels.pixels import bicubic

        small: NDArray[np.uint8] | None = bicubic(np.ascontiguousarray(pixels), height, width)
        if small is not None:
            return small
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BICUBIC))


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


def head_of_file(source: str) -> bytes:
    """The first 132 bytes, or one clear line on why there are none."""
    path = Path(source)
    try:
        if path.is_dir():
            raise InputError(f"{source}: is a folder, not a picture; give a file")
        if path.exists() and not path.is_file():
            raise InputError(f"{source}: is a device or a pipe, not a file; save the picture and give that")
        with path.open("rb") as file:
            head = file.read(132)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file; check the path") from None
    except PermissionError:
        raise InputError(f"{source}: permission to read it was denied; check the file's rights") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"{source!r}: cannot be opened ({type(error).__name__}); check the path") from None
    if not head:
        raise InputError(f"{source}: the file is empty; copy it again")
    return head


def _picture_from_raster(source: str, kind: str) -> Picture:
    import warnings

    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own remarks on odd files; what matters is raised below
            data = Path(source).read_bytes()
            if data.count(b"\xff\xda") > MAX_SCANS and kind == "jpeg":
                raise InputError(f"{source}: has more than {MAX_SCANS} progressive scans; save it again as a plain JPEG")
            with Image.open(BytesIO(data), formats=(kind.upper(),)) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise InputError(f"{source}: {opened.width} x {opened.height} is more than {MAX_PIXELS} pixels; make it smaller")
                pixels, window = _pixels_from_image(ImageOps.exif_transpose(opened))
    except PmclipError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on broken files
        raise InputError(f"{source}: the {kind.upper()} file is broken ({type(error).__name__}); save or copy it again") from None
    return Picture(pixels, ImageInfo(source, kind, rows=pixels.shape[0], columns=pixels.shape[1], window=window))


def _pixels_from_image(image: Image.Image) -> tuple[NDArray[np.uint8], tuple[float, float] | None]:
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16-bit grayscale: Pillow's own convert("L") would clip it
        return _spread(np.asarray(image))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L")), None
    rgb = np.asarray(image.convert("RGB"))
    if np.array_equal(rgb[:, :, 0], rgb[:, :, 1]) and np.array_equal(rgb[:, :, 1], rgb[:, :, 2]):
        return np.ascontiguousarray(rgb[:, :, 0]), None  # grayscale stored as colour
    return rgb, None


def _spread(values: NDArray[Any]) -> tuple[NDArray[np.uint8], tuple[float, float] | None]:
    """An automatic window over the finite values: the smallest becomes 0, the largest 255. Not-a-number becomes 0."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise InputError("array: no finite value in it; give numbers")
    low, high = float(values[finite].min()), float(values[finite].max())
    window = automatic_window(low, high)
    with np.errstate(all="ignore"):
        unit = np.clip((values / 2 - low / 2) / ((high / 2 - low / 2) or 1.0), 0, 1)  # halves: the range of float64 itself may overflow
    return cast("NDArray[np.uint8]", np.floor(np.nan_to_num(unit) * 255 + 0.5).astype(np.uint8)), window


def automatic_window(low: float, high: float) -> tuple[float, float]:
    """The (center, width) whose LINEAR function (PS3.3 C.11.2.1.2.1) takes ``low`` to black and ``high`` to white."""
    return (low + high + 1) / 2, high - low + 1
