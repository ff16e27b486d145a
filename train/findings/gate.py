"""What a finding's answers must be worth to be given, and how that is measured on scores that trained nothing. No torch.

For all who train a finding: the network of `train findings`, and a hospital's own with `train finding`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.types import Stratum
from pmclip_deploy.console import counted

SPECIFICITY = 0.90  # at which a threshold is chosen
LEAST_AUROC = 0.70  # lower end of the interval of a stratum that is answered
SPARE = 4.0  # standard errors: from fold to fold logits shift by more than one

Array = NDArray[Any]


def stratified_folds(groups: Sequence[str], positive: Sequence[bool], count: int) -> dict[str, int]:
    """Each group's fold: the largest go first, each to where the fuller of two shares, of positives and of rows, stays least."""
    rows: dict[str, NDArray[np.float64]] = {}
    for group, yes in zip(groups, positive, strict=True):
        rows[group] = rows.get(group, np.zeros(2)) + np.array([yes, 1])
    total = np.maximum(np.sum(list(rows.values()), axis=0), 1)
    load, folds = np.zeros((count, 2)), dict[str, int]()
    for group, add in sorted(rows.items(), key=lambda row: (-row[1][0], -row[1][1], row[0])):
        folds[group] = fold = int(np.argmin(((load + add) / total).max(axis=1)))
        load[fold] += add
    return folds


def both_beside_each_fold(positive: Array, fold: Array) -> bool:
    """Whether some rows of the others have it and some have not, whichever fold is held out. (n,) bool, (n,) int."""
    apart = [positive[fold != k] for k in np.unique(fold)]
    return bool(apart) and all(x.any() and not x.all() for x in apart)


def from_other_folds(fold: Array, fitted: Callable[[Array], Any]) -> Array:
    """(n, ...): for each row what ``fitted`` gives on the rows of all folds but its own."""
    by = {k: fitted(np.flatnonzero(fold != k)) for k in np.unique(fold).tolist()}
    return np.array([by[k] for k in fold.tolist()])


def judged_by_other_folds(logit: Array, positive: Array, fold: Array) -> tuple[Array, Array]:
    """((n,) bool, whether a yes is given; (n,) f64, the probability), each by a threshold and a logistic curve of the other folds."""
    yes = logit >= from_other_folds(fold, lambda rows: least_threshold(logit[rows], positive[rows]))
    curves = from_other_folds(fold, lambda rows: logistic_curve(logit[rows], positive[rows]))
    return yes, _sigmoid(curves[:, 0] * logit + curves[:, 1])


def stratum_of(
    family: str, region: str, children: bool, logit: Array, positive: Array, yes: Array, auroc: float, ci95: Sequence[float]
) -> Stratum:
    """What n out-of-fold logits, and the answers that other folds gave to them, are worth; with a ``reason`` where they did not pass."""
    slope, intercept = logistic_curve(logit, positive)
    stratum = Stratum(
        family=family,
        region=region,
        n=len(positive),
        positives=int(positive.sum()),
        auroc=auroc,
        auroc_ci95=(min(ci95[0], auroc), max(ci95[1], auroc)),
        threshold=least_threshold(logit, positive),
        yes=(int((yes & positive).sum()), int(yes.sum())),
        no=(int((~yes & ~positive).sum()), int((~yes).sum())),
        slope=slope,
        intercept=intercept,
        children=children,
    )
    return replace(stratum, reason=missed(stratum))


def least_threshold(logit: Array, positive: Array) -> float:
    """Halfway to the least logit at which the specificity is SPECIFICITY or more and a yes is right as often as the gate asks.

    By SPARE standard errors more often, in fact, since the gate is for other films. Where no logit makes a yes right that often, the
    specificity alone chooses. (n,) f64, (n,) bool; both classes are there.
    """
    negatives = np.sort(logit[~positive])
    below = float(negatives[int(np.ceil(SPECIFICITY * len(negatives) - 1e-9)) - 1])
    levels = np.unique(logit[logit > below])
    if not len(levels):
        return below + 1.0
    given = np.array([(logit >= level).sum() for level in levels])
    right = np.array([positive[logit >= level].mean() for level in levels])
    enough = np.flatnonzero(right - SPARE * np.sqrt(right * (1 - right) / given) >= least_right(float(positive.mean())))
    chosen = int(enough[0]) if len(enough) else 0
    return float((levels[chosen] + (levels[chosen - 1] if chosen else below)) / 2)


def least_right(prevalence: float) -> float:
    """How often a yes must be right: twice as often as chance; where that is always or more, half of the way from chance to always."""
    return 2 * prevalence if prevalence < 0.5 else (1 + prevalence) / 2


def logistic_curve(logit: Array, positive: Array) -> tuple[float, float]:
    """(slope, intercept) from logit to probability (Platt 1999, with his targets, so that separable classes have a curve). Slope > 0."""
    counts = positive.sum(), (~positive).sum()
    target = np.where(positive, (counts[0] + 1) / (counts[0] + 2), 1 / (counts[1] + 2))
    center, scale = float(logit.mean()), float(logit.std()) or 1.0
    x = np.stack([(logit - center) / scale, np.ones(len(logit))], axis=1)
    w = np.array([0.0, np.log(target.mean() / (1 - target.mean()))])
    for _ in range(50):  # Newton's method; the ridge holds it where all logits are equal
        p = _sigmoid(x @ w)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2), x.T @ (p - target))
        w -= np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-9:
            break
    slope = max(float(w[0]), 1e-3) / scale
    return slope, float(w[1]) - slope * center


def missed(stratum: Stratum) -> str | None:
    """What the stratum lacks to be answered, in words; None where it has earned it."""
    least = least_right(stratum.positives / stratum.n)
    right, given = stratum.yes
    if not math.isfinite(stratum.auroc_ci95[0]):
        return "the AUROC has no interval"
    if stratum.auroc_ci95[0] < LEAST_AUROC:
        low = math.floor(100 * stratum.auroc_ci95[0]) / 100  # never rounded up to what is needed
        return f"the AUROC's lower 95% bound is {low:.2f}; {LEAST_AUROC:.2f} is needed"
    if not given:
        return f"no yes was given on {counted(stratum.n, 'picture')}"
    if not right / given >= least:
        return f"{right} of {given} yes answers were right; {least:.0%} is needed where {stratum.positives} of {stratum.n} have it"
    return None


def _sigmoid(x: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))
