"""JPEG-LS, by CharLS."""

from __future__ import annotations

from itertools import chain, groupby

import numpy as np

from pmclip_deploy.imaging.decoders.jpeg_header import header_of as header_of
from pmclip_deploy.imaging.decoders.jpeg_header import segments
from pmclip_deploy.imaging.decoders.layout import Header, Layout, Refused, Samples, as_declared

TOO_LONG = ("leading start byte (0xFF)", "still contains encoded data")  # CharLS, of bytes behind the last sample


def decode(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
    import jpeg_ls  # type: ignore[import-untyped]

    assert header is not None
    for data, _ in groupby(chain((frame,), (_with_zeros(frame, count) for count in range(4)))):
        try:
            buffer, info = jpeg_ls.decode_pixel_data(data)
            break
        except Exception as error:
            # What is no padding is broken, and so is a stream that is too long even without its last zeros.
            if any(text in str(error) for text in TOO_LONG) is not (data is frame):
                raise Refused("its compressed data is broken") from None
    else:
        raise Refused("its compressed data is broken")
    samples = np.frombuffer(buffer, "u1" if header.precision <= 8 else "<u2")
    if samples.size != layout.pixels * layout.samples:
        raise Refused("its compressed data is broken")
    if layout.samples == 3 and info["interleave_mode"] == 0:  # plane by plane
        samples = samples.reshape(3, -1).T
    return as_declared(samples, layout, header), header.color if header.color == "RGB" else layout.photometric


def _with_zeros(frame: bytes, count: int) -> bytes:
    """The stream with at most ``count`` zero bytes at the end of each scan.

    CharLS refuses a padded scan, and also one whose own zeros are cut. A scan has three zero bytes of its own at most:
    its last code ends in up to 16 zero bits, and its last byte in 7.
    """
    out, begin, is_scan = b"", 0, False
    for marker, _, at in segments(frame):
        if is_scan:
            scan = frame[begin:at].rstrip(b"\xff")  # fill
            kept = scan.rstrip(b"\0")
            out += scan[: len(kept) + max(count, kept.endswith(b"\xff"))]
            begin = at
        is_scan = marker == 0xDA
    return out + frame[begin:]
