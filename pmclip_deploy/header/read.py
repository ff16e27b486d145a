"""What a DICOM file says of its picture: enumerated values and codes, in the words of ``vocabulary``; free text is never kept.

    Dataset, frame -> Header -> header_value (words), contradiction (one note)

Elements are compared with tables as they stand in the file, so that nothing comes out that is not in a table. A value that is malformed,
too long, of another VR, or in contradiction to another one, says nothing (None). Standard library only; a Dataset comes as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from pmclip_deploy.vocabulary import (
    FAMILIES,
    FAMILY_OF_MODALITY,
    LOOK_ALIKE,
    NO_RADIOLOGY,
    PART_OF_CODE,
    PART_OF_TERM,
    PROJECTIONS,
    Part,
)

OBLIQUE = 30.0  # degrees from the nearest plane; a CT gantry tilts to 30, and its slices are still called axial
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
    groups = _Groups(dataset, frame)
    plane, nearest = _plane(groups, family)
    projection, modifiers = _projection(groups, family)
    parts = _parts(groups)
    return Header(
        family=family,
        localizer=family == "ct" and "LOCALIZER" in _strings(dataset, IMAGE_TYPE),
        plane=plane,
        nearest=nearest,
        projection=projection,
        modifiers=modifiers,
        regions=_once(region for part in parts for region in part.regions),
        parts=_once(part.label for part in parts),
        organs=_once(organ for part in parts for organ in part.organs),
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
    if said is None or seen_as & {family} or any(family in alike and seen_as & alike for alike in LOOK_ALIKE):
        return None
    looks = FAMILIES[family].label
    return f"the header says {said}; the picture looks like {'a ' if family == 'xr' else ''}{looks}"


# --- modality -------------------------------------------------------------------------------------------------------------------

MODALITY, SOP_CLASS, MEDIA_SOP_CLASS, IMAGE_TYPE = 0x00080060, 0x00080016, 0x00020002, 0x00080008

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_FAMILY_OF_SOP_CLASS = {  # PS3.4 B.5, the retired ones too
    _STORAGE + tail: name
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
    _STORAGE + tail: name
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
    code = _code_string(dataset, MODALITY)
    if code in FAMILY_OF_MODALITY or code in NO_RADIOLOGY:
        return FAMILY_OF_MODALITY.get(code), NO_RADIOLOGY.get(code)
    uid = _code_string(dataset, SOP_CLASS) or _code_string(getattr(dataset, "file_meta", None), MEDIA_SOP_CLASS)
    return _FAMILY_OF_SOP_CLASS.get(uid), _OUTSIDE_OF_SOP_CLASS.get(uid)


# --- plane ----------------------------------------------------------------------------------------------------------------------

ORIENTATION, PLANE_ORIENTATION_SEQUENCE, PATIENT_ORIENTATION = 0x00200037, 0x00209116, 0x00200020
SLICED = ("ct", "mr", "pt", "nm", "us", None)  # of a plain film's devices, some write the orientation of an axial slice
VOLUME_SOP_CLASSES = tuple(_STORAGE + tail for tail in ("13.1.1", "13.1.2", "13.1.3"))  # 3D X-ray and tomosynthesis

_PLANES = ("sagittal", "coronal", "axial")  # across x, y and z of the patient (PS3.3 C.7.6.2.1.1)
_PLANE_OF_LETTERS = {frozenset("XZ"): "coronal", frozenset("YZ"): "sagittal", frozenset("XY"): "axial"}
_AXIS = {"L": "X", "R": "X", "A": "Y", "P": "Y", "H": "Z", "F": "Z"}


def _plane(groups: _Groups, family: str | None) -> tuple[str | None, str | None]:
    """(plane, nearest plane of an oblique one)."""
    if family not in SLICED and _code_string(groups.dataset, SOP_CLASS) not in VOLUME_SOP_CLASSES:
        return None, None
    for holder in (*groups.items(PLANE_ORIENTATION_SEQUENCE), groups.dataset, *groups.detector()):
        cosines = _numbers(holder, ORIENTATION)
        if cosines:
            return _plane_of_cosines(cosines)
    return _plane_of_patient_orientation(groups.dataset), None


def _plane_of_cosines(cosines: Sequence[float]) -> tuple[str | None, str | None]:
    """Image Orientation (Patient): the cosines of a row and a column, of length 1 and at right angles (C.7.6.2.1.1)."""
    if len(cosines) != 6:
        return None, None
    a, b = cosines[:3], cosines[3:]
    unit = all(abs(math.hypot(*v) - 1) <= 0.05 for v in (a, b))
    if not unit or abs(sum(x * y for x, y in zip(a, b, strict=True))) > 0.05:
        return None, None
    normal = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
    length = math.hypot(*normal)
    steepest = max(range(3), key=lambda axis: abs(normal[axis]))
    tilt = math.degrees(math.acos(min(abs(normal[steepest]) / length, 1.0)))
    return (_PLANES[steepest], None) if tilt <= OBLIQUE + 1e-6 else ("oblique", _PLANES[steepest])


def _plane_of_patient_orientation(dataset: Any) -> str | None:
    """Patient Orientation (C.7.6.1.1.1): where rows and columns run to; a value of several letters is tilted by an unknown angle."""
    axes = frozenset(_AXIS.get(letter, "") for letter in _strings(dataset, PATIENT_ORIENTATION))
    return _PLANE_OF_LETTERS.get(axes)


# --- projection -----------------------------------------------------------------------------------------------------------------

VIEW_POSITION, VIEW_CODE_SEQUENCE, VIEW_MODIFIER_SEQUENCE = 0x00185101, 0x00540220, 0x00540222
PROJECTED = ("xr", "mg", "rf", "xa", "nm", None)

_PROJECTION_OF_POSITION = {  # View Position: PS3.3 C.8.1.1, C.8.11.5 and C.8.11.7, and what devices write
    term: name
    for name, terms in {
        "ap": "AP",
        "pa": "PA",
        "frontal": "FRONTAL",
        "lateral": "LL RL LAT LATERAL ML LM",
        "oblique": "RLO LLO LAO RAO LPO RPO OBL OBLIQUE LMO SIO ISO",
        "axial": "AX AXIAL",
        "decubitus": "RLD LLD DECUB DECUBITUS",
        "cc": "CC XCC XCCL XCCM",
        "mlo": "MLO",
    }.items()
    for term in terms.split()
}
_PROJECTION_OF_CODE = {  # PS3.16 CID 4010, CID 4014 and CID 26
    code: name
    for name, codes in {
        "ap": "399348003 R-10206",
        "pa": "272479007 R-40888 R-10214",
        "frontal": "399033003 R-10202",
        "lateral": "399067008 R-102CD 399198007 R-10232 399173006 R-10236 399352003 R-10228 399260004 R-10224 399118008 G-5223 "
        "399297009 G-5222 49370004 G-A104",
        "oblique": "399182000 R-102C1 399312000 R-10208 399059000 R-10216 399038007 R-10210 399006002 R-10212 399135007 R-10220 "
        "399356000 R-40985 399236003 R-10234 399184004 R-10238 260427002 R-40783 260426006 R-40782 399160007 R-10204 399099002 R-10230 "
        "399188001 R-102D0 441555000 R-40AAA 399108003 G-5206 399074003 G-5207 399075002 G-5208 399136008 G-5209",
        "axial": "399061009 R-10241",
        "cc": "399162004 R-10242 399192008 R-1024A 399101009 R-1024B",
        "mlo": "399368009 R-10226",
        "anterior": "399321004 G-5215",
        "posterior": "399001007 G-5216",
    }.items()
    for code in codes.split()
}
_MODIFIER_OF_CODE = {  # PS3.16 CID 4015
    code: name
    for name, codes in {
        "magnification": "399163009 R-102D6",
        "spot compression": "399055006 R-102D7",
        "implant displaced": "399209000 R-102D5",
        "axillary tail": "399011000 R-102D1",
        "cleavage": "399161006 R-102D2",
        "tangential beam": "399110001 R-102C2",
    }.items()
    for code in codes.split()
}
_PROJECTION_OF_PLANE = {"coronal": "frontal", "sagittal": "lateral", "axial": "axial"}
_ELSEWHERE = {"cc": "axial", "mlo": "oblique"}  # what a mammogram's names mean on another film
_FRONTAL = frozenset({"ap", "pa", "frontal"})


def _projection(groups: _Groups, family: str | None) -> tuple[str | None, tuple[str, ...]]:
    """(projection, modifiers) from the view's code, else View Position, else, but for a mammogram, Patient Orientation."""
    if family not in PROJECTED:
        return None, ()
    views = [*groups.detector_items(VIEW_CODE_SEQUENCE), *_items(groups.dataset, VIEW_CODE_SEQUENCE)][:1]
    coded = next((_PROJECTION_OF_CODE[code] for code in map(_code, views) if code in _PROJECTION_OF_CODE), None)
    named = _PROJECTION_OF_POSITION.get(_code_string(groups.dataset, VIEW_POSITION))
    if coded and named and coded != named and not {coded, named} <= _FRONTAL:
        return None, ()
    projection = coded or named
    if family not in ("mg", None):
        projection = _ELSEWHERE.get(projection or "", projection)
    if projection is None and family in ("xr", "rf"):
        projection = _PROJECTION_OF_PLANE.get(_plane_of_patient_orientation(groups.dataset) or "")
    modifiers = (_MODIFIER_OF_CODE.get(_code(item)) for view in views for item in _items(view, VIEW_MODIFIER_SEQUENCE)[:8])
    return projection, _once(filter(None, modifiers)) if projection else ()


# --- body part and side ---------------------------------------------------------------------------------------------------------

BODY_PART, ANATOMIC_REGION_SEQUENCE, ANATOMIC_MODIFIER_SEQUENCE, FRAME_ANATOMY_SEQUENCE = 0x00180015, 0x00082218, 0x00082220, 0x00209071
FRAME_LATERALITY, IMAGE_LATERALITY, LATERALITY = 0x00209072, 0x00200062, 0x00200060

_SIDES = {"L": "left", "R": "right", "B": "both"}  # U, unpaired, says nothing
_SIDE_OF_CODE = {"7771000": "left", "G-A101": "left", "24028007": "right", "G-A100": "right", "51440002": "both", "G-A102": "both"}
_SEPARATORS = str.maketrans("", "", " _-/")


def _parts(groups: _Groups) -> list[Part]:
    """From the codes, else from the term (PS3.16 Annex L); where they name regions that do not meet, the file says nothing."""
    coded = [PART_OF_CODE[code] for code in map(_code, groups.anatomy()) if code in PART_OF_CODE]
    term = PART_OF_TERM.get((_code_string(groups.dataset, BODY_PART) or "").translate(_SEPARATORS))
    if not coded or term is None:
        return coded or ([term] if term else [])
    shown = {region for part in coded for region in part.regions}
    if not shown or not term.regions:  # one of them is wide, such as "upper limb"
        return coded if shown else [term]
    if not shown & set(term.regions):
        return []
    return coded if len(coded) > 1 or len(shown) <= len(term.regions) else [term]


def _laterality(groups: _Groups) -> str | None:
    """The side of the frame, else of the image, of the anatomy's modifier, of the series; None where two of them are opposite."""
    frames = (_code_string(item, FRAME_LATERALITY) for item in groups.items(FRAME_ANATOMY_SEQUENCE)[:1])
    letters = (*frames, _code_string(groups.dataset, IMAGE_LATERALITY))
    modifiers = (_SIDE_OF_CODE.get(_code(code)) for item in groups.anatomy() for code in _items(item, ANATOMIC_MODIFIER_SEQUENCE)[:8])
    series = _SIDES.get(_code_string(groups.dataset, LATERALITY))
    sides = [side for side in (*map(_SIDES.get, letters), *modifiers, series) if side]
    return None if {"left", "right"} <= set(sides) else next(iter(sides), None)


# --- contrast -------------------------------------------------------------------------------------------------------------------

AGENT, AGENT_SEQUENCE, USAGE_SEQUENCE, ADMINISTERED = 0x00180010, 0x00180012, 0x00189341, 0x00189342

# What devices write into the agent's free text where there was none, and where nothing is known.
_NO_AGENT = frozenset({"NO", "NONE", "N", "NON", "WO", "WITHOUT", "NOCONTRAST", "NONCONTRAST", "WITHOUTCONTRAST", "UNENHANCED", "NATIVE"})
_NOT_KNOWN = frozenset({"", "0", "NA", "UNKNOWN", "NULL", ".", "?"})


def _contrast(groups: _Groups) -> bool | None:
    """Whether a contrast agent was given (PS3.3 C.7.6.4): the frame's own usage, else an item of the agents' sequence, else the agent.

    An absent element says nothing. An empty one says nothing either: it is of type 2, so that the module that is there because contrast was
    used may leave it empty, and many devices write it empty into every image.
    """
    given = {_code_string(item, ADMINISTERED) for item in groups.items(USAGE_SEQUENCE)}
    if given & {"YES", "NO"}:
        return True if "YES" in given else False if given == {"NO"} else None
    if any(_raw(item, CODE_VALUE) for item in _items(groups.dataset, AGENT_SEQUENCE)):
        return True
    texts = {text.translate(_SEPARATORS) for text in _strings(groups.dataset, AGENT)} - _NOT_KNOWN
    return not texts <= _NO_AGENT if texts else None


# --- child ----------------------------------------------------------------------------------------------------------------------

AGE, BIRTH_DATE, STUDY_DATE = 0x00101010, 0x00100030, 0x00080020
_A_YEAR = {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}


def _child(dataset: Any) -> bool | None:
    """Under 18 years, from Patient's Age (PS3.5 6.2, AS), else from birth date and study date. A 0 that is no day of life is a blank."""
    age = _code_string(dataset, AGE) or ""
    digits, unit = age[:-1], age[-1:]
    if unit in _A_YEAR and len(digits) <= 3 and digits.isascii() and digits.isdigit() and (int(digits) or unit == "D"):
        years = int(digits) / _A_YEAR[unit]
        return years < ADULT if years <= OLDEST else None
    born, studied = _date(dataset, BIRTH_DATE), _date(dataset, STUDY_DATE)
    if born is None or studied is None or not born <= studied or studied.year - born.year > OLDEST:
        return None
    return (studied.year - born.year, studied.month, studied.day) < (ADULT, born.month, born.day)


def _date(dataset: Any, tag: int) -> date | None:
    text = (_code_string(dataset, tag) or "").replace(".", "")  # ACR-NEMA wrote 1997.04.24
    if len(text) != 8 or not (text.isascii() and text.isdigit()):
        return None
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return None


# --- reading single elements ----------------------------------------------------------------------------------------------------

PER_FRAME_GROUPS, SHARED_GROUPS, DETECTOR_SEQUENCE, DETECTOR_VECTOR = 0x52009230, 0x52009229, 0x00540022, 0x00540020
CODE_VALUE, CODING_SCHEME = 0x00080100, 0x00080102
SCHEMES = frozenset({"SCT", "SRT", "SNM3", "99SDM"})  # SNOMED CT, SNOMED RT, and its designators of old (PS3.16 8)
MAX_LENGTH = 1024  # bytes of an element that may hold a value of ours


class _Groups:
    """Where a frame's attributes stand: its own functional group, else the shared one, else the dataset (C.7.6.16)."""

    def __init__(self, dataset: Any, frame: int) -> None:
        self.dataset = dataset
        own = _items(dataset, PER_FRAME_GROUPS)
        self._holders = [*([own[frame]] if 0 <= frame < len(own) else []), *_items(dataset, SHARED_GROUPS)[:1]]
        self._frame = frame

    def items(self, tag: int) -> Sequence[Any]:
        """The items of a macro's sequence."""
        return next((found for holder in self._holders if (found := _items(holder, tag))), ())

    def anatomy(self) -> list[Any]:
        """Items of Anatomic Region Sequence: those of the frame (C.7.6.16.2.8), else those of the image."""
        frames = [item for anatomy in self.items(FRAME_ANATOMY_SEQUENCE)[:1] for item in _items(anatomy, ANATOMIC_REGION_SEQUENCE)]
        return list(frames or _items(self.dataset, ANATOMIC_REGION_SEQUENCE))[:8]

    def detector(self) -> Sequence[Any]:
        """The detector of a nuclear medicine frame (C.8.4.10): Detector Vector counts from 1; no more than one without it."""
        detectors = _items(self.dataset, DETECTOR_SEQUENCE)
        if len(detectors) <= 1:
            return detectors
        vector = _integers(self.dataset, DETECTOR_VECTOR)
        number = vector[self._frame] if 0 <= self._frame < len(vector) else 0
        return detectors[number - 1 : number] if number > 0 else ()

    def detector_items(self, tag: int) -> Iterator[Any]:
        return (item for detector in self.detector() for item in _items(detector, tag))


def _once(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def _raw(dataset: Any, tag: int) -> Any:
    """The element as read, before pydicom converts and checks it: its remarks quote values. None where there is none."""
    try:
        return dataset.get_item(tag)
    except Exception:
        return None


def _strings(dataset: Any, tag: int) -> tuple[str, ...]:
    """The values of a string element, upper case, without padding; () where it is absent, too long or no string."""
    value: Any = getattr(_raw(dataset, tag), "value", ())
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
    except Exception:  # None, a number, or an object of another kind
        return ()


def _code_string(dataset: Any, tag: int) -> str:
    """The one value of a code string, date, age or UID; "" where there are several, or none."""
    texts = _strings(dataset, tag)
    return texts[0] if len(texts) == 1 else ""


def _numbers(dataset: Any, tag: int) -> tuple[float, ...]:
    """The values of a decimal string; () where one of them is no finite number."""
    value: Any = getattr(_raw(dataset, tag), "value", ())
    try:
        if len(value) > MAX_LENGTH:
            return ()
        texts = value.decode("ascii").split("\\") if isinstance(value, bytes) else value
        numbers = tuple(float(text.strip(" \0") if isinstance(text, str) else text) for text in texts)
    except Exception:
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def _integers(dataset: Any, tag: int) -> tuple[int, ...]:
    """The values of a binary element of whole numbers; () where it is none."""
    if getattr(_raw(dataset, tag), "VR", "") not in ("US", None):
        return ()
    try:
        value = dataset[tag].value
        return (value,) if isinstance(value, int) else tuple(int(number) for number in value)
    except Exception:
        return ()


def _items(dataset: Any, tag: int) -> Sequence[Any]:
    """The items of a sequence; () where there is none. An element of another VR is not converted."""
    element = _raw(dataset, tag)
    if element is None or element.VR not in ("SQ", "UN", None):
        return ()
    try:
        value = dataset[tag].value
        return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()
    except Exception:  # broken, or no sequence
        return ()


def _code(item: Any) -> str:
    """The code of a Code Sequence item (PS3.3 8.8) where its scheme is one of ours; never its meaning."""
    return _code_string(item, CODE_VALUE) if _code_string(item, CODING_SCHEME) in SCHEMES else ""
