"""What is done to a file in the process that decodes. The arguments and results are pickled."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import Answer
from pmclip_deploy.errors import InputError
from pmclip_deploy.files import JPEG, PNG
from pmclip_deploy.imaging.dicom_file import image_from_file, reading
from pmclip_deploy.imaging.elements import Window, frame_group, numbers_of, order_in_series, text_of
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.read import picture_from_bytes
from pmclip_deploy.imaging.values import ColorFrame, GrayFrame, frame_from_bytes, windows_from_bytes

UPLOAD = "the upload"  # its name in messages; the file's own may name a patient


def warm_up(*modules: str) -> None:
    """Imports what the first file would have to wait for."""
    for name in ("pydicom", *modules):
        import_module(name)


def picture(data: bytes, frame: int | None, window: Window | None) -> Picture:
    return picture_from_bytes(UPLOAD, data, frame, window)


def described(data: bytes, salt: bytes) -> tuple[Picture, tuple[Window, ...], Place]:
    """The middle frame, the file's windows, and its place. ``salt`` goes into the number of the series."""
    picture = picture_from_bytes(UPLOAD, data)
    return picture, windows_from_bytes(UPLOAD, data), place_from_bytes(data, salt) if picture.info.format == "dicom" else Place()


@dataclass(frozen=True)
class Place:
    """Where a picture belongs among others, and how large its pixels are."""

    series: int = 0  # equal for pictures of one series
    order: float = 0.0  # within it: along the normal of the planes, else by Instance Number (0020,0013)
    spacing: tuple[float, float] | None = None  # mm between the centers of rows, and of columns
    at_detector: bool = False  # spacing is Imager Pixel Spacing: the patient stands nearer to the tube


def place_from_bytes(data: bytes, salt: bytes) -> Place:
    with reading(UPLOAD) as stack:
        dataset = image_from_file(UPLOAD, stack, data).dataset
        series = hashlib.sha256(salt + text_of(dataset, "SeriesInstanceUID").encode()).digest()
        measures = frame_group(dataset, 0, "PixelMeasuresSequence")
        spacing, at_detector = _spacing(measures, "PixelSpacing"), False
        if spacing is None:
            spacing, at_detector = _spacing(dataset, "ImagerPixelSpacing"), True
        return Place(int.from_bytes(series[:6], "big"), order_in_series(dataset), spacing, at_detector and spacing is not None)


def patient(data: bytes) -> dict[str, str]:
    """What names the patient, for a person who asked to see it."""
    with reading(UPLOAD) as stack:
        dataset = image_from_file(UPLOAD, stack, data).dataset
        keywords = {"name": "PatientName", "id": "PatientID", "study_date": "StudyDate"}
        return {key: "".join(filter(str.isprintable, str(dataset.get(word, "") or "")))[:200] for key, word in keywords.items()}


def report(data: bytes, answers: list[Answer]) -> bytes:
    """A DICOM file: the Structured Report of ``answers``. Raises InputError for a picture to which no report can refer."""
    return report_of_images([(data, answers)], "comprehensive3d")[0]


def report_of_images(images: list[tuple[bytes, list[Answer]]], sr_class: str, asked: Any = None) -> tuple[bytes, str, str]:
    """(a DICOM file, its SOP Instance UID, its Series Instance UID): one report about all of them; ``asked`` as ``report_from_images``.

    For ``sr_class`` "sc" it is a Secondary Capture.
    """
    from pmclip_deploy.report.capture import capture_from_images
    from pmclip_deploy.report.document import bytes_of, report_from_images

    headers = []
    for data, answers in images:
        if data.startswith((PNG, JPEG)):
            raise InputError(f"{UPLOAD}: is no DICOM file, so that a report about it belongs to no study", "send a DICOM file")
        with reading(UPLOAD) as stack:
            headers.append((image_from_file(UPLOAD, stack, data).dataset, answers))
    if sr_class == "sc":
        made = capture_from_images(headers, notes=asked.notes if asked else ())
    else:
        made = report_from_images(headers, sr_class=sr_class, asked=asked)
    return bytes_of(made), str(made.SOPInstanceUID), str(made.SeriesInstanceUID)


def _spacing(group: Any, keyword: str) -> tuple[float, float] | None:
    found = numbers_of(group, keyword) or []
    return (found[0], found[1]) if len(found) == 2 and all(0 < mm < 1e3 for mm in found) else None


def frame_values(data: bytes, frame: int | None) -> GrayFrame | ColorFrame:
    return frame_from_bytes(UPLOAD, data, frame)


def table(data: bytes, frame: int | None, window: Window) -> NDArray[np.uint8]:
    """(65536,): the gray level of each sample through a window; empty for a picture that takes none."""
    shown = frame_from_bytes(UPLOAD, data, frame, window)
    return shown.table if isinstance(shown, GrayFrame) else np.empty(0, np.uint8)


def png(data: bytes, frame: int | None, window: Window | None, side: int | None = None) -> bytes:
    """A PNG file of the picture, at most ``side`` pixels in each direction."""
    import PIL.Image

    drawn: Any = PIL.Image.fromarray(picture_from_bytes(UPLOAD, data, frame, window).pixels)
    if side is not None:
        drawn.thumbnail((side, side))
    out = io.BytesIO()
    drawn.save(out, "PNG", compress_level=1)
    return out.getvalue()
