"""What out-of-fold logits are worth: a finding's strata with thresholds and counts, the gate they must pass, figures beside baselines.

Nothing is measured on what it was fitted on: a film's answer comes from a network, a threshold and a logistic curve of the other folds.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle import Finding, Findings, Stratum
from pmclip_deploy.evaluate import Bootstrap, calibration_error
from pmclip_deploy.margins import inner_box
from pmclip_deploy.pixels import padded_place
from pmclip_deploy.train.findings.films import FINDINGS, PREPROCESS, REGIONS, Box, Film

SPECIFICITY = 0.90  # at which a threshold is chosen
LEAST_AUROC = 0.70  # lower end of the interval of a stratum that is answered
LEAST_HITS = 0.60  # share of right yes answers whose map points at the finding, where maps are shown
DILATION = 0.05  # of the picture's sides, around a box

Array = NDArray[Any]


@dataclass(frozen=True)
class Outcomes:
    """What networks say to N films that trained none of them. All logits are means over the picture and its mirror image."""

    films: tuple[Film, ...]
    fold: Array  # (N,) int
    finding: Array  # (N, F) f64
    region: Array  # (N, R) f64
    places: Array  # (N, F, h, w)

    def of(self, rows: Array) -> "Outcomes":
        films = tuple(self.films[i] for i in rows)
        return Outcomes(films, self.fold[rows], self.finding[rows], self.region[rows], self.places[rows])


@dataclass(frozen=True)
class Judged:
    """The answers of one finding to n films: each by a threshold and a logistic curve that the other folds chose."""

    outcomes: Outcomes
    logit: Array  # (n,) f64
    positive: Array  # (n,) bool
    yes: Array  # (n,) bool
    probability: Array  # (n,) f64

    @property
    def sample(self) -> Bootstrap:
        """Films of one group are correlated: a resample takes or leaves them together."""
        return Bootstrap(np.array([f"{film.source} {film.group}" for film in self.outcomes.films]), seed=0)

    def auroc(self, score: Array | None = None) -> dict[str, Any]:
        return self.sample.auroc(self.logit if score is None else score, self.positive, np.arange(len(self.positive)))

    def share(self, part: Array, whole: Array) -> dict[str, Any]:
        """Of rows ``whole``, those that are ``part`` too; both (n,) bool."""
        count = int(whole.sum())
        return {"value": float((part & whole).sum() / count) if count else None, "ci95": self.sample.interval(part & whole, whole)}


def findings_from_outcomes(outcomes: Outcomes) -> tuple[Findings, dict[str, Any]]:
    """(what the bundle says of its findings, the figures of each finding and of the regions beside their baselines)

    A stratum is a finding in a region where some films of known label have it and some have not; each film counts in all its regions.
    """
    made, figures = [], dict[str, Any]()
    for f, name in enumerate(FINDINGS):
        strata = {region: judged for r, region in enumerate(REGIONS) if (judged := _judged_where_both_are(outcomes, f, r)) is not None}
        if not strata:
            made.append(Finding(name, ()))
            continue
        hits = _map_hits(f, list(strata.values()))
        shown = hits is not None and hits["value"] >= LEAST_HITS
        rows = tuple(_stratum(judged, region) for region, judged in strata.items())
        made.append(Finding(name, rows, hits["value"] if hits is not None and shown else None))
        together = {id(film) for judged in strata.values() for film in judged.outcomes.films}
        overall = _judged(outcomes.of(np.array([i for i, film in enumerate(outcomes.films) if id(film) in together])), f)
        by = {region: _figures(judged) for region, judged in strata.items()}
        figures[name] = {**_figures(overall), "by_region": by, "baselines": _baselines(overall), "map": hits}
    figures["regions"] = region_figures(outcomes)
    return Findings(PREPROCESS, REGIONS, tuple(made)), figures


def auroc_figures(outcomes: Outcomes, finding: int, source: str) -> dict[str, Any] | None:
    """Of a source's films that belong to no fold; None where the finding is in all or in none of them."""
    known = outcomes.of(np.flatnonzero([film.source == source and film.findings[finding] is not None for film in outcomes.films]))
    positive = _positive(known, finding)
    if not len(positive) or positive.all() or not positive.any():
        return None
    judged = Judged(known, known.finding[:, finding], positive, positive, positive)
    return {"n": len(positive), "positives": int(positive.sum()), **judged.auroc()}


def region_figures(outcomes: Outcomes) -> dict[str, Any] | None:
    """How often the region of the highest logit is one of the film's, beside always saying the most frequent one."""
    known = outcomes.of(np.flatnonzero([None not in film.regions and any(film.regions) for film in outcomes.films]))
    if not known.films:
        return None
    truth = np.array([film.regions for film in known.films], bool)
    right = truth[np.arange(len(truth)), known.region.argmax(axis=1)]
    sample = Bootstrap(np.array([f"{film.source} {film.group}" for film in known.films]), seed=0)
    by = {region: sample.accuracy(right, truth[:, r]) for r, region in enumerate(REGIONS) if truth[:, r].any()}
    return {"n": len(truth), **sample.accuracy(right), "by_region": by, "baselines": {"majority": float(truth.mean(axis=0).max())}}


SPARE = 4.0  # standard errors: from fold to fold logits shift by more than one


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
    """How often a yes must be right: twice as often as chance; where that is more than can be, half of the way from chance to always."""
    return 2 * prevalence if prevalence <= 0.5 else (1 + prevalence) / 2


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


def placed(box: Box, pixels: NDArray[np.uint8], size: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a box of the picture ``pixels`` on the square of ``size`` pixels that the network sees."""
    height, width = pixels.shape[:2]
    rows, columns = inner_box(pixels)
    to_rows, to_columns = padded_place(rows.stop - rows.start, columns.stop - columns.start, size)

    def along(share: float, length: int, seen: slice, to: slice) -> float:
        return (share * length - seen.start) * (to.stop - to.start) / (seen.stop - seen.start) + to.start

    x, y, w, h = box
    left, right = (along(share, width, columns, to_columns) for share in (x, x + w))
    top, bottom = (along(share, height, rows, to_rows) for share in (y, y + h))
    return left, top, right, bottom


def _judged_where_both_are(outcomes: Outcomes, finding: int, region: int) -> Judged | None:
    """None where no film or every film of the region has the finding, or a fold's others have it so."""
    of = outcomes.of(np.flatnonzero([f.findings[finding] is not None and f.regions[region] is True for f in outcomes.films]))
    positive = _positive(of, finding)
    apart = [positive[of.fold != k] for k in np.unique(of.fold)]
    return None if any(not x.any() or x.all() for x in apart) or not apart else _judged(of, finding)


def _judged(outcomes: Outcomes, finding: int) -> Judged:
    logit, positive = outcomes.finding[:, finding].astype(float), _positive(outcomes, finding)
    yes = logit >= _from_other_folds(outcomes.fold, lambda rows: least_threshold(logit[rows], positive[rows]))
    curves = _from_other_folds(outcomes.fold, lambda rows: logistic_curve(logit[rows], positive[rows]))
    return Judged(outcomes, logit, positive, yes, _sigmoid(curves[:, 0] * logit + curves[:, 1]))


def _from_other_folds(fold: Array, fitted: Callable[[Array], Any]) -> Array:
    """(n, ...): for each row what ``fitted`` gives on the rows of all folds but its own."""
    by = {k: fitted(np.flatnonzero(fold != k)) for k in np.unique(fold).tolist()}
    return np.array([by[k] for k in fold.tolist()])


def _stratum(judged: Judged, region: str) -> Stratum:
    positive, yes = judged.positive, judged.yes
    measured = judged.auroc()
    low, high = measured["ci95"]
    slope, intercept = logistic_curve(judged.logit, positive)
    stratum = Stratum(
        family="xr",
        region=region,
        n=len(positive),
        positives=int(positive.sum()),
        auroc=measured["auroc"],
        auroc_ci95=(min(low, measured["auroc"]), max(high, measured["auroc"])),
        threshold=least_threshold(judged.logit, positive),
        yes=(int((yes & positive).sum()), int(yes.sum())),
        no=(int((~yes & ~positive).sum()), int((~yes).sum())),
        slope=slope,
        intercept=intercept,
        children=all(film.children for film in judged.outcomes.films),
    )
    missed = _missed(stratum)
    return stratum if missed is None else Stratum(**{**vars(stratum), "reason": missed})


def _missed(stratum: Stratum) -> str | None:
    """What the stratum lacks to be answered, in words; None where it has earned it."""
    least = least_right(stratum.positives / stratum.n)
    right, given = stratum.yes
    if stratum.auroc_ci95[0] < LEAST_AUROC:
        return f"the AUROC's lower 95% bound is {stratum.auroc_ci95[0]:.2f}; {LEAST_AUROC:.2f} is needed"
    if not given:
        return f"no yes was given on {stratum.n} films"
    if right / given < least:
        return f"{right} of {given} yes answers were right; {least:.0%} is needed where {stratum.positives} of {stratum.n} films have it"
    return None


def _figures(judged: Judged) -> dict[str, Any]:
    positive, yes, n = judged.positive, judged.yes, len(judged.positive)
    return {
        "n": n,
        "positives": int(positive.sum()),
        "groups": len({(film.source, film.group) for film in judged.outcomes.films}),
        **judged.auroc(),
        "sensitivity": judged.share(yes, positive),
        "specificity": judged.share(~yes, ~positive),
        "right_of_yes": judged.share(positive, yes),
        "right_of_no": judged.share(~positive, ~yes),
        "accuracy": judged.share(yes == positive, np.ones(n, bool)),
        "ece": calibration_error(judged.probability, positive),
    }


def _baselines(judged: Judged) -> dict[str, Any]:
    """What is known without looking: each from the other folds' films of the same size or the same regions."""
    films = judged.outcomes.films
    keys: dict[str, Sequence[Hashable]] = {"picture_size": [film.size for film in films], "regions": [film.regions for film in films]}
    by = {name: judged.auroc(_share_of_same(key, judged.positive, judged.outcomes.fold)) for name, key in keys.items()}
    return {**by, "majority": {"auroc": 0.5, "accuracy": float(max(judged.positive.mean(), 1 - judged.positive.mean()))}}


def _share_of_same(keys: Sequence[Hashable], positive: Array, fold: Array) -> Array:
    """(n,) f64: the share of positives among the other folds' rows of the same key, drawn to that of all by one row's weight."""
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    number = np.array([numbers[key] for key in keys])

    def shares(rows: Array) -> Array:
        yes, all_ = np.bincount(number[rows], positive[rows], len(numbers)), np.bincount(number[rows], minlength=len(numbers))
        return (yes + positive[rows].mean()) / (all_ + 1)

    return np.asarray(_from_other_folds(fold, shares)[np.arange(len(keys)), number])


def _map_hits(finding: int, strata: Sequence[Judged]) -> dict[str, Any] | None:
    """How often the map of a right yes has its peak in a box, dilated, beside a map that always points at the middle of the square.

    A film counts once, whatever its regions. None where no such film has boxes.
    """
    seen = {
        id(film): (film, judged.outcomes.places[i, finding])
        for judged in strata
        for i, film in enumerate(judged.outcomes.films)
        if judged.yes[i] and judged.positive[i] and film.boxes
    }
    if not seen:
        return None
    hits = np.array([[_is_hit(film, of) for of in (_peak(places), (0.5, 0.5))] for film, places in seen.values()])
    sample, every = Bootstrap(np.array([film.group for film, _ in seen.values()]), seed=0), np.ones(len(hits), bool)
    value, middle = ({"value": float(x.mean()), "ci95": sample.interval(x, every)} for x in hits.T)
    return {"n": len(hits), **value, "baselines": {"middle": middle}}


def _peak(places: Array) -> tuple[float, float]:
    """(x, y) of the middle of the highest of (h, w) places, as shares of the square."""
    height, width = places.shape
    row, column = divmod(int(np.argmax(places)), width)
    return (column + 0.5) / width, (row + 0.5) / height


def _is_hit(film: Film, point: tuple[float, float]) -> bool:
    """Whether the point, in shares of the square, lies in one of the film's boxes, dilated by DILATION of the picture's sides."""
    pixels, size = film.pixels(), PREPROCESS.size
    for x, y, w, h in film.boxes or ():
        wider = (x - DILATION, y - DILATION, w + 2 * DILATION, h + 2 * DILATION)
        left, top, right, bottom = placed(wider, pixels, size)
        if left <= point[0] * size <= right and top <= point[1] * size <= bottom:
            return True
    return False


def _positive(outcomes: Outcomes, finding: int) -> Array:
    return np.array([film.findings[finding] is True for film in outcomes.films], bool)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -60, 60))))
