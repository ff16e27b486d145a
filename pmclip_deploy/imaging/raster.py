"""PNG, JPEG, PIL images and arrays to pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import ImageInfo
from pmclip_deploy.errors import InputError, PmclipError
from pmclip_deploy.faults import is_ours
from pmclip_deploy.imaging.decoders.jpeg_whole import image_from_jpeg
from pmclip_deploy.imaging.decoders.layout import Refused
from pmclip_deploy.imaging.picture import Picture, automatic_window, bands, check_size, large_alone
from pmclip_deploy.imaging.quiet import quiet, quieten
from pmclip_deploy.imaging.raster_file import lean_jpeg, lean_png, png_is_cut

if TYPE_CHECKING:
    from PIL import Image


MAX_SCANS = 200  # of a progressive JPEG and its thumbnails: each passes over the whole picture

# Pillow's raw modes of a 16-bit PNG that it would cut to 8 bits -> those that give the bytes: all four of a pixel, or the high and the low
_WIDE = {"LA;16B": ("RGBA",), "RGB;16B": ("RGB;16B", "RGB;16L"), "RGBA;16B": ("RGBA;16B", "RGBA;16L")}
Window = tuple[float, float]  # (center, width)
Rows = Callable[[slice], tuple[NDArray[Any], "NDArray[Any] | None"]]  # values of some rows, and how opaque each pixel is, 0 to 1


def picture_from_array(array: Any) -> Picture:
    """Take uint8 (H, W) or (H, W, 3) RGB as it is; spread other numbers, (H, W) only, from their smallest to their largest finite value."""
    pixels = np.asarray(array)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise InputError(f"array: the shape is {pixels.shape}", "give (height, width) grayscale or (height, width, 3) RGB")
    check_size("array", pixels.shape[1], pixels.shape[0])
    window = None
    if pixels.dtype != np.uint8:
        if pixels.ndim == 3 or pixels.dtype.kind not in "buif":
            raise InputError(f"array: {pixels.dtype} of shape {pixels.shape} has no defined brightness", "scale it to uint8 in 0..255")
        values = pixels
        pixels, window = _spread(lambda part: (values[part], None), values.shape)
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    return Picture(pixels, ImageInfo("array", "array", rows=pixels.shape[0], columns=pixels.shape[1], window=window))


def picture_from_pil(image: Image.Image) -> Picture:
    """As a file with this image is read, its EXIF orientation too. The image stays as it is, but for what Pillow loads of it.

    What Pillow reduced when it loaded the image stays reduced. Raises InputError if it would reduce 16-bit colours of a format other than
    PNG now.
    """
    where, kind = "PIL image", str(getattr(image, "format", None) or "").lower()
    kind, notes = "jpeg" if kind == "mpo" else kind, list[str]()
    try:
        with quiet(), ExitStack() as stack:
            if not image.width * image.height:
                raise InputError(f"{where}: {image.width} x {image.height} has no pixels", "give one that has")
            check_size(where, image.width, image.height)
            _import_plugins(b"Exif")
            images, wide, raw_mode = [image], "", _raw_mode(image)  # "" if it is decoded already
            if raw_mode and kind in ("png", "jpeg") and (file := getattr(image, "fp", None)) and image.tell() == 0:
                place = file.tell()
                file.seek(0)
                decoded, wide = _decoded(where, kind, file, notes, stack)
                file.seek(place)
                if (decoded[0].size, decoded[0].mode) == (image.size, image.mode):  # not a draft of it
                    images = decoded
            elif image.mode in ("RGB", "RGBA") and ";16" in raw_mode:
                raise InputError(f"{where}: Pillow would cut its 16-bit colours to 8 bits", "save it as PNG, or scale it to 8 bits")
            pixels, window = _pixels_from_image(images, wide)
    except PmclipError:
        raise
    except Exception as error:
        if is_ours(error):
            raise
        raise InputError(
            f"{where}: its pixels cannot be read", "open or make it again, in mode L or RGB"
        ) from None
    kind = kind if kind in ("png", "jpeg") else "array"
    info = ImageInfo(where, kind, rows=pixels.shape[0], columns=pixels.shape[1], window=window, warnings=tuple(notes))
    return Picture(pixels, info)


def picture_from_raster(source: str, kind: str, data: bytes | None = None) -> Picture:
    """Of a file's content, ``data``, or of the file at ``source``."""
    notes: list[str] = []
    try:
        with quiet(), ExitStack() as stack:  # Pillow's own remarks on odd files; what matters is raised below
            with BytesIO(data) if data is not None else open(source, "rb") as file:  # noqa: PTH123 - the name comes as a str
                images, wide = _decoded(source, kind, file, notes, stack)
            pixels, window = _pixels_from_image(images, wide)
    except PmclipError:
        raise
    except Exception as error:
        if is_ours(error):
            raise
        # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on broken files
        raise InputError(f"{source}: the {kind.upper()} file is broken", "save or copy it again") from None
    info = ImageInfo(source, kind, rows=pixels.shape[0], columns=pixels.shape[1], window=window, warnings=tuple(notes))
    return Picture(pixels, info)


def _check_scans(where: str, data: bytes) -> None:
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise InputError(f"{where}: has more than {MAX_SCANS} progressive scans", "save it again as a plain JPEG")


def _import_plugins(data: bytes) -> None:
    """Now, so that they are quiet from their first file on."""
    from PIL import JpegImagePlugin, PngImagePlugin  # noqa: F401

    if b"exif" in data or b"eXIf" in data or b"Exif" in data:
        from PIL import TiffImagePlugin  # noqa: F401
    quieten()


def _raw_mode(image: Image.Image) -> str:
    """How the samples stand in the file of an image that is not decoded yet."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _decoded(where: str, kind: str, file: BinaryIO, notes: list[str], stack: ExitStack) -> tuple[list[Image.Image], str]:
    """The image in the file, decoded, and ""; or the images that hold the bytes of its 16-bit colours, and their raw mode."""
    lean = (lean_png if kind == "png" else lean_jpeg)(where, file)
    _import_plugins(lean)
    if kind == "jpeg":
        _check_scans(where, lean)
    from PIL import Image

    def opened(data: BytesIO, raw_mode: str = "") -> Image.Image:
        image = Image.open(data, formats=(kind.upper(),))
        check_size(where, image.width, image.height)
        stack.enter_context(large_alone(image.width * image.height))
        if raw_mode:
            image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return image

    if kind == "jpeg":
        try:
            image, scans = image_from_jpeg(lean, opened)
        except Refused as error:
            raise InputError(f"{where}: {error}", "save or copy it again") from None
        if scans.coarse:
            notes.append("the JPEG lacks its last scans: fine detail is missing")
        return [image], ""
    image = opened(BytesIO(lean))
    wide = raw_mode if (raw_mode := _raw_mode(image)) in _WIDE else ""
    images = [opened(BytesIO(lean), bytes_of) for bytes_of in _WIDE[wide]] if wide else [image]
    for image in images:
        image.load()
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not np.asarray(last).any() and png_is_cut(lean):
        raise InputError(f"{where}: it is cut short or its header lies: its data does not fill its rows", "save or copy it again")
    return images, wide


def _pixels_from_image(images: list[Image.Image], wide: str = "") -> tuple[NDArray[np.uint8], Window | None]:
    """Of one image, or of those that ``_decoded`` gives for 16-bit colours."""
    from PIL import Image, ImageOps

    images = [ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image for image in images]
    image = images[0]
    clear = image.info.get("transparency")  # of a PNG: the value, or the colour, of pixels that are not there

    def crop(part: slice, image: Image.Image = image) -> Image.Image:
        return image.crop((0, part.start, image.width, part.stop))

    def whole_range(part: slice) -> tuple[NDArray[Any], NDArray[Any] | None]:
        if wide == "LA;16B":
            both = np.asarray(crop(part)).view(">u2")
            return both[:, :, 0], _opacity(both[:, :, 1])
        if not wide:
            values = np.asarray(crop(part))
            return values, (values != clear).astype(np.float64) if isinstance(clear, int) else None
        high, low = (np.asarray(crop(part, image)) for image in images)
        values = high.astype(np.uint16) << 8 | low
        if wide == "RGBA;16B":
            return values[:, :, :3], _opacity(values[:, :, 3])
        return values, (values != clear).any(axis=2).astype(np.float64) if isinstance(clear, tuple) else None

    if wide or image.mode.startswith(("I", "F")):  # Pillow's own convert("L") would clip these
        shape = (image.height, image.width, 3) if wide in ("RGB;16B", "RGBA;16B") else (image.height, image.width)
        pixels, window = _spread(whole_range, shape)
        return pixels if pixels.ndim == 2 or not _is_gray(pixels) else np.ascontiguousarray(pixels[:, :, 0]), window

    def shown(part: slice) -> Image.Image:
        band = crop(part)
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or clear is not None:
            band = band.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", band.size, (0, 0, 0, 255)), band).convert("RGB")
        return band.convert("L" if image.mode in ("1", "L") else "RGB")

    parts = list(bands(image.height, image.width))
    gray = all(_is_gray(np.asarray(shown(part))) for part in parts)  # also grayscale stored as colour
    pixels = np.empty((image.height, image.width) if gray else (image.height, image.width, 3), np.uint8)
    for part in parts:
        band = np.asarray(shown(part))
        pixels[part] = band[:, :, 0] if gray and band.ndim == 3 else band
    return pixels, None


def _opacity(alpha: NDArray[np.uint16]) -> NDArray[Any] | None:
    return None if (alpha == 65535).all() else alpha / 65535


def _is_gray(pixels: NDArray[np.uint8]) -> bool:
    if pixels.ndim == 2:
        return True
    return np.array_equal(pixels[:, :, 0], pixels[:, :, 1]) and np.array_equal(pixels[:, :, 1], pixels[:, :, 2])


def _spread(rows: Rows, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], Window]:
    """An automatic window over the finite values of what is not clear: the smallest becomes 0, the largest 255. Not-a-number becomes 0.

    One window for all channels, so that colours keep their hue. What is not opaque lies over black.
    """
    low, high, alpha = math.inf, -math.inf, None
    for part in bands(*shape[:2]):
        values, alpha = rows(part)
        if values.dtype.itemsize > 2 or values.dtype.kind not in "bui":
            values = values.astype(np.float64)
            values = values[np.isfinite(values) if alpha is None else np.isfinite(values) & (alpha > 0)]
        elif alpha is not None and not (alpha > 0).all():
            values = values[alpha > 0]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low > high and alpha is None:
        raise InputError("array: no finite value in it", "give numbers")
    low, high = (low, high) if low <= high else (0.0, 0.0)

    def levels(values: NDArray[Any]) -> NDArray[np.uint8]:
        with np.errstate(all="ignore"):  # halves: the range of float64 itself may overflow
            unit = np.clip((values.astype(np.float64) / 2 - low / 2) / ((high / 2 - low / 2) or 1.0), 0, 1)
        return np.asarray(np.floor(np.nan_to_num(unit) * 255 + 0.5).astype(np.uint8))

    table = levels(np.arange(1 << 16))  # of what a 16-bit file holds: the same arithmetic, done once per value
    pixels = np.empty(shape, np.uint8)
    for part in bands(*shape[:2]):
        values, alpha = rows(part)
        level = np.take(table, values) if values.dtype.kind == "u" and values.dtype.itemsize == 2 else levels(values)
        if alpha is not None:
            level = np.floor(level * (alpha if level.ndim == 2 else alpha[:, :, None]) + 0.5).astype(np.uint8)
        pixels[part] = level
    return pixels, automatic_window(low, high)
