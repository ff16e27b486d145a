"""A DICOM image to what a viewer would show of it: modality LUT, VOI, polarity, palette, colour, frames, in the standard's order.

    file -> Dataset -> Layout (checked) -> stored values -> modality values -> VOI -> polarity -> uint8

Everything pydicom or a decoder raises on broken input becomes one InputError of ours: their messages may quote patient attributes.
"""

from __future__ import annotations

import io
import logging
import math
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import ImageInfo
from pmclip_deploy.decoders import CODECS, LARGE, Layout, Refused, native_samples, samples_from_codestream
from pmclip_deploy.errors import InputError, NoPictureError, PmclipError
from pmclip_deploy.header import header_from_dataset
from pmclip_deploy.pixels import MAX_PIXELS, automatic_window, head_of_file
from pmclip_deploy.pixels import Picture as Picture  # re-exported
from pmclip_deploy.vocabulary import MODALITIES

if TYPE_CHECKING:
    from pydicom import Dataset

Window = tuple[float, float]  # (center, width)
Gray = NDArray[np.uint8]

MAX_INFLATED = 1 << 28  # bytes that a deflated file may grow to: 256 MiB
MAX_FRAGMENTS = 1 << 18  # pieces of compressed data: each costs time

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED)

# No picture to ask about, though some have pixels. By Modality or SOP class, since either may be missing.
NOT_PICTURES = {
    "SEG": "a segmentation",
    "RTDOSE": "a radiotherapy dose",
    "RTSTRUCT": "a radiotherapy structure set",
    "RTPLAN": "a radiotherapy plan",
    "SR": "a structured report",
    "KO": "a key object selection",
    "PR": "a presentation state",
    "REG": "a registration",
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.5": "a surface segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.481.3": "a radiotherapy structure set",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.1.3.10": "a DICOMDIR, the index of a medium",
}


def picture_from_dicom(source: str | PathLike[str] | Dataset, frame: int | None = None, window: Window | None = None) -> Picture:
    """Render one frame of a DICOM file or Dataset; the middle frame and the file's own window unless told otherwise."""
    is_path = isinstance(source, (str, PathLike))
    where = fspath(source) if is_path else "dataset"
    if window is not None and not (len(window) == 2 and all(map(math.isfinite, window)) and window[1] > 0):
        raise InputError(f"{where}: the window asked for has no positive width; give a center and a width above 0")
    with _reading(where) as stack:
        image = _image_from_file(where, stack) if is_path else _image_from_dataset(source)
        return _picture(where, image, frame, None if window is None else (float(window[0]), float(window[1])))


def uid_from_dicom(path: str | PathLike[str]) -> str:
    """The SOP Instance UID (PS3.3 C.12.1): it names the image, and is as identifying as a name; never print or store it."""
    where = fspath(path)
    with _reading(where) as stack:
        if uid := _text(_image_from_file(where, stack).dataset, "SOPInstanceUID"):
            return uid
        raise Refused("it has no SOP Instance UID (0008,0018)")


def patient_from_dicom(path: str | PathLike[str]) -> str:
    """Patient ID (0010,0020), "" where the file has none: to keep one patient's pictures together; never print or store it."""
    where = fspath(path)
    with _reading(where) as stack:
        return _text(_image_from_file(where, stack).dataset, "PatientID")


@contextmanager
def _reading(where: str) -> Iterator[ExitStack]:
    try:
        with _quiet(), ExitStack() as stack:
            yield stack
    except PmclipError:
        raise
    except Refused as error:
        raise InputError(f"{where}: {error}; export or copy the file again") from None
    except Exception as error:  # also RecursionError and MemoryError
        raise InputError(f"{where}: the DICOM file is broken ({type(error).__name__}); export or copy it again") from None


def import_pydicom_lean() -> None:
    """Import pydicom without what it loads whole though few files need it, decoders, test files and their downloads: half the time, 19 MB.

    For a process of ours alone, such as the command line: in it, pydicom's own plugins and downloads stay unavailable. Our decoders do not
    go through them.
    """
    if "pydicom" in sys.modules:
        return
    without = dict.fromkeys(("gdcm", "jpeg_ls", "openjpeg", "requests", "tqdm"))
    without |= {name: ModuleType(name) for name in ("urllib.request", "pydicom.examples")}
    without = {name: module for name, module in without.items() if name not in sys.modules}
    sys.modules.update(without)  # type: ignore[arg-type]
    try:
        import pydicom  # noqa: F401
    finally:
        for name in without:
            del sys.modules[name]


# --- file to dataset and bytes of pixels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """A dataset without its pixels, and where these are."""

    dataset: Dataset
    syntax: str
    little: bool
    file: BinaryIO | None  # stands at the pixel data's first value byte; None where there are no pixels
    available: int  # bytes from there on
    length: int  # as declared; 0xFFFFFFFF for undefined
    vr: str  # of the pixel data; "float" where these are not whole numbers


class _Clamped(io.BufferedReader):
    """Python allocates what a read asks for before it reads: never ask for more than the file has, whatever a header says."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.size = raw.seek(0, io.SEEK_END)
        raw.seek(0)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 65536:
            size = max(min(size, self.size - self.tell()), 0)
        return super().read(size)


def _image_from_file(where: str, stack: ExitStack) -> _Image:
    head = head_of_file(where)
    # Without the preamble (PS3.10 7.1) a file starts with group 0002 or, with no file meta, with a low group of either byte order.
    if head[128:] != b"DICM" and head[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08", b"\x00\x02"):
        raise NoPictureError(f"{where}: is not a DICOM, PNG or JPEG file; give one of these")

    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    if head[128:] == b"DICM" and read_file_meta_info(where).get("TransferSyntaxUID") == DEFLATED:
        _check_inflated(where)
        return _image_from_dataset(dcmread(where))
    file = stack.enter_context(_Clamped(io.FileIO(where)))
    dataset = dcmread(file, stop_before_pixels=True, force=True)
    little = bool(dataset.original_encoding[1])
    order: Literal["little", "big"] = "little" if little else "big"
    tag = file.read(4)
    if tag not in (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10"):
        if not len(dataset) or (head[128:] != b"DICM" and "SOPClassUID" not in dataset and "Rows" not in dataset):
            raise NoPictureError(f"{where}: is not a DICOM, PNG or JPEG file; give one of these")
        kind = "float" if tag in (b"\xe0\x7f\x08\x00", b"\xe0\x7f\x09\x00", b"\x7f\xe0\x00\x08", b"\x7f\xe0\x00\x09") else ""
        return _Image(dataset, _syntax(dataset), little, None, 0, 0, kind)
    vr, field = "OW", file.read(4)
    if field[:2] in (b"OW", b"OB", b"UN"):  # explicit; seen in the bytes, since some files are implicit where they say explicit
        vr, field = field[:2].decode(), file.read(4)
    return _Image(dataset, _syntax(dataset), little, file, file.size - file.tell(), int.from_bytes(field, order), vr)


def _check_inflated(where: str) -> None:
    """Inflate to nowhere first: a thousandth of the size is enough for a bomb."""
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with open(where, "rb") as file:  # noqa: PTH123 - the name comes as a str
        file.seek(140)
        file.seek(144 + int.from_bytes(file.read(4), "little"))  # (0002,0000), the file meta's length, is its first element
        data = file.read(65536)
        while data and not inflater.eof:
            total += len(inflater.decompress(data, 1 << 20))
            if total > MAX_INFLATED:
                raise InputError(f"{where}: inflates to more than {MAX_INFLATED >> 20} MiB; store it in another transfer syntax")
            data = inflater.unconsumed_tail or file.read(65536)
    if not inflater.eof:
        raise InputError(f"{where}: its deflated data is cut short; copy the file again")


def _image_from_dataset(dataset: Any) -> _Image:
    from pydicom import Dataset

    if not isinstance(dataset, Dataset):
        raise InputError(f"{type(dataset).__name__}: is not an image; give a path, a pydicom Dataset or an array")
    syntax = _syntax(dataset)
    little = syntax != BIG_ENDIAN
    if "PixelData" not in dataset or "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        kind = "float" if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset else ""
        return _Image(dataset, syntax, little, None, 0, 0, kind)
    element = dataset["PixelData"]
    value = element.value
    if isinstance(value, (bytes, bytearray, memoryview)):
        file: BinaryIO = io.BytesIO(value)
    elif hasattr(value, "read"):
        file = value
        file.seek(0)
    else:
        raise Refused("its pixel data is empty")
    available = file.seek(0, io.SEEK_END)
    file.seek(0)
    return _Image(dataset, syntax, little, file, available, 0xFFFFFFFF if syntax not in NATIVE else available, str(element.VR))


def _syntax(dataset: Dataset) -> str:
    if syntax := getattr(dataset, "file_meta", {}).get("TransferSyntaxUID"):
        return str(syntax)
    implicit, little = dataset.original_encoding  # what pydicom guessed, or (None, None) where it was made in memory
    return IMPLICIT if implicit else BIG_ENDIAN if little is False else EXPLICIT


# --- dataset to picture -------------------------------------------------------------------------------------------------------


def _picture(where: str, image: _Image, frame: int | None, window: Window | None) -> Picture:
    dataset, notes = image.dataset, []
    modality = _text(dataset, "Modality")
    for name in (modality, _text(dataset, "SOPClassUID"), _text(getattr(dataset, "file_meta", {}), "MediaStorageSOPClassUID")):
        if name in NOT_PICTURES:
            raise NoPictureError(f"{where}: is {NOT_PICTURES[name]}, not a picture; give the image it belongs to")
    if image.vr == "float":  # (7FE0,0008) Float or (7FE0,0009) Double Float Pixel Data
        raise NoPictureError(f"{where}: has floating-point pixels, a parametric map, not a picture; give the image it was made from")
    if image.file is None:
        cut_short = "Rows" in dataset
        raise (InputError if cut_short else NoPictureError)(f"{where}: has no pixel data; give a DICOM image")
    if image.syntax not in NATIVE and image.syntax not in CODECS:
        raise InputError(f"{where}: transfer syntax {_safe(image.syntax)} is not supported; store it as Explicit VR Little Endian")

    layout = _layout(dataset)
    frames = max(_whole(dataset, "NumberOfFrames", 1), 1)
    index = frames // 2 if frame is None else frame
    if not 0 <= index < frames:
        raise InputError(f"{where}: frame {frame} was asked for and the file has frames 0 to {frames - 1}; choose one of these")

    if _text(dataset, "BurnedInAnnotation") == "YES":  # PS3.3 C.7.6.1
        notes.append("text is burned into the pixels (BurnedInAnnotation is YES): it may name the patient")
    stored, photometric = _stored_values(image, layout, index, frames)
    applied = None
    if photometric == "PALETTE COLOR":
        pixels = _rgb_from_palette(image, stored)
    elif layout.samples == 3:
        pixels = _rgb_from_samples(stored, photometric, layout)
    else:
        pixels, applied = _gray_from_stored(image, layout, stored, index, window, notes)
    if window is not None and applied is None:
        raise InputError(f"{where}: is a colour picture, and a window is for grayscale; leave the window out")
    info = ImageInfo(
        source=where,
        format="dicom",
        modality=modality if modality in MODALITIES else None,
        frame=index,
        frames=frames,
        rows=layout.rows,
        columns=layout.columns,
        transfer_syntax=_safe(image.syntax),
        photometric=layout.photometric,
        window=applied,
        warnings=tuple(notes),
    )
    return Picture(np.ascontiguousarray(pixels), info, header_from_dataset(dataset, index))


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


def _layout(dataset: Dataset) -> Layout:
    photometric = _text(dataset, "PhotometricInterpretation")
    if photometric not in PHOTOMETRIC:
        raise Refused("its photometric interpretation (0028,0004) is missing or not supported")
    stored = _whole(dataset, "BitsStored", _whole(dataset, "BitsAllocated", 0))
    layout = Layout(
        rows=_whole(dataset, "Rows", 0),
        columns=_whole(dataset, "Columns", 0),
        samples=_whole(dataset, "SamplesPerPixel", 1),
        allocated=_whole(dataset, "BitsAllocated", 0),
        stored=stored,
        high_bit=_whole(dataset, "HighBit", stored - 1),
        signed=_whole(dataset, "PixelRepresentation", 0) == 1,
        photometric=photometric,
        planar=_whole(dataset, "PlanarConfiguration", 0),
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


def _stored_values(image: _Image, layout: Layout, index: int, frames: int) -> tuple[NDArray[Any], str]:
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


def _bits(image: _Image, layout: Layout, index: int) -> NDArray[np.uint8]:
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


def _codestream(image: _Image, index: int, frames: int) -> bytes:
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


# --- grayscale: modality LUT, VOI, polarity -----------------------------------------------------------------------------------


def _gray_from_stored(
    image: _Image, layout: Layout, stored: NDArray[Any], index: int, window: Window | None, notes: list[str]
) -> tuple[Gray, Window | None]:
    """The grayscale pipeline of PS3.4 N.2.1 for one frame."""
    dataset = image.dataset
    modality = _Modality.of(image, layout, index, notes)
    kept = _padding_left_out(dataset, layout, stored)
    ends = int(stored.min()), int(stored.max())
    low, high = modality.extent(stored, kept, ends)
    # C.7.6.3.1.2 and C.11.6: a MONOCHROME1 image says INVERSE as well, and is inverted once.
    inverse = layout.photometric == "MONOCHROME1" or _text(dataset, "PresentationLUTShape") == "INVERSE"

    voi = _Voi.asked(image, index, window) if window is not None else _Voi.of(image, index, low, notes)
    if voi is not None:
        pixels = _through(stored, modality, voi, inverse, ends)
        if window is not None or low == high or not _is_flat(pixels):
            return pixels, voi.window
        notes.append("the file's own window shows one flat grey; an automatic window is used")
    voi = _Voi("LINEAR_EXACT", ((low + high) / 2, high - low))  # what LINEAR does with the window that is told, without its rounding
    return _through(stored, modality, voi, inverse, ends), automatic_window(low, high)


def _is_flat(pixels: Gray) -> bool:
    few = pixels[::64]
    return bool(few.min() == few.max()) and bool(pixels.min() == pixels.max())


def _through(stored: NDArray[Any], modality: _Modality, voi: _Voi, inverse: bool, ends: tuple[int, int]) -> Gray:
    """Stored values between ``ends`` to 0..255: 32 bits by arithmetic, in blocks that fit the cache, up to 16 through a table."""

    def rendered(values: NDArray[Any]) -> Gray:
        gray = np.floor(voi(modality(values)) * 255 + 0.5).astype(np.uint8)
        return 255 - gray if inverse else gray

    step = max(1, (1 << 17) // stored.shape[1])
    blocks = [slice(row, row + step) for row in range(0, len(stored), step)]
    if stored.dtype.itemsize > 2:
        out = np.empty(stored.shape, np.uint8)
        for block in blocks:
            out[block] = rendered(stored[block])
        return out
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    values = np.arange(ends[0], ends[1] + 1)
    table = np.zeros(1 << (8 * stored.dtype.itemsize), np.uint8)
    table[values.astype(unsigned)] = rendered(values)  # a negative value stands at its two's complement
    stored = np.ascontiguousarray(stored).view(unsigned)
    if stored.itemsize == 2 and stored.size >= LARGE:
        from pmclip_deploy.kernels.pixels import look_up

        looked_up: Gray | None = look_up(stored, table)
        if looked_up is not None:
            return looked_up
    out = np.empty(stored.shape, np.uint8)
    for block in blocks:
        np.take(table, stored[block], out=out[block], mode="clip")
    return out


@dataclass(frozen=True)
class _Table:
    """A LUT Sequence item (C.11.1.1, C.11.2.1.1): below the first mapped value its first entry, beyond its end the last."""

    first: int
    entries: NDArray[Any]
    bits: int

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float64]:
        index = np.clip(np.floor(values.astype(np.float64) + 0.5) - self.first, 0, len(self.entries) - 1)
        out: NDArray[np.float64] = self.entries[index.astype(np.int64)].astype(np.float64)
        return out

    @classmethod
    def of(cls, item: Dataset, little: bool, signed: bool) -> _Table | None:
        try:
            count, first, bits = (int(value) for value in item["LUTDescriptor"].value)
            data: Any = item["LUTData"].value
        except Exception:  # missing, or not three numbers
            return None
        if isinstance(data, (bytes, bytearray)):
            data = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little else ">u2")
        count, bits = count % 65536 or 65536, bits % 65536
        entries = np.atleast_1d(np.asarray(data if data is not None else [])).astype(np.int64) & 0xFFFF
        if bits == 8 and len(entries) == (count + 1) // 2:  # two 8-bit entries in each word
            entries = entries.astype("<u2").view(np.uint8).astype(np.int64)
        entries = entries[:count]
        if not entries.size or not 1 <= bits <= 16:
            return None
        first = first % 65536  # US or SS, and writers take the wrong one
        return cls(first - 65536 if signed and first > 32767 else first, entries, bits)


@dataclass(frozen=True)
class _Modality:
    """Stored values to modality values: a table, or slope and intercept (C.11.1)."""

    table: _Table | None
    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float64]:
        if self.table is not None:
            return self.table(values)
        return values.astype(np.float64) * self.slope + self.intercept

    def extent(self, stored: NDArray[Any], kept: NDArray[np.bool_] | None, ends: tuple[int, int]) -> tuple[float, float]:
        """The smallest and largest modality value; ``ends`` are the stored ones, what is not kept included."""
        if self.table is not None:
            values = self(np.unique(stored if kept is None else stored[kept]))
        elif kept is None:
            values = self(np.array(ends))
        else:
            limits = np.iinfo(stored.dtype)
            values = self(np.array([stored.min(where=kept, initial=limits.max), stored.max(where=kept, initial=limits.min)]))
        return float(values.min()), float(values.max())

    @classmethod
    def of(cls, image: _Image, layout: Layout, index: int, notes: list[str]) -> _Modality:
        dataset = image.dataset
        if items := _items(dataset, "ModalityLUTSequence"):
            if (table := _Table.of(items[0], image.little, layout.signed)) is not None:
                return cls(table)
            notes.append("the Modality LUT cannot be read and is not applied")
        group = _group(dataset, index, "PixelValueTransformationSequence")  # C.7.6.16.2.9
        slope, intercept = _numbers(group, "RescaleSlope"), _numbers(group, "RescaleIntercept")
        if slope is None and intercept is None:
            return cls(None)
        pair = [*([1.0] if slope is None else slope[:1]), *([0.0] if intercept is None else intercept[:1])]
        if len(pair) < 2 or pair[0] == 0 or not all(math.isfinite(number) and abs(number) < 1e30 for number in pair):
            notes.append("Rescale Slope and Rescale Intercept cannot be used and are not applied")
            return cls(None)
        return cls(None, *pair)


@dataclass(frozen=True)
class _Voi:
    """Modality values to 0..1 (C.11.2)."""

    function: str  # LINEAR, LINEAR_EXACT, SIGMOID or TABLE
    window: Window | None
    table: _Table | None = None

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.table is not None:
            share: NDArray[np.float64] = np.minimum(self.table(x) / (2**self.table.bits - 1), 1.0)
            return share
        assert self.window is not None
        center, width = self.window
        if self.function == "SIGMOID":  # C.11.2.1.3.1
            sigmoid: NDArray[np.float64] = 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700)))
            return sigmoid
        if self.function == "LINEAR":  # C.11.2.1.2.1: the window is width values wide, ends included
            center, width = center - 0.5, width - 1
        if width == 0:
            return np.where(x > center, 1.0, 0.0)
        unit: NDArray[np.float64] = np.clip((x - center) / width + 0.5, 0, 1)  # LINEAR_EXACT, C.11.2.1.3.2
        return unit

    @classmethod
    def asked(cls, image: _Image, index: int, window: Window) -> _Voi:
        function = _function(_group(image.dataset, index, "FrameVOILUTSequence"))
        return cls("LINEAR_EXACT" if function == "LINEAR" and window[1] < 1 else function, (float(window[0]), float(window[1])))

    @classmethod
    def of(cls, image: _Image, index: int, low: float, notes: list[str]) -> _Voi | None:
        """A table comes before windows, and the first usable window is taken: several are alternatives (C.11.2.1.2)."""
        group = _group(image.dataset, index, "FrameVOILUTSequence")  # C.7.6.16.2.10
        for item in _items(group, "VOILUTSequence") or _items(image.dataset, "VOILUTSequence"):
            if (table := _Table.of(item, image.little, signed=low < 0)) is not None:
                return cls("TABLE", None, table)
            notes.append("a VOI LUT cannot be read and is left out")
        centers, widths = _numbers(group, "WindowCenter"), _numbers(group, "WindowWidth")
        if centers is None and widths is None:
            return None
        function = _function(group)
        for center, width in zip(centers or [], widths or [], strict=False):
            if math.isfinite(center) and math.isfinite(width) and 0 < width < 1e30 and abs(center) < 1e30:
                if function == "LINEAR" and width < 1:
                    notes.append("a window narrower than 1 is read as LINEAR_EXACT")
                    return cls("LINEAR_EXACT", (center, width))
                return cls(function, (center, width))
        notes.append("Window Center and Window Width cannot be used; an automatic window is used")
        return None


def _function(group: Any) -> str:
    function = _text(group, "VOILUTFunction")
    return function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"


def _padding_left_out(dataset: Dataset, layout: Layout, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Which pixels are none of the padding (C.7.5.1.1.2); None for all of them."""
    value, limit = _numbers(dataset, "PixelPaddingValue"), _numbers(dataset, "PixelPaddingRangeLimit")
    if not value:
        return None
    ends = []
    for number in (value[0], (limit or value)[0]):
        if layout.allocated <= 16 and layout.signed != (number < 0):  # US or SS, and writers take the wrong one
            number = (number + 32768) % 65536 - 32768 if layout.signed else number % 65536
        ends.append(number)
    kept = (stored < min(ends)) | (stored > max(ends))
    return kept if kept.any() and not kept.all() else None


# --- colour -------------------------------------------------------------------------------------------------------------------


def _rgb_from_samples(stored: NDArray[Any], photometric: str, layout: Layout) -> Gray:
    if stored.dtype.itemsize > 1 or layout.stored < 8:
        top = 2 ** min(layout.stored, 8 * stored.dtype.itemsize) - 1
        stored = np.floor(np.clip(stored, 0, top) * (255 / top) + 0.5).astype(np.uint8)
    stored = stored.view(np.uint8)
    if photometric.startswith("YBR_FULL"):
        from pydicom.pixels.processing import convert_color_space

        stored = convert_color_space(stored, "YBR_FULL", "RGB")
    return stored


def _rgb_from_palette(image: _Image, stored: NDArray[Any]) -> Gray:
    """C.7.6.3.1.5 and .6, and segmented tables, C.7.9.2. Own code: pydicom's wraps pixels above 255 around where entries have 8 bits."""
    dataset, channels = image.dataset, []
    first = 0
    for color in ("Red", "Green", "Blue"):
        try:
            count, first, bits = (int(value) for value in dataset[f"{color}PaletteColorLookupTableDescriptor"].value)
        except Exception:
            raise Refused("its palette is missing or broken") from None
        count = count % 65536 or 65536
        segmented = f"Segmented{color}PaletteColorLookupTableData" in dataset
        data = dataset.get(f"{'Segmented' if segmented else ''}{color}PaletteColorLookupTableData")
        if bits not in (8, 16) or not isinstance(data, (bytes, bytearray)):
            raise Refused("its palette is missing or broken")
        words = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if image.little else ">u2").astype("<u2")
        entries: NDArray[Any] = words.view(np.uint8)
        if bits == 16 or (not segmented and len(words) >= count):
            entries = words  # 8-bit entries, too, may each take a word
        if segmented:
            entries = np.array(_expanded(entries.tolist(), bits, count))
        entries = entries[:count]
        if not len(entries):
            raise Refused("its palette is missing or broken")
        wide = bits == 16 and int(entries.max()) > 255  # some writers say 16 and store 8
        channels.append((entries >> 8 if wide else entries).astype(np.uint8))
    if stored.dtype.kind == "i" and first > 32767:
        first -= 65536
    index = stored.astype(np.int64) - first
    return np.stack([channel[np.clip(index, 0, len(channel) - 1)] for channel in channels], axis=-1)


def _expanded(data: list[int], bits: int, count: int) -> list[int]:
    """Discrete, linear and indirect segments, never to more than ``count`` entries, never deeper than one indirection (C.7.9.2.3)."""
    out: list[int] = []

    def expand(at: int, segments: int, inside: bool) -> None:
        while at + 1 < len(data) and segments and len(out) < count:
            opcode, length = data[at], data[at + 1]
            at, segments = at + 2, segments - 1
            if opcode == 0:
                out.extend(data[at : at + length])
                at += length
            elif opcode == 1 and out and at < len(data) and length:
                begin, end = out[-1], data[at]
                out.extend(begin + math.floor((end - begin) * step / length + 0.5) for step in range(1, length + 1))
                at += 1
            elif opcode == 2 and not inside:
                parts = 4 if bits == 8 else 2
                offset = sum(part << (bits * power) for power, part in enumerate(data[at : at + parts]))
                expand(offset if bits == 8 else offset // 2, length, True)
                at += parts
            else:
                raise Refused("its segmented palette is broken")

    expand(0, len(data), False)
    return out[:count]


# --- reading single elements --------------------------------------------------------------------------------------------------


def _items(group: Any, keyword: str) -> list[Dataset]:
    try:
        return list(group[keyword].value or []) if keyword in group else []
    except Exception:  # not a sequence, or a broken one
        return []


def _group(dataset: Dataset, index: int, keyword: str) -> Any:
    """The functional group macro of this frame: its own, else the shared one, else the dataset itself (C.7.6.16)."""
    own, shared = _items(dataset, "PerFrameFunctionalGroupsSequence"), _items(dataset, "SharedFunctionalGroupsSequence")
    for holder in [*own[index : index + 1], *shared[:1]]:
        if found := _items(holder, keyword):
            return found[0]
    return dataset


def _numbers(group: Any, keyword: str) -> list[float] | None:
    """The values that are numbers up to the first that is none; None where the element is missing or empty."""
    try:
        value = group[keyword].value if keyword in group else None
    except Exception:  # a decimal string that is none
        return []
    if value is None or value == "":
        return None
    numbers = []
    try:
        for number in value if hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) else [value]:
            numbers.append(float(number))
    except (TypeError, ValueError, OverflowError):
        pass
    return numbers


def _whole(dataset: Dataset, keyword: str, default: int) -> int:
    numbers = _numbers(dataset, keyword)
    if numbers is None:
        return default
    if len(numbers) != 1 or not math.isfinite(numbers[0]) or numbers[0] != int(numbers[0]):
        raise Refused(f"its {keyword} is not one whole number")
    return int(numbers[0])


def _text(group: Any, keyword: str) -> str:
    try:
        value = group.get(keyword)
    except Exception:
        return ""
    return value.strip() if isinstance(value, str) else ""


def _safe(uid: str) -> str:
    """A UID as it may be printed; anything longer or odder could be something else."""
    return uid if len(uid) <= 64 and all(c in "0123456789." for c in uid) else "?"


# --- silence ------------------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_readers = 0
_silence = ExitStack()


@contextmanager
def _quiet() -> Iterator[None]:
    """While any thread reads, pydicom's log records and warnings go nowhere: they quote element values."""
    global _readers
    with _lock:
        _readers += 1
        if _readers == 1:
            _silence.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for name in ("pydicom", "openjpeg", "jpeg_ls"):
                logger = logging.getLogger(name)
                _silence.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                _silence.close()
