"""One frame of DICOM pixel data, native or compressed, to its stored values: one function per codec, each with one fixed library.

pydicom's own plugins are not used for compressed frames: which of them runs depends on what else is installed, its JPEG 2000 plugin
needs one more package, and it refuses 12-bit JPEG, which GDCM decodes. Before a decoder allocates or runs, the frame's
own header is compared with the DICOM header, and the number of bytes with the least that so many pixels can take.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from struct import error as StructError
from struct import pack, unpack_from
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.threads import cpu_threads

LARGE = 1 << 18  # pixels from which on loading kernels/pixels.py pays
MAX_SCANS = 100  # of a progressive JPEG: each passes over the whole picture
# OpenJPEG is told in no other way, and setting it later is not safe where other threads read the environment.
os.environ.setdefault("OPJ_NUM_THREADS", str(cpu_threads()))
J2K_START = b"\xff\x4f\xff\x51"  # SOC, SIZ
Samples = NDArray[Any]  # (H, W) or (H, W, 3) integers


@dataclass(frozen=True)
class Layout:
    """The Image Pixel module (PS3.3 C.7.6.3), checked."""

    rows: int
    columns: int
    samples: int  # per pixel: 1 or 3
    allocated: int  # bits: 1, 8, 16 or 32
    stored: int
    high_bit: int
    signed: bool
    photometric: str
    planar: int

    @property
    def pixels(self) -> int:
        return self.rows * self.columns

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"<{'i' if self.signed else 'u'}{max(self.allocated // 8, 1)}")


class Refused(Exception):
    """The frame cannot be decoded. The message is ours and holds no patient attribute."""


@dataclass(frozen=True)
class Header:
    """What a codestream says about itself."""

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool = False
    process: int = 0  # JPEG: the SOF marker, 0xC0 baseline ... 0xC3 lossless
    color: str = ""  # JPEG: "RGB", "YBR", or "" where the codestream does not tell
    lossless: bool = False  # by the transfer syntax


def samples_from_codestream(syntax: str, frame: bytes, layout: Layout) -> tuple[Samples, str]:
    """Decode one compressed frame. -> stored values, and the photometric interpretation they now have"""
    header_of, decode = CODECS[syntax]
    try:
        header = header_of(frame, layout)
    except (IndexError, StructError):
        raise Refused("its compressed data is cut short or broken") from None
    if header is not None:
        _check(header, frame, layout)
        header = replace(header, lossless=syntax in LOSSLESS)
    samples, photometric = decode(frame, layout, header)
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


# --- RLE, PS3.5 annex G -------------------------------------------------------------------------------------------------------


def _rle_header(frame: bytes, layout: Layout) -> None:
    segments = unpack_from("<L", frame)[0]
    if segments != layout.samples * max(layout.allocated // 8, 1):
        raise Refused("its RLE segments do not fit its samples per pixel and bits allocated")
    if layout.pixels * segments > (len(frame) - 64) * 64:  # two bytes give at most 128
        raise Refused("it has too few compressed bytes for its rows and columns")


def _rle(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
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
    return _significant_bits(np.ascontiguousarray(values.T), layout), layout.photometric


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


# --- JPEG, PS3.5 A.4.1 to A.4.3 ----------------------------------------------------------------------------------------------


# Between two markers of a scan: 0xFF is followed by 0x00, a restart marker, fill, or (JPEG-LS) a byte below 0x80.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.DOTALL)
_NEXT_MARKER_LS = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]", re.DOTALL)
_FRAME_MARKERS = (0xC0, 0xC1, 0xC2, 0xC3, 0xF7)  # baseline, extended, progressive, lossless, JPEG-LS
_SEGMENTS = (*_FRAME_MARKERS, 0xC4, 0xDA, 0xDB, 0xDD, 0xF8, 0xFE, *range(0xE0, 0xF0))


def _segments(frame: bytes) -> Iterator[tuple[int, bytes, int]]:
    """All marker segments from SOI to EOI (ISO/IEC 10918-1 B.1), each as marker, body and place.

    The whole structure is walked, since the libraries trust it: GDCM aborts the process where a segment is broken, and
    CharLS reads for seconds where EOI is missing.
    """
    if frame[:2] != b"\xff\xd8":
        raise Refused("its compressed data is not JPEG, which its transfer syntax says it is")
    at, next_marker = 2, _NEXT_MARKER
    while True:
        while frame[at + 1] == 0xFF:  # fill
            at += 1
        marker = frame[at + 1]
        if frame[at] != 0xFF or marker not in (*_SEGMENTS, 0xD9):
            raise Refused("its compressed data is broken")
        if marker == 0xD9:
            yield marker, b"", at
            return
        size = int(unpack_from(">H", frame, at + 2)[0])
        body = frame[at + 4 : at + 2 + size]
        if size < 2 or len(body) != size - 2:
            raise Refused("its compressed data is cut short or broken")
        yield marker, body, at
        at += 2 + size
        if marker == 0xF7:
            next_marker = _NEXT_MARKER_LS
        if marker == 0xDA:
            found = next_marker.search(frame, at)
            if found is None:
                raise Refused("its compressed data is cut short: it has no end marker")
            at = found.start()


def _jpeg_header(frame: bytes, layout: Layout) -> Header:
    color, header, scans = "", None, 0
    for marker, body, _ in _segments(frame):
        if marker == 0xE0 and body.startswith(b"JFIF"):
            color = color or "YBR"
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) > 11:
            color = {1: "YBR"}.get(body[11], "")
        elif marker in _FRAME_MARKERS:
            precision, rows, columns, components = unpack_from(">BHHB", body)
            if header is not None or len(body) != 6 + 3 * components:
                raise Refused("its compressed data is broken")
            if components == 3 and body[6::3] in (b"RGB", b"rgb"):
                color = "RGB"
            header = Header(rows, columns, components, precision, process=marker)
        elif marker == 0xDA:
            scans += 1
            if header is None or scans > MAX_SCANS or not 1 <= body[0] <= header.components or len(body) != 4 + 2 * body[0]:
                raise Refused("its compressed data is broken")
        elif marker == 0xC4:
            _check_huffman(body)
    if header is None or not scans:
        raise Refused("its compressed data has no picture in it")
    return replace(header, color=color)


def _check_huffman(body: bytes) -> None:
    """DHT, B.2.4.2: tables of 16 counts and as many values as they add up to."""
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        if len(counts) < 16 or body[at] & 0xEC or not 0 < sum(counts) <= 256:
            raise Refused("its compressed data is broken")
        at += 17 + sum(counts)
    if at != len(body):
        raise Refused("its compressed data is broken")


def _jpeg(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
    assert header is not None
    if header.process == 0xC3 or header.precision > 8:
        return _gdcm(frame, layout, header)
    from PIL import Image

    image = Image.open(BytesIO(frame), formats=("JPEG",))
    ybr = (header.color or layout.photometric).startswith("YBR")
    # What the file holds is told to libjpeg, not left to its guess: the DICOM header decides where the codestream is silent.
    args = ("L", "") if layout.samples == 1 else ("RGB", "YCbCr" if ybr else "RGB")
    image.tile = [tile._replace(args=args) for tile in image.tile]
    samples = np.asarray(image)
    return samples, layout.photometric if layout.samples == 1 else "RGB"


_stderr = threading.Lock()


@contextmanager
def _native_stderr_off() -> Iterator[None]:
    """GDCM's libjpeg writes straight to file descriptor 2 while it looks for the right bit depth."""
    with _stderr:
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
    for marker, body, at in _segments(frame):
        if marker == 0xDA:
            return head + frame[at:]
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            head += b"\xff" + bytes([marker]) + pack(">H", len(body) + 2) + body
    return frame


def _gdcm(frame: bytes, layout: Layout, header: Header) -> tuple[Samples, str]:
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
    with _native_stderr_off():
        try:
            buffer = image.GetBuffer().encode("utf-8", "surrogateescape")
        except Exception:
            raise Refused("its compressed data is broken") from None
    if len(buffer) != layout.pixels * layout.samples * bits // 8:
        raise Refused("its compressed data is broken")
    samples = np.frombuffer(buffer, f"<u{bits // 8}")
    return _as_declared(samples, layout, header), layout.photometric


# --- JPEG-LS, PS3.5 A.4.3 -----------------------------------------------------------------------------------------------------


def _jpeg_ls(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
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
    return _as_declared(samples, layout, header), header.color if header.color == "RGB" else layout.photometric


# --- JPEG 2000 and HTJ2K, PS3.5 A.4.4 -----------------------------------------------------------------------------------------


def _j2k_header(frame: bytes, layout: Layout) -> Header:
    start = frame.find(J2K_START)  # behind the boxes of a (non-conformant) JP2 file
    if start < 0 or start > 4096:
        raise Refused("its compressed data is not JPEG 2000, which its transfer syntax says it is")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components = unpack_from(">8LH", frame, start + 8)
    if tile_width == 0 or tile_height == 0 or left >= right or top >= bottom:
        raise Refused("its compressed data is broken")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > 65535:  # ISO/IEC 15444-1 A.4.2
        raise Refused("its compressed data has more tiles than JPEG 2000 allows")
    sizes = [unpack_from("3B", frame, start + 42 + 3 * index) for index in range(min(components, 4))]
    if any(size != (sizes[0][0], 1, 1) for size in sizes):
        raise Refused("its compressed data has components of different size or depth")
    return Header(bottom - top, right - left, components, (sizes[0][0] & 0x7F) + 1, signed=bool(sizes[0][0] & 0x80))


def _j2k(frame: bytes, layout: Layout, header: Header | None) -> tuple[Samples, str]:
    assert header is not None
    samples = _j2k_in_threads(frame, layout, header) if layout.pixels >= LARGE else None
    if samples is None:
        from openjpeg.utils import decode_pixel_data

        try:
            buffer = decode_pixel_data(frame, version=2)
        except Exception:
            raise Refused("its compressed data is broken") from None
        width = 1 if header.precision <= 8 else 2 if header.precision <= 16 else 4
        samples = np.frombuffer(buffer, f"<u{width}")
    photometric = "RGB" if layout.photometric in ("YBR_RCT", "YBR_ICT") else layout.photometric  # undone by the decoder
    return _as_declared(samples, layout, header), photometric


def _j2k_in_threads(frame: bytes, layout: Layout, header: Header) -> Samples | None:
    """OpenJPEG as Pillow has it, in its wheels built with threads; None where Pillow does not hand its values on, or gives up."""
    deepest = 16 if layout.samples == 1 else 8
    if header.signed or header.precision > deepest or not frame.startswith(J2K_START):
        return None
    from PIL import Image, ImageFile
    from PIL import Jpeg2KImagePlugin as Jpeg2KImagePlugin  # else all plugins are imported

    if ImageFile.LOAD_TRUNCATED_IMAGES:  # somebody wants broken pictures
        return None
    try:
        with Image.open(BytesIO(frame), formats=("JPEG2000",)) as image:
            samples = np.asarray(image)
    except Exception:
        return None
    return samples >> (8 * samples.dtype.itemsize - header.precision)  # Pillow's stand in the highest bits


# --- bits ---------------------------------------------------------------------------------------------------------------------


def _as_declared(samples: Samples, layout: Layout, header: Header) -> Samples:
    """Read decoded words as the DICOM header says, signed or not: JPEG knows no sign, and JPEG 2000 may say another.

    A lossless stream may hold whole words, so only the stored bits count, as they do in a native file. A lossy one overshoots,
    so all its bits do.
    """
    bits = 8 * samples.dtype.itemsize
    depth = min(header.precision, layout.stored) if header.lossless else header.precision
    words = np.ascontiguousarray(samples).view(f"<{'i' if layout.signed else 'u'}{bits // 8}")
    return _significant_bits(words, replace(layout, allocated=bits, stored=depth, high_bit=depth - 1))


def _significant_bits(samples: Samples, layout: Layout) -> Samples:
    """Drop what stands beside the stored bits, an old overlay for instance, and extend the sign (PS3.5 8.1.1)."""
    above = layout.allocated - 1 - layout.high_bit
    beside = layout.allocated - layout.stored
    if beside == 0 or layout.allocated == 1:
        return samples
    if above == beside and samples.dtype.kind == "u" and int(samples.max(initial=0)) >> layout.stored == 0:
        return samples  # nothing stands there, as in most files
    return np.right_shift(np.left_shift(samples, above), beside)


def native_samples(frame: Samples, layout: Layout) -> Samples:
    """A native frame as pydicom gives it, with only its stored bits."""
    return _significant_bits(frame.astype(frame.dtype.newbyteorder("<"), copy=False), layout)


Codec = tuple[Callable[[bytes, Layout], "Header | None"], Callable[[bytes, Layout, "Header | None"], tuple[Samples, str]]]
_JPEG: Codec = (_jpeg_header, _jpeg)
_JPEG_LS: Codec = (_jpeg_header, _jpeg_ls)
_JPEG_2000: Codec = (_j2k_header, _j2k)

LOSSLESS = tuple(f"1.2.840.10008.1.2.4.{tail}" for tail in (57, 70, 80, 90, 201, 202))
CODECS: dict[str, Codec] = {
    "1.2.840.10008.1.2.4.50": _JPEG,  # baseline
    "1.2.840.10008.1.2.4.51": _JPEG,  # extended, 8 and 12 bits
    "1.2.840.10008.1.2.4.57": _JPEG,  # lossless
    "1.2.840.10008.1.2.4.70": _JPEG,  # lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": _JPEG_LS,  # lossless
    "1.2.840.10008.1.2.4.81": _JPEG_LS,  # near-lossless
    "1.2.840.10008.1.2.4.90": _JPEG_2000,  # lossless
    "1.2.840.10008.1.2.4.91": _JPEG_2000,
    "1.2.840.10008.1.2.4.201": _JPEG_2000,  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202": _JPEG_2000,  # HTJ2K lossless, RPCL
    "1.2.840.10008.1.2.4.203": _JPEG_2000,  # HTJ2K
    "1.2.840.10008.1.2.5": (_rle_header, _rle),
}
