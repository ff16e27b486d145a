"""Answers and reports without a model, and what a report says."""

import io
from dataclasses import replace
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file

from pmclip_deploy.answer import Answer, Candidate, ImageInfo, ModelInfo, Worth
from pmclip_deploy.questions import understood
from pmclip_deploy.report.document import bytes_of, report_from_answers

MODEL = ModelInfo("pmclip-lite", "0.1.0", "int8", "onnxruntime", "cpu", "ab" * 32)
IMAGE = ImageInfo("/home/ZQXPATH/scan.dcm", "dicom", "CT", 0, 1, 128, 128, window=(40.0, 400.0))
WORTH = Worth("fracture", True, "plain films of the hip or pelvis", 300, 0.8, 0.9, (60, 70), (190, 230), 0.93, (0.9, 0.95))


def answer(question: str, said: str | None = None, probability: float | None = None, **fields: Any) -> Answer:
    reason = None if said is not None else "the confidence 0.54 is under the threshold 0.60"
    given = Answer(question, said, probability, said is None, reason, (), IMAGE, MODEL, understood_as=understood(question))
    return replace(given, **fields)


OTHERS = (Candidate("axial", 0.89), Candidate("sagittal", 0.08))
ANSWERS = [
    answer("what imaging modality is shown?", "CT", source="header"),
    answer("in what plane is this image?", "axial", 0.89, candidates=OTHERS),
    answer("is there a fracture?", "yes", 0.959, worth=WORTH),
    answer("is there a fracture in the hip?", probability=0.54),
]


def ct() -> Dataset:
    return dcmread(str(get_testdata_file("CT_small.dcm", download=False)), stop_before_pixels=True)


def read_back(dataset: Dataset, answers: list[Answer] | None = None, **options: Any) -> Dataset:
    """The report about a dataset, as its file says it."""
    return dcmread(io.BytesIO(bytes_of(report_from_answers(dataset, answers or ANSWERS, **options))))


def items(container: Dataset, meaning: str) -> list[Dataset]:
    """The content items of this name, at any depth."""
    own = [item for item in container.ContentSequence if item.ConceptNameCodeSequence[0].CodeMeaning == meaning]
    return own + [found for item in container.ContentSequence if "ContentSequence" in item for found in items(item, meaning)]


def said(report: Dataset) -> list[str]:
    """What stands under Qualitative Evaluations."""
    return [item.TextValue for item in items(report, "Qualitative Evaluations")[0].ContentSequence]


def every_string(dataset: Dataset) -> list[str]:
    return [str(element.value) for element in dataset.iterall() if element.VR != "SQ"]
