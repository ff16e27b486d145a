"""Whatever an image is given as, to a picture."""

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, Union

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.errors import InputError, PmclipError, UsageError

if TYPE_CHECKING:
    import PIL.Image
    from pydicom import Dataset

    from pmclip_deploy.imaging.picture import Picture


MAX_BYTES = 1 << 30  # that are read of a file object: a stream may have no end
CHUNK = 1 << 20  # bytes: a read may take its memory before it knows how much there is


class BinaryFile(Protocol):
    """A file object, opened for reading in binary mode."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


Image: TypeAlias = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, BinaryFile, "PIL.Image.Image", NDArray[Any], "Dataset", "Picture"
]


def picture_from_image(image: Image, frame: int | None = None, window: tuple[float, float] | None = None) -> "Picture":
    """The one way in: a path, what a file holds, as bytes or as a file object, a PIL image, an array, a pydicom Dataset, or a Picture.

    The same picture in any of these forms is answered the same. ``frame`` counts from 0, ``window`` is (center, width) in modality units;
    both are for DICOM. A file object is read from where it stands to its end, 1 GiB at most, and stays open: one that can seek is put back
    to where it stood, and another one stays at its end.

    Raises InputError where it cannot be read, and UsageError where it is none of these. Messages name what has no path by its kind, as
    "bytes", "BytesIO", "PIL image", "array" or "dataset".
    """
    from pmclip_deploy.imaging.picture import Picture

    if isinstance(image, (str, os.PathLike)):
        from pmclip_deploy.imaging.read import picture_from_path

        return picture_from_path(image, frame, window)
    if isinstance(image, Picture):
        return image
    if isinstance(image, np.ndarray) or _is_pil(image):
        from pmclip_deploy.imaging.raster import picture_from_array, picture_from_pil
        from pmclip_deploy.imaging.read import refuse_frame_and_window

        refuse_frame_and_window("array" if isinstance(image, np.ndarray) else "PIL image", frame, window)
        return picture_from_array(image) if isinstance(image, np.ndarray) else picture_from_pil(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        from pmclip_deploy.imaging.read import picture_from_bytes

        return picture_from_bytes("bytes", bytes(image), frame, window)
    if _is_file(image):
        from pmclip_deploy.imaging.read import picture_from_bytes

        return picture_from_bytes(type(image).__name__, _bytes_from_file(image), frame, window)
    from pydicom import Dataset

    if not isinstance(image, Dataset):
        forms = "a path, bytes, a binary file object, a PIL image, an array or a pydicom Dataset"
        raise UsageError(f"an image is {forms}, not a {type(image).__name__}")
    from pmclip_deploy.imaging.dicom import picture_from_dicom

    return picture_from_dicom(image, frame, window)


def _is_pil(image: object) -> "TypeGuard[PIL.Image.Image]":
    module = sys.modules.get("PIL.Image")  # which is imported where there is such an image
    return module is not None and isinstance(image, module.Image)


def _is_file(image: object) -> TypeGuard[BinaryFile]:
    return callable(getattr(image, "read", None))


def _bytes_from_file(file: BinaryFile) -> bytes:
    where, parts, left, place = type(file).__name__, list[bytes](), MAX_BYTES + 1, None
    if getattr(file, "closed", False) is True:
        raise InputError(f"{where}: is closed", "give it while it is open")
    try:
        place = _place(file)
        while left > 0:
            part = file.read(min(left, CHUNK))
            if not isinstance(part, bytes):  # of a text file, of one that does not block, of one to be awaited
                raise InputError(f"{where}: its read() gives {type(part).__name__}, not bytes", "give a file object in binary mode")
            if not part:
                return b"".join(parts)
            parts.append(part)
            left -= len(part)
        raise InputError(f"{where}: holds more than {MAX_BYTES >> 20} MiB", "save it, and give its path")
    except PmclipError:
        raise
    except Exception:  # a file object's class raises what it likes
        raise InputError(f"{where}: cannot be read", "give one that is open for reading, in binary mode") from None
    finally:
        if place is not None:
            with suppress(Exception):
                file.seek(place)  # type: ignore[attr-defined]


def _place(file: Any) -> int | None:
    """Where a file object stands that can be put back there."""
    seekable = file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")  # SpooledTemporaryFile has it from 3.11 on
    return int(file.tell()) if seekable else None
