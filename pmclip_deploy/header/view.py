"""Plane and projection of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pmclip_deploy.header.raw import SOP_CLASS, STORAGE, Groups, code_of, code_string_of, items_of, numbers_of, once, strings_of

OBLIQUE = 30.0  # degrees from the nearest plane; a CT gantry tilts to 30, and its slices are still called axial


# --- plane ----------------------------------------------------------------------------------------------------------------------

ORIENTATION, PLANE_ORIENTATION_SEQUENCE, PATIENT_ORIENTATION = 0x00200037, 0x00209116, 0x00200020
SLICED = ("ct", "mr", "pt", "nm", "us", None)  # of a plain film's devices, some write the orientation of an axial slice
VOLUME_SOP_CLASSES = tuple(STORAGE + tail for tail in ("13.1.1", "13.1.2", "13.1.3"))  # 3D X-ray and tomosynthesis

_PLANES = ("sagittal", "coronal", "axial")  # across x, y and z of the patient (PS3.3 C.7.6.2.1.1)
_PLANE_OF_LETTERS = {frozenset("XZ"): "coronal", frozenset("YZ"): "sagittal", frozenset("XY"): "axial"}
_AXIS = {"L": "X", "R": "X", "A": "Y", "P": "Y", "H": "Z", "F": "Z"}


def plane_of(groups: Groups, family: str | None) -> tuple[str | None, str | None]:
    """(plane, nearest plane of an oblique one)."""
    if family not in SLICED and code_string_of(groups.dataset, SOP_CLASS) not in VOLUME_SOP_CLASSES:
        return None, None
    for holder in (*groups.items(PLANE_ORIENTATION_SEQUENCE), groups.dataset, *groups.detector()):
        cosines = numbers_of(holder, ORIENTATION)
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
    axes = frozenset(_AXIS.get(letter, "") for letter in strings_of(dataset, PATIENT_ORIENTATION))
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


def projection_of(groups: Groups, family: str | None) -> tuple[str | None, tuple[str, ...]]:
    """(projection, modifiers) from the view's code, else View Position, else, but for a mammogram, Patient Orientation."""
    if family not in PROJECTED:
        return None, ()
    views = [*groups.detector_items(VIEW_CODE_SEQUENCE), *items_of(groups.dataset, VIEW_CODE_SEQUENCE)][:1]
    coded = next((_PROJECTION_OF_CODE[code] for code in map(code_of, views) if code in _PROJECTION_OF_CODE), None)
    named = _PROJECTION_OF_POSITION.get(code_string_of(groups.dataset, VIEW_POSITION))
    if coded and named and coded != named and not {coded, named} <= _FRONTAL:
        return None, ()
    projection = coded or named
    if family not in ("mg", None):
        projection = _ELSEWHERE.get(projection or "", projection)
    if projection is None and family in ("xr", "rf"):
        projection = _PROJECTION_OF_PLANE.get(_plane_of_patient_orientation(groups.dataset) or "")
    modifiers = (_MODIFIER_OF_CODE.get(code_of(item)) for view in views for item in items_of(view, VIEW_MODIFIER_SEQUENCE)[:8])
    return projection, once(filter(None, modifiers)) if projection else ()
