"""Answers to labels: normalisation and vocabularies as MEVF and QCR build them."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pmclip_deploy.train.datasets import Question, normalised

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


def comparable(answer: str) -> str:
    """What `evaluate` compares answers by on a dataset, whichever model gave them."""
    return answer_as_mevf(normalised(answer))


@dataclass(frozen=True)
class AnswerVocabulary:
    answers: tuple[str, ...]  # label to answer
    closed: int | None = None  # QCR: labels below are closed answers, those from it on open ones; None: MEVF's one list

    def label(self, q: Question) -> int:
        """-1 where the vocabulary does not hold the answer: such a question counts as wrong."""
        return self._labels.get(_key(q, self.closed is not None), -1)

    @cached_property
    def _labels(self) -> dict[tuple[bool, str], int]:
        parted = self.closed is not None
        return {(parted and i < (self.closed or 0), answer): i for i, answer in enumerate(self.answers)}


def vocabulary_as_mevf(questions: Iterable[Question], least: int = 0) -> AnswerVocabulary:
    """Each normalised answer with at least ``least`` questions, by first appearance (Nguyen et al. 2019: the training split, least 0)."""
    counts = Counter(_key(q, False) for q in questions)
    return AnswerVocabulary(tuple(answer for (_, answer), count in counts.items() if count >= least))


def vocabulary_as_qcr(questions: Iterable[Question]) -> AnswerVocabulary:
    """The closed answers, then the open ones, by first appearance; an answer to both kinds has two labels (Zhan et al. 2020).

    The published figures come from a vocabulary of the training *and test* questions. Give both to compare with them.
    """
    keys = dict.fromkeys(_key(q, True) for q in questions)
    closed, open_ = ([answer for said, answer in keys if said == kind] for kind in (True, False))
    return AnswerVocabulary((*closed, *open_), len(closed))


def _key(q: Question, parted: bool) -> tuple[bool, str]:
    return (q.closed, q.answer) if parted else (False, answer_as_mevf(q.answer))
