"""PNG, JPEG, PIL images and arrays to pictures."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import ImageInfo
from pmclip_deploy.errors import InputError, PmclipError
from pmclip_deploy.faults import is_ours
from pmclip_deploy.imaging.picture import MAX_PIXELS, Picture, automatic_window
from pmclip_deploy.imaging.quiet import quiet, quieten

if TYPE_CHECKING:
    from PIL import Image


MAX_SCANS = 200  # of a progressive JPEG and its thumbnails: each passes over the whole picture


def picture_from_array(array: Any) -> Picture:
    """Take uint8 (H, W) or (H, W, 3) RGB as it is; spread other numbers, (H, W) only, from their smallest to their largest finite value."""
    pixels = np.asarray(array)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise InputError(f"array: the shape is {pixels.shape}", "give (height, width) grayscale or (height, width, 3) RGB")
    _check_size("array", pixels.shape[1], pixels.shape[0])
    window = None
    if pixels.dtype != np.uint8:
        if pixels.ndim == 3 or pixels.dtype.kind not in "buif":
            raise InputError(f"array: {pixels.dtype} of shape {pixels.shape} has no defined brightness", "scale it to uint8 in 0..255")
        pixels, window = _spread(pixels)
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    return Picture(pixels, ImageInfo("array", "array", rows=pixels.shape[0], columns=pixels.shape[1], window=window))


def picture_from_pil(image: Image.Image) -> Picture:
    """As a file with this image is read, its EXIF orientation too. The image stays as it is, but for what Pillow loads of it."""
    from PIL import ImageOps, TiffImagePlugin  # noqa: F401

    where, kind = "PIL image", str(getattr(image, "format", None) or "").lower()
    try:
        with quiet():
            if not image.width * image.height:
                raise InputError(f"{where}: {image.width} x {image.height} has no pixels", "give one that has")
            _check_size(where, image.width, image.height)
            if kind == "jpeg" and getattr(image, "tile", None):  # not decoded yet
                file = getattr(image, "fp")  # noqa: B009
                place = file.tell()
                file.seek(0)
                _check_scans(where, file.read())
                file.seek(place)
            pixels, window = _pixels_from_image(ImageOps.exif_transpose(image))
    except PmclipError:
        raise
    except Exception as error:
        if is_ours(error):
            raise
        raise InputError(
            f"{where}: its pixels cannot be read", "open or make it again, in mode L or RGB"
        ) from None
    kind = kind if kind in ("png", "jpeg") else "array"
    return Picture(pixels, ImageInfo(where, kind, rows=pixels.shape[0], columns=pixels.shape[1], window=window))


def picture_from_raster(source: str, kind: str, data: bytes | None = None) -> Picture:
    """Of a file's content, ``data``, or of the file at ``source``."""
    from PIL import Image, ImageOps

    try:
        with quiet():  # Pillow's own remarks on odd files; what matters is raised below
            data = Path(source).read_bytes() if data is None else data
            _import_plugins(kind, data)
            if kind == "jpeg":
                _check_scans(source, data)
            with Image.open(BytesIO(data), formats=(kind.upper(),)) as opened:
                _check_size(source, opened.width, opened.height)
                pixels, window = _pixels_from_image(ImageOps.exif_transpose(opened))
    except PmclipError:
        raise
    except Exception as error:
        if is_ours(error):
            raise
        # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on broken files
        raise InputError(f"{source}: the {kind.upper()} file is broken", "save or copy it again") from None
    return Picture(pixels, ImageInfo(source, kind, rows=pixels.shape[0], columns=pixels.shape[1], window=window))


def _check_size(where: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{where}: {width} x {height} is more than {MAX_PIXELS} pixels", "make it smaller")


def _check_scans(where: str, data: bytes) -> None:
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise InputError(f"{where}: has more than {MAX_SCANS} progressive scans", "save it again as a plain JPEG")


def _import_plugins(kind: str, data: bytes) -> None:
    """Now, so that they are quiet from their first file on."""
    from PIL import JpegImagePlugin, PngImagePlugin  # noqa: F401

    if b"exif" in data or b"eXIf" in data or b"Exif" in data:
        from PIL import TiffImagePlugin  # noqa: F401
    quieten()


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
        raise InputError("array: no finite value in it", "give numbers")
    low, high = float(values[finite].min()), float(values[finite].max())
    window = automatic_window(low, high)
    with np.errstate(all="ignore"):
        unit = np.clip((values / 2 - low / 2) / ((high / 2 - low / 2) or 1.0), 0, 1)  # halves: the range of float64 itself may overflow
    return cast("NDArray[np.uint8]", np.floor(np.nan_to_num(unit) * 255 + 0.5).astype(np.uint8)), window
