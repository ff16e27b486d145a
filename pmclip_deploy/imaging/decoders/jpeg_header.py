"""What a JPEG codestream says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from struct import unpack_from

from pmclip_deploy.imaging.decoders.layout import Header, Layout, Refused

MAX_SCANS = 100  # of a progressive JPEG: each passes over the whole picture


# Between two markers of a scan: 0xFF is followed by 0x00, a restart marker, fill, or (JPEG-LS) a byte below 0x80.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.DOTALL)
START_OF_FRAME = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_NEXT_MARKER_LS = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]", re.DOTALL)
_FRAME_MARKERS = (0xC0, 0xC1, 0xC2, 0xC3, 0xF7)  # baseline, extended, progressive, lossless, JPEG-LS
_SEGMENTS = (*_FRAME_MARKERS, 0xC4, 0xDA, 0xDB, 0xDD, 0xF8, 0xFE, *range(0xE0, 0xF0))


def segments(frame: bytes) -> Iterator[tuple[int, bytes, int]]:
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


def header_of(frame: bytes, layout: Layout) -> Header:
    color, header, scans = "", None, 0
    for marker, body, _ in segments(frame):
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
