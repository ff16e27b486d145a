"""The content of a Structured Report: TID 1500 with a measurement group, TID 1501, for each question (PS3.16 A)."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from pmclip_deploy.answer import Answer, ModelInfo
from pmclip_deploy.console import one_line
from pmclip_deploy.report import texts
from pmclip_deploy.report.source import MAKER, Source

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept, MeasurementsAndQualitativeEvaluations
    from pydicom import Dataset

SCHEME = "99PMCLIP"  # our own codes; Coding Scheme Identification Sequence declares it
PRESENCE = {"Present": "52101004", "Absent": "272519000", "Undetermined": "373068000"}  # CID 240, SCT
FINDINGS = {"fracture": ("125605004", "Fracture of bone"), "pneumonia": ("233604007", "Pneumonia")}  # SCT; others get a code of our own
# CID 100, Procedure reported. Codes that both PS3.16 of 2022 and the present one have: PixelMed's validator, of 2022, refuses the others.
PROCEDURES = {
    ("25045-6", "LN"): "CT unspecified body region",
    ("25056-3", "LN"): "MRI unspecified body region",
    ("49118-3", "LN"): "NM unspecified body region",
    ("44136-0", "LN"): "PET unspecified body region",
    ("44139-4", "LN"): "PET whole body",
    ("39142-5", "LN"): "CT perfusion head with contrast IV",
    ("39632-5", "LN"): "SPECT brain",
    ("443271005", "SCT"): "PET/CT FDG imaging of whole body",
    ("433139009", "SCT"): "Dynamic magnetic resonance imaging of knee",
    ("446315002", "SCT"): "Dynamic magnetic resonance imaging of pelvis",
    ("258177008", "SCT"): "Magnetic resonance imaging guidance",
    ("126020", "DCM"): "Multiparametric MRI",
    ("126022", "DCM"): "Multiparametric MRI of whole body",
    ("363679005", "SCT"): "Imaging procedure",
}
BY_MODALITY = {"CT": ("25045-6", "LN"), "MR": ("25056-3", "LN"), "NM": ("49118-3", "LN"), "PT": ("44136-0", "LN")}


def uid_of(*parts: str) -> str:
    """A UID of these parts alone: 2.25 and the UUID of their SHA-256 (PS3.5 B.2)."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def content_from_answers(
    parts: Sequence[tuple[Source, Sequence[Answer]]],
    prevalence: float | None,
    protocol: str = "",
    codes: Mapping[str, tuple[str, str, str]] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> Dataset:
    """The root container. The answers of a part are about the image of its source; all are from one model."""
    from highdicom import sr
    from pydicom.sr.codedict import codes as standard

    source, answers = parts[0]
    model = answers[0].model
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=uid_of("device", bundle_of(model)), name=MAKER, manufacturer_name=MAKER, model_name=model_name(model)
    )
    observer = sr.ObserverContext(observer_type=standard.DCM.Device, observer_identifying_attributes=device)
    root: Dataset = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_code(*_procedure(source)),
        imaging_measurements=[
            _group(source, answer, protocol, codes.get(answer.question)) for source, answers in parts for answer in answers
        ],
        title=standard.DCM.ImagingMeasurementReport,
        language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(_code("en", "RFC5646", "English")),
    )[0]
    root.ContentSequence.append(_evaluations(parts, prevalence, notes))
    _separate(root)
    return root


def _separate(container: Dataset) -> None:
    """Of a continuous container, DCMTK shows the values without their names."""
    container.ContinuityOfContent = "SEPARATE"
    for item in container.ContentSequence:
        if item.ValueType == "CONTAINER":
            _separate(item)


def bundle_of(model: ModelInfo) -> str:
    """What names the bundle in hashes."""
    return model.sha256 or f"{model.bundle} {model.version} {model.precision}"


def model_name(model: ModelInfo) -> str:
    return long_string(f"{model.bundle} {model.version} {model.precision}")


def long_string(text: str) -> str:
    """As a value of VR LO may be: 64 characters, no backslash."""
    return one_line(text).replace("\\", "/")[:64].strip()


def _code(value: str, scheme: str, meaning: str) -> CodedConcept:
    from highdicom.sr import CodedConcept

    return CodedConcept(value=value, scheme_designator=scheme, meaning=meaning)


def _own_code(text: str) -> CodedConcept:
    """A code that is the same for the same text, of 16 characters at most (PS3.3 8.1)."""
    return _code(f"q{hashlib.sha256(one_line(text).encode()).hexdigest()[:15]}", SCHEME, long_string(text))


def _procedure(source: Source) -> tuple[str, str, str]:
    """The image's own procedure if it is of CID 100, else by modality; the meaning is the standard's, never the file's."""
    own = (code for code in source.procedures if code in PROCEDURES)
    code = next(own, BY_MODALITY.get(source.modality, ("363679005", "SCT")))
    return (*code, PROCEDURES[code])


def _group(
    source: Source, answer: Answer, protocol: str, coded: tuple[str, str, str] | None
) -> MeasurementsAndQualitativeEvaluations:
    from highdicom import sr

    image, model, present = answer.image, answer.model, texts.presence(answer)
    frame = source.frame_number(image)
    finding = answer.understood_as.finding if present and answer.understood_as else None
    version = f"{model.version}+{model.sha256[:8]}" if model.sha256 else model.version
    tracked = uid_of("tracking", source.instance, str(image.frame), answer.question, bundle_of(model))
    measured, judged = [], []
    if answer.probability is not None:
        name, percent = _code("122157", "DCM", "Probability"), round(100 * answer.probability, 1)
        measured.append(sr.Measurement(name=name, value=percent, unit=_code("%", "UCUM", "%")))
    if present:
        name = _code("121052", "DCM", "Presence of property")
        judged.append(sr.QualitativeEvaluation(name, _code(PRESENCE[present], "SCT", present)))
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=tracked, identifier=one_line(answer.question)),
        finding_type=_finding(finding, coded),
        algorithm_id=sr.AlgorithmIdentification(
            name=one_line(model.bundle), version=one_line(version), parameters=[_parameters(answer, protocol)]
        ),
        measurements=measured or None,
        qualitative_evaluations=judged or None,
        source_images=[sr.SourceImageForMeasurementGroup(source.sop_class, source.instance, None if frame is None else [frame])],
    )


def _finding(finding: str | None, coded: tuple[str, str, str] | None) -> CodedConcept | None:
    """The protocol's code, else ours, for a finding that was asked about."""
    if coded is not None:
        return _code(*coded)
    if finding is None:
        return None
    return _code(FINDINGS[finding][0], "SCT", FINDINGS[finding][1]) if finding in FINDINGS else _own_code(finding)


def _parameters(answer: Answer, protocol: str) -> str:
    image, model = answer.image, answer.model
    of = {
        "bundle": f"sha256:{model.sha256}" if model.sha256 else "none",
        "precision": model.precision,
        "frame": f"{image.frame + 1}/{image.frames}",
        "window": f"{image.window[0]:g}/{image.window[1]:g}" if image.window else "none",
        "source": answer.source,
    } | ({"protocol": protocol} if protocol else {})
    return "; ".join(f"{name}={value}" for name, value in of.items())


def _evaluations(parts: Sequence[tuple[Source, Sequence[Answer]]], prevalence: float | None, notes: Sequence[str]) -> Dataset:
    """Qualitative Evaluations (TID 1500, rows 12 to 14), which highdicom writes only in a group: each text says question and answer."""
    from highdicom import sr

    relation = sr.RelationshipTypeValues.CONTAINS
    container: Dataset = sr.ContainerContentItem(_code("C0034375", "UMLS", "Qualitative Evaluations"), relationship_type=relation)
    rows = [(_code("status", SCHEME, "Status"), texts.banner(parts[0][1][0].model))]
    said, noted = texts.told(parts, prevalence, notes)
    rows += [(_own_code(question), text) for question, text in said]
    rows += [(_code("notes", SCHEME, "Notes"), text) for text in noted]
    container.ContentSequence = sr.ContentSequence([sr.TextContentItem(name, text, relation) for name, text in rows])
    return container
