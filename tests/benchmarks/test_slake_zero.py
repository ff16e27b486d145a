"""SLAKE by zero training: how its questions are read and the model's answers put into its words, then the whole on the shipped bundle."""

import json
from pathlib import Path

import pytest

from pmclip_deploy.answer import Candidate
from pmclip_deploy.benchmarks.slake_zero import (
    MEANS,
    NO_PELVIS,
    PLACE,
    READ,
    SLICE,
    UNREAD,
    Reading,
    answer_of_decision,
    measured,
    read_questions,
    reading_of_question,
    same,
)
from pmclip_deploy.decision.heads import Decision
from pmclip_deploy.train.datasets import questions_from_folder


@pytest.mark.parametrize(
    ("question", "reading"),
    [
        ("Is this a CT scan?", Reading("modality", "ct")),
        ("Is this image taken via X-Ray?", Reading("modality", "x-ray")),
        ("Which type of modality is shown about this image, MRI, CT or X-Ray?", Reading("modality", None, ("mri", "ct", "x-ray"))),
        ("Is this a T1 weighted or T2 weighted MRI image?", Reading("weighting", None, ("t1", "t2"))),
        ("Is this an MRI image with T2 weighted?", Reading("weighting", "t2")),
        ("Is this sagittal plane?", Reading("plane", "sagittal plane")),
        (
            "Which plane is the image scanned, transverse plane or coronal plane?",
            Reading("plane", None, ("transverse plane", "coronal plane")),
        ),
        ("What organ system is pictured?", Reading("body part")),
        ("Is this a study of the abdomen?", Reading("body part", "abdomen")),
        ("Does the picture contain brian?", Reading("contained", "brain")),
        ("Is this a study of the pelvic cavity?", NO_PELVIS),
        ("Does the picture contain brain stem?", SLICE),
        ("Are/Is there kidneys in the picture?", SLICE),
        ("What organ is the gray part on the left of the image?", PLACE),
        ("How old is the patient?", UNREAD),
    ],
)
def test_how_a_question_is_read(question: str, reading: Reading | str) -> None:
    assert reading_of_question(question) == reading


def says(*answers: str) -> Decision:
    return Decision(0, tuple(Candidate(answer, 1 / (i + 1)) for i, answer in enumerate(answers)), 1.0)


@pytest.mark.parametrize(
    ("question", "decision", "answer"),
    [
        ("How was this image taken?", says("mra - mr angiography/venography"), "mri"),
        ("How was this image taken?", says("us - ultrasound", "ct noncontrast"), "us - ultrasound"),  # which is wrong
        ("Is this an MRI scan?", says("mr - flair"), "yes"),
        ("Is this an MRI scan?", says("us - ultrasound"), "no"),
        ("Which type of modality is shown about this image, CT or X-Ray?", says("mr - flair", "xr - plain film", "ct"), "x-ray"),
        ("What is the mr weighting in this image?", says("flair"), "t2"),
        ("In what plane is this image scanned?", says("transverse"), "transverse plane"),
        ("In what plane is this image scanned?", says("pa"), "coronal plane"),
        ("In what plane is this image scanned?", says("3d reconstruction"), "3d reconstruction"),
        ("Is this a coronal section?", says("ap"), "yes"),
        ("Which organ system is imaged?", says("heart and great vessels"), "chest"),
        ("What is the main organ in the image?", says("heart and great vessels"), "heart"),
        ("Is this a study of the abdomen?", says("genitourinary"), "yes"),
    ],
)
def test_an_answer_in_slakes_words(question: str, decision: Decision, answer: str) -> None:
    reading = reading_of_question(question)
    assert isinstance(reading, Reading) and answer_of_decision(reading, decision) == answer


def test_what_is_the_same() -> None:
    assert same("Transverse  Plane") == same("transverse plane") and same("Pelvic Cavity") == same("Abdomen") != same("Chest")


def test_the_table_is_whole() -> None:
    assert {about for _, about in READ} == {*MEANS, SLICE, PLACE, NO_PELVIS}
    for about in ("modality", "weighting", "plane", "body part", "main organ"):  # a value has one word
        values = [value for values in MEANS[about].values() for value in values]
        assert len(values) == len(set(values)), about


def test_every_test_question_is_read_or_left_out_for_a_reason(shared: Path) -> None:
    rows, readings, left = read_questions(questions_from_folder(shared / "slake", "test"))
    assert len(rows) == len(readings) == 248 and all(row.category in ("modality", "plane", "organ") for row in rows)
    assert left == {"organ": {SLICE: 127, PLACE: 41, NO_PELVIS: 3}}


def test_the_shipped_bundle_sees_pictures_of_another_source(shared: Path) -> None:
    from pmclip_deploy.opening import load

    if not (shared / "slake" / "imgs" / "xmlab102" / "source.jpg").is_file():
        pytest.skip("SLAKE's images are not there")
    document = json.loads(json.dumps(measured(load(), shared / "slake", "test", 0)))
    for name in ("all", "modality", "plane", "organ"):
        group = document["groups"][name]
        assert group["accuracy"] > 0.8 and min(of["gain_ci95"][0] for of in group["baselines"].values()) > 0, name
