"""What the trust benchmark reads of an answer: all that it knows of one."""

import re
from pathlib import Path

from pmclip_deploy.answer import Answer
from pmclip_deploy.decision.evidence import NO_RADIOGRAPH
from pmclip_deploy.evaluation.rows import normalised
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.vocabulary import CONFUSABLE_FAMILIES, FAMILY_OF_MODALITY, NO_RADIOLOGY, family_of_answer, view_of_answer

FRONTAL = ("ap", "pa", "frontal")
WORDS_OF_CHOICE = {"with contrast": "contrast", "without contrast": "noncontrast"}  # and the label's
TYPES_OF_CONTRAST = ("gi", "iv", "gi and iv")


def word(answer: Answer) -> str | None:
    """What was answered, in small letters; None where nothing was. A closed answer is its first word."""
    said = None if answer.answer is None else normalised(answer.answer)
    closed = re.match(r"(yes|no)\b", said or "")
    return closed[0] if closed else said


def best(answer: Answer) -> str | None:
    """The likeliest candidate, answered or not, which `evaluate` counts too."""
    return normalised(answer.candidates[0].answer) if answer.candidates else word(answer)


def probability(answer: Answer) -> float:
    """Of what was answered, else of the likeliest candidate; NaN where there is none, as where the header says it."""
    if answer.answer is not None and answer.probability is not None:
        return answer.probability
    return answer.candidates[0].probability if answer.candidates else float("nan")


def is_right(answer: Answer, truth: str) -> bool:
    """Of what was answered, which may be coarser than the truth ("CT, detail not determined"), else of the likeliest candidate."""
    said, likeliest, known = word(answer), best(answer), normalised(truth)
    if said is None or said == likeliest:
        return WORDS_OF_CHOICE.get(likeliest or "", likeliest) == known
    coarse, (_, view) = said.partition(",")[0], view_of_answer(known) or ("", "")
    coarse = WORDS_OF_CHOICE.get(coarse, coarse)
    if (coarse == "frontal" and view in FRONTAL) or (coarse == "contrast" and known in TYPES_OF_CONTRAST):
        return True
    return known == coarse or family(said) == family(known) is not None or view == coarse


def agree(one: Answer, other: Answer) -> bool:
    """Whether two answers are equal, or one of them is coarser; so too where one is not given."""
    a, b = word(one), word(other)
    if a is None or b is None or a == b:
        return True
    return any("not determined" in coarse and is_right(answer, fine) for answer, coarse, fine in ((one, a, b), (other, b, a)))


def yes_minus_no(answer: Answer) -> float:
    """What ranks pictures, answered or not; NaN where yes or no is no candidate."""
    of = {normalised(c.answer): c.probability for c in answer.candidates}
    return of["yes"] - of["no"] if {"yes", "no"} <= of.keys() else float("nan")


def turned_away(answer: Answer) -> bool:
    """Whether the bundle says that the picture is no radiology."""
    return NO_RADIOGRAPH in (answer.reason or "")


def tells(answer: Answer) -> bool:
    """Whether a reader learns that the answer is the header's, or that header and picture differ."""
    said = " ".join([str(getattr(answer, "source", "")), answer.note or "", *answer.image.warnings])
    return "header" in said


def family(answer: str | None) -> str | None:
    """The family of modalities that an answer names: "xr", "ct", ...; None if it names none."""
    return None if answer is None else family_of_answer(answer.replace(",", " "))


def logit(predictor: Predictor, path: Path, finding: str) -> float | None:
    """What the graph "findings" says, in a bundle that has one for this: its abstentions carry no candidates, and all films are ranked."""
    known = predictor.manifest.findings
    if known is None or finding not in [f.name for f in known.findings]:
        return None
    seen = predictor.detect_findings(picture_from_path(path))
    return None if seen is None else seen.logits[finding]


def contradicts(modality: str | None, answer: Answer) -> bool:
    """Whether an answer names another family than Modality (0008,0060) does, one that does not look alike."""
    said, known = family(word(answer)), FAMILY_OF_MODALITY.get(modality or "")
    alike = any({said, known} <= group for group in CONFUSABLE_FAMILIES)
    return said is not None and said != known and not alike and has_family(modality)


def has_family(modality: str | None) -> bool:
    """Whether Modality says what a picture is; "OT" (other) does not, an endoscope's "ES" does."""
    return modality in FAMILY_OF_MODALITY or modality in NO_RADIOLOGY
