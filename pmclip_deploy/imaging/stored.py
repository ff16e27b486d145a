"""Pixel data to stored values: layout, frames, fragments (PS3.5 8 and annex A)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.console import counted
from pmclip_deploy.imaging.decoders.frame import CODECS, samples_from_codestream
from pmclip_deploy.imaging.decoders.layout import Layout, Refused, native_samples
from pmclip_deploy.imaging.dicom_file import DicomImage
from pmclip_deploy.imaging.elements import code_string_of, whole_number
from pmclip_deploy.imaging.picture import MAX_PIXELS

if TYPE_CHECKING:
    from pydicom import Dataset


MAX_FRAGMENTS = 1 << 18  # pieces of compressed data: each costs time
RLE = "1.2.840.10008.1.2.5"
CODESTREAM_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")  # JPEG and JPEG-LS, JPEG 2000, a JP2 file around it
RLE_START = re.compile(rb"[\x01-\x0f]\0\0\0\x40\0\0\0")  # a count of segments, and the place of the first (PS3.5 G.5)
NEXT_CODESTREAM = re.compile(rb"\xff\xd9\0*(?:\xff\xd8\xff|\xff\x4f\xff\x51)")  # behind the end of one; never within one

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
    said = "".join(filter(str.isalnum, code_string_of(dataset, "PhotometricInterpretation")))
    photometric = next((name for name in PHOTOMETRIC if "".join(filter(str.isalnum, name)) == said), "")
    if not photometric:
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


def stored_values(image: DicomImage, layout: Layout, index: int, frames: int, notes: list[str]) -> tuple[NDArray[Any], str]:
    """Decode the one frame that is wanted. -> (H, W) or (H, W, 3) integers, and the photometric interpretation they have"""
    assert image.file is not None
    if image.syntax in CODECS:
        codestream = _codestream(image, index, frames)
        return samples_from_codestream(image.syntax, codestream, layout)
    if image.length == 0xFFFFFFFF:
        raise Refused("its pixel data is compressed and no transfer syntax says how")
    layout = _layout_of_length(layout, frames, min(image.available, image.length), notes)
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


def _layout_of_length(layout: Layout, frames: int, present: int, notes: list[str]) -> Layout:
    """The layout that native pixel data of ``present`` bytes has. Writers pad to an even length, some of them twice."""
    needed = _native_bytes(layout, frames)
    if 0 <= present - needed <= 2:
        return layout
    if layout.photometric == "YBR_FULL_422" and 0 <= present - _native_bytes(full := replace(layout, photometric="YBR_FULL"), frames) <= 2:
        notes.append("the pixel data is as long as YBR_FULL is, not YBR_FULL_422, and is read as YBR_FULL")
        return full
    if needed > present:
        size = f"of {layout.rows} x {layout.columns}"
        need = f"{counted(frames, f'frame {size} needs', f'frames {size} need')} {needed} bytes of pixels"
        raise Refused(f"it is cut short or its header lies: {need}, {present} are there")
    if any((present - padding) % (layout.pixels * frames) == 0 for padding in (0, 1, 2)):
        raise Refused(f"its header lies: it says {needed} bytes of pixels, and {present} are there, another number for each pixel")
    return layout


def _native_bytes(layout: Layout, frames: int) -> int:
    samples = 2 if layout.photometric == "YBR_FULL_422" else layout.samples  # C.7.6.3.1.2: two pixels share their chroma
    return (layout.pixels * samples * layout.allocated * frames + 7) // 8


def _codestream(image: DicomImage, index: int, frames: int) -> bytes:
    """The fragments of one frame (PS3.5 A.4), after a walk over all item headers: their lengths may lie, and so may the frame count."""
    assert image.file is not None
    if image.length != 0xFFFFFFFF:
        raise Refused("its transfer syntax is a compressed one and its pixel data is not")
    file, fragments = image.file, list[_Fragment]()  # the first item is the Basic Offset Table
    end = file.tell() + image.available
    while (head := file.read(8)) and head[:4] == b"\xfe\xff\x00\xe0":
        place, first = file.tell(), file.read(8)
        begins = RLE_START.match(first) is not None if image.syntax == RLE else first.startswith(CODESTREAM_STARTS)
        fragment = _Fragment(place, int.from_bytes(head[4:], "little"), begins)
        if fragment.place + fragment.length > end:
            raise Refused("it is cut short: its compressed data ends before its declared length")
        file.seek(fragment.place + fragment.length)
        fragments.append(fragment)
        if len(fragments) > (most := min(MAX_FRAGMENTS, (1 << 16) + 16 * frames)) + 1:
            raise Refused(f"its compressed data is in more than {most} pieces")
    table, fragments = fragments[:1], fragments[1:]
    if len(fragments) < frames:
        declared = counted(frames, "frame is declared", "frames are declared")
        raise Refused(f"it is cut short or its header lies: {declared}, {len(fragments)} compressed ones are there")
    firsts = [*_first_fragments(image, frames, table[0], fragments), len(fragments)]
    parts = fragments[firsts[index] : firsts[index + 1]]
    frame = b"".join(_read(file, part) for part in parts)
    if sum(part.begins for part in parts) > 1 or (image.syntax != RLE and NEXT_CODESTREAM.search(frame)):
        raise Refused(f"its frame {index} holds more than one compressed picture")
    return frame


class _Fragment(NamedTuple):
    place: int  # of its first byte in the file
    length: int
    begins: bool  # with the first bytes of a codestream


def _read(file: BinaryIO, fragment: _Fragment) -> bytes:
    file.seek(fragment.place)
    return file.read(fragment.length)


def _first_fragments(image: DicomImage, frames: int, table: _Fragment, fragments: list[_Fragment]) -> Sequence[int]:
    """The index of each frame's first fragment. Offset tables lie more often than the fragments do, and so are asked last."""
    assert image.file is not None
    if len(fragments) == frames:
        return range(frames)
    if frames == 1:
        return [0]
    begins = [index for index, fragment in enumerate(fragments) if fragment.begins]
    if len(begins) == frames and begins[0] == 0:
        return begins
    at = {fragment.place - fragments[0].place: index for index, fragment in enumerate(fragments)}
    extended = image.dataset.get("ExtendedOffsetTable")
    for data, size in ((extended if isinstance(extended, bytes) else b"", 8), (_read(image.file, table), 4)):
        offsets = np.frombuffer(data[: len(data) // size * size], f"<u{size}").tolist()
        found = [at.get(offset, -1) for offset in offsets]
        if len(found) == frames and found[0] == 0 and all(one < other for one, other in pairwise(found)):
            return found
    raise Refused("its compressed data is in more pieces than it has frames, and nothing tells which piece begins a frame")
