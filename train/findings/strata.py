"""What out-of-fold logits are worth: a finding's strata with thresholds and counts, the gate they must pass, figures beside baselines.

Nothing is measured on what it was fitted on: a film's answer comes from a network, a threshold and a logistic curve of the other folds.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.types import Finding, Findings, Stratum
from pmclip_deploy.evaluation.statistics import Bootstrap, calibration_error
from pmclip_deploy.imaging.margins import inner_box
from pmclip_deploy.imaging.preprocess import padded_place
from pmclip_deploy.train.findings.films import FINDINGS, PREPROCESS, REGIONS, Box, Film
from pmclip_deploy.train.findings.gate import both_beside_each_fold, from_other_folds, judged_by_other_folds, stratum_of

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


def placed(box: Box, pixels: NDArray[np.uint8], size: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a box of the picture ``pixels`` on the square of ``size`` pixels that the network sees."""
    height, width = pixels.shape[:2]
    rows, columns = inner_box(pixels)
    to_rows, to_columns = padded_place(rows.stop - rows.start, columns.stop - columns.start, size)

    def along(share: float, length: int, seen: slice, to: slice) -> float:
        at: float = (share * length - seen.start) * (to.stop - to.start) / (seen.stop - seen.start) + to.start
        return at

    x, y, w, h = box
    left, right = (along(share, width, columns, to_columns) for share in (x, x + w))
    top, bottom = (along(share, height, rows, to_rows) for share in (y, y + h))
    return left, top, right, bottom


def _judged_where_both_are(outcomes: Outcomes, finding: int, region: int) -> Judged | None:
    """None where no film or every film of the region has the finding, or a fold's others have it so."""
    of = outcomes.of(np.flatnonzero([f.findings[finding] is not None and f.regions[region] is True for f in outcomes.films]))
    return _judged(of, finding) if both_beside_each_fold(_positive(of, finding), of.fold) else None


def _judged(outcomes: Outcomes, finding: int) -> Judged:
    logit, positive = outcomes.finding[:, finding].astype(float), _positive(outcomes, finding)
    return Judged(outcomes, logit, positive, *judged_by_other_folds(logit, positive, outcomes.fold))


def _stratum(judged: Judged, region: str) -> Stratum:
    children = all(film.children for film in judged.outcomes.films)
    measured = judged.auroc()
    return stratum_of("xr", region, children, judged.logit, judged.positive, judged.yes, measured["auroc"], measured["ci95"])


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
        return np.asarray((yes + positive[rows].mean()) / (all_ + 1))

    return np.asarray(from_other_folds(fold, shares)[np.arange(len(keys)), number])


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
