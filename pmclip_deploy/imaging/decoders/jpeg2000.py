"""JPEG 2000 and HTJ2K, by OpenJPEG: Pillow's, and that of pylibjpeg-openjpeg, which is older, for what Pillow does not hand on."""

from __future__ import annotations

from io import BytesIO
from struct import unpack_from

import numpy as np

from pmclip_deploy.imaging.decoders.layout import Header, Layout, Refused, Samples, as_declared
from pmclip_deploy.imaging.quiet import quieten

SPARE = 48 << 20  # bytes that may be taken beyond MOST times the picture
MOST = 8  # OpenJPEG takes four bytes a sample, and Pillow as many again: a picture of 8 bits takes six times its size
BLOCK_BYTES = 640  # that OpenJPEG takes for a code block or precinct before it reads one
MAX_PARTS = 1 << 18  # tile-parts: each costs time
J2K_START = b"\xff\x4f\xff\x51"  # SOC, SIZ


def header_of(frame: bytes, layout: Layout) -> Header:
    start = frame.find(J2K_START)  # behind the boxes of a (non-conformant) JP2 file
    if start < 0 or start > 4096:
        raise Refused("its compressed data is not JPEG 2000, which its transfer syntax says it is")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components = unpack_from(">8LH", frame, start + 8)
    if tile_width == 0 or tile_height == 0 or left >= right or top >= bottom:
        raise Refused("its compressed data is broken")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > 65535:  # ISO/IEC 15444-1 A.4.2
        raise Refused("its compressed data has more tiles than JPEG 2000 allows")
    sizes = [unpack_from("3B", frame, start + 42 + 3 * index) for index in range(min(components, 4))]
    if any(size != (sizes[0][0], 1, 1) for size in sizes):
        raise Refused("its compressed data has components of different size or depth")
    tile = min(tile_width, right - left) * min(tile_height, bottom - top)
    blocks = _blocks(frame[start:], components)
    precision, signed = (sizes[0][0] & 0x7F) + 1, bool(sizes[0][0] & 0x80)
    return Header(bottom - top, right - left, components, precision, signed, tile, blocks)


def _blocks(codestream: bytes, components: int) -> int:
    """The most code blocks that a tile has, by the coding styles in all headers (ISO/IEC 15444-1 A.6.1, A.6.2, B.6 to B.8).

    A kilobyte may say that its code blocks have one sample each.
    """
    right, bottom, left, top, width, height = unpack_from(">6L", codestream, 8)
    width, height = min(width, right - left), min(height, bottom - top)
    most, at, end = 0, 2, 0  # ``end`` is that of a tile-part
    for _ in range(MAX_PARTS):
        marker, length = unpack_from(">2H", codestream, at) if at + 4 <= len(codestream) else (0xFFD9, 0)
        if marker in (0xFF52, 0xFF53):  # COD, COC
            body = codestream[at + 4 : at + 2 + length]
            style, rest = (body[0], body[5:]) if marker == 0xFF52 else (body[1 + (components > 256)], body[2 + (components > 256) :])
            levels, blocks = min(rest[0], 32), 0
            for level in range(levels + 1):  # of resolution, from the smallest
                precinct, number = rest[5 + level] if style & 1 else 0xFF, 3 if level else 1  # of subbands
                for side, block, bits in ((width, rest[1], precinct & 15), (height, rest[2], precinct >> 4)):
                    log = min((block & 15) + 2, max(bits - (level > 0), 0))
                    number *= (side >> (levels - level + (level > 0)) >> log) + 2
                blocks += number
            most = max(most, blocks * components)
        elif marker == 0xFF90:  # SOT
            size = unpack_from(">L", codestream, at + 6)[0]
            end = at + size if size > 0 else len(codestream)
        if marker == 0xFFD9:
            return most
        at = end if marker == 0xFF93 else at + 2 + length  # SOD
        if at <= 0 or (marker == 0xFF93 and not end):
            return most
    raise Refused(f"its compressed data is in more than {MAX_PARTS} pieces")


def decode(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
    assert header is not None
    frame = frame[frame.find(J2K_START) :]  # what boxes say counts for nothing, so nothing reads them
    width = 1 if header.precision <= 8 else 2 if header.precision <= 16 else 4
    # Pillow decodes one tile after the other.
    need = header.tile * layout.samples * (4 + width) + layout.pixels * (width if layout.samples == 1 else 4)
    if need + header.blocks * BLOCK_BYTES > layout.pixels * layout.samples * layout.allocated // 8 * MOST + SPARE:
        raise Refused("its JPEG 2000 has so many code blocks that it takes too much memory; store it uncompressed")
    samples = _j2k_in_threads(frame, layout, header)
    if samples is None:
        from openjpeg.utils import decode_pixel_data

        quieten()
        try:
            buffer = decode_pixel_data(frame, version=2)
        except Exception:
            raise Refused("its compressed data is broken") from None
        samples = np.frombuffer(buffer, f"<u{width}")
    photometric = "RGB" if layout.photometric in ("YBR_RCT", "YBR_ICT") else layout.photometric  # undone by the decoder
    return as_declared(samples, layout, header), photometric


def _j2k_in_threads(frame: bytes, layout: Layout, header: Header) -> Samples | None:
    """OpenJPEG as Pillow has it, in its wheels built with threads; None where Pillow does not hand its values on, or gives up."""
    deepest = 16 if layout.samples == 1 else 8
    if header.precision > deepest:
        return None
    from PIL import Image, ImageFile
    from PIL import Jpeg2KImagePlugin as Jpeg2KImagePlugin  # else all plugins are imported

    quieten()
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # somebody wants broken pictures
        return None
    half = 1 << header.precision - 1 if header.signed else 0
    if header.signed:  # Pillow would move them by half of the range; as unsigned values they are moved by it in the standard itself (G.1)
        unsigned = bytearray(frame)
        for place in range(42, 42 + 3 * header.components, 3):  # Ssiz (A.5.1)
            unsigned[place] &= 0x7F
        frame = bytes(unsigned)
    try:
        with Image.open(BytesIO(frame), formats=("JPEG2000",)) as image:
            samples = np.asarray(image)
    except Exception:
        return None
    samples = samples >> (8 * samples.dtype.itemsize - header.precision)  # Pillow's stand in the highest bits
    return samples - samples.dtype.type(half)  # below 0 as two's complement, as the other decoder gives them
