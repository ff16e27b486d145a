"""A picture as a viewer shows it, and what every reader checks first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import ImageInfo
from pmclip_deploy.errors import InputError

if TYPE_CHECKING:
    from pmclip_deploy.header.read import Header


MAX_PIXELS = 1 << 26  # 8192 x 8192, twice the largest mammogram: more is a mistake or an attack

LARGE = 1 << 24  # pixels: while it is decoded, a picture may take eight times its memory

BAND = 1 << 18  # pixels that are converted at a time: the wide values of a whole picture take many times its memory


@dataclass(frozen=True)
class Picture:
    """What a person would see on a viewer, and where it came from."""

    pixels: NDArray[np.uint8]  # (H, W) grayscale with 0 = black, or (H, W, 3) RGB
    info: ImageInfo
    header: Header | None = None  # what a DICOM file says of it

    def __repr__(self) -> str:  # without the pixels and what the header says of a patient
        return f"Picture({self.pixels.shape[0]} x {self.pixels.shape[1]}, {self.info.format})"


def head_of_file(source: str) -> bytes:
    """The first 132 bytes, or one clear line on why there are none."""
    path = Path(source)
    try:
        if path.is_dir():
            raise InputError(f"{source}: is a folder, not a picture", "give a file")
        if path.exists() and not path.is_file():
            raise InputError(f"{source}: is a device or a pipe, not a file", "save the picture and give that")
        with path.open("rb") as file:
            head = file.read(132)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file", "check the path") from None
    except PermissionError:
        raise InputError(f"{source}: permission to read it was denied", "check the file's rights") from None
    except (OSError, ValueError):  # ValueError: a null byte in the path
        raise InputError(f"{source!r}: cannot be opened", "check the path") from None
    if not head:
        raise InputError(f"{source}: the file is empty", "copy it again")
    return head


def check_size(where: str, width: int, height: int) -> None:
    """Raises InputError if there are more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise InputError(f"{where}: {width} x {height} is more than {MAX_PIXELS} pixels", "make it smaller")


_large = RLock()


@contextmanager
def large_alone(pixels: int) -> Iterator[None]:
    """Of pictures of more than LARGE pixels, one is decoded at a time, whoever's threads read."""
    if pixels <= LARGE:
        yield
        return
    with _large:
        yield


def bands(height: int, width: int) -> Iterator[slice]:
    """Rows, about BAND pixels at a time."""
    step = max(1, BAND // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def automatic_window(low: float, high: float) -> tuple[float, float]:
    """The (center, width) whose LINEAR function (PS3.3 C.11.2.1.2.1) takes ``low`` to black and ``high`` to white."""
    return (low + high + 1) / 2, high - low + 1
