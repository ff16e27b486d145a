"""JPEG 2000 and HTJ2K, by OpenJPEG: Pillow's, and that of pylibjpeg-openjpeg, which is older, for what Pillow does not hand on."""

from __future__ import annotations

from io import BytesIO
from struct import unpack_from

import numpy as np

from pmclip_deploy.imaging.decoders.layout import Header, Layout, Refused, Samples, as_declared
from pmclip_deploy.imaging.quiet import quieten

SPARE = 48 << 20  # bytes that may be taken beyond four times the picture
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
    return Header(bottom - top, right - left, components, (sizes[0][0] & 0x7F) + 1, signed=bool(sizes[0][0] & 0x80), tile=tile)


def decode(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
    assert header is not None
    frame = frame[frame.find(J2K_START) :]  # what boxes say counts for nothing, so nothing reads them
    width = 1 if header.precision <= 8 else 2 if header.precision <= 16 else 4
    # OpenJPEG takes four bytes a sample: Pillow one tile after the other, openjpeg all of them.
    most = layout.pixels * layout.samples * layout.allocated // 8 * 4 + SPARE
    tiled = header.tile * layout.samples * (4 + width) + layout.pixels * (width if layout.samples == 1 else 4)
    samples = _j2k_in_threads(frame, layout, header) if tiled <= most else None
    if samples is None and layout.pixels * layout.samples * (4 + width) > most:
        raise Refused("to decode its JPEG 2000 takes more than four times its memory; store it in tiles or uncompressed")
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
