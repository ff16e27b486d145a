"""`train finding`: a hospital's labelled pictures -> a finding of a new bundle, or a refusal that says what is missing. No torch.

    folder or table -> samples (finding_data.py) -> out-of-fold logits -> strata -> the old bundle's files and one probe more

The image tower stays as it is. What is fitted is linear in its embedding: least squares to -1 and 1, both classes of equal weight, with a
ridge, which is Fisher's discriminant with a shrunken covariance. A logistic regression measured no better and took ten times as long.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.files import name_of_output, refuse_foreign_folder, write_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import PROBES, SIGNATURES
from pmclip_deploy.bundle.types import Finding, Probe, Stratum
from pmclip_deploy.decision.evidence import findings_of
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.evaluation.evaluate import tower_trained_on
from pmclip_deploy.evaluation.statistics import Bootstrap
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.opening import load
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.questions.taught import name_of_finding, trouble
from pmclip_deploy.train.finding_data import LEAST, Defaults, Key, Progress, Samples, labelled_from_path, samples_from_rows
from pmclip_deploy.train.findings.gate import LEAST_AUROC, both_beside_each_fold, judged_by_other_folds, stratified_folds, stratum_of
from pmclip_deploy.vocabulary import FAMILIES, REGIONS

FOLDS = 5
STRENGTHS = np.array([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1])  # of the ridge, in shares of the embedding's variance
NO_DEFAULTS = Defaults()
MOST = 100_000  # pictures: to say that more would be needed helps nobody

Array = NDArray[Any]


@dataclass(frozen=True)
class Measured:
    """What was found out about a finding; ``strata`` have a reason where they did not pass."""

    name: str
    samples: Samples
    strata: tuple[Stratum, ...]
    small: dict[Key, tuple[int, int]]  # of strata too small to be measured: pictures with the finding, and without
    probe: Array  # (D + 1,) f32, fitted to all samples
    tower_trained_on: tuple[str, ...]
    contamination_checked: bool

    @property
    def passed(self) -> bool:
        return any(stratum.reason is None for stratum in self.strata)

    def to_json(self) -> dict[str, Any]:
        s = self.samples
        return {
            "finding": self.name,
            "pictures": len(s.positive),
            "positives": int(s.positive.sum()),
            "groups": len(set(s.group.tolist())),
            "grouped_by": s.grouped,
            "look_alikes_joined": s.alike,
            "look_alikes_with_different_labels": s.disagreeing,
            "left_out": s.left_out,
            "tower_trained_on": list(self.tower_trained_on),
            "contamination_checked": self.contamination_checked,
            "strata": [{**vars(stratum), "pictures_missing": pictures_missing(stratum)} for stratum in self.strata],
            "too_small": [{"family": f, "region": r, "with": yes, "without": no} for (f, r), (yes, no) in self.small.items()],
        }


def train_finding(
    name: str,
    images: Path,
    output: Path,
    *,
    asked: Sequence[str] = (),
    bundle: Path | None = None,
    called: str | None = None,
    defaults: Defaults = NO_DEFAULTS,
    replace_it: bool = False,
    progress: Progress = lambda items, what: items,
) -> tuple[Measured, Manifest | None]:
    """(what was measured, the manifest of the bundle in ``output``, or None where the finding did not pass and nothing was written).

    Raises UsageError, InputError and BundleError.
    """
    finding = name_of_finding(name)
    if reason := trouble(finding, asked):
        raise UsageError(f"{name[:60]!r}: {reason}")
    named = _name_of_bundle(output, called)
    rows = labelled_from_path(images)
    predictor = load(bundle, "cpu")
    _refuse_known(predictor.manifest, finding, replace_it)
    measured = measured_from_samples(predictor, finding, samples_from_rows(predictor, rows, defaults, progress))
    return measured, _written(predictor, measured, tuple(asked), output, named) if measured.passed else None


def measured_from_samples(predictor: Predictor, name: str, samples: Samples) -> Measured:
    """Raises InputError where the samples cannot be parted into folds."""
    fold = _folds(samples)
    logit = out_of_fold(samples.embedding, samples.positive, fold)
    strata, small = list[Stratum](), dict[Key, tuple[int, int]]()
    for key in sorted({key for keys in samples.strata for key in keys}):
        rows = np.flatnonzero([key in keys for keys in samples.strata])
        positive = samples.positive[rows]
        counts = int(positive.sum()), int((~positive).sum())
        if min(counts) < LEAST or not both_beside_each_fold(positive, fold[rows]):
            small[key] = counts
            continue
        yes, _ = judged_by_other_folds(logit[rows], positive, fold[rows])
        auroc = Bootstrap(samples.group[rows], seed=0).auroc(logit[rows], positive, np.arange(len(rows)))
        children = all(samples.child[i] is True for i in rows)
        strata.append(stratum_of(*key, children, logit[rows], positive, yes, auroc["auroc"], auroc["ci95"] or (0.0, 1.0)))
    if not strata:
        counted = ", ".join(f"{label_of(key)}: {yes} with it and {no} without" for key, (yes, no) in small.items())
        raise InputError(f"no kind of picture has {LEAST} with the finding and {LEAST} without, in groups of their own", f"{counted}")
    return Measured(
        name=name,
        samples=samples,
        strata=tuple(strata),
        small=small,
        probe=fitted(samples.embedding, samples.positive, fold).astype(np.float32),
        tower_trained_on=tuple(tower_trained_on(predictor.manifest.provenance)),
        contamination_checked=SIGNATURES in predictor.manifest.files,
    )


def out_of_fold(embedding: Array, positive: Array, fold: Array) -> Array:
    """(N,) f64: of each sample the logit of a model that saw nothing of its fold, not even to choose its strength."""
    logit = np.empty(len(positive))
    for k in np.unique(fold):
        others = fold != k
        logit[~others] = _logits(embedding[~others], fitted(embedding[others], positive[others], fold[others]))
    return logit


def fitted(embedding: Array, positive: Array, fold: Array) -> Array:
    """(D + 1,): the weights and what is added, at the strength that ranks best where each fold is held out in turn."""
    held_out = np.empty((len(STRENGTHS), len(positive)))
    for k in np.unique(fold):
        others = fold != k
        held_out[:, ~others] = _logits(embedding[~others], _ridge(embedding[others], positive[others])).T
    best = int(np.argmax([_auroc(logit, positive) for logit in held_out]))
    return np.asarray(_ridge(embedding, positive)[best])


def _ridge(embedding: Array, positive: Array) -> Array:
    """(STRENGTHS, D + 1), each a least-squares fit to -1 and 1, both classes of equal weight."""
    weight = np.where(positive, 0.5 / positive.sum(), 0.5 / (~positive).sum())
    mean = weight @ embedding
    centred = embedding - mean
    values, vectors = np.linalg.eigh((weight[:, None] * centred).T @ centred)
    values = np.maximum(values, 0)
    toward = vectors.T @ (centred.T @ (weight * np.where(positive, 1.0, -1.0)))
    weights = toward / (values + STRENGTHS[:, None] * values.sum() + 1e-12) @ vectors.T
    return np.concatenate([weights, -(weights @ mean)[:, None]], axis=1)


def _logits(embedding: Array, models: Array) -> Array:
    """(N, D) and (..., D + 1) -> (N, ...)"""
    return np.asarray(embedding @ models[..., :-1].T + models[..., -1])


def _auroc(score: Array, positive: Array) -> float:
    negatives = np.sort(score[~positive])
    below = [np.searchsorted(negatives, score[positive], side).mean() for side in ("left", "right")]
    return float(sum(below) / 2 / len(negatives))


def pictures_missing(stratum: Stratum) -> int | None:
    """How many more pictures, with as many positives among them, would lift the AUROC's lower bound to LEAST_AUROC if the AUROC stays.

    By its standard error (Hanley and McNeil 1982), wider by as much as the interval here is, since pictures of a group are alike.
    0 where that bound is reached; None where no number of pictures is expected to.
    """
    auroc, low, n = stratum.auroc, stratum.auroc_ci95[0], stratum.n
    if low >= LEAST_AUROC:
        return 0
    if auroc <= LEAST_AUROC:
        return None
    share = stratum.positives / n
    wider = max(1.0, (auroc - low) / _half_width(auroc, n * share, n * (1 - share)))
    few, many = n, MOST
    if auroc - wider * _half_width(auroc, many * share, many * (1 - share)) < LEAST_AUROC:
        return None
    while many - few > 1:
        middle = (few + many) // 2
        enough = auroc - wider * _half_width(auroc, middle * share, middle * (1 - share)) >= LEAST_AUROC
        few, many = (few, middle) if enough else (middle, many)
    return many - n


def _half_width(auroc: float, positives: float, negatives: float) -> float:
    """Of the 95% interval, by Hanley and McNeil 1982; at least that of one pair ranked wrongly, where all are ranked rightly."""
    auroc = min(auroc, 1 - 0.5 / (positives * negatives))
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc) + (positives - 1) * (q1 - auroc**2) + (negatives - 1) * (q2 - auroc**2)
    return 1.96 * math.sqrt(spread / (positives * negatives))


def advice(stratum: Stratum) -> str:
    """What would help a stratum that did not pass."""
    missing, share = pictures_missing(stratum), stratum.positives / stratum.n
    if missing is None:
        return f"with an AUROC of {stratum.auroc:.2f}, more pictures alone are not expected to help: see whether the labels are right"
    if not missing and share > 1 / 3:
        return "two or more pictures without the finding for each with it, as practice has them, would ask less of a yes"
    if not missing:
        return "its AUROC is enough: more pictures would let the threshold be chosen more surely"
    return (
        f"about {missing} more pictures like these, {math.ceil(missing * share)} of them with the finding, would lift that bound to "
        f"{LEAST_AUROC:.2f}, if the AUROC stays {stratum.auroc:.2f}"
    )


def label_of(key: Key) -> str:
    return f"{FAMILIES[key[0]].label} of the {REGIONS[key[1]].label}"


def _folds(samples: Samples) -> Array:
    """(N,) int. Raises InputError where a fold's others, or those of two folds, lack a class."""
    groups = [f"{group:08d}" for group in samples.group.tolist()]
    by_group = stratified_folds(groups, samples.positive.tolist(), FOLDS)
    fold = np.array([by_group[group] for group in groups], np.int64)
    holding = [len({g for g, yes in zip(groups, samples.positive, strict=True) if yes == wanted}) for wanted in (True, False)]
    others = (fold != k for k in range(FOLDS))
    if len(set(fold.tolist())) < FOLDS or not all(both_beside_each_fold(samples.positive[rows], fold[rows]) for rows in others):
        raise InputError(
            f"the pictures are of too few patients: {holding[0]} groups have the finding and {holding[1]} have pictures without it, and "
            f"{FOLDS} or more of each are needed",
            "where groups are not right, give a table path,label,group",
        )
    return fold


def _name_of_bundle(output: Path, called: str | None) -> str:
    named = name_of_output(output, called)
    refuse_foreign_folder(output)
    if output.resolve() == DEFAULT_BUNDLE.resolve() or named == DEFAULT_BUNDLE.parent.name:
        raise UsageError(f"a bundle of your own is not called {DEFAULT_BUNDLE.parent.name}", "give another --output, or --name")
    return named


def _refuse_known(manifest: Manifest, finding: str, replace_it: bool) -> None:
    taught = any(probe.finding.name == finding for probe in manifest.probes)
    if taught and not replace_it:
        raise UsageError(f"bundle {manifest.name} was taught {finding} before", "--replace puts the new one in its place")
    if not taught and any(known.name == finding for known in findings_of(manifest)):
        raise UsageError(f"bundle {manifest.name} looks for {finding} already", "give yours a name that says what is new about it")


def _written(predictor: Predictor, measured: Measured, asked: tuple[str, ...], output: Path, named: str) -> Manifest:
    """The old bundle with one probe more, or with this one in place of that of the same name."""
    old, folder = predictor.manifest, predictor.path
    assert folder is not None
    kept = [i for i, probe in enumerate(old.probes) if probe.finding.name != measured.name]
    weights = [np.load(folder / PROBES, allow_pickle=False)[kept]] if kept else []
    content = io.BytesIO()
    np.save(content, np.concatenate([*weights, measured.probe[None]]).astype(np.float32), allow_pickle=False)
    about = {key: value for key, value in measured.to_json().items() if key not in ("finding", "strata")}
    from_ = {"bundle": old.name, "version": old.version, "sha256": predictor.model.sha256}
    manifest = replace(
        old,
        name=named,
        probes=(*(old.probes[i] for i in kept), Probe(Finding(measured.name, measured.strata), asked)),
        provenance={**old.provenance, "probes": {**old.provenance.get("probes", {}), measured.name: {**about, "from": from_}}},
    )
    files: dict[str, Path | bytes] = {name: folder / name for name in old.files if name != PROBES}
    return write_bundle(output, manifest, {**files, PROBES: content.getvalue()})
