"""The trust benchmark's films, whom to ask about them, and the figures over what was answered."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmclip_deploy.answer import Answer
from pmclip_deploy.benchmarks.trust_answers import family, logit, yes_minus_no
from pmclip_deploy.console import progress
from pmclip_deploy.evaluation.statistics import Bootstrap
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.train.datasets.schema import question_from_text
from pmclip_deploy.train.findings.groups import group_of_row
from pmclip_deploy.train.kinds import kind_of

FRACTURE, PNEUMONIA = "is there a fracture?", "is there pneumonia?"
INTACT, NO_FRACTURE, DISPLACED = "is the bone intact?", "is there no fracture?", "is the fracture displaced?"
RIB, HIP = "rib fracture?", "hip fracture?"
NORMAL, ABNORMAL = "is this a normal x-ray?", "is there an abnormality?"
XRAY, CHEST_XRAY, CHEST_IMAGE = "is this an x-ray?", "is this a chest x-ray?", "is this a chest image?"
MODALITY, PLANE, ORGAN = "what imaging modality is shown?", "in what plane is this image taken?", "what organ system is shown?"

WEIGHTING = "what is the mr weighting in this image?"
CLAIMS = {  # question: which fact it is about, and for which value of it the answer is yes
    "is this a ct scan?": ("family", "ct"),
    "is this an mri image?": ("family", "mr"),
    "is this a t1 weighted image?": ("weighting", "t1"),
    "is this a t2 weighted image?": ("weighting", "t2"),
}

VQA_MED, FRACATLAS, KERMANY, SLAKE, DICOM = "vqa-med-2019", "fracatlas", "kermany-cxr", "slake", "dicom"
SETS = {VQA_MED: "VQA-Med 2019 val", FRACATLAS: "FracAtlas", KERMANY: "Kermany", SLAKE: "SLAKE"}
MANY = 300  # of each class, where a set is larger than need be
SPECIFICITY = 0.90
Z = 1.959964  # of a 95% interval

Bools = NDArray[np.bool_]
Figure = dict[str, Any]  # value, n, and where they mean something of (a count), ci95, positives
Said = Sequence[Mapping[str, Answer]]  # of each film, its answer to each question
Change = Callable[[Image.Image], Image.Image]
Groups = set[tuple[str, str]]  # (set, group)


@dataclass(frozen=True)
class Film:
    """A picture of a set, and what its labels say."""

    path: Path
    set: str
    group: str  # films of a group are alike: the patient, or look-alikes
    facts: Mapping[str, Any] = field(default_factory=dict)


class Over:
    """Figures over N rows, with intervals that resample whole groups."""

    def __init__(self, groups: Sequence[str], seed: int) -> None:
        self._cluster = np.unique(np.array(groups, str), return_inverse=True)[1]
        self._sample = Bootstrap(self._cluster, seed)

    def share(self, hits: Iterable[object], rows: Iterable[object] | None = None) -> Figure:
        """Of (N,) bool among the rows that the mask ``rows`` takes. Where all rows agree, Wilson's interval over the groups."""
        taken = np.ones(len(self._cluster), bool) if rows is None else bools(rows)
        hit = bools(hits) & taken
        n, of = int(taken.sum()), int(hit.sum())
        if n == 0:
            return {"value": None, "n": 0, "of": 0}
        interval, far = self._sample.interval(hit, taken), Z**2 / (len(np.unique(self._cluster[taken])) + Z**2)
        if of in (0, n):
            interval = [0.0, far] if of == 0 else [1 - far, 1.0]
        return {"value": of / n, "n": n, "of": of, "ci95": interval}

    def auroc(self, score: Iterable[float], positive: Iterable[object], rows: Iterable[object] | None = None) -> Figure:
        """Of the rows that have a score."""
        scores, truth = np.array(list(score), float), bools(positive)
        taken = np.flatnonzero(np.isfinite(scores) & (True if rows is None else bools(rows)))
        about = {"n": len(taken), "positives": int(truth[taken].sum())}
        if about["positives"] in (0, len(taken)):
            return {"value": None, **about}
        found = self._sample.auroc(scores[taken], truth[taken], taken)
        return {"value": found["auroc"], **about, "ci95": found["ci95"]}


def bools(values: Iterable[object]) -> Bools:
    return np.array([bool(value) for value in values], bool)


def ranking(over: Over, score: Sequence[float], truth: Bools, rows: Bools) -> dict[str, Figure]:
    """AUROC, and sensitivity where the specificity is SPECIFICITY."""
    scores, found = np.array(score), {"AUROC": over.auroc(score, truth, rows)}
    if found["AUROC"]["value"] is None:
        return found
    scored = rows & np.isfinite(scores)
    limit = np.quantile(scores[scored & ~truth], SPECIFICITY, method="higher")
    return {**found, f"sensitivity at specificity {SPECIFICITY:.2f}": over.share(scores > limit, scored & truth)}


def out_of_fold(keys: Sequence[object], positive: Bools, groups: Sequence[str], seed: int, folds: int = 5) -> list[float]:
    """A baseline's score, (N,): how often the rows with the same key are positive, among the groups of the other folds."""
    names = sorted(set(groups))
    fold_of = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % folds, strict=True))
    counts: Counter[tuple[object, int]] = Counter((key, fold_of[g]) for key, g in zip(keys, groups, strict=True))
    hits = Counter((key, fold_of[g]) for key, g, yes in zip(keys, groups, positive, strict=True) if yes)
    overall = float(positive.mean())

    def score(key: object, fold: int) -> float:
        others = [i for i in range(folds) if i != fold]
        return (sum(hits[key, i] for i in others) + overall) / (sum(counts[key, i] for i in others) + 1)

    return [score(key, fold_of[g]) for key, g in zip(keys, groups, strict=True)]


# --- the pictures and whom to ask -----------------------------------------------------------------------------------------------


class Bench:
    """The data, the bundles, and which groups each bundle has not seen."""

    def __init__(
        self, data: Path, predictors: Sequence[Predictor], apart: Sequence[Groups], pictures: Path, seed: int = 0, limit: int | None = None
    ) -> None:
        self.data, self.predictors, self.apart, self.pictures, self.seed, self.limit = data, predictors, apart, pictures, seed, limit
        self.named = {name for groups in apart for name, _ in groups}

    def predictor_of(self, film: Film) -> Predictor | None:
        """The first bundle that knows nothing of the film's group; any where no file names its set."""
        if film.set not in self.named:
            return self.predictors[0]
        apart = (p for p, groups in zip(self.predictors, self.apart, strict=True) if (film.set, film.group) in groups)
        return next(apart, None)

    def answers(self, film: Film, questions: Sequence[str], change: Change | None = None) -> dict[str, Answer]:
        """{question: answer} of one picture, which may be changed first."""
        predictor, asked = self.predictor_of(film), list(dict.fromkeys(questions))
        assert predictor is not None  # no other film is kept
        image = film.path if change is None else changed(film.path, change)
        about: dict[str, Any] = {"child": True} if film.set == KERMANY and predictor.manifest.findings is not None else {}
        return dict(zip(asked, predictor.ask_many(image, asked, **about), strict=True))

    def scores(self, films: Sequence[Film], said: Said, question: str, finding: str) -> list[float]:
        """(N,) what ranks films by a finding, answered or not; NaN where the bundle says nothing of it."""
        logits = [logit(p, film.path, finding) for film in films if (p := self.predictor_of(film)) is not None]
        return [yes_minus_no(s[question]) if x is None else x for s, x in zip(said, logits, strict=True)]

    def said(self, films: Sequence[Film], questions: Sequence[str], change: Change | None = None) -> Said:
        """`answers` of each picture."""
        return [self.answers(film, questions, change) for film in progress(films, f"{len(films)} pictures")]

    def over(self, films: Sequence[Film]) -> Over:
        """Figures over these pictures, whose intervals draw whole groups."""
        return Over([f"{film.set} {film.group}" for film in films], self.seed)

    def has(self, name: str) -> bool:
        """Whether the data holds this set."""
        return (self.data / name).is_dir()

    def drawn(self, films: Sequence[Film], count: int | None = None) -> list[Film]:
        """As many as asked for, and no more than --limit, drawn by the seed and in the order that they stand in."""
        most = min(len(films), *(n for n in (count, self.limit) if n is not None), len(films))
        return [films[i] for i in sorted(np.random.default_rng(self.seed).permutation(len(films))[:most].tolist())]

    def _labelled(self, name: str) -> list[Film]:
        rows = [json.loads(line) for line in (self.data / name / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
        films = [Film(self.data / name / r["image"], name, group_of_row(r), {**r["labels"], "size": r["original_size"]}) for r in rows]
        return [film for film in films if self.predictor_of(film) is not None]

    @cached_property
    def all_fracatlas(self) -> list[Film]:
        return self._labelled(FRACATLAS)

    @cached_property
    def fracatlas(self) -> tuple[list[Film], Said]:
        """All that are fractured, as many that are not, and what every question of this file gets there."""
        yes = self.drawn([f for f in self.all_fracatlas if f.facts["fractured"]])
        films = yes + self.drawn([f for f in self.all_fracatlas if not f.facts["fractured"]], len(yes))
        questions = (FRACTURE, INTACT, NO_FRACTURE, DISPLACED, RIB, HIP, NORMAL, ABNORMAL, XRAY, CHEST_XRAY, CHEST_IMAGE, MODALITY)
        return films, self.said(films, questions)

    @cached_property
    def kermany(self) -> tuple[list[Film], Said]:
        """At most MANY normal films and MANY with pneumonia, and what every question of this file gets there."""
        films = [f for finding in ("normal", "pneumonia") for f in self.drawn(self._of_kermany(finding), MANY)]
        return films, self.said(films, (PNEUMONIA, FRACTURE, NORMAL, ABNORMAL, XRAY, CHEST_XRAY, CHEST_IMAGE, MODALITY))

    def _of_kermany(self, finding: str) -> list[Film]:
        return [f for f in self._labelled(KERMANY) if f.facts["finding"] == finding]

    @cached_property
    def val(self) -> tuple[list[Film], Said]:
        """Each picture of VQA-Med's validation part, and what its own questions and this file's get there."""
        by = defaultdict[str, list[dict[str, str]]](list)
        for line in (self.data / VQA_MED / "val.jsonl").read_text(encoding="utf-8").splitlines():
            by[(row := json.loads(line))["image"]].append(row)
        films = [Film(self.data / VQA_MED / "images" / image, VQA_MED, image, _facts(rows)) for image, rows in by.items()]
        films = self.drawn([film for film in films if self.predictor_of(film) is not None])
        mine = (NORMAL, ABNORMAL, MODALITY, PLANE, ORGAN)
        return films, [self.answers(f, [*(r["question"] for r in f.facts["rows"]), *mine]) for f in progress(films, SETS[VQA_MED])]

    @cached_property
    def slake(self) -> tuple[list[Film], Said]:
        """Each picture of all three parts, and what is said of its modality and weighting."""
        files = [self.data / SLAKE / f"{split}.json" for split in ("train", "validate", "test")]
        rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
        weighting = {row["img_name"]: row["answer"].lower() for row in rows if row["answer"] in ("T1", "T2")}
        films = [
            Film(self.data / SLAKE / "imgs" / name, SLAKE, name, {"family": family(of), "weighting": weighting.get(name)})
            for name, of in sorted({row["img_name"]: row["modality"] for row in rows}.items())
        ]
        films = self.drawn([film for film in films if self.predictor_of(film) is not None])
        return films, self.said(films, (MODALITY, WEIGHTING, *CLAIMS))


def _facts(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What the rows of one VQA-Med picture say: open answers by kind, its family, whether an abnormality is named."""
    kinds = {kind_of_row(r): r["answer"] for r in rows}
    words = " ".join(r["question"] for r in rows if r["category"] == "abnormality")  # "what is abnormal in the mri?"
    asked = next((f for f, w in (("xr", "x-ray"), ("ct", "ct scan"), ("mr", "mri"), ("us", "ultrasound"), ("mg", "mammo"), ("xa", "angio"))
                  if w in words), None)  # fmt: skip
    weighted = "mr" if "weighting" in kinds else "ct" if kinds.get("contrast") else None
    return {"rows": rows, "family": family(kinds.get("modality")) or weighted or asked, "named": "abnormality" in kinds, **kinds}


def kind_of_row(row: Mapping[str, str]) -> str:
    return kind_of(question_from_text(Path(row["image"]), row["question"], row["answer"], row["category"]))


def changed(path: Path, change: Change) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3) u8 after the change."""
    with Image.open(path) as opened:
        return np.asarray(change(opened.convert("L" if opened.mode == "L" else "RGB")))


@dataclass(frozen=True)
class Found:
    """The figures of one part of the report, on some pictures."""

    part: str
    pictures: str  # of which set, or part of it
    figures: Mapping[str, Figure]
    not_measured: str | None = None
