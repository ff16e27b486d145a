"""Baseline JPEG by Pillow; what it does not read goes to GDCM."""

from __future__ import annotations

from io import BytesIO

import numpy as np

from pmclip_deploy.imaging.decoders import gdcm
from pmclip_deploy.imaging.decoders.jpeg_header import header_of as header_of
from pmclip_deploy.imaging.decoders.jpeg_whole import image_from_jpeg
from pmclip_deploy.imaging.decoders.layout import Header, Layout, Samples
from pmclip_deploy.imaging.quiet import quieten


def decode(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
    assert header is not None
    if header.process == 0xC3 or header.precision > 8:
        return gdcm.decode(frame, layout, header)
    from PIL import Image
    from PIL import JpegImagePlugin as JpegImagePlugin  # else more plugins are imported, which speak up

    quieten()
    ybr = (header.color or layout.photometric).startswith("YBR")
    # What the file holds is told to libjpeg, not left to its guess: the DICOM header decides where the codestream is silent.
    args = ("L", "") if layout.samples == 1 else ("RGB", "YCbCr" if ybr else "RGB")

    def opened(data: BytesIO) -> Image.Image:
        image = Image.open(data, formats=("JPEG",))
        image.tile = [tile._replace(args=args) for tile in image.tile]
        return image

    samples = np.asarray(image_from_jpeg(frame, opened)[0])
    return samples, layout.photometric if layout.samples == 1 else "RGB"
