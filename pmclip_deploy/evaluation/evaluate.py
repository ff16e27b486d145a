"""How well a model answers rows of {image, question, answer}: figures, baselines and 95% intervals.

Questions about one image are correlated, so every interval comes from resampling images, not rows.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy.beside import chunks, made
from pmclip_deploy.decision.heads import Decision, decision_from_heads
from pmclip_deploy.evaluation.counting import VQA_MED_2019, Count, Judged
from pmclip_deploy.evaluation.rows import Array, Row, normalised, pictures_of, types_of
from pmclip_deploy.evaluation.statistics import Bootstrap, calibration_error, coverage_curve, derangement
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.spec import EVALUATION_SCHEMA

AT_ONCE = 256  # questions that are encoded together
REASONS = {
    "question": "the kind of question is not sure, or no word of it is known",
    "radiograph": "the picture does not look like a radiology image",
    "confidence": "the confidence is under the bundle's threshold",
}

Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Decisions:
    """What a model says to N rows, whoever computed it."""

    answers: Sequence[str | None]  # the best candidate
    probability: Array  # (N,) f64, the best candidate's; 0 where there is none
    causes: Sequence[str | None]  # why it abstained; None where it answered
    kinds: Sequence[str] | None = None  # what the model takes the questions for
    yes: Array | None = None  # (N,) f64, the probability of yes, NaN where the kind's answers are not yes and no
    majority: Sequence[str | None] | None = None  # the training set's most frequent answer to such a question, where the model says it


Answerer = Callable[[Array], Decisions]  # (N,) int, which of ``pictures_of(rows)`` each row is asked of
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
    asked = bundle_answerer(predictor, rows, images, progress)
    return figures(rows, asked, about_bundle(predictor), train, seed, counts=(VQA_MED_2019,))[0]


def about_bundle(predictor: Predictor) -> dict[str, Any]:
    """What stands as "model" in the document. A head that does not look through the image tower has none that was trained."""
    head, provenance = predictor.manifest.head, predictor.manifest.provenance
    return {**asdict(predictor.model), "tower_trained_on": tower_trained_on(provenance) if head is None or head.clip else []}


def tower_trained_on(provenance: Mapping[str, Any]) -> list[str]:
    """The data sets that the image tower learned from: all of them, or the training split of those that have a validation split.

    `train vqa` trains the tower too with `--head lite`, and with `--fine-tune`; else MEVF's and QCR's heads leave it as it is.
    """
    head = provenance.get("head")
    notes = [provenance.get(stage) for stage in ("clip", "vqa")]
    notes += [head] if isinstance(head, dict) and head.get("fine_tune") else []
    named = [note["data"] for note in notes if isinstance(note, dict) and isinstance(note.get("data"), list)]
    return sorted({str(name) for names in named for name in names})


def bundle_answerer(predictor: Predictor, rows: Sequence[Row], images: Path, progress: Progress = lambda items, what: items) -> Answerer:
    """Each image and each question is encoded once, as `infer` does: bit for bit, and within the gates where `tune` chose batches.

    Raises UsageError where the bundle has no head.
    """
    questions = list(dict.fromkeys(row.question for row in rows))
    names = pictures_of(rows)[0]
    seen = predictor.features_of_images(images / name for name in names)
    pictures = np.stack([made(row) for _, row in zip(progress(names, "Encoding images"), seen, strict=True)])
    asked_of = chain.from_iterable(map(predictor.question_features, chunks(questions, AT_ONCE)))
    encoded = np.stack([row for _, row in zip(progress(questions, "Encoding questions"), asked_of, strict=True)])
    place = {question: i for i, question in enumerate(questions)}
    of_row = encoded[[place[row.question] for row in rows]]  # (rows, D) or (rows, T)
    manifest = predictor.manifest
    knows_majority = any(kind.majority is not None for kind in manifest.kinds)
    answers_yes_or_no = [{normalised(manifest.answers[i]) for i in kind.answers} == {"yes", "no"} for kind in manifest.kinds]

    def asked(picture: Array) -> Decisions:
        heads = predictor.head_logits(pictures[picture], of_row)
        decisions = [decision_from_heads(manifest, heads, i) for i in range(len(rows))]
        majority = [manifest.kinds[d.kind].majority for d in decisions]
        return Decisions(
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
    asked: Answerer,
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
        "type": types_of(rows),
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
    decided: Decisions,
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


def _majority(decided: Decisions, train: Sequence[Row] | None, rows: Sequence[Row], same: Same) -> Sequence[str | None]:
    """Always the training set's most frequent answer: of the question's kind where the model says it, else of the answer's type."""
    if decided.majority is not None:
        return decided.majority
    by_type = _most_frequent(((row.type, row.answer) for row in train or ()), same)
    return [by_type.get(row.type) for row in rows]


def _by_question(decided: Decisions, train: Sequence[Row], rows: Sequence[Row], same: Same) -> list[str | None]:
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


def _binary(decided: Decisions, sample: Bootstrap, rows: Sequence[Row]) -> dict[str, Any]:
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
