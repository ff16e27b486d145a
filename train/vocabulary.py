"""Answers to labels: normalisation and vocabularies as MEVF and QCR build them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pmclip_deploy.evaluation.counting import answer_as_mevf
from pmclip_deploy.train.datasets import Question, normalised


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
