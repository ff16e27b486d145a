"""A Structured Report from an image's header and the answers about it; the one function that the command line and a service call."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from pmclip_deploy.answer import Answer
from pmclip_deploy.errors import UsageError
from pmclip_deploy.extras import need_extra
from pmclip_deploy.imaging.quiet import quiet
from pmclip_deploy.report import texts
from pmclip_deploy.report.source import MAKER, UTF_8, Source, source_from_dataset
from pmclip_deploy.report.tree import SCHEME, bundle_of, content_from_answers, long_string, model_name, uid_of

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

SR_CLASSES = {  # the same content is valid in each
    "comprehensive3d": "1.2.840.10008.5.1.4.1.1.88.34",
    "comprehensive": "1.2.840.10008.5.1.4.1.1.88.33",
    "enhanced": "1.2.840.10008.5.1.4.1.1.88.22",
}
SERIES = 9901


@dataclass(frozen=True)
class Previous:
    """The report that a new one takes the place of (PS3.3 C.17.2, Predecessor Documents Sequence)."""

    study: str
    series: str
    sop_class: str
    instance: str


@dataclass(frozen=True)
class Asked:
    """What a protocol adds to a report: who asked, the codes of findings by question, and what else a reader must know."""

    protocol: str = ""
    codes: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)  # (value, scheme, meaning)
    notes: tuple[str, ...] = ()
    previous: Previous | None = None


def report_from_answers(
    dataset: Dataset, answers: Sequence[Answer], *, sr_class: str = "comprehensive3d", prevalence: float | None = None
) -> Dataset:
    """A Structured Report, TID 1500, about one image; ``bytes_of`` makes a file of it.

    ``dataset`` is the image's header; nothing in it changes. ``answers`` are of one image and one model. ``sr_class`` is one of
    SR_CLASSES. With ``prevalence``, 0 to 1, the report says how often an answer about a finding is then right.
    Raises InputError if the header lacks a UID, and UsageError if there are no answers or highdicom is not installed.

    The SOP Instance UID is a hash of all content but the date and time of writing: the same answers give the same UID.
    """
    return report_from_images([(dataset, answers)], sr_class=sr_class, prevalence=prevalence)


def report_from_images(
    images: Sequence[tuple[Dataset, Sequence[Answer]]],
    *,
    sr_class: str = "comprehensive3d",
    prevalence: float | None = None,
    asked: Asked | None = None,
) -> Dataset:
    """One report about several images of a study, each with its answers; else as ``report_from_answers``.

    Patient and study are those of the first image. Raises UsageError if the images are of several studies.
    """
    check_extra()
    if sr_class not in SR_CLASSES:
        raise UsageError(f"there is no SR class {sr_class[:60]!r}", f"choose one of {', '.join(SR_CLASSES)}")
    parts = sources_of(images)
    source, answers = parts[0]
    asked = asked or Asked()
    report = new_document(SR_CLASSES[sr_class], "SR", SERIES, source, answers)
    report.CompletionFlag, report.PreliminaryFlag, report.VerificationFlag = "COMPLETE", "PRELIMINARY", "UNVERIFIED"
    report.ReferencedPerformedProcedureStepSequence = report.PerformedProcedureCodeSequence = []
    report.CurrentRequestedProcedureEvidenceSequence = [_evidence([source for source, _ in parts])]
    if asked.previous is not None:
        report.PredecessorDocumentsSequence = [_previous(asked.previous)]
    report.CodingSchemeIdentificationSequence = [_coding_scheme()]
    report.update(content_from_answers(parts, prevalence, asked.protocol, asked.codes, asked.notes))
    finish(report, source)
    return report


def sources_of(images: Sequence[tuple[Dataset, Sequence[Answer]]]) -> list[tuple[Source, Sequence[Answer]]]:
    """Raises UsageError unless the answers are about images of one study and from one bundle."""
    for _, answers in images:
        check_answers(answers)
    parts = [(source_from_dataset(dataset, answers[0].image.source), answers) for dataset, answers in images]
    if len({(source.study, bundle_of(answers[0].model)) for source, answers in parts}) != 1:
        raise UsageError("a report is about images of one study, asked about with one bundle", "make a report for each study")
    return parts


def check_extra() -> None:
    """Raises UsageError without the extra ``ward``."""
    need_extra("ward", "a report (--sr)", "highdicom")


def check_answers(answers: Sequence[Answer]) -> None:
    """Raises UsageError unless there are answers, all about one frame of one image and from one bundle."""
    if len({(answer.image, bundle_of(answer.model)) for answer in answers}) != 1:
        raise UsageError("a report is about the answers to questions about one image", "give the answers of one call")


def new_document(sop_class: str, modality: str, series_number: int, source: Source, answers: Sequence[Answer]) -> Dataset:
    """What both kinds of report begin with: patient and study of the image, a series of the study and the bundle, and our equipment."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    model, report = answers[0].model, Dataset()
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.update(deepcopy(source.kept))
    report.SOPClassUID, report.Modality, report.InstanceNumber = sop_class, modality, source.number
    report.StudyInstanceUID = source.study
    report.SeriesInstanceUID = uid_of("series", modality, source.study, bundle_of(model))
    report.SeriesNumber, report.SeriesDescription = series_number, texts.DESCRIPTION
    report.Manufacturer, report.ManufacturerModelName = MAKER, model_name(model)
    report.SoftwareVersions = long_string(model.version)
    report.DeviceSerialNumber = f"sha256:{model.sha256[:32]}" if model.sha256 else "none"
    report.ContributingEquipmentSequence = [_equipment(report, model.sha256)]
    if source.zone:
        report.TimezoneOffsetFromUTC = source.zone
    return report


def finish(report: Dataset, source: Source) -> None:
    """Set the character set, the time of writing, and the UID, which is a hash of all else."""
    _set_character_set(report, source)
    report.SOPInstanceUID = uid_of("instance", _hash_of(report))
    written = datetime.now(_zone(source.zone) if source.zone else None)
    report.ContentDate, report.ContentTime = written.strftime("%Y%m%d"), written.strftime("%H%M%S")


def bytes_of(report: Dataset) -> bytes:
    """The file of a report, PS3.10, in Explicit VR Little Endian."""
    file = io.BytesIO()
    report.save_as(file, enforce_file_format=True)
    return file.getvalue()


def reference(source: Source) -> Dataset:
    """The image, by its class and its UID (PS3.3 10.8)."""
    from pydicom import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.sop_class, source.instance
    return item


def _evidence(sources: Sequence[Source]) -> Dataset:
    """The images in their series and study (PS3.3 C.17.2.2)."""
    from pydicom import Dataset

    study = Dataset()
    study.StudyInstanceUID, study.ReferencedSeriesSequence = sources[0].study, []
    for uid in dict.fromkeys(source.series for source in sources):
        series, of = Dataset(), {source.instance: source for source in sources if source.series == uid}
        series.SeriesInstanceUID, series.ReferencedSOPSequence = uid, [reference(source) for source in of.values()]
        study.ReferencedSeriesSequence.append(series)
    return study


def _previous(one: Previous) -> Dataset:
    from pydicom import Dataset

    study, series, item = Dataset(), Dataset(), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = one.sop_class, one.instance
    series.SeriesInstanceUID, series.ReferencedSOPSequence = one.series, [item]
    study.StudyInstanceUID, study.ReferencedSeriesSequence = one.study, [series]
    return study


def _coding_scheme() -> Dataset:
    from pydicom import Dataset

    item = Dataset()
    item.CodingSchemeDesignator, item.CodingSchemeName = SCHEME, "pmclip-deploy questions"
    item.CodingSchemeResponsibleOrganization = MAKER
    return item


def _equipment(report: Dataset, sha256: str) -> Dataset:
    from pydicom import Dataset

    purpose, item = Dataset(), Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = "109102", "DCM", "Processing Equipment"
    item.PurposeOfReferenceCodeSequence = [purpose]
    item.Manufacturer, item.ManufacturerModelName = report.Manufacturer, report.ManufacturerModelName
    item.SoftwareVersions, item.ContributionDescription = report.SoftwareVersions, f"bundle sha256:{sha256 or 'none'}"
    return item


def _zone(offset: str) -> timezone:
    minutes = int(offset[1:3]) * 60 + int(offset[3:])
    return timezone(timedelta(minutes=-minutes if offset[0] == "-" else minutes))


def _set_character_set(report: Dataset, source: Source) -> None:
    """The image's own sets if they hold all texts, else UTF-8. If its bytes are of no declared set, our own texts become ASCII."""
    own = [element for top in report if top.tag not in source.kept for element in _texts(top)]
    if source.undeclared:
        for element in own:
            element.value = element.value.encode("ascii", "replace").decode()
        return
    sets = list(source.character_sets)
    if not (all(_holds(sets, element.value) for element in own) and _survives(source.kept, sets)):
        sets = [UTF_8]
    if sets:
        report.SpecificCharacterSet = sets if len(sets) > 1 else sets[0]


def _texts(element: DataElement) -> Iterator[DataElement]:
    """The elements of one value whose bytes depend on the character set."""
    if element.VR == "SQ":
        for item in element.value:
            yield from (text for each in item for text in _texts(each))
    elif element.VR in ("LO", "LT", "SH", "ST", "UT") and isinstance(element.value, str):
        yield element


def _holds(sets: Sequence[str], text: str) -> bool:
    from pydicom.charset import python_encoding

    if text.isascii():
        return True
    try:
        return len(sets) == 1 and bool(text.encode(python_encoding[sets[0]]))  # of several, UTF-8 spares us the escape sequences
    except UnicodeEncodeError:
        return False


def _survives(kept: Dataset, sets: Sequence[str]) -> bool:
    """Whether the elements come back as they were."""
    from pydicom import dcmread

    whole, file = deepcopy(kept), io.BytesIO()
    if sets:
        whole.SpecificCharacterSet = list(sets)
    with quiet():  # what pydicom says of a character that a set does not hold
        whole.save_as(file, implicit_vr=False, little_endian=True)
        file.seek(0)
        return bool(dcmread(file, force=True) == whole)


def _hash_of(report: Dataset) -> str:
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    file = DicomBytesIO()
    file.is_little_endian, file.is_implicit_VR = True, False
    write_dataset(file, report)
    return hashlib.sha256(file.getvalue()).hexdigest()
