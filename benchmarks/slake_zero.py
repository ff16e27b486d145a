"""SLAKE by zero training: its English test questions on modality, plane and organ, answered in the model's words from pictures alone.

    python -m pmclip_deploy.benchmarks.slake_zero --data slake [--bundle DIR] [--split test] [--seed N] [--json]

Of each picture the model is asked one question of its own a facet (ASKED). Its best answer is put into SLAKE's words by MEANS, and answers
SLAKE's question as READ reads that. The model has learned nothing of SLAKE. An answer that MEANS has no word for ("us - ultrasound",
"3d reconstruction") is wrong for an open question and "no" for a closed one; where a question offers a choice, the best of what it
offers is taken. "Coronal Plane" is also what SLAKE calls a frontal film. The ten organ systems cannot tell abdomen from pelvis, so for
open questions these are one answer. What they cannot decide at all is left out, by the question's words and never by its answer, and
counted.

Baselines: always the most frequent answer of SLAKE's own training questions (of the same content type, open or closed), their most frequent
answer to the same words, and the model shown another test picture. Intervals: 95%, by resampling pictures.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy.decision.heads import Decision, decision_from_heads
from pmclip_deploy.evaluation.evaluate import Answerer, Decisions, about_bundle, figures
from pmclip_deploy.evaluation.rows import Row, normalised, pictures_of
from pmclip_deploy.opening import load
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.train.datasets import Question, questions_from_folder
from pmclip_deploy.train.splits import rows_from_questions
from pmclip_deploy.vocabulary import family_of_answer, view_of_answer

ASKED = {  # facet -> what the model is asked; each is a kind of question of its own
    "modality": "what imaging modality is shown?",
    "weighting": "what is the mr weighting in this image?",
    "plane": "what is the plane of this image?",
    "organ": "what organ system is shown?",
}
CHEST = ("lung, mediastinum, pleura", "heart and great vessels", "breast")
BELLY = ("gastrointestinal", "genitourinary")
MEANS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {  # what is asked for -> SLAKE's word -> what the model may say for it
    "modality": {"ct": ("ct",), "mri": ("mr",), "x-ray": ("xr",)},  # families of its answers
    "weighting": {"t1": ("t1",), "t2": ("t2", "flair")},  # FLAIR is T2-weighted, with the fluid's signal nulled
    "plane": {
        "transverse plane": (("plane", "axial"),),  # "transverse" and "axial"
        "coronal plane": (("plane", "coronal"), ("projection", "ap"), ("projection", "pa"), ("projection", "frontal")),
        "sagittal plane": (("plane", "sagittal"), ("projection", "lateral")),
    },
    "body part": {"head": ("skull and contents",), "neck": ("face, sinuses, and neck",), "chest": CHEST, "abdomen": BELLY},
    "main organ": {
        "brain": ("skull and contents",),
        "lung": CHEST[:1],
        "heart": CHEST[1:2],
        "liver": BELLY[:1],
        "spinal cord": ("spine and contents",),
    },
    # What any picture of the region shows. Lung and heart are not here: of SLAKE's training questions on them, one who knows the region
    # (its "location") and no more has 65 of 98 and 73 of 96 right, for abdominal CT slices often show both; of those on the brain 31 of 31.
    "contained": {"brain": ("skull and contents",)},
}
FACET = {"body part": "organ", "main organ": "organ", "contained": "organ"}  # where it is not the facet's own name
OTHER_WORDS = {"brian": "brain", "coronal": "coronal plane", "transverse": "transverse plane", "sagittal": "sagittal plane"}
PELVIS = {"pelvic cavity": "abdomen"}  # for open questions

SLICE = "one organ of its region: whether it is seen depends on the slice"
PLACE = "a place, colour or pair in the picture: the model has no places"
NO_PELVIS = "the pelvic cavity: no organ system is the pelvis's alone"
UNREAD = "no rule reads it"

READ = (  # SLAKE's wording -> what it asks for, or why it is left out; "asked" is what a closed question asserts, "offered" a choice
    (r"is this an? (?P<asked>ct|mri|x-ray)( scan)?", "modality"),
    (r"is this image taken via (?P<asked>ct|mri|x-ray)", "modality"),
    (r"how was this image taken|what imaging modality was used|what type of medical image is this", "modality"),
    (r"what modality is (shown in|used to take) this image", "modality"),
    (r"which type of modality is shown about this image, (?P<offered>.+)", "modality"),
    (r"is this an mri image with (?P<asked>t[12]) weighted", "weighting"),
    (r"is this a (?P<offered>t1 weighted or t2 weighted) mri image", "weighting"),
    (r"what is the mr weighting in this image|what type of mri is shown in this image", "weighting"),
    (r"which kind of weighting is this image generated with, (?P<offered>.+)", "weighting"),
    (r"is this (a )?(?P<asked>coronal|transverse|sagittal) (plane|section)", "plane"),
    (r"in what plane is this image scanned|what (is the )?scanning plane (of|does) this image( belong to)?", "plane"),
    (r"which plane is the image scanned, (?P<offered>.+)", "plane"),
    (r"(what|which) organ system is (the )?(pictured|imaged|visualized|primarily present in this image)", "body part"),
    (r"what is the organ system visualized", "body part"),
    (r"is this a study of the (?P<asked>head|neck|chest|abdomen)", "body part"),
    (r"is this a study of the pelvic cavity", NO_PELVIS),
    (r"what is the main organ in the image", "main organ"),
    (r"does the picture contain (?P<asked>brain|brian)", "contained"),
    (r"(does the|is there|are/is there) .*", SLICE),
    (r"(what is the (organ|leftmost|rightmost)|what are the white|what organ is the|which organs appear in pairs).*", PLACE),
)


@dataclass(frozen=True)
class Reading:
    """A question of SLAKE's, as far as the model can decide it."""

    about: str  # a key of MEANS
    asked: str | None = None  # what a closed question asserts
    offered: tuple[str, ...] = ()  # what a choice offers

    @property
    def facet(self) -> str:
        """The part of a decision that answers it."""
        return FACET.get(self.about, self.about)


def reading_of_question(question: str) -> Reading | str:
    """Or why it is left out."""
    text = normalised(question).removesuffix("?").strip()
    for pattern, about in READ:
        if found := re.fullmatch(pattern, text):
            if about not in MEANS:
                return about
            groups = found.groupdict()
            offered = re.split(r", | or |,", (groups.get("offered") or "").replace(" weighted", ""))
            asked = groups.get("asked")
            return Reading(about, None if asked is None else OTHER_WORDS.get(asked, asked), tuple(word for word in offered if word))
    return UNREAD


def answer_of_decision(reading: Reading, decision: Decision) -> str:
    """In SLAKE's words; the model's own where SLAKE has none."""
    means = MEANS[reading.about]
    answers = [candidate.answer for candidate in decision.candidates]  # best first
    if reading.asked is not None:
        return "yes" if value_of_answer(reading.facet, answers[0]) in means[reading.asked] else "no"
    word_of = {value: word for word, values in means.items() for value in values}
    words = [word_of.get(value_of_answer(reading.facet, answer), answer) for answer in answers]
    return next((word for word in words if word in reading.offered), words[0])


def value_of_answer(facet: str, answer: str) -> Any:
    """What MEANS knows an answer of the model by."""
    if facet == "modality":
        return family_of_answer(answer)
    return view_of_answer(answer) if facet == "plane" else answer


def same(answer: str) -> str:
    """The answer normalised; the names of the pelvis are one."""
    return PELVIS.get(normalised(answer), normalised(answer))


def decisions_of_pictures(predictor: Predictor, pictures: Sequence[str]) -> list[dict[str, Decision]]:
    """Of each picture, by facet."""
    asked = predictor.question_features(list(ASKED.values()))
    made = []
    for picture in pictures:
        heads = predictor.head_logits(np.repeat(predictor.image_features(picture)[None], len(ASKED), 0), asked)
        made.append({facet: decision_from_heads(predictor.manifest, heads, i) for i, facet in enumerate(ASKED)})
    for facet, decision in made[0].items():
        kind = predictor.manifest.kinds[decision.kind].name
        if kind != facet:
            raise SystemExit(f"{predictor.manifest.name} takes {ASKED[facet]!r} for a question on {kind!r}; give another --bundle")
    return made


def asked_of_decisions(readings: Sequence[Reading], decisions: Sequence[Mapping[str, Decision]]) -> Answerer:
    """``decisions`` of each of the rows' pictures."""

    def asked(picture: Any) -> Decisions:
        taken = [decisions[p][reading.facet] for p, reading in zip(picture, readings, strict=True)]
        return Decisions(
            answers=[answer_of_decision(reading, d) for reading, d in zip(readings, taken, strict=True)],
            probability=np.array([d.candidates[0].probability for d in taken]),
            causes=[d.rule for d in taken],
        )

    return asked


def read_questions(questions: Sequence[Question]) -> tuple[list[Row], list[Reading], dict[str, Counter[str]]]:
    """(those that the model can decide, how they were read, by content type how many were left out and why)"""
    kept, readings, left = [], [], dict[str, Counter[str]]()
    for row in rows_from_questions([q for q in questions if q.category in ("modality", "plane", "organ")]):
        read = reading_of_question(row.question)
        if isinstance(read, Reading):
            kept.append(row)
            readings.append(read)
        else:
            left.setdefault(str(row.category), Counter())[read] += 1
    return kept, readings, left


def measured(predictor: Predictor, data: Path, split: str, seed: int) -> dict[str, Any]:
    """All figures of a split, by group of questions, with those of the baselines."""
    rows, readings, left = read_questions(questions_from_folder(data, split))
    known, known_readings, _ = read_questions(questions_from_folder(data, "train"))
    names = pictures_of(rows)[0]
    decisions = dict(zip(names, decisions_of_pictures(predictor, names), strict=True))
    groups = {"all": None, "modality": "modality", "plane": "plane", "organ": "organ"}
    parts = {"modality: family": "modality", "modality: weighting": "weighting"} | {f"organ: {about}": about for about in FACET}
    found = {}
    for name, key in (groups | parts).items():
        by_reading = name in parts

        def member(row: Row, reading: Reading, key: str | None = key, by_reading: bool = by_reading) -> bool:
            return key is None or (reading.about if by_reading else row.category) == key

        some = [i for i, pair in enumerate(zip(rows, readings, strict=True)) if member(*pair)]
        train = [row for row, reading in zip(known, known_readings, strict=True) if member(row, reading)]
        ours = [rows[i] for i in some]
        asked = asked_of_decisions([readings[i] for i in some], [decisions[image] for image in pictures_of(ours)[0]])
        document = figures(ours, asked, {}, train, seed, same)[0]
        keys = ("n", "images", "accuracy", "ci95", "coverage", "selective_accuracy", "selective_accuracy_ci95", "baselines")
        found[name] = {key: document[key] for key in keys}
    return {"split": split, "model": about_bundle(predictor), "left_out": left, "groups": found, "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    document = measured(load(options.bundle), options.data, options.split, options.seed)
    if options.json:
        print(json.dumps(document, indent=1, allow_nan=False))
        return

    def cell(of: dict[str, Any] | None) -> str:
        return "not measured" if of is None else "{:.3f} ({:.3f}-{:.3f})".format(of["accuracy"], *of["ci95"])

    print("| questions | n | pictures | accuracy (95%) | majority | question only | another picture | answered | right of answered |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, group in document["groups"].items():
        beside = " | ".join(cell(group["baselines"][b]) for b in ("majority", "question_only", "shuffled_image"))
        given = "" if group["selective_accuracy"] is None else f"{group['selective_accuracy']:.3f}"
        print(f"| {name} | {group['n']} | {group['images']} | {cell(group)} | {beside} | {group['coverage']:.3f} | {given} |")
    for category, reasons in document["left_out"].items():
        for reason, count in reasons.most_common():
            print(f"left out, {category}, {count}: {reason}")


if __name__ == "__main__":
    main()
