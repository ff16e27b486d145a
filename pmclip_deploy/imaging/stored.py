"""Pixel data to stored values: layout, frames, fragments (PS3.5 8 and annex A)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.imaging.decoders.frame import CODECS, samples_from_codestream
from pmclip_deploy.imaging.decoders.layout import Layout, Refused, native_samples
from pmclip_deploy.imaging.dicom_file import DicomImage
from pmclip_deploy.imaging.elements import text_of, whole_number
from pmclip_deploy.imaging.picture import MAX_PIXELS

if TYPE_CHECKING:
    from pydicom import Dataset


MAX_FRAGMENTS = 1 << 18  # pieces of compressed data: each costs time


PHOTOMETRIC = {  # (0028,0004), PS3.3 C.7.6.3.1.2 -> samples per pixel
    "MONOCHROME1": 1,
    "MONOCHROME2": 1,
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}


def layout_from_dataset(dataset: Dataset) -> Layout:
    photometric = text_of(dataset, "PhotometricInterpretation")
    if photometric not in PHOTOMETRIC:
        raise Refused("its photometric interpretation (0028,0004) is missing or not supported")
    stored = whole_number(dataset, "BitsStored", whole_number(dataset, "BitsAllocated", 0))
    layout = Layout(
        rows=whole_number(dataset, "Rows", 0),
        columns=whole_number(dataset, "Columns", 0),
        samples=whole_number(dataset, "SamplesPerPixel", 1),
        allocated=whole_number(dataset, "BitsAllocated", 0),
        stored=stored,
        high_bit=whole_number(dataset, "HighBit", stored - 1),
        signed=whole_number(dataset, "PixelRepresentation", 0) == 1,
        photometric=photometric,
        planar=whole_number(dataset, "PlanarConfiguration", 0),
    )
    if layout.rows < 1 or layout.columns < 1:
        raise Refused(f"its header says {layout.rows} rows and {layout.columns} columns")
    if layout.pixels > MAX_PIXELS:
        raise Refused(f"its header says {layout.rows} x {layout.columns}, more than {MAX_PIXELS} pixels a frame")
    if layout.samples != PHOTOMETRIC[photometric]:
        raise Refused(f"its header says {layout.samples} samples per pixel, which {photometric} does not have")
    whole = layout.allocated in (8, 16, 32) or (layout.allocated == 1 and layout.samples == 1)
    if not whole or not 1 <= layout.stored <= layout.high_bit + 1 <= layout.allocated:
        raise Refused(f"its header says {layout.allocated} bits allocated, {layout.stored} stored, high bit {layout.high_bit}")
    return layout


def stored_values(image: DicomImage, layout: Layout, index: int, frames: int) -> tuple[NDArray[Any], str]:
    """Decode the one frame that is wanted. -> (H, W) or (H, W, 3) integers"""
    assert image.file is not None
    if image.syntax in CODECS:
        codestream = _codestream(image, index, frames)
        return samples_from_codestream(image.syntax, codestream, layout)
    if image.length == 0xFFFFFFFF:
        raise Refused("its pixel data is compressed and no transfer syntax says how")
    bits = layout.pixels * layout.samples * layout.allocated * frames
    declared = (bits + 7) // 8
    if layout.photometric == "YBR_FULL_422":  # C.7.6.3.1.2: two pixels share their chroma
        declared = layout.pixels * frames * 2 * layout.allocated // 8
    present = min(image.available, image.length)
    if declared > present:
        need = f"{frames} frame(s) of {layout.rows} x {layout.columns} need {declared} bytes of pixels"
        raise Refused(f"it is cut short or its header lies: {need}, {present} are there")

    if layout.allocated == 1:
        return _bits(image, layout, index), layout.photometric

    from pydicom.pixels.decoders.base import get_decoder

    options: dict[str, Any] = {
        "correct_unused_bits": False,  # pydicom assumes the high bit; native_samples reads it
        "pixel_keyword": "PixelData",
        "pixel_vr": image.vr,
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": int(layout.signed),
        "photometric_interpretation": layout.photometric,
        "planar_configuration": layout.planar,
        "number_of_frames": frames,
    }
    samples, _ = get_decoder(image.syntax).as_array(image.file, index=index, raw=True, **options)
    return native_samples(samples, layout), layout.photometric


def _bits(image: DicomImage, layout: Layout, index: int) -> NDArray[np.uint8]:
    """A frame of single bits, which may start within a byte (PS3.5 8.1.1); pydicom loses the last bits of such a frame. -> (H, W)"""
    assert image.file is not None
    first = index * layout.pixels
    start, skip = first // 16 * 2, first % 16
    image.file.seek(start, io.SEEK_CUR)
    data = np.frombuffer(image.file.read((skip + layout.pixels + 15) // 16 * 2), np.uint8)
    if not image.little and image.vr == "OW":
        data = data[: len(data) // 2 * 2].view(np.uint16).byteswap().view(np.uint8)
    bits = np.unpackbits(data, bitorder="little")[skip : skip + layout.pixels]
    return bits.reshape(layout.rows, layout.columns)


def _codestream(image: DicomImage, index: int, frames: int) -> bytes:
    """The fragments of one frame (PS3.5 A.4), after a walk over all item headers: their lengths may lie, and so may the frame count."""
    from pydicom.encaps import get_frame

    assert image.file is not None
    if image.length != 0xFFFFFFFF:
        raise Refused("its transfer syntax is a compressed one and its pixel data is not")
    file, start = image.file, image.file.tell()
    fragments, end = -1, start + image.available  # the first item is the Basic Offset Table
    while (head := file.read(8)) and head[:4] == b"\xfe\xff\x00\xe0":
        length = int.from_bytes(head[4:], "little")
        if file.tell() + length > end:
            raise Refused("it is cut short: its compressed data ends before its declared length")
        file.seek(length, io.SEEK_CUR)
        fragments += 1
        if fragments > MAX_FRAGMENTS:
            raise Refused(f"its compressed data is in more than {MAX_FRAGMENTS} pieces")
    if fragments < frames:
        raise Refused(f"it is cut short or its header lies: {frames} frame(s) are declared, {max(fragments, 0)} compressed ones are there")
    file.seek(start)
    offsets = None
    if "ExtendedOffsetTable" in image.dataset and "ExtendedOffsetTableLengths" in image.dataset:
        offsets = (image.dataset.ExtendedOffsetTable, image.dataset.ExtendedOffsetTableLengths)
    return get_frame(file, index, number_of_frames=frames, extended_offsets=offsets)
