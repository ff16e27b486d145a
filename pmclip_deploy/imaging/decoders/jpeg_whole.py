"""Whether a JPEG holds all of its picture: libjpeg fills what is missing with grey and goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from pmclip_deploy.imaging.decoders.jpeg_header import START_OF_FRAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

_MARKER = re.compile(rb"\xff+([\x01-\xfe])", re.DOTALL)
_PADDING = bytes(step * 73 % 251 for step in range(1, 251))
_ARITHMETIC = range(0xC9, 0xD0)  # these codes may end before their picture does (ISO/IEC 10918-1 D.1.8)


@dataclass(frozen=True)
class Scans:
    """What the markers of a codestream say of its scans."""

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
            ends=ends,
            one=scans == 1 and not restarts,
            in_order=in_order,
            empty=any((component, 0) not in low_bits for component in components),
            coarse=any(low_bits.get(place, 1) for place in places),
            arithmetic=arithmetic,
        )

    def padded(self, data: bytes) -> bytes:
        """The same codestream with bytes behind all its codes. They are skipped, unless codes are missing: then they change the picture."""
        out, kept = bytearray(), 0
        for place, restart in self.ends:
            out += data[kept:place] + _PADDING
            if restart:
                out += bytes((0xFF, restart)) + _PADDING
            kept = place
        return bytes(out + data[kept:])


def is_cut(data: bytes, scans: Scans, image: Image.Image, opened: Callable[[BytesIO], Image.Image]) -> bool:
    """Whether ``image``, decoded of ``data``, shows more than its scans hold. ``opened`` decodes as ``image`` was."""
    if scans.empty or not scans.in_order:
        return True
    corner = image.getpixel((image.width - 1, image.height - 1))
    is_filler = all(value in (127, 128) for value in (corner if isinstance(corner, tuple) else (corner,)))
    if scans.arithmetic or (scans.one and not is_filler):
        return False
    return _digest(image) != _digest(opened(BytesIO(scans.padded(data))))


def _digest(image: Image.Image) -> bytes:
    digest, step = blake2b(), max(1, (1 << 20) // image.width)
    for top in range(0, image.height, step):
        band: Any = np.asarray(image.crop((0, top, image.width, min(top + step, image.height))))
        digest.update(band.data)
    return digest.digest()
