"""A comparison with NaN is false. Wherever one decides, false is the side that abstains, refuses or misses a gate."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmclip_deploy.answer import Candidate
from pmclip_deploy.decision.evidence import Evidence, FindingScores
from pmclip_deploy.decision.heads import HeadLogits, decision_from_heads
from pmclip_deploy.decision.rules import reply
from pmclip_deploy.header.read import Header
from pmclip_deploy.questions import understood
from tests.command import Result
from tests.tiny.bundle import ANSWERS, KINDS, tiny_manifest
from tests.tiny.findings import HAND

NAN = float("nan")
FACETS_ASKED = [
    "what imaging modality is this?",
    "in what plane is this image?",
    "is this a CT?",
    "is this an MRI or a CT?",
    "is this T1 weighted?",
]


def heads(**changes: Any) -> HeadLogits:
    answer, kind = np.full((1, len(ANSWERS)), 5, np.float32), np.zeros((1, len(KINDS)), np.float32)
    answer[0, 1] = kind[0, 0] = 20
    return replace(HeadLogits(answer, kind, radiograph=np.ones(1, np.float32)), **changes)


@pytest.mark.parametrize("part", ["answer", "kind", "radiograph"])
def test_a_head_that_gives_no_number_abstains(part: str) -> None:
    assert decision_from_heads(tiny_manifest(), heads(), 0).rule is None
    good = getattr(heads(), part)
    for place in range(good.size):
        broken = good.copy()
        broken.flat[place] = NAN
        with np.errstate(invalid="ignore"):
            decided = decision_from_heads(tiny_manifest(), heads(**{part: broken}), 0)
        used = part != "answer" or place in KINDS[0].answers
        assert (decided.rule is not None) is used, (place, decided)


def findings_manifest() -> Any:
    from pmclip_deploy.bundle.types import Finding, Findings
    from pmclip_deploy.spec import Preprocess

    finding = Finding("fracture", (HAND,))
    return tiny_manifest(findings=Findings(Preprocess(32, "pad", (0.5,) * 3, (0.5,) * 3), ("hand", "other"), (finding,)))


@pytest.mark.parametrize("logit", [NAN, math.inf, -math.inf])
def test_a_finding_whose_logit_is_no_number_is_not_answered(logit: float) -> None:
    intent = understood("is there a fracture?")
    for header in (Header(), Header(family="xr", regions=("hand",))):
        said = reply(findings_manifest(), intent, Evidence(header=header, findings=FindingScores({"fracture": 3.0}, {"hand": 0.9})))
        assert said.answer == "yes"
        said = reply(findings_manifest(), intent, Evidence(header=header, findings=FindingScores({"fracture": logit}, {"hand": 0.9})))
        assert said.answer is None and "no number" in (said.reason or "")


def test_a_region_that_is_no_number_is_not_shown() -> None:
    intent = understood("is there a fracture?")
    for header in (Header(), Header(family="xr", regions=("hand",))):
        said = reply(findings_manifest(), intent, Evidence(header=header, findings=FindingScores({"fracture": 3.0}, {"hand": NAN})))
        assert said.answer is None


@pytest.mark.parametrize("question", FACETS_ASKED)
def test_opinions_that_are_no_numbers_are_not_answered(question: str) -> None:
    names = {"modality": ("ct noncontrast", "mr - t2 weighted"), "plane": ("axial", "coronal"), "organ": ("musculoskeletal", "breast")}
    names |= {"contrast": ("contrast", "noncontrast"), "contrast of mr": ("contrast", "noncontrast"), "weighting": ("t1", "t2")}
    opinions = {facet: tuple(Candidate(name, NAN) for name in of) for facet, of in names.items()}
    said = reply(tiny_manifest(), understood(question), Evidence(opinions, Header(), True, None, None))
    assert said.answer is None


def test_a_stratum_whose_interval_is_no_number_has_not_passed() -> None:
    pytest.importorskip("torch", reason="training needs the extra `train`")
    from pmclip_deploy.train.findings.gate import missed

    assert missed(HAND) is None
    assert missed(replace(HAND, auroc_ci95=(NAN, 0.95))) is not None


GOOD = {
    "stages": {"pixels": {"max_abs": 0.0}, "tokens": {"equal": 1.0}},
    "tensors": {"image": {"cosine": 1.0, "cosine_mean": 1.0, "max_abs": 0.0}},
    "answers": {"agreement": 1.0, "candidate_agreement": 1.0, "difference": 0.0},
    "labels": {"n": 1000, "agreement": 1.0},
    "findings": {"decisions": 1000, "agreement": 1.0, "crossed": 0},
}


@pytest.mark.parametrize(
    ("part", "figure"),
    [
        ("answers", "agreement"),
        ("answers", "candidate_agreement"),
        ("answers", "difference"),
        ("labels", "agreement"),
        ("findings", "agreement"),
        ("stages/pixels", "max_abs"),
        ("stages/tokens", "equal"),
        ("tensors/image", "cosine"),
    ],
)
def test_a_gate_is_missed_by_no_number(part: str, figure: str) -> None:
    pytest.importorskip("onnx", reason="exporting needs the extra `export`")
    from pmclip_deploy.export.gates import misses

    assert not any(misses("fp32", GOOD).values())
    outer, _, inner = part.partition("/")
    of = GOOD[outer]
    assert isinstance(of, dict)
    broken = {**of, inner: {**of[inner], figure: NAN}} if inner else {**of, figure: NAN}
    assert any(misses("fp32", {**GOOD, outer: broken}).values())


def test_pixels_that_are_no_numbers_differ() -> None:
    pytest.importorskip("onnx", reason="exporting needs the extra `export`")
    from pmclip_deploy.export.gates import misses
    from pmclip_deploy.export.parity import _pixel_difference

    zero, broken = np.zeros((3, 4, 4), np.float32), np.full((3, 4, 4), NAN, np.float32)
    for other in ([broken, zero], [zero, broken]):
        figures = _pixel_difference([zero, zero], other)
        assert any(misses("fp32", {**GOOD, "stages": {"pixels": figures}}).values())


@pytest.mark.parametrize(
    "arguments",
    [
        ("infer", "x.dcm", "is there a fracture?", "--prevalence", "nan"),
        ("bench", "--seconds", "nan"),
        ("bench", "--latency-bound", "nan"),
        ("train", "vqa", "--learning-rate", "nan"),
        ("train", "vqa", "--learning-rate", "inf"),
    ],
)
def test_an_option_that_is_no_number(arguments: tuple[str, ...], command: Callable[..., Result], tmp_path: Path) -> None:
    code, _, err = command(*arguments)
    assert code == 2 and "is no number" in err and err.count("\n") == 1
