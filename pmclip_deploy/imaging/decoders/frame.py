"""Decodes one compressed frame to its stored values: its transfer syntax chooses the codec's file.

pydicom's own plugins are not used: which of them runs depends on what else is installed, its JPEG 2000 plugin
needs one more package, and it refuses 12-bit JPEG, which GDCM decodes. Before a decoder allocates or runs, the frame's own header
is compared with the DICOM header, and the number of bytes with the least that so many pixels can take.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from struct import error as StructError

from pmclip_deploy.imaging.decoders.layout import Header, Layout, Refused, Samples

LOSSLESS = tuple(f"1.2.840.10008.1.2.4.{tail}" for tail in (57, 70, 80, 90, 201, 202))
CODECS = {  # the file that reads it, imported when a frame needs it: most files need none
    "1.2.840.10008.1.2.4.50": "jpeg",  # baseline
    "1.2.840.10008.1.2.4.51": "jpeg",  # extended, 8 and 12 bits
    "1.2.840.10008.1.2.4.57": "jpeg",  # lossless
    "1.2.840.10008.1.2.4.70": "jpeg",  # lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": "jpeg_ls",  # lossless
    "1.2.840.10008.1.2.4.81": "jpeg_ls",  # near-lossless
    "1.2.840.10008.1.2.4.90": "jpeg2000",  # lossless
    "1.2.840.10008.1.2.4.91": "jpeg2000",
    "1.2.840.10008.1.2.4.201": "jpeg2000",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202": "jpeg2000",  # HTJ2K lossless, RPCL
    "1.2.840.10008.1.2.4.203": "jpeg2000",  # HTJ2K
    "1.2.840.10008.1.2.5": "rle",
}


def samples_from_codestream(syntax: str, frame: bytes, layout: Layout) -> tuple[Samples, str]:
    """Decode one compressed frame. -> stored values, and the photometric interpretation they now have"""
    codec = import_module(f"{__package__}.{CODECS[syntax]}")
    try:
        header: Header | None = codec.header_of(frame, layout)
    except (IndexError, StructError):
        raise Refused("its compressed data is cut short or broken") from None
    if header is not None:
        _check(header, frame, layout)
        header = replace(header, lossless=syntax in LOSSLESS)
    samples, photometric = codec.decode(frame, layout, header)
    if samples.size != layout.pixels * layout.samples:
        raise Refused("its compressed data decodes to another size than the header says")
    return samples.reshape((layout.rows, layout.columns, 3)[: 2 if layout.samples == 1 else 3]), photometric


def _check(header: Header, frame: bytes, layout: Layout) -> None:
    if (header.rows, header.columns) != (layout.rows, layout.columns):
        raise Refused(f"its header says {layout.rows} x {layout.columns} and its compressed data {header.rows} x {header.columns}")
    if header.components != layout.samples:
        raise Refused(f"its header says {layout.samples} samples per pixel and its compressed data {header.components}")
    if not 1 <= header.precision <= max(layout.allocated, 8):
        raise Refused(f"its header has {layout.allocated} bits per sample and its compressed data {header.precision}")
    # Huffman codes take at least one bit: per sample where lossless, twice per block of 64 where sequential DCT.
    per_byte = {0xC3: 8, 0xC0: 256, 0xC1: 256}.get(header.process)
    if per_byte and layout.pixels * layout.samples > (len(frame) + 64) * per_byte * (1 if header.process == 0xC3 else 4):
        raise Refused("it has too few compressed bytes for its rows and columns")
