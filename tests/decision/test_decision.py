"""The rules between a question and its answer: what the file says, what the picture looks like, and what a finding has earned."""

from dataclasses import replace
from typing import Any

import pytest

from pmclip_deploy.answer import Candidate
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.decision.evidence import NO_RADIOGRAPH, NOT_SURE, Evidence, FindingScores, Reply
from pmclip_deploy.decision.rules import EXAMPLES, facets_of, reply
from pmclip_deploy.header.read import Header
from pmclip_deploy.questions import understood
from tests.tiny.bundle import tiny_manifest
from tests.tiny.findings import FINDINGS

MANIFEST = tiny_manifest(findings=FINDINGS)
FILM = {"modality": (Candidate("xr - plain film", 0.9), Candidate("ct noncontrast", 0.1))}
FRACTURE = "is there a fracture?"


def seen(region: str = "hand", fracture: float = 2.0, pneumonia: float = 2.0) -> FindingScores:
    regions = {name: 0.95 if name == region else 0.02 for name in FINDINGS.regions}
    return FindingScores({"fracture": fracture, "pneumonia": pneumonia}, regions)


def look(**changes: Any) -> Evidence:
    return replace(Evidence(FILM, findings=seen()), **changes)


def said(question: str, of: Evidence, manifest: Manifest = MANIFEST) -> Reply:
    return reply(manifest, understood(question), of)


def of(*shares: tuple[str, float]) -> tuple[Candidate, ...]:
    return tuple(Candidate(answer, share) for answer, share in shares)


# --- findings -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "logit", "answer"),
    [
        (FRACTURE, 1.0, "yes"),
        (FRACTURE, 0.99, "no"),
        ("is the bone intact?", 2.0, "no"),
        ("is the bone intact?", 0.0, "yes"),
        ("hand fracture?", 2.0, "yes"),
    ],
)
def test_a_finding_is_answered_at_its_stratums_threshold(question: str, logit: float, answer: str) -> None:
    given = said(question, look(findings=seen(fracture=logit)))
    assert given.answer == answer and given.worth is not None and given.worth.found == (logit >= 1)
    assert given.worth.stratum == "plain films of the hand or wrist" and given.worth.sensitivity == 0.8
    assert given.candidates[0].probability >= 0.5 and sum(c.probability for c in given.candidates) == pytest.approx(1)


def test_what_an_answer_is_worth_follows_the_prevalence() -> None:
    worth = said(FRACTURE, look()).worth
    assert worth is not None
    assert "24 of 32 such answers were right (sensitivity 0.80, specificity 0.89)" in worth.sentence()
    assert worth.predictive_value(0.3) == pytest.approx(24 / 32)  # the validation's own
    assert worth.predictive_value(0.05) == pytest.approx(0.8 * 0.05 / (0.8 * 0.05 + (8 / 70) * 0.95))
    assert worth.predictive_value(0.0) == 0


@pytest.mark.parametrize(
    ("question", "changes", "reason"),
    [
        ("is the fracture displaced?", {}, '"displaced"'),
        ("left hand fracture?", {}, '"left"'),
        ("is there an old fracture?", {}, '"old"'),
        ("rib fracture?", {}, "not the site"),
        ("hip fracture?", {}, "not the site"),
        ("scaphoid fracture?", {}, "does not judge"),
        ("is there a pneumothorax?", {}, "pneumothorax is not validated"),
        ("is there a hemorrhage?", {}, "hemorrhage is not validated"),
        (FRACTURE, {"findings": seen("leg")}, "lower bound"),
        (FRACTURE, {"findings": seen("other")}, "shows none of these"),
        (FRACTURE, {"header": Header(family="ct")}, "the file says CT"),
        (FRACTURE, {"header": Header(family="xr", regions=("skull",), parts=("skull",))}, "shows the head"),
        (FRACTURE, {"header": Header(family="xr", regions=("hand", "elbow"), parts=("hand", "elbow"))}, "elbow"),
        (FRACTURE, {"header": Header(family="xr", regions=("hand",), parts=("hand",)), "findings": seen("leg")}, "does not look like it"),
        ("is there a fracture in this MRI?", {}, "about MR"),
        ("is there pneumonia?", {"findings": seen("chest")}, "--age"),
        ("is there pneumonia?", {"findings": seen("chest"), "child": False}, "children alone"),
        ("is this a normal x-ray?", {}, "not validated"),
        ("what is abnormal?", {}, "validation"),
    ],
)  # fmt: skip
def test_what_was_not_validated_is_not_answered(question: str, changes: dict[str, Any], reason: str) -> None:
    given = said(question, look(**changes))
    assert given.answer is None and given.worth is None and reason in (given.reason or ""), given.reason


def test_a_finding_of_children_is_answered_for_a_child() -> None:
    assert said("is there pneumonia?", look(findings=seen("chest"), child=True)).answer == "yes"


def test_a_model_without_findings_answers_none() -> None:
    given = said(FRACTURE, Evidence(FILM), tiny_manifest())
    assert given.answer is None and "not validated for this model" in (given.reason or "")


def test_a_picture_that_is_no_radiology_image_gets_no_finding() -> None:
    given = said(FRACTURE, look(radiology=False))
    assert (given.answer, given.reason, given.worth) == (None, NO_RADIOGRAPH, None)


# --- the file, and the picture --------------------------------------------------------------------------------------------------

LIVER = Header(family="ct", plane="axial", regions=("abdomen",), parts=("liver",), organs=("gastrointestinal",))
CT = replace(LIVER, contrast=True, laterality="left")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what modality is this?", "CT, with contrast"),
        ("in what plane is this?", "axial"),
        ("what organ is shown?", "gastrointestinal (liver)"),
        ("is this a CT?", "yes"),
        ("is this an MRI?", "no"),
        ("is this not a CT?", "no"),
        ("is this a chest x-ray?", "no"),
        ("is this an axial CT?", "yes"),
        ("is this a coronal CT?", "no"),
        ("is this an abdominal CT?", "yes"),
        ("CT or MRI?", "CT"),
        ("axial or sagittal?", "axial"),
        ("was contrast given?", "yes"),
        ("which side is shown?", "left"),
    ],
)
def test_what_the_file_says_is_the_answer_and_carries_no_percentage(question: str, answer: str) -> None:
    given = said(question, Evidence(FILM, CT))
    assert (given.answer, given.source, given.probability) == (answer, "header", None)


def test_a_strong_contradiction_is_said_and_a_weak_one_is_not() -> None:
    strong, weak = Evidence(FILM, CT), Evidence({"modality": of(("xr - plain film", 0.7), ("ct noncontrast", 0.3))}, CT)
    assert said("what modality is this?", strong).note == "the header says CT; the picture looks like a plain film"
    assert said("in what plane is this?", strong).note == "the header says CT; the picture looks like a plain film"
    assert said("what modality is this?", weak).note is None


def test_the_details_beside_a_headers_answer_are_of_its_family_and_sum_to_one() -> None:
    mixed = of(("xr - plain film", 0.5), ("ct noncontrast", 0.3), ("ct with iv contrast", 0.2))
    given = said("what modality is this?", Evidence({"modality": mixed}, CT))
    assert [c.answer for c in given.candidates] == ["ct noncontrast", "ct with iv contrast"]
    assert sum(c.probability for c in given.candidates) == pytest.approx(1)


@pytest.mark.parametrize(
    ("question", "facet", "shares", "answer"),
    [
        ("what modality is this?", "modality", {"xr - plain film": 0.6, "ct noncontrast": 0.4}, "xr - plain film"),
        ("what modality is this?", "modality", {"mr - flair": 0.4, "mr - stir": 0.3, "ct noncontrast": 0.3}, "MR, detail not determined"),
        ("what modality is this?", "modality", {"mr - flair": 0.4, "us - ultrasound": 0.3, "ct noncontrast": 0.3}, None),
        ("what modality is this?", "modality", {"mr - flair": 0.94, "mr - stir": 0.06}, "MR, detail not determined"),
        ("what modality is this?", "modality", {"mr - flair": 0.95, "mr - stir": 0.05}, "mr - flair"),
        ("what modality is this?", "modality", {"ct noncontrast": 0.9, "cta - ct angiography": 0.1}, "CT, detail not determined"),
        ("what modality is this?", "modality", {"xr - plain film": 0.4, "mr - flair": 0.3, "mr - stir": 0.3}, "MR, detail not determined"),
        ("in what plane is this?", "plane", {"axial": 0.4, "transverse": 0.3, "coronal": 0.3}, "axial"),
        ("in what plane is this?", "plane", {"ap": 0.4, "pa": 0.3, "coronal": 0.3}, "frontal, AP or PA not determined"),
        ("what organ system is shown?", "organ", {"spine and contents": 0.51, "breast": 0.49}, "spine and contents"),
        ("what organ system is shown?", "organ", {"spine and contents": 0.49, "breast": 0.3}, None),
    ],
)
def test_an_open_answer_is_as_fine_as_the_picture_is_sure(question: str, facet: str, shares: dict[str, float], answer: str | None) -> None:
    given = said(question, Evidence({facet: of(*shares.items())}))
    assert given.answer == answer and given.probability is not None and (answer is None or given.probability >= 0.5)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("is this an x-ray?", "yes", None),
        ("is this a CT?", "no", None),
        ("CT or MRI?", None, "neither CT nor MR"),
        ("x-ray or CT?", "plain film", None),
        ("t1 or t2?", None, "answered for MR"),
        ("was contrast given?", None, "answered for CT and MR"),
        ("which side is shown?", None, "does not say"),
        ("Ist da ein Bruch?", None, "English"),
        ("what is the patient's name?", None, "outside"),
    ],
)
def test_what_the_picture_alone_says(question: str, answer: str | None, reason: str | None) -> None:
    given = said(question, Evidence(FILM))
    assert given.answer == answer and (reason is None or reason in (given.reason or "")), given


T2_AND_CONTRAST = "is this a t2 mri with contrast?"


def mr(share: float) -> Evidence:
    """An MR with contrast and T2 weighting of this probability."""
    contrast, weighting = of(("contrast", share), ("noncontrast", 1 - share)), of(("t2", share), ("t1", 1 - share))
    return Evidence({"modality": of(("mr - flair", 0.97), ("ct noncontrast", 0.03)), "contrast of mr": contrast, "weighting": weighting})


@pytest.mark.parametrize(
    ("question", "what", "answer"),
    [
        ("what contrast was given?", "contrast", "with contrast, type not determined"),
        ("with or without contrast?", "contrast", "with contrast"),
        ("was contrast given?", "contrast", "yes"),
        ("is this a noncontrast mri?", "contrast", "no"),
        ("what is the mr weighting?", "weighting", "t2"),
        ("t1 or t2?", "weighting", "t2"),
        ("is this t2 weighted?", "weighting", "yes"),
        ("is this a t1 weighted mri?", "weighting", "no"),
    ],
)
def test_a_detail_is_given_from_the_same_certainty_on_however_it_is_asked(question: str, what: str, answer: str) -> None:
    assert said(question, mr(0.96)).answer == answer
    for share in (0.94, 0.55):
        unsure = reply(MANIFEST, understood(question), mr(share), question)
        assert unsure.answer is None and (unsure.reason or "").startswith(f"{what} is not determined: "), unsure
        if understood(question).form != "open":
            same = [q for q, facet in EXAMPLES.items() if facet == what]  # which have no answer either
            assert "this can be asked: " in (unsure.note or "") and not any(q in str(unsure.note) for q in same), unsure


@pytest.mark.parametrize(
    ("question", "evidence", "answer", "reason"),
    [
        ("was contrast given?", replace(mr(0.6), header=Header(family="mr", contrast=False)), "no", None),
        ("what contrast was given?", replace(mr(0.6), header=Header(family="mr", contrast=True)), "with contrast", None),
        ("is this a noncontrast ct?", mr(0.6), "no", None),
        (T2_AND_CONTRAST, replace(mr(0.6), header=Header(family="mr", contrast=True)), None, "weighting is not determined"),
        (T2_AND_CONTRAST, Evidence({**mr(0.97).opinions, "weighting": of(("t2", 0.6))}), None, "weighting is not determined"),
        (T2_AND_CONTRAST, Evidence({**mr(0.6).opinions, "weighting": of(("t2", 0.97))}), None, "contrast is not determined"),
        ("was gi contrast given?", mr(0.6), None, "does not judge 'gi' contrast"),
        ("was contrast given?", replace(mr(0.6), radiology=False), None, NO_RADIOGRAPH),
    ],
)
def test_a_detail_that_is_not_determined_hides_nothing_that_is_known(
    question: str, evidence: Evidence, answer: str | None, reason: str | None
) -> None:
    given = said(question, evidence)
    assert given.answer == answer and (reason is None or reason in (given.reason or "")), given


@pytest.mark.parametrize("share", [0.45, 0.5, 0.59])
def test_yes_and_no_that_are_too_close_are_no_answer(share: float) -> None:
    given = said("is this an x-ray?", Evidence({"modality": of(("xr - plain film", share), ("ct noncontrast", 1 - share))}))
    assert given.answer is None and "too close" in (given.reason or "")


def test_a_region_is_read_from_the_organ_only_as_far_as_that_goes() -> None:
    bones, head = (Evidence({**FILM, "organ": of((organ, 0.9), ("breast", 0.1))}) for organ in ("musculoskeletal", "skull and contents"))
    assert said("is this a hand?", bones).answer is None
    assert said("is this a head?", bones).answer == "no"
    assert said("is this a head?", head).answer == "yes"


def test_a_file_that_holds_no_radiology_gets_no_answer() -> None:
    given = said("what organ is shown?", Evidence(FILM, Header(outside="microscopy")))
    assert given.answer is None and "microscopy" in (given.reason or "")


def test_nothing_sure_is_said_plainly() -> None:
    assert said("what organ is shown?", Evidence({"organ": of(("breast", 0.4), ("spine and contents", 0.3))})).reason == NOT_SURE


def test_only_the_opinions_that_are_needed_are_asked_for() -> None:
    def facets(*questions: str) -> set[str]:
        return facets_of(understood(question) for question in questions)

    assert facets(FRACTURE) == {"modality"}
    assert facets("in what plane is this?", "is this a chest x-ray?") == {"plane", "organ", "modality"}
    assert facets("what is the patient's name?") == set()
