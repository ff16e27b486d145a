"""Whether a JPEG holds all of its picture: libjpeg fills what is missing with grey and goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from pmclip_deploy.imaging.decoders.jpeg_header import START_OF_FRAME
from pmclip_deploy.imaging.decoders.layout import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

MAX_SCANNED = 1 << 29  # pixels of all scans: a plain JPEG has one, a progressive one some ten, so that 50 M pixels are read
_MARKER = re.compile(rb"\xff+([\x01-\xfe])", re.DOTALL)
_PADDING = bytes(step * 73 % 251 for step in range(1, 251))
_ARITHMETIC = range(0xC9, 0xD0)  # these codes may end before their picture does (ISO/IEC 10918-1 D.1.8)


@dataclass(frozen=True)
class Scans:
    """What the markers of a codestream say of its scans."""

    count: int
    ends: list[tuple[int, int]]  # of data between two markers: its place, and the restart marker that would come next, or 0
    one: bool  # one scan without restart intervals: only its end can be missing
    in_order: bool  # the restart markers (ISO/IEC 10918-1 E.2.4)
    empty: bool  # a component has no scan
    coarse: bool  # coefficients, or their last bits, are in no scan
    arithmetic: bool

    @classmethod
    def of(cls, data: bytes) -> Scans:
        ends, at, scans, restarts, in_order, progressive, arithmetic = list[tuple[int, int]](), 2, 0, False, True, False, False
        components: tuple[int, ...] = ()
        low_bits: dict[tuple[int, int], int] = {}  # (component, coefficient) -> bits that no scan held yet
        while (found := _MARKER.match(data, at)) is not None and found[1] != b"\xd9":
            marker, at = found[1][0], found.end()
            length = int.from_bytes(data[at : at + 2], "big")
            body, at = data[at + 2 : at + length], at + length
            if marker in START_OF_FRAME and len(body) > 5:
                components, progressive, arithmetic = tuple(body[6::3]), marker in (0xC2, 0xCA), marker in _ARITHMETIC
            elif marker == 0xDD:
                restarts = any(body)
            elif marker == 0xDA and len(body) > 3:
                scans += 1
                first, last, bits = body[-3:] if progressive else (0, 63, 0)
                for component in body[1 : 1 + 2 * body[0] : 2]:
                    low_bits.update({(component, place): bits & 15 for place in range(first, min(last, 63) + 1)})
                number = 0
                while (found := _MARKER.search(data, at)) is not None and found[1][0] & 0xF8 == 0xD0:
                    in_order &= found[1][0] & 7 == number
                    ends.append((found.start(), 0))
                    at, number = found.end(), (number + 1) % 8
                at = len(data) if found is None else found.start()
                ends.append((at, 0xD0 + number if restarts else 0))
        places = [(component, place) for component in components for place in range(64)]
        return cls(
            count=scans,
            ends=ends,
            one=scans == 1 and not restarts,
            in_order=in_order,
            empty=any((component, 0) not in low_bits for component in components),
            coarse=any(low_bits.get(place, 1) for place in places),
            arithmetic=arithmetic,
        )

    def padded(self, data: bytes) -> bytes:
        """The same codestream with bytes behind all its codes. They are skipped, unless codes are missing: then they change the picture."""
        parts, kept, view = list[bytes | memoryview](), 0, memoryview(data)
        for place, restart in self.ends:
            parts += view[kept:place], _PADDING, *([bytes((0xFF, restart)), _PADDING] if restart else [])
            kept = place
        return b"".join([*parts, view[kept:]])


def image_from_jpeg(data: bytes, opened: Callable[[BytesIO], Image.Image]) -> tuple[Image.Image, Scans]:
    """``opened`` of the codestream, decoded. Raises Refused if a part of the picture is missing, or if its scans are too much work."""
    scans, image = Scans.of(data), opened(BytesIO(data))
    if image.width * image.height * scans.count > MAX_SCANNED:
        raise Refused("its scans pass over a picture of its size too often; save it as a baseline JPEG")
    digest = None
    if not scans.arithmetic and not scans.one:  # first, so that two decoded pictures are never held
        digest = _digest(opened(BytesIO(scans.padded(data))))
    image.load()
    if not scans.arithmetic and scans.one:
        corner = image.getpixel((image.width - 1, image.height - 1))
        if all(value in (127, 128) for value in (corner if isinstance(corner, tuple) else (corner,))):  # as what libjpeg fills with
            digest = _digest(opened(BytesIO(scans.padded(data))))
    if scans.empty or not scans.in_order or (digest is not None and digest != _digest(image)):
        raise Refused("it is cut short or its header lies: its data does not fill its rows")
    return image, scans


def _digest(image: Image.Image) -> bytes:
    digest, step = blake2b(), max(1, (1 << 20) // image.width)
    for top in range(0, image.height, step):
        band: Any = np.asarray(image.crop((0, top, image.width, min(top + step, image.height))))
        digest.update(band.data)
    return digest.digest()
