"""How well a model answers rows of {image, question, answer}: figures, baselines and 95% intervals.

Questions about one image are correlated, so every interval comes from resampling images, not rows.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.counting import VQA_MED_2019, Count, Judged
from pmclip_deploy.errors import InputError
from pmclip_deploy.predictor import Decision, Predictor, decision_from_heads
from pmclip_deploy.spec import EVALUATION_SCHEMA

RESAMPLES = 1000
BINS = 15  # of the calibration error
CURVE = 20  # points of the coverage-accuracy curve
REASONS = {
    "question": "the kind of question is not sure, or no word of it is known",
    "radiograph": "the picture does not look like a radiology image",
    "confidence": "the confidence is under the bundle's threshold",
}

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
Array = NDArray[Any]


def normalised(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


@dataclass(frozen=True)
class Row:
    image: str
    question: str
    answer: str
    category: str | None = None
    type: str | None = None  # of the answer: "open" or "closed"
    phrase: str | None = None  # of the question, as VQA-RAD says it: "freeform", "para" or "frame"


@dataclass(frozen=True)
class Decided:
    """What a model says to N rows, whoever computed it."""

    answers: Sequence[str | None]  # the best candidate
    probability: Array  # (N,) f64, the best candidate's; 0 where there is none
    causes: Sequence[str | None]  # why it abstained; None where it answered
    kinds: Sequence[str] | None = None  # what the model takes the questions for
    yes: Array | None = None  # (N,) f64, the probability of yes, NaN where the kind's answers are not yes and no
    majority: Sequence[str | None] | None = None  # the training set's most frequent answer to such a question, where the model says it


Asked = Callable[[Array], Decided]  # (N,) int, which of ``pictures_of(rows)`` each row is asked of
Same = Callable[[str], str]  # two answers are the same where this makes them equal


def evaluation(
    predictor: Predictor,
    rows: Sequence[Row],
    images: Path,
    train: Sequence[Row] | None = None,
    seed: int = 0,
    progress: Progress = lambda items, what: items,
) -> dict[str, Any]:
    """The document of `evaluate --json` for a bundle."""
    asked = asked_of_bundle(predictor, rows, images, progress)
    return figures(rows, asked, about_bundle(predictor), train, seed, counts=(VQA_MED_2019,))[0]


def about_bundle(predictor: Predictor) -> dict[str, Any]:
    """What stands as "model" in the document. A head that does not look through the image tower has none that was trained."""
    head, provenance = predictor.manifest.head, predictor.manifest.provenance
    return {**asdict(predictor.model), "tower_trained_on": tower_trained_on(provenance) if head is None or head.clip else []}


def tower_trained_on(provenance: Mapping[str, Any]) -> list[str]:
    """The data sets that the image tower learned from: all of them, or the training split of those that have a validation split.

    `train vqa --head lite` trains the tower too; MEVF's and QCR's heads leave it as it is.
    """
    notes = [provenance.get(stage) for stage in ("clip", "vqa")]
    named = [note["data"] for note in notes if isinstance(note, dict) and isinstance(note.get("data"), list)]
    return sorted({str(name) for names in named for name in names})


def asked_of_bundle(predictor: Predictor, rows: Sequence[Row], images: Path, progress: Progress = lambda items, what: items) -> Asked:
    """Each image and each question is encoded once, alone, just as `infer` does. Raises UsageError where the bundle has no head."""
    questions = list(dict.fromkeys(row.question for row in rows))
    pictures = np.stack([predictor.seen(images / name) for name in progress(pictures_of(rows)[0], "Encoding images")])
    encoded = np.concatenate([predictor.asked([question]) for question in progress(questions, "Encoding questions")])
    place = {question: i for i, question in enumerate(questions)}
    of_row = encoded[[place[row.question] for row in rows]]  # (rows, D) or (rows, T)
    manifest = predictor.manifest
    knows_majority = any(kind.majority is not None for kind in manifest.kinds)
    answers_yes_or_no = [{normalised(manifest.answers[i]) for i in kind.answers} == {"yes", "no"} for kind in manifest.kinds]

    def asked(picture: Array) -> Decided:
        heads = predictor.heads(pictures[picture], of_row)
        decisions = [decision_from_heads(manifest, heads, i) for i in range(len(rows))]
        majority = [manifest.kinds[d.kind].majority for d in decisions]
        return Decided(
            answers=[d.candidates[0].answer if d.candidates else None for d in decisions],
            probability=np.array([d.candidates[0].probability if d.candidates else 0.0 for d in decisions]),
            causes=[_cause(predictor, d) if d.reason is not None else None for d in decisions],
            kinds=[manifest.kinds[d.kind].name for d in decisions] if len(manifest.kinds) > 1 else None,
            yes=np.array([_probability_of_yes(d) if answers_yes_or_no[d.kind] else np.nan for d in decisions]),
            majority=[None if i is None else manifest.answers[i] for i in majority] if knows_majority else None,
        )

    return asked


def figures(
    rows: Sequence[Row],
    asked: Asked,
    model: dict[str, Any],
    train: Sequence[Row] | None = None,
    seed: int = 0,
    same: Same = normalised,
    counts: Sequence[Count] = (),
) -> tuple[dict[str, Any], Array]:
    """(the document of `evaluate --json`, which rows were right: (N,) bool). ``model`` goes into the document as it is.

    ``counts`` are those of others, beside our own, which is exact match of what ``same`` makes of the answers.
    """
    names, picture = pictures_of(rows)
    truth = [same(row.answer) for row in rows]

    def right_of(answers: Sequence[str | None]) -> Array:
        return np.array([a is not None and same(a) == t for a, t in zip(answers, truth, strict=True)])

    decided = asked(picture)
    right = right_of(decided.answers)
    answered = np.array([cause is None for cause in decided.causes])
    offered = np.array([answer is not None for answer in decided.answers])
    sample = Bootstrap(picture, seed)
    majority = _majority(decided, train, rows, same)
    other = derangement(len(names), seed) if len(names) > 1 else None
    said = {
        "majority": majority if any(majority) else None,
        "question_only": None if train is None else _by_question(decided, train, rows, same),
        "shuffled_image": None if other is None else asked(other[picture]).answers,
    }
    baselines = {name: None if answers is None else right_of(answers) for name, answers in said.items()}
    labels = {
        "type": _types(rows),
        "category": [row.category or "none" for row in rows],
        "kind": decided.kinds or [],
    }
    by = {what: _groups(sample, of_row, right, answered, baselines if what == "type" else None) for what, of_row in labels.items()}
    document = {
        "schema": EVALUATION_SCHEMA,
        "n": len(rows),
        "images": len(names),
        **sample.accuracy(right),
        "by": by,
        "coverage": float(answered.mean()),
        "coverage_ci95": sample.interval(answered, np.ones(len(rows))),
        "selective_accuracy": float(right[answered].mean()) if answered.any() else None,
        "selective_accuracy_ci95": sample.interval(right & answered, answered),
        "abstentions": dict(Counter(cause for cause in decided.causes if cause is not None).most_common()),
        "ece": calibration_error(decided.probability[offered], right[offered]),
        "curve": coverage_curve(decided.probability, right, offered),
        "binary": _binary(decided, sample, rows),
        "baselines": _beside(sample, right, baselines, np.ones(len(rows), bool)),
        "counts": {count.name: _counted(sample, count, rows, decided, said, train) for count in counts},
        "model": model,
        "seed": seed,
    }
    return document, right


def difference(rows: Sequence[Row], right: Array, other: Array, model: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """How much more often ``right`` is right than ``other``, both (N,) bool, or means over several models, on the same rows.

    ``model`` says who the other is. McNemar's test counts the rows that only one of the two got right. It takes rows for independent,
    which those of one image are not: where it and the interval disagree, the interval is right.
    """
    gap, sample = right.astype(float) - other, Bootstrap(pictures_of(rows)[1], seed)

    def over(member: Array) -> dict[str, Any]:
        return {
            "accuracy": float(other[member].mean()),
            "difference": float(gap[member].mean()),
            "ci95": sample.interval(gap * member, member),
            "mcnemar": mcnemar(int((gap[member] > 0).sum()), int((gap[member] < 0).sum())) if right.dtype == bool else None,
        }

    types = _types(rows)
    by = {"type": {name: over(np.array([x == name for x in types])) for name in sorted(set(types))}}
    return {"against": model, **over(np.ones(len(rows), bool)), "by": by}


def mcnemar(only_this: int, only_other: int) -> dict[str, Any]:
    """The exact two-sided binomial test (McNemar 1947) of rows that one of two models got right."""
    n, fewer = only_this + only_other, min(only_this, only_other)
    return {"only_this": only_this, "only_other": only_other, "p": min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)}


def seeds(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (N - 1 below) of what ``figures`` says of several trainings of one model on the same rows."""

    def spread(accuracies: list[float]) -> dict[str, float]:
        return {"mean": float(np.mean(accuracies)), "std": float(np.std(accuracies, ddof=1))}

    types = [document["by"]["type"] for document in documents]
    return {
        "n": len(documents),
        **spread([document["accuracy"] for document in documents]),
        "by": {"type": {name: spread([by[name]["accuracy"] for by in types]) for name in types[0]}},
        "each": [{"model": document["model"], "accuracy": document["accuracy"]} for document in documents],
    }


def pictures_of(rows: Sequence[Row]) -> tuple[list[str], Array]:
    """(the images in their order, (N,) int: which of them each row is about)"""
    names = list(dict.fromkeys(row.image for row in rows))
    place = {name: i for i, name in enumerate(names)}
    return names, np.array([place[row.image] for row in rows])


def rows_from_jsonl(path: Path, images: Path | None = None) -> list[Row]:
    """One row per line; with ``images``, every picture named must be there."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold U+2028
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no UTF-8 text; pass a file of JSON lines") from error
    if path.suffix == ".json" and lines[0].lstrip().startswith("["):
        raise InputError(f"{path}: one JSON list, not JSON lines; of a dataset pass the folder, and --split: --data {path.parent}")
    rows = [_row(line, f"{path}, line {number}", images) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: holds no rows; pass a file of JSON lines {{image, question, answer}}")
    return rows


def sha256_of_rows(rows: Sequence[Row]) -> str:
    return hashlib.sha256("\n".join(f"{r.image}\t{r.question}\t{r.answer}" for r in rows).encode()).hexdigest()


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
    category, answer_type = data.get("category"), str(data.get("answer_type", "")).strip().lower()
    return Row(
        data["image"],
        data["question"],
        data["answer"],
        category if isinstance(category, str) else None,
        answer_type if answer_type in ("open", "closed") else None,
    )


def _types(rows: Sequence[Row]) -> list[str]:
    """Each row's group in the table by type; none where no row says its type."""
    return [row.type or "none" for row in rows] if any(row.type for row in rows) else []


def _groups(
    sample: Bootstrap, labels: Sequence[str], right: Array, answered: Array, baselines: dict[str, Array | None] | None
) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for label in sorted(set(labels)):
        member = np.array([x == label for x in labels])
        groups[label] = {"n": int(member.sum()), **sample.accuracy(right, member), "coverage": float(answered[member].mean())}
        if baselines is not None:
            groups[label]["baselines"] = _beside(sample, right, baselines, member)
    return groups


def _beside(sample: Bootstrap, right: Array, baselines: dict[str, Array | None], member: Array) -> dict[str, Any]:
    """Each baseline over the rows ``member``, and what the model gains over it on the same rows, with the interval of that."""

    def beside(of: Array) -> dict[str, Any]:
        gain = (right.astype(float) - of) * member
        return {**sample.accuracy(of, member), "gain": float(gain[member].mean()), "gain_ci95": sample.interval(gain, member)}

    return {name: None if of is None else beside(of) for name, of in baselines.items()}


def _counted(
    sample: Bootstrap,
    count: Count,
    rows: Sequence[Row],
    decided: Decided,
    said: Mapping[str, Sequence[str | None] | None],
    train: Sequence[Row] | None,
) -> dict[str, Any]:
    """What another's count makes of the model's answers and of the baselines', ``said``."""
    judged = count.judge(rows, decided.answers, decided.kinds, train)
    every = np.array(judged.taken or [True] * len(rows))
    groups = {name: every & np.array([x == name for x in judged.groups]) for name in sorted(set(judged.groups))}
    taken_for = {"shuffled_image": decided.kinds}  # it is the model too
    of_baselines = {
        name: None if answers is None else count.judge(rows, answers, taken_for.get(name), train) for name, answers in said.items()
    }
    return {
        "definition": count.definition,
        "n": int(every.sum()),
        **_scores(sample, judged, every),
        "by": {count.group: {name: {"n": int(of.sum()), **_scores(sample, judged, of)} for name, of in groups.items() if of.any()}},
        "baselines": {name: None if of is None else _scores(sample, of, every) for name, of in of_baselines.items()},
    }


def _scores(sample: Bootstrap, judged: Judged, member: Array) -> dict[str, Any]:
    """Over the rows ``member``, of which there may be none."""
    if not member.any():
        return {"accuracy": None, "ci95": None}
    bleu = np.array(judged.bleu) * member if judged.bleu else None
    of_bleu = {} if bleu is None else {"bleu": float(bleu[member].mean()), "bleu_ci95": sample.interval(bleu, member)}
    return {**sample.accuracy(np.array(judged.accuracy), member), **of_bleu}


def _cause(predictor: Predictor, decision: Decision) -> str:
    return predictor.manifest.kinds[decision.kind].reason or "" if decision.rule == "kind" else REASONS[str(decision.rule)]


def _probability_of_yes(decision: Decision) -> float:
    return next(c.probability for c in decision.candidates if normalised(c.answer) == "yes")


def _majority(decided: Decided, train: Sequence[Row] | None, rows: Sequence[Row], same: Same) -> Sequence[str | None]:
    """Always the training set's most frequent answer: of the question's kind where the model says it, else of the answer's type."""
    if decided.majority is not None:
        return decided.majority
    by_type = _most_frequent(((row.type, row.answer) for row in train or ()), same)
    return [by_type.get(row.type) for row in rows]


def _by_question(decided: Decided, train: Sequence[Row], rows: Sequence[Row], same: Same) -> list[str | None]:
    """The most frequent training answer to the same words, else of the kind, else of the category and type, else of the type."""
    words = _most_frequent(((normalised(row.question), row.answer) for row in train), same)
    category = _most_frequent((((row.category, row.type), row.answer) for row in train), same)
    answer_of_type = _most_frequent(((row.type, row.answer) for row in train), same)
    of_kind = decided.majority or [None] * len(rows)
    return [
        words.get(normalised(row.question)) or kind or category.get((row.category, row.type)) or answer_of_type.get(row.type)
        for row, kind in zip(rows, of_kind, strict=True)
    ]


def _most_frequent(pairs: Iterable[tuple[Hashable, str]], same: Same) -> dict[Hashable, str]:
    """In the words in which it is first said, so that a stricter count than ``same`` can judge it too."""
    counts: dict[Hashable, Counter[str]] = {}
    words: dict[str, str] = {}
    for key, answer in pairs:
        said = same(answer)
        counts.setdefault(key, Counter())[said] += 1
        words.setdefault(said, answer)
    return {key: words[min(counter, key=lambda said: (-counter[said], said))] for key, counter in counts.items()}


def _binary(decided: Decided, sample: Bootstrap, rows: Sequence[Row]) -> dict[str, Any]:
    """Per kind whose answers are yes and no: how well the probability of yes ranks the rows that were taken for this kind."""
    measured: dict[str, Any] = {}
    if decided.kinds is None or decided.yes is None:
        return measured
    truth = np.array([normalised(row.answer) for row in rows])
    closed = np.isfinite(decided.yes) & np.isin(truth, ["yes", "no"])
    for name in dict.fromkeys(kind for kind, taken in zip(decided.kinds, closed, strict=True) if taken):
        places = np.flatnonzero(closed & np.array([kind == name for kind in decided.kinds]))
        positive = truth[places] == "yes"
        if positive.any() and not positive.all():
            about = {"n": len(places), "positives": int(positive.sum())}
            measured[name] = {**about, **sample.auroc(decided.yes[places], positive, places)}
    return measured


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
