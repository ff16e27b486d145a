"""Stored values to RGB: colour models and palettes (PS3.3 C.7.6.3, C.7.9)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.faults import OF_ELEMENTS
from pmclip_deploy.imaging.decoders.layout import Layout, Refused
from pmclip_deploy.imaging.dicom_file import DicomImage
from pmclip_deploy.imaging.grayscale import Gray
from pmclip_deploy.imaging.picture import bands

MAX_STEPS = 1 << 18  # segments of a palette, which has at most 65,536 entries: those that give none go on for minutes


def rgb_from_samples(stored: NDArray[Any], photometric: str, layout: Layout) -> Gray:
    wide, ybr = stored.dtype.itemsize > 1 or layout.stored < 8, photometric.startswith("YBR_FULL")
    if not wide and not ybr:
        return stored.view(np.uint8)
    from pydicom.pixels.processing import convert_color_space

    top = 2 ** min(layout.stored, 8 * stored.dtype.itemsize) - 1
    pixels = np.empty(stored.shape, np.uint8)
    for part in bands(*stored.shape[:2]):
        band = stored[part]
        band = np.floor(np.clip(band, 0, top) * (255 / top) + 0.5).astype(np.uint8) if wide else band.view(np.uint8)
        pixels[part] = convert_color_space(band, "YBR_FULL", "RGB") if ybr else band
    return pixels


def rgb_from_palette(image: DicomImage, stored: NDArray[Any]) -> Gray:
    """C.7.6.3.1.5 and .6, and segmented tables, C.7.9.2. Own code: pydicom's wraps pixels above 255 around where entries have 8 bits."""
    dataset, channels = image.dataset, []
    first = 0
    for color in ("Red", "Green", "Blue"):
        try:
            count, first, bits = (int(value) for value in dataset[f"{color}PaletteColorLookupTableDescriptor"].value)
        except OF_ELEMENTS:
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
    pixels = np.empty((*stored.shape, 3), np.uint8)
    for part in bands(*stored.shape):
        index = stored[part].astype(np.int64) - first
        for place, channel in enumerate(channels):
            pixels[part, :, place] = channel[np.clip(index, 0, len(channel) - 1)]
    return pixels


def _expanded(data: list[int], bits: int, count: int) -> list[int]:
    """Discrete, linear and indirect segments, never to more than ``count`` entries, never deeper than one indirection (C.7.9.2.3)."""
    out: list[int] = []
    steps = 0

    def expand(at: int, segments: int, inside: bool) -> None:
        nonlocal steps
        while at + 1 < len(data) and segments and len(out) < count:
            opcode, length = data[at], data[at + 1]
            at, segments, steps = at + 2, segments - 1, steps + 1
            if steps > MAX_STEPS:
                raise Refused("its segmented palette is broken")
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
