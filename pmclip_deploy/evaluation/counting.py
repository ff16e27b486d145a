"""Answers counted as others count them, beside `evaluate`'s own count: VQA-Med 2019's challenge, MEVF's code, QCR's. Standard library only.

Sources, as far as they are published:
- VQA-Med 2019, README of the test set (github.com/abachaa/VQA-Med-2019, VQAMed2019Test): "#" stands between possible answers, text in
  brackets may be left out. READMEs of 2020 and 2021: answers are put in lower case, punctuation is removed, what is left is split into
  words; accuracy is exact match, BLEU is NLTK's for a sentence, the best over the possible answers (Evaluator-VQA-Med-2020.py).
- MEVF: tools/compute_softscore.py and test.py of github.com/aioz-ai/MICCAI19-MedVQA, and PubMedCLIP's copy of them.
- QCR: train.py and multi_level_model.py of github.com/Awenbocc/med-vqa; create_label.py and main/test.py of PubMedCLIP's copy
  (github.com/sarahESL/PubMedCLIP, MEVF_PubMedCLIP and QCR_PubMedCLIP).
docs/reference/counting.md says where they differ from ours.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pmclip_deploy.evaluation.rows import Row


@dataclass(frozen=True)
class Judged:
    """What a count makes of N rows; its parts are N long."""

    accuracy: list[bool]
    groups: list[str]  # what the count's own table tells apart
    taken: list[bool] = field(default_factory=list)  # which rows it counts; empty: all
    bleu: list[float] = field(default_factory=list)  # empty: the count has none


class Judge(Protocol):
    def __call__(
        self, rows: Sequence[Row], answers: Sequence[str | None], types: Sequence[str] | None, train: Sequence[Row] | None
    ) -> Judged:
        """``types``: "open" or "closed", what the model took each question for; None where it does not say. ``train``: training rows."""


@dataclass(frozen=True)
class Count:
    name: str  # its key in `evaluate --json`
    definition: str  # one line
    group: str  # what its groups are: "category" or "type"
    judge: Judge


# --- VQA-Med 2019 ---------------------------------------------------------------------------------------------------------------

BRACKETED = re.compile(r"\(([^()]*)\)")
MOST_BRACKETS = 8  # each with or without: 256 readings; of more, all or none
_MARKS = str.maketrans("", "", string.punctuation)
ORDERS = 4  # BLEU-4


def words_of(answer: str) -> list[str]:
    """Lower case, punctuation removed, split at blanks: "XR - plain film" is xr, plain, film."""
    return answer.lower().translate(_MARKS).split()


def readings(reference: str) -> list[list[str]]:
    """The words of every answer that a reference of VQA-Med 2019 allows."""
    allowed = (words_of(reading) for alternative in reference.split("#") for reading in _with_and_without_brackets(alternative))
    return [words for words in allowed if words] or [[]]


def _with_and_without_brackets(text: str) -> Iterable[str]:
    parts = BRACKETED.split(text)  # every second one stood in brackets
    count = len(parts) // 2
    choices = product((True, False), repeat=count) if count <= MOST_BRACKETS else ((True,) * count, (False,) * count)
    return ("".join(part for i, part in enumerate(parts) if i % 2 == 0 or kept[i // 2]) for kept in choices)


def bleu(answer: Sequence[str], reference: Sequence[str]) -> float:
    """BLEU-4 of a sentence as NLTK gave it up to 3.2.5: an order in which nothing matches is left out, and the others keep a quarter each.

    So "axial" for "axial" is 1, and one right word of three is 0.76. From NLTK 3.3 on any answer of fewer than four words has 0, right or
    wrong, which no published figure of the challenge can have come from (JUST: BLEU 0.591 at accuracy 0.57, CEUR Vol-2380, paper 125).
    """
    if not answer:
        return float(not reference)
    precisions = [_precision(answer, reference, n) for n in range(1, ORDERS + 1)]
    if not precisions[0]:
        return 0.0
    brevity = 1.0 if len(answer) > len(reference) else math.exp(1 - len(reference) / len(answer))
    return brevity * math.exp(sum(math.log(p) / ORDERS for p in precisions if p))


def _precision(answer: Sequence[str], reference: Sequence[str], n: int) -> float:
    """The share of the answer's n-grams that the reference has as often."""
    said, known = (Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (answer, reference))
    return (said & known).total() / max(1, said.total())


def _judged_as_vqa_med_2019(
    rows: Sequence[Row], answers: Sequence[str | None], types: Sequence[str] | None, train: Sequence[Row] | None
) -> Judged:
    said = [None if answer is None else words_of(answer) for answer in answers]
    allowed = [readings(row.answer) for row in rows]
    return Judged(
        accuracy=[words in of for words, of in zip(said, allowed, strict=True)],
        groups=[row.category or "none" for row in rows],
        bleu=[0.0 if words is None else max(bleu(words, ref) for ref in of) for words, of in zip(said, allowed, strict=True)],
    )


VQA_MED_2019 = Count(
    "vqa-med-2019",
    'as the challenge: "#" parts possible answers, text in brackets is optional, case and punctuation do not count; BLEU is NLTK 3.2\'s',
    "category",
    _judged_as_vqa_med_2019,
)

# --- MEVF and QCR ---------------------------------------------------------------------------------------------------------------

DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(i) for i, word in enumerate(DIGITS.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd "
    "how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock "
    "oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll "
    "they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}  # one mark missing


def answer_as_mevf(answer: str) -> str:
    """The VQA challenge's normalisation as MEVF applies it: punctuation, number words, articles, contractions.

    "The left-lung." is "left lung", and "two" is "2". A mark that stands beside a blank anywhere in the answer is dropped, else it
    becomes a blank; where a comma parts two digits, all marks are dropped. A full stop is dropped unless a digit follows.
    """
    thousands = re.search(r"\d,\d", answer)
    text = answer
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if thousands or f"{mark} " in answer or f" {mark}" in answer else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES).replace("x ray", "xray")


def answer_as_qcr(answer: str) -> str:
    return " ".join(answer.lower().split())


def _judged_as_mevf(rows: Sequence[Row], answers: Sequence[str | None], types: Sequence[str] | None, train: Sequence[Row] | None) -> Judged:
    """An answer that no training row has is no label, so neither can it be given nor found right."""
    labels = None if train is None else {answer_as_mevf(row.answer) for row in train}
    said = [None if answer is None else answer_as_mevf(answer) for answer in answers]
    right = [answer == answer_as_mevf(row.answer) for answer, row in zip(said, rows, strict=True)]
    return Judged([r and (labels is None or answer in labels) for r, answer in zip(right, said, strict=True)], _types_of(rows))


def _judged_as_mevf_freeform(
    rows: Sequence[Row], answers: Sequence[str | None], types: Sequence[str] | None, train: Sequence[Row] | None
) -> Judged:
    judged = _judged_as_mevf(rows, answers, types, train)
    return Judged(judged.accuracy, judged.groups, [row.phrase in (None, "freeform") for row in rows])


def _judged_as_qcr(rows: Sequence[Row], answers: Sequence[str | None], types: Sequence[str] | None, train: Sequence[Row] | None) -> Judged:
    """A question that the model took for one of the other type is wrong whatever it says, and counts among those of the type that it was
    taken for."""
    own = _types_of(rows)
    taken = own if types is None or not set(types) <= {"open", "closed"} else list(types)
    pairs = zip(answers, rows, own, taken, strict=True)
    return Judged([a is not None and t == o and answer_as_qcr(a) == answer_as_qcr(row.answer) for a, row, o, t in pairs], taken)


def _types_of(rows: Sequence[Row]) -> list[str]:
    return [row.type or "none" for row in rows]


MEVF = Count(
    "mevf",
    "as MEVF's test.py: the VQA challenge's normalisation, answers that training rows have alone, free-form questions alone",
    "type",
    _judged_as_mevf_freeform,
)
MEVF_ALL = Count("mevf-all", "as PubMedCLIP's copy of MEVF: the same, over paraphrased questions too", "type", _judged_as_mevf)
QCR = Count(
    "qcr",
    "as QCR's code: case and blanks do not count, all else does; by the type that the model took the question for",
    "type",
    _judged_as_qcr,
)
