"""Questions as rows to train on, grouped by image, and what the head's memory keeps of each image."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from pmclip_deploy.train import kinds as K
from pmclip_deploy.train.datasets import Question
from pmclip_deploy.train.lite.data import Data
from pmclip_deploy.train.lite.vocabulary import BY_HEART, Vocabulary
from pmclip_deploy.train.modality import implied_questions

REMEMBERED = ("plane", "organ", "modality", BY_HEART)
FINDING_WEIGHT = 0.15  # of one derived question against one of the dataset's
ANY_WAY = -1  # the text of a derived question, which is put in another way each time


class Rows:
    """Questions grouped by image: for a batch of images, all their rows at once. Every text is kept once, each with its kind."""

    def __init__(self, vocabulary: Vocabulary, paths: list[Path]) -> None:
        self.vocabulary = vocabulary
        self.of: list[list[tuple[int, int, int, float]]] = [[] for _ in paths]  # (text, kind, answer, weight)
        self.slots: list[list[int]] = [[] for _ in paths]  # the columns that each image speaks for, from memory
        self.balance = torch.zeros(len(vocabulary.answers))  # of these columns: the log count of images
        self.texts: dict[str, int] = {}
        self.kinds: list[int] = []  # of the texts
        self.ways: dict[int, list[int]] = {}  # of a finding's kind, the texts that ask about it
        self._place = {path: i for i, path in enumerate(paths)}

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(place in the batch, text, kind, answer) i64 and weight f32, each (R,)."""
        rows = [(i, *row) for i, image in enumerate(indices) for row in self.of[image]]
        place, text, kind, answer, weight = zip(*rows, strict=True)
        return torch.tensor(place), torch.tensor(text), torch.tensor(kind), torch.tensor(answer), torch.tensor(weight)

    def padded_slots(self) -> Tensor:
        """(N, S) i64; the number of answers where an image has fewer slots than others."""
        widest, none = max(map(len, self.slots)), len(self.vocabulary.answers)
        return torch.tensor([row + [none] * (widest - len(row)) for row in self.slots])

    def __contains__(self, image: Path) -> bool:
        """Whether ``image`` is trained on."""
        return image in self._place

    def text(self, text: str, kind: str) -> int:
        if text not in self.texts:
            self.texts[text] = len(self.texts)
            self.kinds.append(self.vocabulary.kind_id[kind])
        return self.texts[text]

    def add(self, image: Path, text: int, kind: str, answer: str, weight: float) -> None:
        """Does nothing where ``image`` is not trained on."""
        if image in self:
            self.of[self._place[image]].append((text, self.vocabulary.kind_id[kind], self.vocabulary.column[kind, answer], weight))

    def remember(self, image: Path, kind: str, answer: str) -> None:
        if image in self:
            self.slots[self._place[image]].append(self.vocabulary.column[kind, answer])


def rows_from_data(data: Data, rng: random.Random) -> Rows:
    rows = Rows(data.vocabulary, data.paths)
    _add_questions(rows, data.training)
    for kind, ways in json.loads((K.PHRASES / "paraphrases.json").read_text(encoding="utf-8")).items():
        for text in ways if kind in data.vocabulary.kind_id else ():
            rows.text(text, kind)
    _add_implied(rows, data)
    for finding in K.FINDINGS:
        if finding.name in data.organs:
            kind = f"finding: {finding.name}"
            rows.ways[data.vocabulary.kind_id[kind]] = [rows.text(way, kind) for way in K.ways_to_ask(finding.words)]
    abnormal = {q.answer for q in data.training if q.category == "abnormality"} - {"yes", "no"}
    freeform = [q for q in data.everything if q.image.parent != data.training[0].image.parent]
    for kind, unanswered in K.questions_without_answer(abnormal, set(data.organs), freeform, rng).items():
        for text in unanswered:
            rows.text(text, kind)
    _add_derived(rows, data.derived)
    return rows


def _add_questions(rows: Rows, questions: list[Question]) -> None:
    for q in questions:
        kind = K.kind_of(q)
        text = rows.text(q.question, kind)
        if kind in REMEMBERED:
            rows.remember(q.image, kind, q.answer)
        if kind != BY_HEART:
            rows.add(q.image, text, kind, q.answer, 1.0)


def _add_implied(rows: Rows, data: Data) -> None:
    """What the modality of an image decides, but for what is asked about it anyway."""
    own = {(q.image, q.question) for q in data.training}
    for image, facts in data.facts.items():
        for question, answer, kind, weight in implied_questions(facts):
            if (kind, answer) not in data.vocabulary.column:
                continue
            text = rows.text(question, kind)
            if (image, question) not in own:
                rows.add(image, text, kind, answer, weight)


def _add_derived(rows: Rows, derived: list[K.Derived]) -> None:
    """Yes and no weigh the same, so that the probabilities are for even odds."""
    share = Counter((d.finding, d.answer) for d in derived)
    total = Counter(d.finding for d in derived)
    for d in derived:
        kind = f"finding: {d.finding}"
        rows.add(d.image, ANY_WAY, kind, d.answer, FINDING_WEIGHT * total[d.finding] / (2 * share[d.finding, d.answer]))
        rows.remember(d.image, kind, d.answer)
        if d.image in rows:
            rows.balance[rows.vocabulary.column[kind, d.answer]] = math.log(share[d.finding, d.answer])
