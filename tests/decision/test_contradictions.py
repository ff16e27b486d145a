"""A hundred DICOM files of five modalities and more: no answer contradicts what the file says of itself without saying so.

What a file says is read here from its elements, not by header/. Files of pydicom's wheel, of the package pydicom-data, of PMCLIP_SHARED
and of the demo, each content once; of a multi-frame file the middle frame.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pydicom
import pytest

import pmclip_deploy as pm
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.models import DEFAULT_BUNDLE, DEMO
from pmclip_deploy.vocabulary import family_of_answer
from tests.sources import SHARED

pytestmark = pytest.mark.skipif(not (DEFAULT_BUNDLE / "manifest.json").is_file(), reason="needs the embedded bundle")

LABELS = {"CT": "CT", "MR": "MR", "US": "ultrasound", "CR": "plain film", "DX": "plain film", "RG": "plain film", "NM": "nuclear medicine"}
FAMILIES = {"CT": "ct", "MR": "mr", "US": "us", "CR": "xr", "DX": "xr", "RG": "xr", "NM": "nm"}
CLOSED = {"is this a CT?": "ct", "is this an MRI?": "mr", "is this an ultrasound?": "us", "is this an x-ray?": "xr"}
VIEWS = {"AP": "AP", "PA": "PA", "LL": "lateral", "RL": "lateral"}
PLANES = ("sagittal", "coronal", "axial")  # by the normal's axis: x to the left, y to the back, z to the head (PS3.3 C.7.6.2.1.1)
CHEST, BRAIN = "is this a chest image?", "is this the brain?"
PARTS = {"CHEST": CHEST, "THORAX": CHEST, "HEAD": BRAIN, "BRAIN": BRAIN, "SKULL": BRAIN}  # what each may be yes to; others to neither
ELSEWHERE = ("HAND", "HIP", "KNEE", "LEG", "CSPINE", "PELVIS", "EXTREMITY")
MODALITY, EITHER = "what imaging modality is shown?", "is this a CT or an MRI?"
PLANE, CONTRAST, SIDE = "in what plane is this image taken?", "was contrast given?", "which side is shown?"
FINDINGS = ("is there a fracture?", "is there pneumonia?")
QUESTIONS = (MODALITY, *CLOSED, EITHER, PLANE, CONTRAST, SIDE, CHEST, BRAIN, "is this a chest x-ray?", *FINDINGS)


@dataclass(frozen=True)
class File:
    path: Path
    dataset: pydicom.Dataset
    picture: Picture


def folders() -> Iterator[Path]:
    yield Path(pydicom.__file__).parent / "data"
    yield DEMO
    if SHARED.is_dir():
        yield SHARED / "dicom"
    try:
        yield Path(str(distribution("pydicom-data").locate_file("data_store/data")))
    except PackageNotFoundError:
        return


@pytest.fixture(scope="module")
def files() -> list[File]:
    """Those that can be read and name a modality, each content once."""
    found: dict[bytes, File] = {}
    for path in (path for folder in folders() for path in sorted(folder.rglob("*")) if path.suffix in (".dcm", "") and path.is_file()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                picture, dataset = picture_from_path(path), pydicom.dcmread(path, force=True, stop_before_pixels=True)
            except pm.InputError:
                continue
        if dataset.get("Modality") in FAMILIES:
            found.setdefault(hashlib.sha256(path.read_bytes()).digest(), File(path, dataset, picture))
    return list(found.values())


@pytest.fixture(scope="module")
def asked(files: list[File]) -> list[tuple[File, dict[str, pm.Answer]]]:
    predictor = pm.load()
    return [(file, dict(zip(QUESTIONS, predictor.ask_many(file.picture, QUESTIONS), strict=True))) for file in files]


Asked = list[tuple[File, dict[str, pm.Answer]]]


def told(answer: pm.Answer) -> bool:
    return answer.source == "header" or "header" in (answer.note or "")


def test_there_are_a_hundred_of_five_modalities(files: list[File]) -> None:
    count = Counter(FAMILIES[file.dataset.Modality] for file in files)
    if len(list(folders())) < 4:
        pytest.skip(f"needs PMCLIP_SHARED and the package pydicom-data; here are {count.total()} files of {len(count)} modalities")
    assert count.total() >= 100 and len(count) >= 5 and min(count.values()) >= 5, count


def test_modality(asked: Asked) -> None:
    for file, answers in asked:
        name, family = file.dataset.Modality, FAMILIES[file.dataset.Modality]
        said = answers[MODALITY]
        assert said.source == "header" and (said.answer or "").startswith(LABELS[name]), (file.path.name, said.answer)
        assert all(family_of_answer(c.answer) == family for c in said.candidates), file.path.name
        for question, asked_for in CLOSED.items():
            closed = answers[question]
            assert (closed.answer, closed.source) == ("yes" if family == asked_for else "no", "header"), (file.path.name, question)
        assert answers[EITHER].answer == (LABELS[name] if name in ("CT", "MR") else None), file.path.name


def test_plane_and_view(asked: Asked) -> None:
    planes, views = Counter[str](), Counter[str]()
    for file, answers in asked:
        said, orientation = answers[PLANE], file.dataset.get("ImageOrientationPatient")
        if orientation and FAMILIES[file.dataset.Modality] in ("ct", "mr"):
            normal = np.cross(orientation[:3], orientation[3:])
            nearest, share = PLANES[int(np.abs(normal).argmax())], float(np.abs(normal).max() / max(np.linalg.norm(normal), 1e-9))
            if share > 0.95:  # within 18 degrees
                planes[nearest] += 1
                assert said.answer == nearest and said.source == "header", (file.path.name, said.answer, nearest)
            elif said.answer is not None:
                assert nearest in said.answer and told(said), (file.path.name, said.answer, nearest)
        if (view := file.dataset.get("ViewPosition")) in VIEWS:
            views[view] += 1
            assert (said.answer or "").startswith(VIEWS[view]) and said.source == "header", (file.path.name, said.answer)
    assert len(planes) == 3 and planes.total() >= 20 and views


def test_body_part(asked: Asked) -> None:
    known = Counter[str]()
    for file, answers in asked:
        part = str(file.dataset.get("BodyPartExamined", "")).strip()
        allowed = PARTS.get(part, "" if part in ELSEWHERE else None)
        if allowed is None:
            continue
        known[part] += 1
        for question in (CHEST, BRAIN):
            said = answers[question]
            assert said.answer != ("no" if question == allowed else "yes") or told(said), (file.path.name, part, question, said.answer)
        if question_of_film := answers["is this a chest x-ray?"].answer:
            right = allowed == CHEST and FAMILIES[file.dataset.Modality] == "xr"
            assert question_of_film == ("yes" if right else "no"), (file.path.name, part)
    assert known.total() >= 15 and {"CHEST", "HEAD"} <= known.keys(), known


def test_contrast_and_side(asked: Asked) -> None:
    known = Counter[str]()
    for file, answers in asked:
        if str(file.dataset.get("ContrastBolusAgent", "")).strip().upper() not in ("", "NONE", "NO"):
            known["contrast"] += 1
            assert answers[CONTRAST].answer == "yes" and answers[CONTRAST].source == "header", file.path.name
        side = {"R": "right", "L": "left"}.get(str(file.dataset.get("ImageLaterality", file.dataset.get("Laterality", ""))))
        if side is not None:
            known["side"] += 1
            assert (answers[SIDE].answer, answers[SIDE].source) == (side, "header"), file.path.name
        else:
            assert answers[SIDE].answer is None, file.path.name
    assert known["contrast"] >= 3 and known["side"] >= 1


def test_findings_of_films_are_answered_of_no_other_modality(asked: Asked) -> None:
    for file, answers in asked:
        if FAMILIES[file.dataset.Modality] != "xr":
            assert all(answers[question].abstained for question in FINDINGS), file.path.name
