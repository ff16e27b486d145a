"""What a DICOM file says of its picture: enumerated values and codes, in the words of ``vocabulary``; free text is never kept.

    Dataset, frame -> Header -> header_value (words), contradiction (one note)

Elements are compared with tables as they stand in the file, so that nothing comes out that is not in a table. A value that is malformed,
too long, of another VR, or in contradiction to another one, says nothing (None). Standard library only; a Dataset comes as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from typing import Any

from pmclip_deploy.body_parts import PART_OF_CODE, PART_OF_TERM, Part
from pmclip_deploy.header.raw import (
    ANATOMIC_MODIFIER_SEQUENCE,
    BODY_PART,
    CODE_VALUE,
    FRAME_ANATOMY_SEQUENCE,
    IMAGE_TYPE,
    MEDIA_SOP_CLASS,
    MODALITY,
    SOP_CLASS,
    STORAGE,
    Groups,
    code_of,
    code_string_of,
    items_of,
    once,
    raw_of,
    strings_of,
)
from pmclip_deploy.header.view import plane_of, projection_of
from pmclip_deploy.vocabulary import CONFUSABLE_FAMILIES, FAMILIES, FAMILY_OF_MODALITY, NO_RADIOLOGY, PROJECTIONS

DISAGREES = 0.8  # a picture's opinion of its family under this is too weak to hold against a header
ADULT = 18  # years
OLDEST = 120  # years; above are the dates and ages that de-identification writes


@dataclass(frozen=True)
class Header:
    """What the file says of one frame, in words of ``vocabulary``; None, or an empty tuple, where it says nothing that can be used.

    ``child`` comes from the patient's age, which is not kept; it is for decisions only, in no repr, JSON or message.
    """

    family: str | None = None  # of FAMILIES
    outside: str | None = None  # what it is where that is no radiology, as "microscopy"; family is None then
    localizer: bool = False  # a CT's scout view, which looks like a plain film
    plane: str | None = None  # "axial", "coronal", "sagittal", "oblique"
    nearest: str | None = None  # the plane nearest to an oblique one
    projection: str | None = None  # of PROJECTIONS
    modifiers: tuple[str, ...] = ()  # of a mammogram's view, as "magnification"
    regions: tuple[str, ...] = ()  # of REGIONS: all that the picture shows
    parts: tuple[str, ...] = ()  # the labels of PARTS, finer than a region: "wrist"
    organs: tuple[str, ...] = ()  # the model's organ answers that fit, the likeliest first
    contrast: bool | None = None
    laterality: str | None = None  # "left", "right", "both"
    child: bool | None = field(default=None, repr=False)  # under 18 years

    def to_json(self) -> dict[str, Any]:
        """All that is stated, but for ``child``."""
        stated = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "child"}
        stated["localizer"] = self.localizer or None
        return {name: list(value) if isinstance(value, tuple) else value for name, value in stated.items() if value not in (None, ())}


def header_from_dataset(dataset: Any, frame: int = 0) -> Header:
    """Read a pydicom Dataset for one frame, counted from 0. Raises nothing: what cannot be read says nothing."""
    family, outside = _modality(dataset)
    child = _child(dataset)
    if outside:
        return Header(outside=outside, child=child)
    groups = Groups(dataset, frame)
    plane, nearest = plane_of(groups, family)
    projection, modifiers = projection_of(groups, family)
    parts = _parts(groups)
    return Header(
        family=family,
        localizer=family == "ct" and "LOCALIZER" in strings_of(dataset, IMAGE_TYPE),
        plane=plane,
        nearest=nearest,
        projection=projection,
        modifiers=modifiers,
        regions=once(region for part in parts for region in part.regions),
        parts=once(part.label for part in parts),
        organs=once(organ for part in parts for organ in part.organs),
        contrast=_contrast(groups),
        laterality=_laterality(groups),
        child=child,
    )


FACETS = ("modality", "plane", "projection", "region", "organ", "contrast", "laterality")


def header_value(header: Header, facet: str) -> str | None:
    """What the header says on one of FACETS, as a radiologist reads it: "CT", "oblique, nearest to sagittal", "PA"; None where nothing."""
    if facet == "modality":
        name = FAMILIES[header.family].label if header.family else header.outside
        return f"{name} localizer" if header.localizer else name
    if facet == "plane":
        return f"{header.plane}, nearest to {header.nearest}" if header.nearest else header.plane
    if facet == "projection" and header.projection:
        return " with ".join(filter(None, (PROJECTIONS[header.projection][0], " and ".join(header.modifiers))))
    if facet == "region":
        return " and ".join(header.parts) or None
    if facet == "organ":
        return header.organs[0] if len(header.organs) == 1 else None
    if facet == "contrast" and header.contrast is not None:
        return "with contrast" if header.contrast else "without contrast"
    return header.laterality if facet == "laterality" else None


def contradiction(header: Header, family: str | None, probability: float) -> str | None:
    """One note where the picture looks like another family than the header's, at DISAGREES or above; none where the two look alike."""
    if family is None or not probability >= DISAGREES or family == header.family:
        return None
    said = header_value(header, "modality")
    seen_as = {"xr"} if header.localizer else {header.family}
    if said is None or seen_as & {family} or any(family in alike and seen_as & alike for alike in CONFUSABLE_FAMILIES):
        return None
    looks = FAMILIES[family].label
    return f"the header says {said}; the picture looks like {'a ' if family == 'xr' else ''}{looks}"


_FAMILY_OF_SOP_CLASS = {  # PS3.4 B.5, the retired ones too
    STORAGE + tail: name
    for name, tails in {
        "xr": "1 1.1 1.1.1 1.3 1.3.1",
        "mg": "1.2 1.2.1 13.1.3 13.1.4 13.1.5",
        "ct": "2 2.1 2.2 13.1.2",
        "mr": "4 4.1 4.2 4.3 4.4",
        "us": "3 3.1 6 6.1 6.2 6.3",
        "nm": "5 20",
        "pt": "128 128.1 130",
        "xa": "12.1 12.1.1 12.3 13.1.1",
        "rf": "12.2 12.2.1",
    }.items()
    for tail in tails.split()
}
_OUTSIDE_OF_SOP_CLASS = {
    STORAGE + tail: name
    for name, tails in {
        "endoscopy": "77.1.1 77.1.1.1",
        "microscopy": "77.1.2 77.1.2.1 77.1.3 77.1.6 77.1.8 77.1.9",
        "photography": "77.1.4 77.1.4.1 77.1.7",
        "ophthalmology": "77.1.5.1 77.1.5.2 77.1.5.3 77.1.5.4 77.1.5.5 77.1.5.6 77.1.5.7 77.1.5.8",
        "intravascular optical tomography": "14.1 14.2",
    }.items()
    for tail in tails.split()
}


def _modality(dataset: Any) -> tuple[str | None, str | None]:
    """(family, outside) from Modality, else from the SOP class, which the IOD ties to a modality (PS3.3 C.7.3.1.1.1, PS3.4 B.5)."""
    code = code_string_of(dataset, MODALITY)
    if code in FAMILY_OF_MODALITY or code in NO_RADIOLOGY:
        return FAMILY_OF_MODALITY.get(code), NO_RADIOLOGY.get(code)
    uid = code_string_of(dataset, SOP_CLASS) or code_string_of(getattr(dataset, "file_meta", None), MEDIA_SOP_CLASS)
    return _FAMILY_OF_SOP_CLASS.get(uid), _OUTSIDE_OF_SOP_CLASS.get(uid)


FRAME_LATERALITY, IMAGE_LATERALITY, LATERALITY = 0x00209072, 0x00200062, 0x00200060

_SIDES = {"L": "left", "R": "right", "B": "both"}  # U, unpaired, says nothing
_SIDE_OF_CODE = {"7771000": "left", "G-A101": "left", "24028007": "right", "G-A100": "right", "51440002": "both", "G-A102": "both"}
_SEPARATORS = str.maketrans("", "", " _-/")


def _parts(groups: Groups) -> list[Part]:
    """From the codes, else from the term (PS3.16 Annex L); where they name regions that do not meet, the file says nothing."""
    coded = [PART_OF_CODE[code] for code in map(code_of, groups.anatomy()) if code in PART_OF_CODE]
    term = PART_OF_TERM.get((code_string_of(groups.dataset, BODY_PART) or "").translate(_SEPARATORS))
    if not coded or term is None:
        return coded or ([term] if term else [])
    shown = {region for part in coded for region in part.regions}
    if not shown or not term.regions:  # one of them is wide, such as "upper limb"
        return coded if shown else [term]
    if not shown & set(term.regions):
        return []
    return coded if len(coded) > 1 or len(shown) <= len(term.regions) else [term]


def _laterality(groups: Groups) -> str | None:
    """The side of the frame, else of the image, of the anatomy's modifier, of the series; None where two of them are opposite."""
    frames = (code_string_of(item, FRAME_LATERALITY) for item in groups.items(FRAME_ANATOMY_SEQUENCE)[:1])
    letters = (*frames, code_string_of(groups.dataset, IMAGE_LATERALITY))
    modifiers = (_SIDE_OF_CODE.get(code_of(code)) for item in groups.anatomy() for code in items_of(item, ANATOMIC_MODIFIER_SEQUENCE)[:8])
    series = _SIDES.get(code_string_of(groups.dataset, LATERALITY))
    sides = [side for side in (*map(_SIDES.get, letters), *modifiers, series) if side]
    return None if {"left", "right"} <= set(sides) else next(iter(sides), None)


# --- contrast -------------------------------------------------------------------------------------------------------------------

AGENT, AGENT_SEQUENCE, USAGE_SEQUENCE, ADMINISTERED = 0x00180010, 0x00180012, 0x00189341, 0x00189342

# What devices write into the agent's free text where there was none, and where nothing is known.
_NO_AGENT = frozenset({"NO", "NONE", "N", "NON", "WO", "WITHOUT", "NOCONTRAST", "NONCONTRAST", "WITHOUTCONTRAST", "UNENHANCED", "NATIVE"})
_NOT_KNOWN = frozenset({"", "0", "NA", "UNKNOWN", "NULL", ".", "?"})


def _contrast(groups: Groups) -> bool | None:
    """Whether a contrast agent was given (PS3.3 C.7.6.4): the frame's own usage, else an item of the agents' sequence, else the agent.

    An absent element says nothing. An empty one says nothing either: it is of type 2, so that the module that is there because contrast was
    used may leave it empty, and many devices write it empty into every image.
    """
    given = {code_string_of(item, ADMINISTERED) for item in groups.items(USAGE_SEQUENCE)}
    if given & {"YES", "NO"}:
        return True if "YES" in given else False if given == {"NO"} else None
    if any(raw_of(item, CODE_VALUE) for item in items_of(groups.dataset, AGENT_SEQUENCE)):
        return True
    texts = {text.translate(_SEPARATORS) for text in strings_of(groups.dataset, AGENT)} - _NOT_KNOWN
    return not texts <= _NO_AGENT if texts else None


# --- child ----------------------------------------------------------------------------------------------------------------------

AGE, BIRTH_DATE, STUDY_DATE = 0x00101010, 0x00100030, 0x00080020
_A_YEAR = {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}


def _child(dataset: Any) -> bool | None:
    """Under 18 years, from Patient's Age (PS3.5 6.2, AS), else from birth date and study date. A 0 that is no day of life is a blank."""
    age = code_string_of(dataset, AGE) or ""
    digits, unit = age[:-1], age[-1:]
    if unit in _A_YEAR and len(digits) <= 3 and digits.isascii() and digits.isdigit() and (int(digits) or unit == "D"):
        years = int(digits) / _A_YEAR[unit]
        return years < ADULT if years <= OLDEST else None
    born, studied = _date(dataset, BIRTH_DATE), _date(dataset, STUDY_DATE)
    if born is None or studied is None or not born <= studied or studied.year - born.year > OLDEST:
        return None
    return (studied.year - born.year, studied.month, studied.day) < (ADULT, born.month, born.day)


def _date(dataset: Any, tag: int) -> date | None:
    text = (code_string_of(dataset, tag) or "").replace(".", "")  # ACR-NEMA wrote 1997.04.24
    if len(text) != 8 or not (text.isascii() and text.isdigit()):
        return None
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return None
