"""PNG and JPEG files to what their picture needs of them, however large the file is and whatever else it holds."""

from __future__ import annotations

import io
import zlib
from struct import unpack, unpack_from
from typing import BinaryIO

from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.decoders.jpeg_header import START_OF_FRAME
from pmclip_deploy.imaging.picture import check_size

MAX_PIECES = 1 << 18  # chunks of a PNG, segments of a JPEG: each costs time
SPARE = 16 << 20  # bytes that a file may hold beyond the most that its pixels can take
MAX_TEXT = 1 << 16  # bytes of a PNG's text, which may say how the picture is turned; it may inflate to 1 MiB
MAX_TEXTS = 8

_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# The first row and column of each pass, and its step down and across (PNG 8.2).
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples per pixel


def lean_png(where: str, file: BinaryIO) -> bytes:
    """The chunks of the still picture (PNG, third edition, 5.6), and a few that may hold its orientation.

    Raises InputError if the picture is too large, or if its data is larger than its pixels can be.
    """
    lean = io.BytesIO()
    lean.write(file.read(8))
    most, texts = SPARE, 0
    for _ in range(MAX_PIECES):
        head = file.read(8)
        if len(head) < 8:
            return lean.getvalue()  # cut short, as Pillow says
        length, kind = unpack(">L4s", head)
        is_text = kind in _PNG_TEXTS and length <= MAX_TEXT and texts < MAX_TEXTS
        texts += is_text
        if not is_text and kind not in _PNG_KEPT:
            file.seek(length + 4, io.SEEK_CUR)
            continue
        if lean.tell() + length > most:
            raise InputError(f"{where}: holds more data than a picture of its size can", "save it again")
        lean.write(head)
        lean.write(body := file.read(length + 4))
        if kind == b"IHDR" and len(body) == 17:
            width, height, depth, color = unpack(">2L2B", body[:10])
            check_size(where, width, height)
            most += height * (1 + (width * _PNG_SAMPLES.get(color, 4) * depth + 7) // 8) * 17 // 16
        elif kind == b"IEND":
            return lean.getvalue()
    raise InputError(f"{where}: is in more than {MAX_PIECES} pieces", "save it again")


def png_is_cut(lean: bytes) -> bool:
    """Whether the data of ``lean_png`` inflates to fewer bytes than its rows have: Pillow leaves the rest black, and says nothing."""
    width, height, depth, color, _, _, interlaced = unpack_from(">2L5B", lean, 16)
    left = 0
    for top, first, down, across in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows, columns = len(range(top, height, down)), len(range(first, width, across))
        left += rows * (1 + (columns * depth * _PNG_SAMPLES[color] + 7) // 8) if columns else 0
    inflater, at = zlib.decompressobj(), 8
    while at < len(lean) and left > 0 and not inflater.eof:
        length, kind = unpack_from(">L4s", lean, at)
        if kind == b"IDAT":
            data = lean[at + 8 : at + 8 + length]
            while left > 0 and (part := inflater.decompress(data, 1 << 20)):
                left, data = left - len(part), inflater.unconsumed_tail
        at += 12 + length
    return left > 0


def lean_jpeg(where: str, file: BinaryIO) -> bytes:
    """The segments that libjpeg needs, those that may hold the orientation, and the scans; not what devices append.

    Raises InputError if the picture is too large, or if its header is in too many pieces.
    """
    lean = io.BytesIO()
    lean.write(file.read(2))
    most, notes = SPARE, 0
    for _ in range(MAX_PIECES):
        place = file.tell()
        marker = file.read(4)
        if marker[:2] == b"\xff\xff":  # fill
            file.seek(place + 1)
            continue
        if len(marker) < 4 or marker[0] != 0xFF or not 0xC0 <= marker[1] <= 0xFE or marker[1] in (0xD8, 0xD9):
            file.seek(place)  # odd, or the end: Pillow reads or refuses it
            break
        length = int.from_bytes(marker[2:], "big")
        body = file.read(max(length - 2, 0))
        if marker[1] in START_OF_FRAME and len(body) > 5:
            height, width = unpack(">2H", body[1:5])
            check_size(where, width, height)
            most += width * height * body[5] * 3 // 2
        elif 0xE2 <= marker[1] <= 0xED or marker[1] in (0xEF, 0xFE):
            continue
        elif marker[1] == 0xE1:  # Exif, XMP
            notes += length
            if notes > 1 << 20:
                continue
        if lean.tell() + length > SPARE:
            raise InputError(f"{where}: its header is larger than {SPARE >> 20} MiB", "save it again")
        lean.write(marker)
        lean.write(body)
        if marker[1] == 0xDA:
            break
    else:
        raise InputError(f"{where}: is in more than {MAX_PIECES} pieces", "save it again")
    place = file.tell()
    left = file.seek(0, io.SEEK_END) - place
    file.seek(place)
    lean.write(file.read(min(left, most)))
    return lean.getvalue()
