"""Stored values to grey levels: modality LUT, VOI, polarity (PS3.3 C.11)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.faults import OF_ELEMENTS
from pmclip_deploy.header.raw import is_long
from pmclip_deploy.imaging.decoders.layout import LARGE, Layout, Refused
from pmclip_deploy.imaging.dicom_file import DicomImage
from pmclip_deploy.imaging.elements import Window, code_string_of, frame_group, items_of, numbers_of, text_of
from pmclip_deploy.imaging.picture import automatic_window

if TYPE_CHECKING:
    from pydicom import Dataset


Gray = NDArray[np.uint8]

# X-ray angiography and radiofluoroscopy, the retired biplane and the enhanced ones too: their modality transformation leads back to the
# intensity of the X-rays, and their windows are for stored values (C.8.7.1.1.2).
SHOWN_AS_STORED = {f"1.2.840.10008.5.1.4.1.1.12.{tail}" for tail in ("1", "1.1", "2", "2.1", "3")}


class Rendering(NamedTuple):
    """A frame as it is shown, and what was applied to its stored values."""

    pixels: Gray  # (H, W)
    modality: Modality
    voi: Voi
    inverse: bool
    window: Window | None  # that a person would read off a viewer; None where a table was applied


def gray_from_stored(
    image: DicomImage, layout: Layout, stored: NDArray[Any], index: int, window: Window | None, notes: list[str]
) -> Rendering:
    """The grayscale pipeline of PS3.4 N.2.1 for one frame."""
    dataset = image.dataset
    modality = Modality.of(image, layout, index, notes)
    kept = _padding_left_out(dataset, layout, stored)
    ends = int(stored.min()), int(stored.max())
    low, high = modality.extent(stored, kept, ends)
    # C.7.6.3.1.2 and C.11.6: a MONOCHROME1 image says INVERSE as well, and is inverted once.
    inverse = layout.photometric == "MONOCHROME1" or code_string_of(dataset, "PresentationLUTShape") == "INVERSE"

    if window is not None and modality.is_lost:
        raise Refused("a window cannot be applied, because its modality transformation cannot be used")
    voi = Voi.asked(image, index, window) if window is not None else Voi.of(image, index, modality.lowest(layout), notes)
    if voi is not None and modality.is_lost:
        notes.append("the file's own window is for rescaled values and is not applied; an automatic window is used")
        voi = None
    if voi is not None:
        pixels = _through(stored, modality, voi, inverse, ends)
        if window is not None or low == high or not _is_flat(pixels):
            return Rendering(pixels, modality, voi, inverse, voi.window)
        notes.append("the file's own window shows one flat grey; an automatic window is used")
    voi = Voi("LINEAR_EXACT", ((low + high) / 2, high - low))  # what LINEAR does with the window that is told, without its rounding
    return Rendering(_through(stored, modality, voi, inverse, ends), modality, voi, inverse, automatic_window(low, high))


def _is_flat(pixels: Gray) -> bool:
    few = pixels[::64]
    return bool(few.min() == few.max()) and bool(pixels.min() == pixels.max())


def gray_from_modality(values: NDArray[np.float64], voi: Voi, inverse: bool) -> Gray:
    gray = np.floor(voi(values) * 255 + 0.5).astype(np.uint8)
    return 255 - gray if inverse else gray


def _through(stored: NDArray[Any], modality: Modality, voi: Voi, inverse: bool, ends: tuple[int, int]) -> Gray:
    """Stored values between ``ends`` to 0..255: 32 bits by arithmetic, in blocks that fit the cache, up to 16 through a table."""

    def rendered(values: NDArray[Any]) -> Gray:
        return gray_from_modality(modality(values), voi, inverse)

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
    def of(cls, item: Dataset, little: bool, low: float) -> _Table | None:
        """``low`` is the smallest value that the table may be asked for, by the header and not by the pixels of one frame."""
        try:
            count, first, bits = map(int, numbers_of(item, "LUTDescriptor") or [])
            data: Any = None if is_long(item.get_item("LUTData"), 1 << 17) else item["LUTData"].value
            if isinstance(data, (bytes, bytearray)):
                little = little if item.original_encoding[1] is None else item.original_encoding[1]
                data = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little else ">u2")
            entries = np.atleast_1d(np.asarray(data if data is not None else [])).astype(np.int64) & 0xFFFF
        except OF_ELEMENTS:  # missing, not three numbers, or entries that are no numbers
            return None
        count, bits = count % 65536 or 65536, bits % 65536
        if bits == 8 and len(entries) == (count + 1) // 2:  # two 8-bit entries in each word
            entries = entries.astype("<u2").view(np.uint8).astype(np.int64)
        entries = entries[:count]
        if not entries.size or not 1 <= bits <= 16:
            return None
        # US or SS as the values before the table are unsigned or signed, and writers take the wrong one (C.11.2.1.1).
        unsigned, negative = first % 65536, first % 65536 - 65536
        is_negative = unsigned > 32767 and (first < 0 or low < 0) and negative + count > low
        return cls(negative if is_negative else unsigned, entries, bits)


@dataclass(frozen=True)
class Modality:
    """Stored values to modality values: a table, or slope and intercept (C.11.1)."""

    table: _Table | None
    slope: float = 1.0
    intercept: float = 0.0
    is_lost: bool = False  # the file has a transformation and it cannot be used: a window has no meaning

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

    def lowest(self, layout: Layout) -> float:
        """The smallest modality value that the header allows. A Modality LUT has unsigned entries."""
        return 0 if self.table is not None else float(self(np.array([layout.low, layout.high])).min())

    @classmethod
    def of(cls, image: DicomImage, layout: Layout, index: int, notes: list[str]) -> Modality:
        dataset = image.dataset
        if _is_shown_as_stored(dataset):
            return cls(None)
        is_lost = False
        if items := items_of(dataset, "ModalityLUTSequence"):
            if (table := _Table.of(items[0], image.little, layout.low)) is not None:
                return cls(table)
            notes.append("the Modality LUT cannot be read and is not applied")
            is_lost = True
        group = frame_group(dataset, index, "PixelValueTransformationSequence")  # C.7.6.16.2.9
        slope, intercept = numbers_of(group, "RescaleSlope"), numbers_of(group, "RescaleIntercept")
        if slope is None and intercept is None:
            return cls(None, is_lost=is_lost)
        pair = [*([1.0] if slope is None else slope[:1]), *([0.0] if intercept is None else intercept[:1])]
        if len(pair) < 2 or pair[0] == 0 or not all(math.isfinite(number) and abs(number) < 1e30 for number in pair):
            notes.append("Rescale Slope and Rescale Intercept cannot be used and are not applied")
            return cls(None, is_lost=True)
        return cls(None, pair[0], pair[1])


def _is_shown_as_stored(dataset: Dataset) -> bool:
    """By the SOP class, or by the modality if the file does not name one."""
    sop_class = text_of(dataset, "SOPClassUID") or text_of(getattr(dataset, "file_meta", None) or {}, "MediaStorageSOPClassUID")
    return sop_class in SHOWN_AS_STORED if sop_class else code_string_of(dataset, "Modality") in ("XA", "RF")


@dataclass(frozen=True)
class Voi:
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
    def asked(cls, image: DicomImage, index: int, window: Window) -> Voi:
        function = _function(frame_group(image.dataset, index, "FrameVOILUTSequence"))
        return cls("LINEAR_EXACT" if function == "LINEAR" and window[1] < 1 else function, (float(window[0]), float(window[1])))

    @classmethod
    def of(cls, image: DicomImage, index: int, low: float, notes: list[str]) -> Voi | None:
        """A table comes before windows, and the first usable window is taken: several are alternatives (C.11.2.1.2)."""
        group = frame_group(image.dataset, index, "FrameVOILUTSequence")  # C.7.6.16.2.10
        for item in items_of(group, "VOILUTSequence") or items_of(image.dataset, "VOILUTSequence"):
            if (table := _Table.of(item, image.little, low)) is not None:
                return cls("TABLE", None, table)
            notes.append("a VOI LUT cannot be read and is left out")
        centers, widths = numbers_of(group, "WindowCenter"), numbers_of(group, "WindowWidth")
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
    function = code_string_of(group, "VOILUTFunction")
    return function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"


def _padding_left_out(dataset: Dataset, layout: Layout, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Which pixels are none of the padding (C.7.5.1.1.2); None for all of them."""
    value, limit = numbers_of(dataset, "PixelPaddingValue"), numbers_of(dataset, "PixelPaddingRangeLimit")
    if not value:
        return None
    ends = []
    for number in (value[0], (limit or value)[0]):
        if layout.allocated <= 16 and layout.signed != (number < 0):  # US or SS, and writers take the wrong one
            number = (number + 32768) % 65536 - 32768 if layout.signed else number % 65536
        ends.append(number)
    kept = (stored < min(ends)) | (stored > max(ends))
    return kept if kept.any() and not kept.all() else None
