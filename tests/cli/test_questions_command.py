"""`pmclip-deploy questions`: what can be asked, from the manifest alone; each example is understood as what it is an example of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pmclip_deploy as pm
from pmclip_deploy.decision.rules import EXAMPLES, askable
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.questions import understood
from tests.tiny.bundle import tiny_bundle, tiny_manifest
from tests.tiny.findings import FINDINGS


@pytest.mark.parametrize("question", askable(tiny_manifest(findings=FINDINGS)))
def test_every_example_is_understood(question: str) -> None:
    intent = understood(question)
    assert intent.answerable, intent
    assert intent.kind == EXAMPLES.get(question, "finding")


def test_only_findings_that_passed_are_offered() -> None:
    offered = askable(tiny_manifest(findings=FINDINGS))
    assert "is there a fracture?" in offered and "is there pneumonia?" in offered
    assert "is there a fracture?" not in askable(tiny_manifest())


@pytest.mark.skipif(not (DEFAULT_BUNDLE / "manifest.json").is_file(), reason="needs the embedded bundle")
def test_the_shipped_model_lists_its_questions(run: Any) -> None:
    listed = run("questions", "--json")
    rows = listed.json["questions"]
    assert listed.code == 0 and listed.json["schema"] == "pmclip-deploy/questions/1"
    assert {row["question"] for row in rows} >= set(EXAMPLES) and all(row["worth"] for row in rows)
    assert "right in validation" in run("questions").out


@pytest.mark.skipif(not (DEFAULT_BUNDLE / "manifest.json").is_file(), reason="needs the embedded bundle")
def test_a_refusal_names_what_can_be_asked() -> None:
    predictor = pm.load()
    answer = predictor.ask(np.zeros((64, 64), np.uint8), "what is the patient's name?")
    assert answer.answer is None and answer.note is not None
    named = answer.note.removeprefix("this can be asked: ").split(", ")
    assert len(named) == 3 and set(named) <= set(predictor.questions())


def test_a_head_that_reads_words_says_so(run: Any, tmp_path: Path) -> None:
    listed = run("questions", "--bundle", tiny_bundle(tmp_path / "mevf", "mevf"))
    assert listed.code == 0 and "reads each question itself" in listed.out


def test_no_bundle(run: Any, tmp_path: Path) -> None:
    listed = run("questions", "--bundle", tmp_path / "nothing")
    assert listed.code == 4 and listed.err.count("\n") == 1
