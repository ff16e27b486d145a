"""Temperatures and thresholds of a bundle, fitted on validation answers, and the figures that stand in its card."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.evaluation.statistics import Bootstrap, calibration_error, coverage_curve
from pmclip_deploy.train import kinds as K
from pmclip_deploy.train.lite.vocabulary import Vocabulary

Array = NDArray[Any]

EVEN_ODDS = "the probability is for even odds of yes and no; where a finding is rare, so is a true yes"
KIND_THRESHOLD = 0.5  # the kind of a question must be likelier than all others together
TARGET = 0.75  # of the answers given to a kind of question, this share is right on validation images
COIN = 0.6  # of two answers, one that is less likely than this is not given
LEAST_ANSWERED = 10  # rows that the share is measured on
LEAST_MEASURED = 5  # positives on validation images
LEAST_AUROC = 0.6  # lower 95% bound under which a finding is not answered
RADIOGRAPH = 0.0  # the least logit of a radiology image: train/radiograph.py puts its threshold there
TEMPERATURES = np.geomspace(0.1, 12, 100)


@dataclass(frozen=True)
class Scored:
    """Validation questions with the head's raw outputs; derived closed questions have a category "finding: ..."."""

    image: Array  # (N,) place in radiograph
    category: Array  # (N,) str
    question: Array  # (N,) str
    truth: Array  # (N,) str
    organ: Array  # (N,) str; of derived questions
    answer: Array  # (N, A)
    kind: Array  # (N, K)
    radiograph: Array  # (I,)


@dataclass(frozen=True)
class Limits:
    temperature: dict[int, float]
    threshold: dict[int, float]


def calibrated(scored: Scored, vocabulary: Vocabulary, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(kinds, abstention, metrics) as the checkpoint states them.

    What is shipped is fitted on all validation images. What is reported under "crossfit" is fitted on one half of the
    images and measured on the other, both ways.
    """
    kind = scored.kind.argmax(1)
    sample, everything = Bootstrap(scored.image, seed), np.ones(len(kind), bool)
    limits, reasons = _fitted(scored, vocabulary, everything, kind), _reasons(scored, vocabulary, sample, everything)
    half = np.random.default_rng(seed).permutation(scored.image.max() + 1) % 2
    crossed = _crossfitted(scored, vocabulary, sample, kind, half[scored.image])
    metrics = {"crossfit": _figures(scored, sample, crossed), "findings": _figures_of_findings(scored, vocabulary, sample, kind, crossed)}
    _, top, _ = _applied(scored, vocabulary, limits, kind, reasons)
    asked = _asked(scored)
    curve = coverage_curve(top[asked], crossed.right[asked], crossed.offered[asked])
    abstention = {
        "kind_threshold": KIND_THRESHOLD,
        "radiograph_threshold": RADIOGRAPH,
        "curve": [[round(c, 4), round(a, 4)] for c, a in curve],
    }
    return _kinds(vocabulary, limits, reasons), abstention, {name: _rounded(figures) for name, figures in metrics.items()}


@dataclass(frozen=True)
class Crossfitted:
    """Each row by what was fitted on the half of the images that it is not of; each (N,)."""

    right: Array  # bool
    top: Array  # the confidence
    answered: Array  # bool
    offered: Array  # bool; whether its kind is answered at all


def _asked(scored: Scored) -> Array:
    """(N,) bool: the dataset's own questions."""
    return np.array([not c.startswith("finding: ") for c in scored.category])


def _crossfitted(scored: Scored, vocabulary: Vocabulary, sample: Bootstrap, kind: Array, side: Array) -> Crossfitted:
    right, top, answered, offered = (np.zeros(len(side), t) for t in (bool, float, bool, bool))
    for one in (0, 1):
        fitted, withheld = _fitted(scored, vocabulary, side != one, kind), _reasons(scored, vocabulary, sample, side != one)
        for out, values in zip((right, top, answered), _applied(scored, vocabulary, fitted, kind, withheld), strict=True):
            out[side == one] = values[side == one]
        offered[side == one] = ~np.isin(kind, list(withheld))[side == one]
    return Crossfitted(right, top, answered, offered)


def _figures(scored: Scored, sample: Bootstrap, crossed: Crossfitted) -> dict[str, Any]:
    """Of the dataset's own questions."""
    right, answered, asked = crossed.right, crossed.answered, _asked(scored)
    counted = asked & crossed.offered
    return {
        **sample.accuracy(right, asked),
        "by_category": {str(c): sample.accuracy(right, asked & (scored.category == c)) for c in np.unique(scored.category[asked])},
        "ece": calibration_error(crossed.top[counted], right[counted]),
        "coverage": float(answered[asked].mean()),
        "coverage_ci95": sample.interval(answered & asked, asked),
        "selective_accuracy": float(right[asked & answered].mean()) if (asked & answered).any() else None,
        "selective_accuracy_ci95": sample.interval(right & asked & answered, asked & answered),
    }


def _figures_of_findings(
    scored: Scored, vocabulary: Vocabulary, sample: Bootstrap, kind: Array, crossed: Crossfitted
) -> dict[str, dict[str, Any] | None]:
    """Of each finding's derived questions; None where too few are positive."""
    findings: dict[str, dict[str, Any] | None] = {}
    said_yes = crossed.right == (scored.truth == "yes")
    for name in (k for k in vocabulary.kinds if k.startswith("finding: ")):
        own = crossed.answered & (scored.category == name) & (kind == vocabulary.kind_id[name])
        measured = _auroc(scored, vocabulary, sample, vocabulary.kind_id[name], np.ones(len(kind), bool))
        if measured:
            measured |= {
                "answered": int(own.sum()),
                "right_of_yes": f"{(own & said_yes & crossed.right).sum()}/{(own & said_yes).sum()}",
                "right_of_no": f"{(own & ~said_yes & crossed.right).sum()}/{(own & ~said_yes).sum()}",
            }
        findings[name] = measured
    return findings


def _kinds(vocabulary: Vocabulary, limits: Limits, reasons: dict[int, str]) -> list[dict[str, Any]]:
    """Each kind of question with its answers and limits, or the reason why it is not answered."""
    kinds = []
    for i, name in enumerate(vocabulary.kinds):
        answers = [] if i in reasons else np.flatnonzero(vocabulary.allowed[i].numpy()).tolist()
        row: dict[str, Any] = {"name": name, "answers": answers}
        row |= {"temperature": round(limits.temperature.get(i, 1.0), 4), "threshold": round(limits.threshold.get(i, 0.0), 4)}
        row |= {"reason": reasons.get(i)}
        if i not in reasons:
            row["majority"] = vocabulary.column[name, vocabulary.majority[name]]
            row["note"] = EVEN_ODDS if name.startswith("finding: ") else None
        kinds.append(row)
    return kinds


def _reasons(scored: Scored, vocabulary: Vocabulary, sample: Bootstrap, use: Array) -> dict[int, str]:
    """The kinds that are not answered, and why; a finding is among them unless it is told apart on the images ``use``."""
    reasons = {vocabulary.kind_id[k]: reason for k, reason in K.REASONS.items()}
    for name in (k for k in vocabulary.kinds if k.startswith("finding: ")):
        measured = _auroc(scored, vocabulary, sample, vocabulary.kind_id[name], use)
        if measured is None or measured["ci95"][0] < LEAST_AUROC:
            reasons[vocabulary.kind_id[name]] = K.LEARNED_BADLY
    return reasons


def _best(scored: Scored, vocabulary: Vocabulary, rows: Array, kind: int, temperature: float) -> tuple[Array, Array]:
    """(whether the best answer is right (R,) bool, its probability (R,))."""
    ids = np.flatnonzero(vocabulary.allowed[kind].numpy())
    logits = scored.answer[np.ix_(rows, ids)].astype(np.float64) / temperature
    weights = np.exp(logits - logits.max(1, keepdims=True))
    best = np.array(vocabulary.answers)[ids[weights.argmax(1)]]
    return best == scored.truth[rows], weights.max(1) / weights.sum(1)


def _fitted(scored: Scored, vocabulary: Vocabulary, use: Array, kind: Array) -> Limits:
    """Temperature: the least log loss of "the best answer is right". Threshold: the least one that reaches TARGET."""
    temperature, threshold = {}, {}
    for k, name in enumerate(vocabulary.kinds):
        rows = np.flatnonzero(use & (kind == k) & _own(scored, name))
        if not vocabulary.allowed[k].any() or not len(rows):
            continue
        weight = _even_odds(scored.truth[rows] == "yes") if name.startswith("finding: ") else np.ones(len(rows))
        losses = []
        for t in TEMPERATURES:
            right, top = _best(scored, vocabulary, rows, k, t)
            top = top.clip(1e-6, 1 - 1e-6)
            losses.append(-(weight * np.where(right, np.log(top), np.log1p(-top))).sum())
        temperature[k] = float(TEMPERATURES[int(np.argmin(losses))])
        right, top = _best(scored, vocabulary, rows, k, temperature[k])
        order = np.argsort(-top, kind="stable")
        share = np.cumsum((weight * right)[order]) / np.cumsum(weight[order])
        enough = np.flatnonzero((share >= TARGET) & (np.arange(1, len(rows) + 1) >= min(LEAST_ANSWERED, len(rows))))
        last = int(enough[-1]) if len(enough) else -1
        threshold[k] = 0.0 if last == len(rows) - 1 else (float(top[order][last]) if last >= 0 else 1.0)
        if vocabulary.allowed[k].sum() == 2:
            threshold[k] = max(threshold[k], COIN)
    return Limits(temperature, threshold)


def _own(scored: Scored, name: str) -> Array:
    """Derived questions fit the findings' kinds, the dataset's own questions all others."""
    derived = np.array([c.startswith("finding: ") for c in scored.category])
    return scored.category == name if name.startswith("finding: ") else ~derived


def _even_odds(yes: Array) -> Array:
    return np.asarray(np.where(yes, 0.5 / max(1, yes.sum()), 0.5 / max(1, (~yes).sum())) * len(yes))


def _applied(scored: Scored, vocabulary: Vocabulary, limits: Limits, kind: Array, reasons: dict[int, str]) -> tuple[Array, Array, Array]:
    """(right (N,), confidence (N,), answered (N,)); the best candidate counts whether or not it is given."""
    right, top, answered = (np.zeros(len(kind), t) for t in (bool, float, bool))
    sure = _softmax_max(scored.kind) >= KIND_THRESHOLD
    radiograph = scored.radiograph[scored.image] >= RADIOGRAPH
    for k in np.unique(kind):
        if k in reasons:
            continue
        rows = np.flatnonzero(kind == k)
        right[rows], top[rows] = _best(scored, vocabulary, rows, k, limits.temperature.get(k, 1.0))
        answered[rows] = sure[rows] & radiograph[rows] & (top[rows] >= limits.threshold.get(k, 0.0))
    return right, top, answered


def _softmax_max(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(shifted.max(1) / shifted.sum(1))


def _auroc(scored: Scored, vocabulary: Vocabulary, sample: Bootstrap, kind: int, use: Array) -> dict[str, Any] | None:
    """How well "yes" ranks the derived questions of a finding, over all its organs and, stricter, in each organ alone."""
    name = vocabulary.kinds[kind]
    rows = np.flatnonzero((scored.category == name) & use)
    positive = scored.truth[rows] == "yes"
    if positive.sum() < LEAST_MEASURED or positive.all():
        return None
    score = scored.answer[rows, vocabulary.column[name, "yes"]] - scored.answer[rows, vocabulary.column[name, "no"]]
    i, j = _pairs_in_organ(positive, scored.organ[rows])
    better = (score[i] > score[j]) + 0.5 * (score[i] == score[j])
    weights, cluster = sample.weights(rows)
    pair_weights = weights[:, cluster[i]] * weights[:, cluster[j]]
    with np.errstate(invalid="ignore"):
        draws = (pair_weights @ better) / pair_weights.sum(1)
    return {
        "n": len(rows),
        "positives": int(positive.sum()),
        **sample.auroc(score, positive, rows),
        "auroc_within_organ": float(better.mean()) if len(i) else None,
        "within_organ_ci95": [float(x) for x in np.nanpercentile(draws, [2.5, 97.5])] if len(i) else None,
    }


def _pairs_in_organ(positive: Array, organ: Array) -> tuple[Array, Array]:
    """Indices (P,) of a positive and (P,) of a negative row, all pairs that share an organ."""
    i, j = np.nonzero(positive[:, None] & ~positive[None, :] & (organ[:, None] == organ[None, :]))
    return i, j


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 4) + 0.0 if isinstance(value, float) else value  # 0.0 makes 0 of -0.0
