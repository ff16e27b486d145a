"""Kinds of question: what pmclip-lite may answer with, which closed questions are derived, and what it must not answer."""

import random
import re
import string
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.train.datasets import Question

OUT_OF_SCOPE, NEVER_LEARNED = "out of scope", "finding never learned"
REASONS = {  # of the kinds that are never answered
    OUT_OF_SCOPE: "the question is outside what this model was trained on",
    NEVER_LEARNED: "the model never learned this finding",
}
LEARNED_BADLY = "the model does not tell this finding apart well enough on validation images"


@dataclass(frozen=True)
class Finding:
    """A finding that closed questions ask about; ``pattern`` finds it in an abnormality answer."""

    name: str
    pattern: str
    words: tuple[str, ...]  # with article, as they stand after "is there ..."


FINDINGS = (
    Finding("fracture", r"fractur|\bfx\b", ("a fracture", "a bone fracture", "a fractured bone", "a broken bone", "fracture", "fractures")),
    Finding(
        "hemorrhage",
        r"hemorrhag(?!ic telang)|haemorrh|hematoma|bleed",
        ("a hemorrhage", "hemorrhage", "bleeding", "a hematoma", "blood"),
    ),
    Finding("aneurysm", r"aneurysm(?!al bone)", ("an aneurysm", "aneurysm", "aneurysms")),
    Finding("abscess", r"abscess", ("an abscess", "abscess", "abscesses")),
    Finding("cyst", r"\bcysts?\b", ("a cyst", "cysts", "a cystic lesion", "cyst")),
    Finding("metastasis", r"metasta", ("a metastasis", "metastases", "metastatic disease", "metastasis")),
    Finding("lymphoma", r"lymphoma", ("a lymphoma", "lymphoma")),
    Finding("meningioma", r"meningioma", ("a meningioma", "meningioma")),
    Finding(
        "glioma",
        r"\bglio(?!sis)|ganglioglioma|oligodendroglioma|astrocytoma|ependymoma",
        ("a glioma", "glioma", "an astrocytoma", "a glioblastoma", "a glial tumor"),
    ),
    Finding("infarct", r"infarct|\bstroke|ischemi(?!c encephal)", ("an infarct", "infarction", "a stroke", "ischemia", "an infarction")),
    Finding(
        "vascular malformation",
        r"(arterio-? ?venous|vascular|cavernous|galen|venous) malformation|\bavm\b",
        ("a vascular malformation", "an arteriovenous malformation", "an avm"),
    ),
    Finding("embolism", r"\bembol(?!iz|isat)", ("an embolism", "an embolus", "emboli", "a pulmonary embolism")),
    Finding("thrombosis", r"thromb", ("a thrombosis", "thrombosis", "a thrombus", "a clot")),
    Finding("carcinoma", r"carcinoma|cancer", ("a carcinoma", "carcinoma", "cancer", "a cancer")),
    Finding("lipoma", r"\blipoma", ("a lipoma", "lipoma")),
    Finding("hernia", r"hernia", ("a hernia", "hernia", "herniation")),
    Finding("pneumonia", r"pneumonia", ("pneumonia", "a pneumonia")),
    Finding("pneumothorax", r"pneumothora", ("a pneumothorax", "pneumothorax")),
    Finding("appendicitis", r"appendic", ("appendicitis", "an appendicitis")),
    Finding("obstruction", r"obstruct", ("an obstruction", "obstruction")),
)
LEAST_POSITIVES = 40  # training images that name a finding; with fewer it is never answered
LEAST_ORGAN_SHARE = 0.05  # an organ counts as a finding's if it holds this share of its positives

ASK = (
    "is there {}?",
    "is there any {bare}?",
    "is there evidence of {}?",
    "is there any evidence of {bare}?",
    "does this image show {}?",
    "does the image show {}?",
    "does this scan show {}?",
    "does the x-ray show {}?",
    "do you see {}?",
    "can you see {}?",
    "can {} be seen?",
    "is {} present?",
    "is {} visible?",
    "is {} seen in this image?",
    "are there signs of {}?",
    "any sign of {}?",
    "any {bare}?",
    "{bare}?",
    "is there {} in this image?",
    "is there {} on this x-ray?",
    "is there {} in this ct?",
    "is there {} in this mri?",
    "does the patient have {}?",
    "does this patient have {}?",
    "is this {}?",
)


PHRASES = Path(__file__).parent / "phrases"  # questions to never answer, and other ways to ask what the datasets ask


def kind_of(q: Question) -> str:
    """The kind of a question of VQA-Med 2019."""
    closed = q.answer in ("yes", "no")
    if q.category == "modality" and not closed:
        if re.search(r"\bt1\b|\bt2\b|flair|weighting", q.question):
            return "weighting"
        return "contrast" if "contrast" in q.question else "modality"
    return f"{q.category} yes/no" if closed else q.category


@dataclass(frozen=True)
class Derived:
    """A closed question that an abnormality answer decides."""

    image: Path
    finding: str
    answer: str  # "yes", "no"
    organ: str


def derived_from_questions(questions: list[Question], organs: dict[str, set[str]]) -> list[Derived]:
    """Yes where the abnormality answer names the finding; no where it names another one, in one of the finding's organs."""
    organ = {q.image: q.answer for q in questions if q.category == "organ"}
    out = []
    for q in questions:
        if q.category != "abnormality" or q.answer in ("yes", "no"):
            continue
        for f in FINDINGS:
            named = re.search(f.pattern, q.answer) is not None
            if f.name in organs and (named or organ.get(q.image) in organs[f.name]):
                out.append(Derived(q.image, f.name, "yes" if named else "no", organ.get(q.image, "")))
    return out


def organs_from_questions(questions: list[Question]) -> dict[str, set[str]]:
    """The organs of each finding that has enough positives to be learned."""
    organ = {q.image: q.answer for q in questions if q.category == "organ"}
    found: dict[str, list[str]] = defaultdict(list)
    for q in questions:
        if q.category == "abnormality":
            for f in FINDINGS:
                if re.search(f.pattern, q.answer):
                    found[f.name].append(organ.get(q.image, ""))
    return {
        name: {o for o in set(where) if o and where.count(o) >= LEAST_ORGAN_SHARE * len(where)}
        for name, where in found.items()
        if len(where) >= LEAST_POSITIVES
    }


def ways_to_ask(words: tuple[str, ...]) -> list[str]:
    return sorted({a.format(w, bare=_bare(w)) for a in ASK for w in words})


def _bare(words: str) -> str:
    return re.sub(r"^(an?|the) ", "", words)


def questions_without_answer(
    abnormalities: set[str], learned: set[str], freeform: list[Question], rng: random.Random
) -> dict[str, list[str]]:
    """Questions for the two kinds that are never answered: findings not learned, and all that is out of scope."""
    known = [f for f in FINDINGS if f.name in learned]

    def unknown(text: str) -> bool:
        return not any(re.search(f.pattern, text) or any(_bare(w) in text for w in f.words) for f in known)

    never = []
    for name in sorted(filter(unknown, abnormalities)):
        article = "an" if name[0] in "aeiou" else "a"
        for ask in rng.sample(ASK, 2):
            never.append(ask.format(rng.choice((name, f"{article} {name}")), bare=name))
    for f in FINDINGS:
        if f.name not in learned:
            never += ways_to_ask(f.words)
    never += ways_to_ask(tuple((PHRASES / "never_learned.txt").read_text(encoding="utf-8").splitlines()))
    about_findings = [q.question for q in freeform if q.category == "abnormality" and q.answer in ("yes", "no")]
    never += [text for text in about_findings if unknown(text) and "normal" not in text]

    letters = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 10))) for _ in range(300)]
    noise = [" ".join(rng.sample(letters, rng.randint(1, 4))) + rng.choice(("", "?")) for _ in range(300)]
    written = (PHRASES / "out_of_scope.txt").read_text(encoding="utf-8").splitlines()
    outside = written + noise + [q.question for q in freeform if q.category == "other"]
    return {NEVER_LEARNED: sorted(set(never)), OUT_OF_SCOPE: sorted(set(outside))}
