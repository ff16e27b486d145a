"""Lossless and 12-bit JPEG, by GDCM."""

from __future__ import annotations

from struct import pack
from threading import Lock

import numpy as np

from pmclip_deploy import process
from pmclip_deploy.imaging.decoders.jpeg_header import segments
from pmclip_deploy.imaging.decoders.layout import Header, Layout, Refused, Samples, as_declared

_one = Lock()  # GDCM has one decode at a time, whoever's threads read


def _without_hints(frame: bytes) -> bytes:
    """The same picture with one application segment, Adobe's "no transform": GDCM converts colours, or aborts, by what it finds there."""
    head = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    for marker, body, at in segments(frame):
        if marker == 0xDA:
            return head + frame[at:]
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            head += b"\xff" + bytes([marker]) + pack(">H", len(body) + 2) + body
    return frame


def decode(frame: bytes, layout: Layout, header: Header) -> tuple[Samples, str]:
    import gdcm  # type: ignore[import-untyped]

    syntax = {0xC3: "1.2.840.10008.1.2.4.57"}.get(header.process, "1.2.840.10008.1.2.4.51")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(_without_hints(frame))
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    bits = 8 if header.precision <= 8 else 16
    depth = max(header.precision, 8)  # GDCM aborts the process where 8 bits hold fewer
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((layout.columns, layout.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.RGB if layout.samples == 3 else gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    if layout.samples == 3:
        image.SetPlanarConfiguration(0)
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    image.SetPixelFormat(gdcm.PixelFormat(layout.samples, bits, depth, depth - 1, 0))
    with _one, process.native_stderr_off():  # its libjpeg writes there while it looks for the right bit depth; nothing that a file holds
        try:
            buffer = image.GetBuffer().encode("utf-8", "surrogateescape")
        except Exception:
            raise Refused("its compressed data is broken") from None
    if len(buffer) != layout.pixels * layout.samples * bits // 8:
        raise Refused("its compressed data is broken")
    samples = np.frombuffer(buffer, f"<u{bits // 8}")
    return as_declared(samples, layout, header), layout.photometric
