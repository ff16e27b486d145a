"""JPEG-LS, by CharLS."""

from __future__ import annotations

import numpy as np

from pmclip_deploy.imaging.decoders.jpeg_header import header_of as header_of
from pmclip_deploy.imaging.decoders.layout import Header, Layout, Refused, Samples, as_declared


def decode(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
    import jpeg_ls  # type: ignore[import-untyped]

    assert header is not None
    try:
        buffer, info = jpeg_ls.decode_pixel_data(frame)
    except Exception:
        raise Refused("its compressed data is broken") from None
    samples = np.frombuffer(buffer, "u1" if header.precision <= 8 else "<u2")
    if samples.size != layout.pixels * layout.samples:
        raise Refused("its compressed data is broken")
    if layout.samples == 3 and info["interleave_mode"] == 0:  # plane by plane
        samples = samples.reshape(3, -1).T
    return as_declared(samples, layout, header), header.color if header.color == "RGB" else layout.photometric
