"""What a report takes over from the image that it is about: the identifiers of patient, study and request, and nothing else.

A value that DICOM does not allow (PS3.5 6.2) is left empty, and the report names its attribute. Values are never cut: a shorter Patient ID
could be another patient's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from pmclip_deploy.answer import ImageInfo
from pmclip_deploy.errors import InputError, NoPictureError
from pmclip_deploy.faults import OF_ELEMENTS
from pmclip_deploy.files import JPEG, PNG
from pmclip_deploy.header import raw
from pmclip_deploy.imaging.dicom_file import image_from_file, reading
from pmclip_deploy.imaging.picture import head_of_file

if TYPE_CHECKING:
    from pydicom import Dataset

MAKER = "pmclip-deploy"  # Manufacturer of our own reports, about which nothing is asked
UTF_8 = "ISO_IR 192"
REFERENCE = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
PATIENT_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")  # type 2 (PS3.3 C.7.1.1): empty if unknown
STUDY_2 = ("StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")  # type 2 (C.7.2.1, C.7.2.2)
OPTIONAL = ("IssuerOfPatientID", "PatientBirthTime", "StudyDescription", "PatientAge", "PatientSize", "PatientWeight")
REQUEST = (  # of an item of Referenced Request Sequence (C.17.2), type 2
    *("AccessionNumber", "RequestedProcedureID", "RequestedProcedureDescription"),
    *("PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest"),
)

_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+")
_TIME = re.compile(r"([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?")
_ZONE = re.compile(r"[+-](0\d|1[0-4])[0-5]\d")
_BEFORE_DICOM = {"DA": ".", "TM": ":"}  # 1997.04.24 and 10:11:12 of ACR-NEMA (PS3.5 6.2, notes)
_ASCII_CONTROLS = re.compile("[\x00-\x1f\x7f\\\\\ufffd\ud800-\udfff]")  # and what pydicom puts in place of a byte that it cannot read
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\\\\\ufffd\ud800-\udfff]")
_INTEGER = re.compile(r"[+-]?\d{1,12}")
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


# Image classes whose instances have one frame, so that a reference has no frame number even if a file claims more (PS3.3 10.3, PS3.4 B.5).
_ONE_FRAME = ("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1", "2", "4", "6", "6.1", "7", "128", "77.1.1", "77.1.2", "77.1.3", "77.1.4")
SINGLE_FRAME = frozenset(raw.STORAGE + number for number in _ONE_FRAME)


@dataclass(frozen=True)
class Source:
    """Of one image."""

    sop_class: str
    instance: str
    study: str
    series: str
    kept: Dataset  # valid elements of the modules Patient, General Study and Patient Study, and Referenced Request Sequence
    character_sets: tuple[str, ...]  # for ``kept``, valid together; () for the default repertoire
    undeclared: bool  # whether ``kept`` holds bytes over 0x7F of no declared set: they are kept as they are
    zone: str | None  # Timezone Offset From UTC
    procedures: tuple[tuple[str, str], ...]  # (value, scheme) of Procedure Code Sequence
    modality: str
    number: int  # Instance Number, or 1
    left_out: tuple[str, ...]  # names of attributes whose values are not valid

    def frame_number(self, image: ImageInfo) -> int | None:
        """What a reference to the frame says, counted from 1; None if the image has one frame, or its class allows one alone."""
        return image.frame + 1 if image.frames > 1 and self.sop_class not in SINGLE_FRAME else None


def header_from_path(path: str | PathLike[str]) -> Dataset:
    """A DICOM file's elements up to its pixels. Raises InputError if it is none, or broken."""
    where = fspath(path)
    if head_of_file(where).startswith((PNG, JPEG)):
        what = "is no DICOM file, so that a report about it belongs to no study"
        raise InputError(f"{where}: {what}", "give a DICOM file, or ask without a report")
    with reading(where) as stack:
        return image_from_file(where, stack).dataset


def source_from_dataset(dataset: Dataset, where: str) -> Source:
    """Read what a report takes over. ``where`` names the image in errors.

    Raises InputError if a UID that a report must refer to is missing or not valid, and NoPictureError for a page that a report made.
    """
    with reading(where):
        return _source(dataset, where)


def _source(dataset: Dataset, where: str) -> Source:
    from pydicom.datadict import dictionary_description

    reader = _Reader(dataset)
    sop_class, instance, study, series = uids = [reader.text(dataset, keyword) or "" for keyword in REFERENCE]
    if missing := [dictionary_description(keyword) for keyword, uid in zip(REFERENCE, uids, strict=True) if not uid]:
        what = f"has no valid {' and no valid '.join(missing)}, to which a report must refer"
        raise InputError(f"{where}: {what}", "export the image again from the archive, or ask without a report")
    if raw.strings_of(dataset, 0x00080070) == (MAKER.upper(),):
        raise NoPictureError(f"{where}: holds a report of {MAKER}, no picture", "give the image itself")
    reader.left_out.clear()  # of the UIDs, which are all valid
    kept = _kept(reader, dataset, study)
    zone = reader.text(dataset, "TimezoneOffsetFromUTC") or None
    number = reader.text(dataset, "InstanceNumber")
    reader.left_out.pop("InstanceNumber", None)
    return Source(
        sop_class,
        instance,
        study,
        series,
        kept=kept,
        character_sets=reader.sets,
        undeclared=reader.undeclared,
        zone=zone,
        procedures=tuple((value, scheme) for value, scheme, _ in reader.codes(dataset, "ProcedureCodeSequence")),
        modality=next(iter(raw.strings_of(dataset, raw.MODALITY)), ""),
        number=int(number) if number and 0 < int(number) < 2**31 else 1,
        left_out=tuple(dictionary_description(keyword) for keyword in reader.left_out),
    )


def _kept(reader: _Reader, dataset: Dataset, study: str) -> Dataset:
    from pydicom import Dataset as NewDataset

    kept = NewDataset()
    for keyword in (*PATIENT_2, *STUDY_2):
        setattr(kept, keyword, reader.text(dataset, keyword) or "")
    for keyword in OPTIONAL:
        if text := reader.text(dataset, keyword):
            setattr(kept, keyword, text)
    removed, method = (reader.text(dataset, keyword) for keyword in ("PatientIdentityRemoved", "DeidentificationMethod"))
    codes = reader.codes(dataset, "DeidentificationMethodCodeSequence")
    if removed and (removed == "NO" or method or codes):  # YES needs to say how (C.7.1.1, type 1C)
        kept.PatientIdentityRemoved = removed
        if method:
            kept.DeidentificationMethod = method
        if codes:
            kept.DeidentificationMethodCodeSequence = [_code_item(code) for code in codes]
    if requests := [_request(reader, item, study) for item in _requests(dataset)]:
        kept.ReferencedRequestSequence = requests
    return kept


def _requests(dataset: Dataset) -> Sequence[Any]:
    """The requests that an image says it fulfils: a document's own (C.17.2), or an image's (C.7.3.1)."""
    from pydicom.datadict import tag_for_keyword

    tags = [tag_for_keyword(keyword) for keyword in ("ReferencedRequestSequence", "RequestAttributesSequence")]
    return next((found for tag in tags if tag is not None and (found := list(raw.items_of(dataset, tag))[:16])), ())


def _request(reader: _Reader, item: Any, study: str) -> Dataset:
    from pydicom import Dataset as NewDataset

    request = NewDataset()
    request.StudyInstanceUID = reader.text(item, "StudyInstanceUID") or study
    request.ReferencedStudySequence = []
    request.RequestedProcedureCodeSequence = [_code_item(code) for code in reader.codes(item, "RequestedProcedureCodeSequence")]
    for keyword in REQUEST:
        setattr(request, keyword, reader.text(item, keyword) or "")
    return request


def _code_item(code: tuple[str, str, str]) -> Dataset:
    from pydicom import Dataset as NewDataset

    item = NewDataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


class _Reader:
    """Reads string elements of a dataset and its items, and keeps the keywords of those that are not valid, in their order."""

    def __init__(self, dataset: Dataset) -> None:
        self.sets, self._readable = _character_sets(dataset)
        self.undeclared = False
        self.left_out = dict[str, None]()

    def text(self, group: Any, keyword: str) -> str | None:
        """The value; "" if it is empty, and None if it is absent or not valid."""
        try:
            if keyword not in group:
                return None
            if raw.is_long(group.get_item(keyword)):
                raise ValueError("too long")
            element = group[keyword]
            text = "" if element.value is None else _checked(element, keyword, bool(self.sets))
            if not text.isascii():
                if not self._readable:
                    raise ValueError("its character set is unknown")
                self.undeclared |= not self.sets
            return text
        except OF_ELEMENTS:  # what pydicom raises, and ValueError
            self.left_out[keyword] = None
            return None

    def codes(self, group: Any, keyword: str) -> list[tuple[str, str, str]]:
        """(value, scheme, meaning) of each item that has all three."""
        from pydicom.datadict import tag_for_keyword

        tag = tag_for_keyword(keyword)
        assert tag is not None
        items = list(raw.items_of(group, tag))[:16]
        found = [tuple(self.text(x, name) or "" for name in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")) for x in items]
        return [(value, scheme, meaning) for value, scheme, meaning in found if value and scheme and meaning]


def _checked(element: Any, keyword: str, declared: bool) -> str:
    """The text of one value that PS3.5 6.2 allows. Raises ValueError."""
    from pydicom.config import RAISE
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import PersonName, validate_value

    vr, value = dictionary_VR(keyword), element.value
    numeric = vr in ("DS", "IS") and isinstance(value, (int, float, Decimal))  # which pydicom made of a text
    if vr != element.VR or not (numeric or isinstance(value, (str, PersonName))):
        raise ValueError("another VR, or several values")
    text = str(getattr(value, "original_string", value)).strip(" \0") if numeric else str(value).strip(" \0")
    if (_CONTROLS if declared else _ASCII_CONTROLS).search(text):
        raise ValueError("several values, control characters, or bytes that are not of the character set")
    if text:
        text = text.replace(_BEFORE_DICOM[vr], "") if vr in _BEFORE_DICOM else text
        if vr == "PN":
            text = _person_name(text)
        validate_value(vr, text, RAISE)
        if keyword in _CHECKS and not _CHECKS[keyword](text):
            raise ValueError("not a value of this attribute")
        if vr in _CHECKS and not _CHECKS[vr](text):
            raise ValueError("not a value of this VR")
    return text


def _person_name(text: str) -> str:
    """As PS3.5 6.2.1 allows it. Raises ValueError for more than three component groups or five components, and for 65 characters."""
    groups = text.rstrip("=").split("=")
    if len(groups) > 3 or any(len(group) > 64 or group.count("^") > 4 for group in groups):
        raise ValueError("not a person's name")
    return text


def _is_date(text: str) -> bool:
    return len(text) == 8 and text.isdigit() and text.isascii() and bool(datetime.strptime(text, "%Y%m%d"))  # which raises ValueError


_CHECKS: dict[str, Callable[[str], object]] = {
    "DA": _is_date,
    "TM": _TIME.fullmatch,
    "UI": _UID.fullmatch,
    "IS": _INTEGER.fullmatch,
    "DS": _DECIMAL.fullmatch,
    "PatientSex": ("M", "F", "O").__contains__,
    "PatientIdentityRemoved": ("YES", "NO").__contains__,
    "TimezoneOffsetFromUTC": _ZONE.fullmatch,
}


def _character_sets(dataset: Dataset) -> tuple[tuple[str, ...], bool]:
    """(the sets in which ``kept`` can be written, whether text beyond ASCII can be read at all), PS3.3 C.12.1.1.2.

    An empty first value is written as the set that it stands for. Sets that do not go together become UTF-8.
    """
    from pydicom.charset import STAND_ALONE_ENCODINGS, python_encoding

    try:
        value = dataset.get("SpecificCharacterSet")
    except OF_ELEMENTS:
        return (), False
    names = [str(name).strip() for name in ([value] if isinstance(value, str) else value or [])]
    if not any(names):
        return (), True
    if any(name not in python_encoding for name in names):
        return (), False
    if len(names) == 1:
        return (() if names[0] == "ISO_IR 6" else tuple(names)), True
    if any(name in STAND_ALONE_ENCODINGS for name in names):
        return (UTF_8,), True
    return tuple((name or "ISO 2022 IR 6").replace("ISO_IR", "ISO 2022 IR") for name in names), True
