"""A DICOM file's elements up to its pixels, in bounded work and memory whatever its size."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from pmclip_deploy.faults import Refused
from pmclip_deploy.header.work import MOST_READS, allow, limited, spend
from pmclip_deploy.imaging.elements import whole_number

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_HEADER = 1 << 24  # bytes of all elements but the pixels
MAX_ELEMENT = 1 << 20  # bytes of an element that is no sequence; the longest of ours is a palette of some 100 kB
DECLARED = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames")


class BoundedFile(io.BufferedReader):
    """Python allocates what a read asks for before it reads: never ask for more than the file has, whatever a header says.

    Reads count for the header's limits until ``header_is_read``. After that ``left`` bytes may be read, any number if it is None.
    """

    name = ""  # pydicom asks for it

    def __init__(self, raw: Any, buffer: int = io.DEFAULT_BUFFER_SIZE) -> None:
        super().__init__(raw, buffer)
        self.size = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        self.left: int | None = MAX_HEADER
        self.header_is_read = False

    def read(self, size: int | None = -1, /) -> bytes:
        rest = self.size - self.tell()
        size = max(rest if size is None or size < 0 else min(size, rest), 0)
        if not self.header_is_read:
            spend()
        if self.left is not None:
            self.left -= size
            if self.left < 0:
                spend(0 if self.header_is_read else MOST_READS * 2)
                raise Refused("its pixel data is larger than its picture can be")
        return super().read(size)


def header_from_file(file: BoundedFile) -> Dataset:
    """pydicom's ``dcmread`` up to the pixels, where the file stands then. Elements of more than 1 MiB are left out, but for sequences.

    Raises Refused if a list of numbers is that long, or if the elements are more than those of a picture of its size.
    """
    try:
        return _read(file)
    except (Refused, OSError):
        file.seek(0)
        with limited():
            file.left = MAX_HEADER
            pixel_bytes = min(_declared(file), 8 * file.size)
        allow(pixel_bytes)
        file.seek(0)
        file.left = MAX_HEADER + pixel_bytes
        return _read(file)


def _read(file: BoundedFile) -> Dataset:
    from pydicom import dcmread
    from pydicom.datadict import dictionary_has_tag, dictionary_VR
    from pydicom.dataelem import RawDataElement

    try:
        dataset = dcmread(file, stop_before_pixels=True, force=True, defer_size=MAX_ELEMENT)
    except OSError:  # which pydicom makes of anything that a read raises
        spend(0)
        raise
    end = file.tell()
    for element in list(dataset.values()):
        if isinstance(element, RawDataElement) and element.value is None and element.length:
            tag, vr = element.tag, element.VR
            if vr in (None, "UN"):
                vr = dictionary_VR(tag) if dictionary_has_tag(tag) else "UN"
            del dataset[tag]
            if vr == "SQ" and element.length != 0xFFFFFFFF:
                file.seek(element.value_tell)
                dataset[tag] = element._replace(value=file.read(element.length))
            elif tag.group == 0x28 and vr in ("DS", "IS", "US", "SS"):  # to go on without it might show the picture otherwise
                raise Refused("a list of numbers in its header is longer than such an element can be")
    file.seek(end)
    file.header_is_read, file.left = True, None
    return dataset


def _declared(file: BoundedFile) -> int:
    """Bytes of the pixels that the elements up to Bits Allocated (0028,0100) tell of."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_partial

    tags = [tag_for_keyword(keyword) for keyword in DECLARED]
    dataset = read_partial(file, lambda tag, vr, length: tag > 0x00280100, force=True, specific_tags=tags)  # type: ignore[arg-type]
    numbers = [whole_number(dataset, keyword, 1) for keyword in DECLARED]
    return math.prod(max(number, 0) for number in numbers) // 8
