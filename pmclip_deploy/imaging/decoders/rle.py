"""RLE, PS3.5 annex G."""

from __future__ import annotations

from struct import unpack_from

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.imaging.decoders.layout import LARGE, Header, Layout, Refused, Samples, significant_bits


def header_of(frame: bytes, layout: Layout) -> None:
    segments = unpack_from("<L", frame)[0]
    if segments != layout.samples * max(layout.allocated // 8, 1):
        raise Refused("its RLE segments do not fit its samples per pixel and bits allocated")
    if layout.pixels * segments > (len(frame) - 64) * 64:  # two bytes give at most 128
        raise Refused("it has too few compressed bytes for its rows and columns")


def decode(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
    """Each segment is one PackBits run over a byte plane, most significant byte first."""
    width = max(layout.allocated // 8, 1)
    count = layout.samples * width
    starts = [*unpack_from(f"<{count}L", frame, 4), len(frame)]
    if starts[0] < 64 or starts != sorted(starts):
        raise Refused("its RLE segments are out of order")
    planes = np.empty((layout.samples, layout.pixels, width), np.uint8)
    for index in range(count):
        if not _unpack_bits(frame, starts[index], starts[index + 1], planes[index // width, :, width - 1 - index % width]):
            raise Refused("its compressed data is cut short or broken")
    values = planes.view(layout.dtype)[:, :, 0]  # (samples, pixels)
    return significant_bits(np.ascontiguousarray(values.T), layout), layout.photometric


def _unpack_bits(frame: bytes, start: int, end: int, plane: NDArray[np.uint8]) -> bool:
    """Fills the plane; bytes after its last pixel are padding (PS3.5 G.3.1). Pillow's decoder, or for much one without its copies."""
    if plane.size >= LARGE:
        from pmclip_deploy.kernels.pixels import unpack_bits

        enough: bool | None = unpack_bits(np.frombuffer(frame, np.uint8)[start:end], plane)
        if enough is not None:
            return enough
    from PIL import Image

    try:
        plane[:] = np.frombuffer(Image.frombytes("L", (plane.size, 1), frame[start:end], "packbits", "L").tobytes(), np.uint8)
    except ValueError:
        return False
    return True
