"""Elements of a dataset as plain values; nothing that a file holds is printed.

``header/raw.py`` reads elements before pydicom converts them, since its remarks quote values; pixels need the converted numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pmclip_deploy.faults import OF_ELEMENTS
from pmclip_deploy.header import raw
from pmclip_deploy.imaging.decoders.layout import Refused

if TYPE_CHECKING:
    from pydicom import Dataset


Window = tuple[float, float]  # (center, width)


def items_of(group: Any, keyword: str) -> list[Dataset]:
    from pydicom.datadict import tag_for_keyword

    tag = tag_for_keyword(keyword)
    assert tag is not None
    return list(raw.items_of(group, tag))


def frame_group(dataset: Dataset, index: int, keyword: str) -> Any:
    """The functional group macro of this frame: its own, else the shared one, else the dataset itself (C.7.6.16)."""
    own, shared = items_of(dataset, "PerFrameFunctionalGroupsSequence"), items_of(dataset, "SharedFunctionalGroupsSequence")
    for holder in [*own[index : index + 1], *shared[:1]]:
        if found := items_of(holder, keyword):
            return found[0]
    return dataset


def numbers_of(group: Any, keyword: str) -> list[float] | None:
    """The values that are numbers up to the first that is none; None where the element is missing or empty."""
    value: Any
    try:
        if keyword in group and raw.is_long(group.get_item(keyword)):
            raise Refused(f"its {keyword} is longer than a list of numbers can be")
        value = (_decimal_texts(group.get_item(keyword)) or group[keyword].value) if keyword in group else None
    except OF_ELEMENTS:  # a decimal string that is none
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


def _decimal_texts(element: Any) -> list[str] | None:
    """The values of a decimal string that pydicom has not converted yet. A comma in one can only be the decimal mark (PS3.5 6.2)."""
    if not isinstance(element.value, bytes) or b"," not in element.value:
        return None
    from pydicom.datadict import dictionary_VR

    if (dictionary_VR(element.tag) if element.VR in ("UN", None) else element.VR) != "DS":
        return None
    return element.value.decode("ascii").replace(",", ".").strip(" \0").split("\\")


def whole_number(dataset: Dataset, keyword: str, default: int) -> int:
    numbers = numbers_of(dataset, keyword)
    if numbers is None:
        return default
    if len(numbers) != 1 or not math.isfinite(numbers[0]) or numbers[0] != int(numbers[0]):
        raise Refused(f"its {keyword} is not one whole number")
    return int(numbers[0])


def order_in_series(dataset: Any) -> float:
    """Where an image stands in its series: along the normal of the planes (PS3.3 C.7.6.2.1.1), else by Instance Number (0020,0013)."""
    position, orientation = numbers_of(dataset, "ImagePositionPatient") or [], numbers_of(dataset, "ImageOrientationPatient") or []
    if len(position) == 3 and len(orientation) == 6:
        (a, b, c), (d, e, f) = orientation[:3], orientation[3:]
        along = (b * f - c * e) * position[0] + (c * d - a * f) * position[1] + (a * e - b * d) * position[2]
        if math.isfinite(along):
            return along
    number = (numbers_of(dataset, "InstanceNumber") or [0.0])[0]
    return number if math.isfinite(number) else 0.0


def text_of(group: Any, keyword: str) -> str:
    try:
        value = group.get(keyword) if keyword in group and not raw.is_long(group.get_item(keyword)) else ""
    except OF_ELEMENTS:
        return ""
    return value.strip() if isinstance(value, str) else ""


def code_string_of(group: Any, keyword: str) -> str:
    """A code string, in upper case: PS3.5 6.2 allows no other, and some writers use it."""
    return text_of(group, keyword).upper()


def printable_uid(uid: str) -> str:
    """A UID as it may be printed; anything longer or odder could be something else."""
    return uid if len(uid) <= 64 and all(c in "0123456789." for c in uid) else "?"
