"""What one answer about modality says of the other modality questions: a T2 image is an MRI and no CT.

VQA-Med 2019 asks one modality question of an image. Its answer, and the modality that other questions about the image
mention ("what is abnormal in the ct scan?"), decide most of the questions that were not asked.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.train.datasets import Question

# The modality that a question takes for granted, or an open answer names.
FAMILY = {
    "ct": r"\bct scan\b|\bcta?\b|noncontrast ct",
    "mr": r"\bmri?\b|\bmra\b|t1|t2|flair",
    "xr": r"x-ray|xr - plain film",
    "us": r"ultrasound",
    "an": r"\bangiogram\b",
    "mg": r"mammograph",
}
CLOSED_FAMILY = {"is this a ct scan?": "ct", "is this an mri image?": "mr"}
NAMED_FAMILY = {
    "ct": ("is this a ct?", "is this image a ct scan?", "is this a computed tomography?"),
    "mr": ("is this an mri?", "is this an mr image?", "is this a magnetic resonance image?"),
    "xr": ("is this an x-ray?", "is this a plain film?", "is this a radiograph?"),
    "us": ("is this an ultrasound?", "is this a sonogram?", "is this image an ultrasound?"),
    "an": ("is this an angiogram?",),
    "mg": ("is this a mammogram?", "is this a mammograph?"),
}


@dataclass
class Facts:
    family: str | None = None
    weighting: str | None = None  # "t1", "t2", "flair", or "other" for an MR that is none of them
    not_weighting: str | None = None
    contrast: bool | None = None  # intravenous, CT or MR


def facts_by_image(questions: list[Question]) -> dict[Path, Facts]:
    facts: dict[Path, Facts] = defaultdict(Facts)
    for q in questions:
        if q.category != "modality":
            taken_for_granted = _family(q.question)
            if taken_for_granted and facts[q.image].family is None:
                facts[q.image].family = taken_for_granted
            continue
        _learn(facts[q.image], q.question, q.answer)
    return dict(facts)


def _family(text: str) -> str | None:
    found = [name for name, pattern in FAMILY.items() if re.search(pattern, text)]
    return found[0] if len(found) == 1 else None


def _learn(f: Facts, question: str, answer: str) -> None:
    closed, yes = answer in ("yes", "no"), answer == "yes"
    if question in CLOSED_FAMILY:
        f.family = CLOSED_FAMILY[question] if yes else f.family
    elif closed and (weighting := re.search(r"\b(t1|t2) weighted", question)):
        f.family = "mr"
        f.weighting, f.not_weighting = (weighting[1], None) if yes else (f.weighting, weighting[1])
    elif re.search(r"weighting|t1.*flair", question):
        f.family, f.weighting = "mr", answer
    elif closed and "noncontrast" in question:  # "is this a noncontrast ct?"
        f.family, f.contrast = _family(question), not yes
    elif closed and "taken with contrast" in question:
        f.family, f.contrast = _family(question), yes
    elif answer in ("contrast", "noncontrast"):
        f.family, f.contrast = _family(question), answer == "contrast"
    elif not closed and "contrast" not in question:  # an open question
        f.family = "mr" if answer.startswith("mr") else "ct" if answer.startswith("ct") else _family(answer) or "none of these"
        if f.family == "mr" and not answer.startswith("mra"):
            named = re.search(r"t1|t2(?!\*)|flair", answer)
            f.weighting = named[0] if named else "other"
            if f.weighting == "t1":
                f.contrast = "w/g" in answer
        if f.family == "ct" and not answer.startswith("cta"):
            f.contrast = {"ct noncontrast": False, "ct with gi contrast": False}.get(answer, True)


def implied_questions(f: Facts) -> list[tuple[str, str, str, float]]:
    """(question, answer, kind, weight) of all that the facts decide; many ways to ask the same share its weight."""
    out: list[tuple[str, str, str, float]] = []

    def closed(question: str, yes: bool, weight: float = 0.3) -> None:
        out.append((question, "yes" if yes else "no", "modality yes/no", weight))

    if f.family is None:
        return out
    for question, family in CLOSED_FAMILY.items():
        closed(question, f.family == family, 0.15)
    for family, ways in NAMED_FAMILY.items():
        for question in ways:
            closed(question, f.family == family, 0.05)
    if f.family == "mr":
        for weighting in ("t1", "t2"):
            if f.weighting or f.not_weighting == weighting:
                closed(f"is this a {weighting} weighted image?", f.weighting == weighting)
        if f.weighting in ("t1", "t2", "flair"):
            out.append(("is this a t1 weighted, t2 weighted, or flair image?", f.weighting, "weighting", 0.15))
            out.append(("what is the mr weighting in this image?", f.weighting, "weighting", 0.15))
            out.append(("is this image modality t1, t2, or flair?", f.weighting, "weighting", 0.15))
        if f.weighting in ("t2", "flair"):
            name = {"t2": "mr - t2 weighted", "flair": "mr - flair"}[f.weighting]
            out.append(("what imaging modality was used to take this image?", name, "modality", 0.3))
    if f.contrast is not None and f.family in ("ct", "mr"):
        scan = {"ct": "ct", "mr": "mri"}[f.family]
        closed(f"is this a noncontrast {scan}?", not f.contrast)
        closed(f"was the {scan}{' scan' if scan == 'ct' else ''} taken with contrast?", f.contrast)
        out.append((f"is this a contrast or noncontrast {scan}?", "contrast" if f.contrast else "noncontrast", "contrast", 0.3))
    return out
