"""How well a predictor answers rows of {image, question, answer}: figures, baselines and 95% intervals.

Questions about one image are correlated, so every interval comes from resampling images, not rows.
"""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.errors import InputError
from pmclip_deploy.predictor import Decision, Predictor, decision_from_heads
from pmclip_deploy.spec import EVALUATION_SCHEMA

RESAMPLES = 1000
BINS = 15  # of the calibration error
CURVE = 20  # points of the coverage-accuracy curve
REASONS = {
    "question": "the kind of question is not sure",
    "radiograph": "the picture does not look like a radiology image",
    "confidence": "the confidence is under the bundle's threshold",
}

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    image: str
    question: str
    answer: str
    category: str | None = None


def evaluation(
    predictor: Predictor,
    rows: Sequence[Row],
    images: Path,
    train: Sequence[Row] | None = None,
    seed: int = 0,
    progress: Progress = lambda items, what: items,
) -> dict[str, Any]:
    """The document of `evaluate --json`. Each image and each question is encoded once, alone, just as `infer` does."""
    names = list(dict.fromkeys(row.image for row in rows))
    questions = list(dict.fromkeys(row.question for row in rows))
    pictures = np.stack([predictor.embed_image(images / name) for name in progress(names, "Encoding images")])  # (images, D)
    texts = np.concatenate([predictor.embed_texts([question]) for question in progress(questions, "Encoding questions")])
    place, asked = {name: i for i, name in enumerate(names)}, {question: i for i, question in enumerate(questions)}
    picture = np.array([place[row.image] for row in rows])
    text = texts[[asked[row.question] for row in rows]]  # (rows, D)

    def decided(image_of_row: Array) -> list[Decision]:
        heads = predictor.heads(pictures[image_of_row], text)
        return [decision_from_heads(predictor.manifest, heads, i) for i in range(len(rows))]

    decisions = decided(picture)
    right = _right(rows, decisions)
    answered = np.array([d.reason is None for d in decisions])
    offered = np.array([bool(d.candidates) for d in decisions])
    top = np.array([d.candidates[0].probability if d.candidates else 0.0 for d in decisions])
    sample = Bootstrap(picture, seed)
    kinds = [predictor.manifest.kinds[d.kind].name for d in decisions]
    other = derangement(len(names), seed) if len(names) > 1 else None
    majority = _majority(predictor, rows, decisions)
    by_question = None if train is None else _by_question(predictor, train, rows, decisions)
    return {
        "schema": EVALUATION_SCHEMA,
        "n": len(rows),
        "images": len(names),
        **sample.accuracy(right),
        "by": {
            "category": _groups(sample, [row.category or "none" for row in rows], right, answered),
            "kind": _groups(sample, kinds, right, answered),
        },
        "coverage": float(answered.mean()),
        "coverage_ci95": sample.interval(answered, np.ones(len(rows))),
        "selective_accuracy": float(right[answered].mean()) if answered.any() else None,
        "selective_accuracy_ci95": sample.interval(right & answered, answered),
        "abstentions": dict(Counter(_cause(predictor, d) for d in decisions if d.reason is not None).most_common()),
        "ece": calibration_error(top[offered], right[offered]),
        "curve": coverage_curve(top, right, offered),
        "binary": _binary(predictor, sample, rows, decisions),
        "baselines": {
            "majority": sample.accuracy(majority) if majority is not None else None,
            "question_only": sample.accuracy(by_question) if by_question is not None else None,
            "shuffled_image": sample.accuracy(_right(rows, decided(other[picture]))) if other is not None else None,
        },
        "model": asdict(predictor.model),
        "seed": seed,
    }


def rows_from_jsonl(path: Path, images: Path | None = None) -> list[Row]:
    """One row per line; with ``images``, every picture named must be there."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold U+2028
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no UTF-8 text; pass a file of JSON lines") from error
    rows = [_row(line, f"{path}, line {number}", images) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: holds no rows; pass a file of JSON lines {{image, question, answer}}")
    return rows


def normalised(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


class Bootstrap:
    """95% intervals by resampling whole clusters: ``cluster`` is each row's image."""

    def __init__(self, cluster: Array, seed: int) -> None:
        self._cluster = cluster
        self._seed = seed

    def accuracy(self, right: Array, rows: Array | None = None) -> dict[str, Any]:
        """Of (N,) bool, over the rows that the mask ``rows``, (N,) bool, takes: all of them by default."""
        rows = np.ones(len(right), bool) if rows is None else rows
        return {"accuracy": float(right[rows].mean()), "ci95": self.interval(right & rows, rows)}

    def interval(self, part: Array, whole: Array) -> list[float] | None:
        """[low, high] of sum(part) / sum(whole), both (N,) bool or float, ``part`` being zero wherever ``whole`` is."""
        rows = np.flatnonzero(whole)
        weights, cluster = self.weights(rows)
        if not len(rows):
            return None
        parts, wholes = (np.bincount(cluster, np.asarray(x, float)[rows], weights.shape[1]) for x in (part, whole))
        with np.errstate(invalid="ignore"):
            return _percentiles((weights @ parts) / (weights @ wholes))

    def weights(self, rows: Array) -> tuple[Array, Array]:
        """How often each cluster of ``rows`` is drawn, (RESAMPLES, clusters), and each row's cluster."""
        _, cluster = np.unique(self._cluster[rows], return_inverse=True)
        count = int(cluster.max()) + 1 if len(rows) else 1
        draws = np.random.default_rng(self._seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
        return draws.astype(np.float64), cluster

    def auroc(self, score: Array, positive: Array, rows: Array) -> dict[str, Any]:
        """Of the rows at the indices ``rows``; ``score`` and ``positive`` are for those alone."""
        weights, cluster = self.weights(rows)
        ones = np.ones((1, len(rows)))
        few = np.array_split(weights, RESAMPLES // 10)  # (10, clusters) each: all resamples of all rows at once would take gigabytes
        with np.errstate(invalid="ignore"):
            return {
                "auroc": float(_weighted_auroc(score, positive, ones)[0]),
                "ci95": _percentiles(np.concatenate([_weighted_auroc(score, positive, w[:, cluster]) for w in few])),
            }


def calibration_error(probability: Array, right: Array) -> float | None:
    """Expected calibration error in equal-width bins, of (N,) float and (N,) bool; None where N is 0."""
    if not len(probability):
        return None
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, probability - right, BINS)  # (sum of confidence - sum of right), per bin
    return float(np.abs(gaps).sum() / len(probability))


def coverage_curve(probability: Array, right: Array, offered: Array) -> list[list[float]]:
    """[coverage, accuracy] where only the most confident rows are answered, from few to all that have candidates.

    Of (N,) float, (N,) bool and (N,) bool: ``offered`` are the rows with candidates.
    """
    order = np.argsort(-probability[offered], kind="stable")
    hits = np.cumsum(right[offered][order])
    counts = sorted({int(np.ceil(len(order) * i / CURVE)) for i in range(1, CURVE + 1)} - {0})
    return [[count / len(right), float(hits[count - 1]) / count] for count in counts]


def derangement(count: int, seed: int) -> Array:
    """A permutation, (count,) int, that leaves nothing in its place: one random cycle."""
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)
    return other


def _row(line: str, where: str, images: Path | None) -> Row:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON; every line is one object {{image, question, answer}}") from error
    for key in ("image", "question", "answer"):
        if not isinstance(data, dict) or not isinstance(data.get(key), str) or not data[key].strip():
            raise InputError(f'{where}: "{key}" is missing, empty or no text; every line is one object {{image, question, answer}}')
    if images is not None and not (images / data["image"]).is_file():
        raise InputError(f"{where}: its image {images / data['image']} is missing; check --images")
    category = data.get("category")
    return Row(data["image"], data["question"], data["answer"], category if isinstance(category, str) else None)


def _right(rows: Sequence[Row], decisions: Sequence[Decision]) -> Array:
    best = [d.candidates[0].answer if d.candidates else None for d in decisions]
    return np.array([b is not None and normalised(b) == normalised(row.answer) for row, b in zip(rows, best, strict=True)])


def _groups(sample: Bootstrap, labels: Sequence[str], right: Array, answered: Array) -> dict[str, Any]:
    groups = {}
    for label in sorted(set(labels)):
        member = np.array([x == label for x in labels])
        groups[label] = {"n": int(member.sum()), **sample.accuracy(right, member), "coverage": float(answered[member].mean())}
    return groups


def _cause(predictor: Predictor, decision: Decision) -> str:
    return predictor.manifest.kinds[decision.kind].reason or "" if decision.rule == "kind" else REASONS[str(decision.rule)]


def _majority(predictor: Predictor, rows: Sequence[Row], decisions: Sequence[Decision]) -> Array | None:
    """Always the training set's most frequent answer of the question's kind; None where the bundle does not say it."""
    answers = [_kind_majority(predictor, d) for d in decisions]
    if not any(answers):
        return None
    return np.array([a is not None and normalised(a) == normalised(row.answer) for row, a in zip(rows, answers, strict=True)])


def _kind_majority(predictor: Predictor, decision: Decision) -> str | None:
    majority = predictor.manifest.kinds[decision.kind].majority
    return None if majority is None else predictor.manifest.answers[majority]


def _by_question(predictor: Predictor, train: Sequence[Row], rows: Sequence[Row], decisions: Sequence[Decision]) -> Array:
    """The most frequent training answer to the same words, else of the kind, else of the category."""
    same = _most_frequent((normalised(row.question), row.answer) for row in train)
    category = _most_frequent((row.category, row.answer) for row in train)
    answers = [
        same.get(normalised(row.question)) or _kind_majority(predictor, d) or category.get(row.category)
        for row, d in zip(rows, decisions, strict=True)
    ]
    return np.array([a is not None and normalised(a) == normalised(row.answer) for row, a in zip(rows, answers, strict=True)])


def _most_frequent(pairs: Iterable[tuple[Hashable, str]]) -> dict[Hashable, str]:
    counts: dict[Hashable, Counter[str]] = {}
    for key, answer in pairs:
        counts.setdefault(key, Counter())[normalised(answer)] += 1
    return {key: min(counter, key=lambda answer: (-counter[answer], answer)) for key, counter in counts.items()}


def _binary(predictor: Predictor, sample: Bootstrap, rows: Sequence[Row], decisions: Sequence[Decision]) -> dict[str, Any]:
    """Per kind whose answers are yes and no: how well the probability of yes ranks the rows that were taken for this kind."""
    figures = {}
    for index, kind in enumerate(predictor.manifest.kinds):
        if {normalised(predictor.manifest.answers[i]) for i in kind.answers} != {"yes", "no"}:
            continue
        places = [i for i, d in enumerate(decisions) if d.kind == index and normalised(rows[i].answer) in ("yes", "no")]
        positive = np.array([normalised(rows[i].answer) == "yes" for i in places], bool)
        score = np.array([c.probability for i in places for c in decisions[i].candidates if normalised(c.answer) == "yes"])
        if positive.any() and not positive.all():
            measured = sample.auroc(score, positive, np.array(places))
            figures[kind.name] = {"n": len(places), "positives": int(positive.sum()), **measured}
    return figures


def _weighted_auroc(score: Array, positive: Array, weights: Array) -> Array:
    """(R,) from (N,), (N,) and how often each row counts, (R, N). A tie counts half; NaN where a class is empty."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.nan) != 0)  # where each distinct score begins
    yes, no = (np.add.reduceat((weights * side)[:, order], starts, axis=1) for side in (positive, ~positive))  # (R, levels)
    below = np.cumsum(no, 1) - no
    return np.asarray((yes * (below + no / 2)).sum(1) / (yes.sum(1) * no.sum(1)))


def _percentiles(values: Array) -> list[float] | None:
    values = values[np.isfinite(values)]
    return [float(x) for x in np.percentile(values, [2.5, 97.5])] if len(values) else None
