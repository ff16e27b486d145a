"""Elements of a dataset and of its functional groups, checked and short.

``imaging/elements.py`` converts values and so is not used here: pydicom's remarks on a conversion quote the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pmclip_deploy.faults import OF_ELEMENTS
from pmclip_deploy.header.work import sequence_of

MODALITY, SOP_CLASS, MEDIA_SOP_CLASS, IMAGE_TYPE = 0x00080060, 0x00080016, 0x00020002, 0x00080008

STORAGE = "1.2.840.10008.5.1.4.1.1."


BODY_PART, ANATOMIC_REGION_SEQUENCE, ANATOMIC_MODIFIER_SEQUENCE, FRAME_ANATOMY_SEQUENCE = 0x00180015, 0x00082218, 0x00082220, 0x00209071


PER_FRAME_GROUPS, SHARED_GROUPS, DETECTOR_SEQUENCE, DETECTOR_VECTOR = 0x52009230, 0x52009229, 0x00540022, 0x00540020
CODE_VALUE, CODING_SCHEME = 0x00080100, 0x00080102
SCHEMES = frozenset({"SCT", "SRT", "SNM3", "99SDM"})  # SNOMED CT, SNOMED RT, and its designators of old (PS3.16 8)
MAX_LENGTH = 1024  # bytes of an element that may hold a value of ours


class Groups:
    """Where a frame's attributes stand: its own functional group, else the shared one, else the dataset (C.7.6.16)."""

    def __init__(self, dataset: Any, frame: int) -> None:
        self.dataset = dataset
        own = items_of(dataset, PER_FRAME_GROUPS)
        self._holders = [*([own[frame]] if 0 <= frame < len(own) else []), *items_of(dataset, SHARED_GROUPS)[:1]]
        self._frame = frame

    def items(self, tag: int) -> Sequence[Any]:
        """The items of a macro's sequence."""
        return next((found for holder in self._holders if (found := items_of(holder, tag))), ())

    def anatomy(self) -> list[Any]:
        """Items of Anatomic Region Sequence: those of the frame (C.7.6.16.2.8), else those of the image."""
        frames = [item for anatomy in self.items(FRAME_ANATOMY_SEQUENCE)[:1] for item in items_of(anatomy, ANATOMIC_REGION_SEQUENCE)]
        return list(frames or items_of(self.dataset, ANATOMIC_REGION_SEQUENCE))[:8]

    def detector(self) -> Sequence[Any]:
        """The detector of a nuclear medicine frame (C.8.4.10): Detector Vector counts from 1; no more than one without it."""
        detectors = items_of(self.dataset, DETECTOR_SEQUENCE)
        if len(detectors) <= 1:
            return detectors
        vector = _integers(self.dataset, DETECTOR_VECTOR)
        number = vector[self._frame] if 0 <= self._frame < len(vector) else 0
        return detectors[number - 1 : number] if number > 0 else ()

    def detector_items(self, tag: int) -> Iterator[Any]:
        return (item for detector in self.detector() for item in items_of(detector, tag))


def once(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def raw_of(dataset: Any, tag: int) -> Any:
    """The element as read, before pydicom converts and checks it: its remarks quote values. None where there is none."""
    try:
        return dataset.get_item(tag)
    except OF_ELEMENTS:
        return None


def is_long(element: Any, most: int = 65534) -> bool:
    """Whether its value takes more bytes than an explicit VR of numbers or text has room for: a list of millions fills memory."""
    value = getattr(element, "value", None)
    return isinstance(value, bytes) and len(value) > most


def strings_of(dataset: Any, tag: int) -> tuple[str, ...]:
    """The values of a string element, upper case, without padding; () where it is absent, too long or no string."""
    value: Any = getattr(raw_of(dataset, tag), "value", ())
    try:
        if isinstance(value, bytes):
            texts = value.decode("latin-1").split("\\") if len(value) <= MAX_LENGTH else []
        elif isinstance(value, str):
            texts = value.split("\\") if len(value) <= MAX_LENGTH else []
        else:
            texts = list(value) if len(value) <= 16 else []
        if not all(isinstance(text, str) and len(text) <= MAX_LENGTH for text in texts):
            return ()
        return tuple(text.strip(" \0").upper() for text in texts)
    except OF_ELEMENTS:  # None, a number, or an object of another kind
        return ()


def code_string_of(dataset: Any, tag: int) -> str:
    """The one value of a code string, date, age or UID; "" where there are several, or none."""
    texts = strings_of(dataset, tag)
    return texts[0] if len(texts) == 1 else ""


def numbers_of(dataset: Any, tag: int) -> tuple[float, ...]:
    """The values of a decimal string; () where one of them is no finite number."""
    value: Any = getattr(raw_of(dataset, tag), "value", ())
    try:
        if len(value) > MAX_LENGTH:
            return ()
        texts = value.decode("ascii").replace(",", ".").split("\\") if isinstance(value, bytes) else value  # PS3.5 6.2: no other comma
        numbers = tuple(float(text.strip(" \0") if isinstance(text, str) else text) for text in texts)
    except OF_ELEMENTS:
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def _integers(dataset: Any, tag: int) -> tuple[int, ...]:
    """The values of a binary element of whole numbers; () where it is none."""
    element = raw_of(dataset, tag)
    if getattr(element, "VR", "") not in ("US", None) or is_long(element):
        return ()
    try:
        value = dataset[tag].value
        return (value,) if isinstance(value, int) else tuple(int(number) for number in value)
    except OF_ELEMENTS:
        return ()


def items_of(dataset: Any, tag: int) -> Sequence[Any]:
    """The items of a sequence; () where there is none. An element of another VR is not converted."""
    element = raw_of(dataset, tag)
    if element is None or element.VR not in ("SQ", "UN", None):
        return ()
    try:
        return sequence_of(dataset, tag, element)
    except OF_ELEMENTS:  # broken, or no sequence
        return ()


def code_of(item: Any) -> str:
    """The code of a Code Sequence item (PS3.3 8.8) where its scheme is one of ours; never its meaning."""
    return code_string_of(item, CODE_VALUE) if code_string_of(item, CODING_SCHEME) in SCHEMES else ""
