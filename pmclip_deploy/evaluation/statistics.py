"""Intervals, calibration error, curves and baselines."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pmclip_deploy.evaluation.rows import Array, Row, pictures_of, types_of

RESAMPLES = 1000
BINS = 15  # of the calibration error
CURVE = 20  # points of the coverage-accuracy curve


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

    types = types_of(rows)
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
