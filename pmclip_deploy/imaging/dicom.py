"""A DICOM image to what a viewer would show of it: modality LUT, VOI, polarity, palette, colour, frames, in the standard's order.

    file -> Dataset -> Layout (checked) -> stored values -> modality values -> VOI -> polarity -> uint8

Everything pydicom or a decoder raises on broken input becomes one InputError of ours: their messages may quote patient attributes.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import ImageInfo
from pmclip_deploy.errors import InputError, NoPictureError
from pmclip_deploy.header.read import header_from_dataset
from pmclip_deploy.header.work import allow
from pmclip_deploy.imaging.bounded import MAX_HEADER, BoundedFile
from pmclip_deploy.imaging.decoders.frame import CODECS
from pmclip_deploy.imaging.decoders.layout import Layout
from pmclip_deploy.imaging.dicom_file import NATIVE, DicomImage, image_from_dataset, image_from_file, reading
from pmclip_deploy.imaging.elements import Window, code_string_of, printable_uid, text_of, whole_number
from pmclip_deploy.imaging.grayscale import gray_from_stored
from pmclip_deploy.imaging.picture import Picture, large_alone
from pmclip_deploy.imaging.stored import layout_from_dataset, stored_values
from pmclip_deploy.vocabulary import MODALITIES

if TYPE_CHECKING:
    from pydicom import Dataset


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


def picture_from_dicom(
    source: str | PathLike[str] | Dataset, frame: int | None = None, window: Window | None = None, *, data: bytes | None = None
) -> Picture:
    """Render one frame of a DICOM file or Dataset; the middle frame and the file's own window unless told otherwise.

    With ``data``, what the file holds, ``source`` is its name in messages.
    """
    is_path = isinstance(source, (str, PathLike))
    where = fspath(source) if is_path else "dataset"
    if window is not None and not (len(window) == 2 and all(map(math.isfinite, window)) and window[1] > 0):
        raise InputError(f"{where}: the window asked for is no center with a positive width", "give two numbers, the width above 0")
    with reading(where) as stack:
        image = image_from_file(where, stack, data) if is_path else image_from_dataset(source)
        decoded = frame_from_image(where, image, stack, frame)
        return picture_from_frame(where, decoded, None if window is None else (float(window[0]), float(window[1])))


def _is_image_class(uid: str) -> bool:
    """Whether a SOP class is one of images, by its name in PS3.6 table A-1, such as "CT Image Storage"."""
    from pydicom.uid import UID

    return "Image Storage" in UID(uid).name


@dataclass(frozen=True)
class Frame:
    """One frame of a file, decoded."""

    image: DicomImage
    layout: Layout
    index: int
    frames: int
    stored: NDArray[Any]  # (H, W) or (H, W, 3)
    photometric: str  # of the stored values
    modality: str
    notes: list[str]


def frame_from_image(where: str, image: DicomImage, stack: ExitStack, frame: int | None) -> Frame:
    """Raises InputError, or Refused, where the file holds no picture or not this frame. ``stack`` is that of ``reading``."""
    dataset, notes = image.dataset, list[str]()
    modality = code_string_of(dataset, "Modality")
    classes = text_of(dataset, "SOPClassUID"), text_of(getattr(dataset, "file_meta", {}), "MediaStorageSOPClassUID")
    for name in (modality, *classes):
        if name in NOT_PICTURES:
            raise NoPictureError(f"{where}: is {NOT_PICTURES[name]}, not a picture", "give the image it belongs to")
    if image.vr == "float":  # (7FE0,0008) Float or (7FE0,0009) Double Float Pixel Data
        raise NoPictureError(f"{where}: has floating-point pixels, a parametric map, not a picture", "give the image it was made from")
    if image.file is None:
        cut_short = "Rows" in dataset or any(map(_is_image_class, classes)) or not any(classes)
        raise (InputError if cut_short else NoPictureError)(f"{where}: has no pixel data", "give a DICOM image")
    if image.syntax not in NATIVE and image.syntax not in CODECS:
        raise InputError(
            f"{where}: transfer syntax {printable_uid(image.syntax)} is not supported", "store it as Explicit VR Little Endian"
        )

    layout = layout_from_dataset(dataset)
    frames = max(whole_number(dataset, "NumberOfFrames", 1), 1)
    index = frames // 2 if frame is None else frame
    if not 0 <= index < frames:
        there, step = ("only frame 0", "leave the frame out") if frames == 1 else (f"frames 0 to {frames - 1}", "choose one of these")
        raise InputError(f"{where}: frame {frame} was asked for and the file has {there}", step)

    if code_string_of(dataset, "BurnedInAnnotation") == "YES":  # PS3.3 C.7.6.1
        notes.append("text is burned into the pixels (BurnedInAnnotation is YES): it may name the patient")
    frame_bytes = layout.pixels * layout.samples * layout.allocated // 8
    allow(min(frame_bytes * frames, 8 * image.available))
    if isinstance(image.file, BoundedFile):
        image.file.left = 2 * frame_bytes + MAX_HEADER // 2
    stack.enter_context(large_alone(layout.pixels))
    stored, photometric = stored_values(image, layout, index, frames, notes)
    return Frame(image, layout, index, frames, stored, photometric, modality, notes)


def picture_from_frame(where: str, decoded: Frame, window: Window | None) -> Picture:
    image, layout, stored, photometric, notes = decoded.image, decoded.layout, decoded.stored, decoded.photometric, decoded.notes
    applied = None
    if photometric == "PALETTE COLOR" or layout.samples == 3:
        from pmclip_deploy.imaging.color import rgb_from_palette, rgb_from_samples

        pixels = rgb_from_palette(image, stored) if photometric == "PALETTE COLOR" else rgb_from_samples(stored, photometric, layout)
    else:
        shown = gray_from_stored(image, layout, stored, decoded.index, window, notes)
        pixels, applied = shown.pixels, shown.window
    if window is not None and applied is None:
        raise InputError(f"{where}: is a colour picture, and a window is for grayscale", "leave the window out")
    info = ImageInfo(
        source=where,
        format="dicom",
        modality=decoded.modality if decoded.modality in MODALITIES else None,
        frame=decoded.index,
        frames=decoded.frames,
        rows=layout.rows,
        columns=layout.columns,
        transfer_syntax=printable_uid(image.syntax),
        photometric=layout.photometric,
        window=applied,
        warnings=tuple(notes),
    )
    return Picture(np.ascontiguousarray(pixels), info, header_from_dataset(image.dataset, decoded.index))
