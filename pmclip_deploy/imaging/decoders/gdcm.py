"""Lossless and 12-bit JPEG, by GDCM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from struct import pack
from threading import Lock

import numpy as np

from pmclip_deploy import process
from pmclip_deploy.imaging.decoders.jpeg_header import segments
from pmclip_deploy.imaging.decoders.layout import Header, Layout, Refused, Samples, as_declared

_one = Lock()  # GDCM has one decode at a time, whoever's threads read


@contextmanager
def _native_stderr_off() -> Iterator[None]:
    """GDCM's libjpeg writes straight to file descriptor 2 while it looks for the right bit depth; nothing that a file holds.

    In a process of somebody else, whose threads write there too, it may.
    """
    if not process.taken_over:
        yield
        return
    with process.stderr:
        try:
            kept = os.dup(2)
        except OSError:  # closed: nothing to keep quiet
            yield
            return
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(null)


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
    with _one, _native_stderr_off():
        try:
            buffer = image.GetBuffer().encode("utf-8", "surrogateescape")
        except Exception:
            raise Refused("its compressed data is broken") from None
    if len(buffer) != layout.pixels * layout.samples * bits // 8:
        raise Refused("its compressed data is broken")
    samples = np.frombuffer(buffer, f"<u{bits // 8}")
    return as_declared(samples, layout, header), layout.photometric
