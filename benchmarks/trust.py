"""Can an answer be trusted? The failures that issue reports named, measured with any bundle, before and after it is trained again.

    python -m pmclip_deploy.benchmarks.trust --data DATA --pictures pictures --output benchmarks/results/trust.jsonl
    python -m pmclip_deploy.benchmarks.trust --rows benchmarks/results/trust.jsonl \\
        --markdown docs/measured/trust.md --markdown docs/measured/model.md

DATA holds fracatlas, kermany-cxr, vqa-med-2019, slake and dicom, or some of them. What --pictures holds is told in trust_pictures.py.
A bundle that learned from one of these sets is measured by cross-validation: --bundle FOLD1 --apart FILE1 --bundle FOLD2 --apart FILE2 ...,
where each file has a line "SET GROUP" for every group that its bundle neither learned from nor was tuned on. Of a set that a file names,
only those groups are asked. No time is measured. --limit 20 looks at a few pictures of each set, and docs leave such rows out.
"""

import argparse
import hashlib
import io
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import pmclip_deploy as pm
from pmclip_deploy.answer import Answer
from pmclip_deploy.benchmarks import trust_pictures, trust_table
from pmclip_deploy.benchmarks.results import Row, Run, append, command_line, read
from pmclip_deploy.console import print_error, print_note, progress
from pmclip_deploy.decision.evidence import NO_RADIOGRAPH
from pmclip_deploy.errors import InputError, PmclipError, UsageError
from pmclip_deploy.evaluation.evaluate import tower_trained_on
from pmclip_deploy.evaluation.rows import normalised
from pmclip_deploy.evaluation.statistics import Bootstrap, calibration_error
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.machine import versions
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.spec import ANSWER_SCHEMA
from pmclip_deploy.train.datasets.schema import question_from_text
from pmclip_deploy.train.findings.groups import group_of_row
from pmclip_deploy.train.kinds import kind_of
from pmclip_deploy.vocabulary import FAMILY_OF_MODALITY, LOOK_ALIKE, NO_RADIOLOGY, family_of_answer, view_of_answer

FRACTURE, PNEUMONIA = "is there a fracture?", "is there pneumonia?"
INTACT, NO_FRACTURE, DISPLACED = "is the bone intact?", "is there no fracture?", "is the fracture displaced?"
RIB, HIP = "rib fracture?", "hip fracture?"
NORMAL, ABNORMAL = "is this a normal x-ray?", "is there an abnormality?"
XRAY, CHEST_XRAY, CHEST_IMAGE = "is this an x-ray?", "is this a chest x-ray?", "is this a chest image?"
MODALITY, PLANE, ORGAN = "what imaging modality is shown?", "in what plane is this image taken?", "what organ system is shown?"

VQA_MED, FRACATLAS, KERMANY, SLAKE, DICOM = "vqa-med-2019", "fracatlas", "kermany-cxr", "slake", "dicom"
SETS = {VQA_MED: "VQA-Med 2019 val", FRACATLAS: "FracAtlas", KERMANY: "Kermany", SLAKE: "SLAKE"}
REGIONS = ("hand", "leg", "hip", "shoulder")
MANY = 300  # of each class, where a set is larger than need be
WEAK = 0.5
FRONTAL = ("ap", "pa", "frontal")
WORDS_OF_CHOICE = {"with contrast": "contrast", "without contrast": "noncontrast"}  # and the label's
SPECIFICITY = 0.90
Z = 1.959964  # of a 95% interval

Bools = NDArray[np.bool_]
Figure = dict[str, Any]  # value, n, and where they mean something of (a count), ci95, positives
Said = Sequence[Mapping[str, Answer]]  # of each film, its answer to each question
Change = Callable[[Image.Image], Image.Image]
Groups = set[tuple[str, str]]  # (set, group)


# --- what is read of an answer: all that this file knows of it ------------------------------------------------------------------


def word(answer: Answer) -> str | None:
    """What was answered, in small letters; None where nothing was. A closed answer is its first word."""
    said = None if answer.answer is None else normalised(answer.answer)
    closed = re.match(r"(yes|no)\b", said or "")
    return closed[0] if closed else said


def best(answer: Answer) -> str | None:
    """The likeliest candidate, answered or not, which `evaluate` counts too."""
    return normalised(answer.candidates[0].answer) if answer.candidates else word(answer)


def probability(answer: Answer) -> float:
    """Of what was answered, else of the likeliest candidate; NaN where there is none, as where the header says it."""
    if answer.answer is not None and answer.probability is not None:
        return answer.probability
    return answer.candidates[0].probability if answer.candidates else float("nan")


def is_right(answer: Answer, truth: str) -> bool:
    """Of what was answered, which may be coarser than the truth ("CT, detail not determined"), else of the likeliest candidate."""
    said, likeliest, known = word(answer), best(answer), normalised(truth)
    if said is None or said == likeliest:
        return WORDS_OF_CHOICE.get(likeliest or "", likeliest) == known
    coarse, (_, view) = said.partition(",")[0], view_of_answer(known) or ("", "")
    coarse = WORDS_OF_CHOICE.get(coarse, coarse)
    return known == coarse or family(said) == family(known) is not None or view == coarse or (coarse == "frontal" and view in FRONTAL)


def agree(one: Answer, other: Answer) -> bool:
    """Whether two answers are equal, or one of them is coarser; so too where one is not given."""
    a, b = word(one), word(other)
    if a is None or b is None or a == b:
        return True
    return any("not determined" in coarse and is_right(answer, fine) for answer, coarse, fine in ((one, a, b), (other, b, a)))


def yes_minus_no(answer: Answer) -> float:
    """What ranks pictures, answered or not; NaN where yes or no is no candidate."""
    of = {normalised(c.answer): c.probability for c in answer.candidates}
    return of["yes"] - of["no"] if {"yes", "no"} <= of.keys() else float("nan")


def turned_away(answer: Answer) -> bool:
    return NO_RADIOGRAPH in (answer.reason or "")


def tells(answer: Answer) -> bool:
    """Whether a reader learns that the answer is the header's, or that header and picture differ."""
    said = " ".join([str(getattr(answer, "source", "")), answer.note or "", *answer.image.warnings])
    return "header" in said


def family(answer: str | None) -> str | None:
    return None if answer is None else family_of_answer(answer.replace(",", " "))


def logit(predictor: Predictor, path: Path, finding: str) -> float | None:
    """What the graph "findings" says, in a bundle that has one for this: its abstentions carry no candidates, and all films are ranked."""
    known = predictor.manifest.findings
    if known is None or finding not in [f.name for f in known.findings]:
        return None
    seen = predictor.seen_of_findings(picture_from_path(path))
    return None if seen is None else seen.logits[finding]


def contradicts(modality: str | None, answer: Answer) -> bool:
    """Whether an answer names another family than Modality (0008,0060) does, one that does not look alike."""
    said, known = family(word(answer)), FAMILY_OF_MODALITY.get(modality or "")
    alike = any({said, known} <= group for group in LOOK_ALIKE)
    return said is not None and said != known and not alike and has_family(modality)


def has_family(modality: str | None) -> bool:
    """Whether Modality says what a picture is; "OT" (other) does not, an endoscope's "ES" does."""
    return modality in FAMILY_OF_MODALITY or modality in NO_RADIOLOGY


# --- films and the figures over them --------------------------------------------------------------------------------------------


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
        taken = np.ones(len(self._cluster), bool) if rows is None else _bools(rows)
        hit = _bools(hits) & taken
        n, of = int(taken.sum()), int(hit.sum())
        if n == 0:
            return {"value": None, "n": 0, "of": 0}
        interval, far = self._sample.interval(hit, taken), Z**2 / (len(np.unique(self._cluster[taken])) + Z**2)
        if of in (0, n):
            interval = [0.0, far] if of == 0 else [1 - far, 1.0]
        return {"value": of / n, "n": n, "of": of, "ci95": interval}

    def auroc(self, score: Iterable[float], positive: Iterable[object], rows: Iterable[object] | None = None) -> Figure:
        """Of the rows that have a score."""
        scores, truth = np.array(list(score), float), _bools(positive)
        taken = np.flatnonzero(np.isfinite(scores) & (True if rows is None else _bools(rows)))
        about = {"n": len(taken), "positives": int(truth[taken].sum())}
        if about["positives"] in (0, len(taken)):
            return {"value": None, **about}
        found = self._sample.auroc(scores[taken], truth[taken], taken)
        return {"value": found["auroc"], **about, "ci95": found["ci95"]}


def _bools(values: Iterable[object]) -> Bools:
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
        return [self.answers(film, questions, change) for film in progress(films, f"{len(films)} pictures")]

    def over(self, films: Sequence[Film]) -> Over:
        return Over([f"{film.set} {film.group}" for film in films], self.seed)

    def has(self, name: str) -> bool:
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
        files = [self.data / SLAKE / f"{split}.json" for split in ("train", "validate", "test")]
        modality = {row["img_name"]: row["modality"] for file in files for row in json.loads(file.read_text(encoding="utf-8"))}
        films = [Film(self.data / SLAKE / "imgs" / name, SLAKE, name, {"family": family(of)}) for name, of in sorted(modality.items())]
        films = self.drawn([film for film in films if self.predictor_of(film) is not None])
        return films, self.said(films, (MODALITY,))


def _facts(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What the rows of one VQA-Med picture say: open answers by kind, its family, whether an abnormality is named."""
    kinds = {_kind(r): r["answer"] for r in rows}
    words = " ".join(r["question"] for r in rows if r["category"] == "abnormality")  # "what is abnormal in the mri?"
    asked = next((f for f, w in (("xr", "x-ray"), ("ct", "ct scan"), ("mr", "mri"), ("us", "ultrasound"), ("mg", "mammo"), ("xa", "angio"))
                  if w in words), None)  # fmt: skip
    weighted = "mr" if "weighting" in kinds else "ct" if kinds.get("contrast") else None
    return {"rows": rows, "family": family(kinds.get("modality")) or weighted or asked, "named": "abnormality" in kinds, **kinds}


def _kind(row: Mapping[str, str]) -> str:
    return kind_of(question_from_text(Path(row["image"]), row["question"], row["answer"], row["category"]))


def changed(path: Path, change: Change) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        return np.asarray(change(opened.convert("L" if opened.mode == "L" else "RGB")))


# --- what is measured -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    part: str
    pictures: str  # of which set, or part of it
    figures: Mapping[str, Figure]
    not_measured: str | None = None


def findings(bench: Bench) -> Iterator[Found]:
    """(a) Does yes mean anything? Beside what the picture's size and the region alone would tell."""
    if bench.has(FRACATLAS):
        films, said = bench.fracatlas
        truth = _bools(f.facts["fractured"] for f in films)
        score = bench.scores(films, said, FRACTURE, "fracture")
        tags = _baseline(bench, bench.all_fracatlas, lambda f: tuple(f.facts[r] for r in REGIONS), "fractured", 1)
        size = _baseline(bench, bench.all_fracatlas, _size, "fractured", 1)
        for region in ("", *REGIONS):
            rows = _bools(not region or f.facts[region] for f in films)
            yield Found(FRACTURE, f"FracAtlas, {region or 'all'}", {
                **closed(bench.over(films), [s[FRACTURE] for s in said], score, truth, rows),
                "AUROC of picture size alone": bench.over(films).auroc([size[f.path] for f in films], truth, rows),
                **({} if region else {"AUROC of region tags alone": bench.over(films).auroc([tags[f.path] for f in films], truth)}),
            })  # fmt: skip
    if bench.has(KERMANY):
        films, said = bench.kermany
        truth, every = _bools(f.facts["finding"] == "pneumonia" for f in films), np.ones(len(films), bool)
        size = _baseline(bench, bench._labelled(KERMANY), _size, "finding", "pneumonia")
        yield Found(PNEUMONIA, "Kermany", {
            **closed(bench.over(films), [s[PNEUMONIA] for s in said], bench.scores(films, said, PNEUMONIA, "pneumonia"), truth, every),
            "AUROC of picture size alone": bench.over(films).auroc([size[f.path] for f in films], truth),
        })  # fmt: skip


def closed(over: Over, answers: Sequence[Answer], score: Sequence[float], truth: Bools, rows: Bools) -> dict[str, Figure]:
    """A finding's figures; ``truth``, (N,) bool, says where it is."""
    words = np.array([word(a) or "" for a in answers])
    yes, no = words == "yes", words == "no"
    more = truth[rows].mean() >= 0.5 if rows.any() else False
    return {
        **ranking(over, score, truth, rows),
        "yes where it is": over.share(yes, rows & truth),
        "yes where it is not": over.share(yes, rows & ~truth),
        "answered": over.share(words != "", rows),
        "right of yes": over.share(truth, rows & yes),
        "right of no": over.share(~truth, rows & no),
        "right of the majority answer": over.share(truth == more, rows),
    }


def _size(film: Film) -> object:
    return tuple(side // 64 for side in film.facts["size"])


def _baseline(bench: Bench, films: Sequence[Film], key: Callable[[Film], object], fact: str, value: object) -> dict[Path, float]:
    truth = _bools(f.facts[fact] == value for f in films)
    scores = out_of_fold([key(f) for f in films], truth, [f.group for f in films], bench.seed)
    return dict(zip((f.path for f in films), scores, strict=True))


def normality(bench: Bench) -> Iterator[Found]:
    """(b) "Normal" of what is known not to be."""
    cases = list[tuple[str, list[Film], Said]]()
    if bench.has(VQA_MED):
        cases.append(("VQA-Med 2019 val, a named abnormality", *_where(bench.val, lambda f: f.facts["named"])))
        cases.append(
            (
                "VQA-Med 2019 val, x-rays with a named abnormality",
                *_where(bench.val, lambda f: f.facts["named"] and f.facts["family"] == "xr"),
            )
        )
    if bench.has(FRACATLAS):
        cases.append(("FracAtlas, fractured", *_where(bench.fracatlas, lambda f: f.facts["fractured"])))
    if bench.has(KERMANY):
        cases.append(("Kermany, pneumonia", *_where(bench.kermany, lambda f: f.facts["finding"] == "pneumonia")))
    for pictures, films, said in cases:
        over = bench.over(films)
        for question, wrong in ((NORMAL, "yes"), (ABNORMAL, "no")):
            words = [word(s[question]) for s in said]
            given = _bools(words)
            yield Found(question, pictures, {
                "answered": over.share(given),
                'wrong "normal" among given': over.share((w == wrong for w in words), given),
            })  # fmt: skip


def _where(of: tuple[list[Film], Said], keep: Callable[[Film], object]) -> tuple[list[Film], Said]:
    kept = [(film, said) for film, said in zip(*of, strict=True) if keep(film)]
    return [film for film, _ in kept], [said for _, said in kept]


def consistency(bench: Bench) -> Iterator[Found]:
    """(c) Negation, qualifiers and sites beside the plain question; which answers cannot stand side by side."""
    if not bench.has(FRACATLAS):
        return
    for question in (INTACT, NO_FRACTURE, DISPLACED, RIB, HIP, NORMAL):
        films, said = _where(bench.fracatlas, lambda f: not f.facts["hip"]) if question == HIP else bench.fracatlas
        over, plain, other = bench.over(films), [word(s[FRACTURE]) for s in said], [word(s[question]) for s in said]
        given, both = _bools(other), _bools(plain) & _bools(other)
        same = _bools(a == b for a, b in zip(plain, other, strict=True))
        figures = {"answered": over.share(given), "same word as to the plain question, of both answered": over.share(same, both)}
        if question in (INTACT, NO_FRACTURE, NORMAL):
            truth = _bools(not f.facts["fractured"] for f in films)
            figures |= {
                "yes to both, of both answered": over.share(same & _bools(w == "yes" for w in plain), both),
                "right of answered": over.share((w == ("yes" if t else "no") for w, t in zip(other, truth, strict=True)), given),
            }
        yield Found(question, "FracAtlas without hips" if question == HIP else "FracAtlas, all", figures)


def body_part(bench: Bench) -> Iterator[Found]:
    """(d) A body part that a closed question names is heard."""
    cases = list[tuple[str, list[Film], Said, bool]]()
    if bench.has(FRACATLAS):
        cases.append(("FracAtlas, hands", *_where(bench.fracatlas, lambda f: f.facts["hand"]), False))
    if bench.has(KERMANY):
        cases.append(("Kermany, chests", *bench.kermany, True))
    for pictures, films, said, is_chest in cases:
        for question in (XRAY, CHEST_XRAY, CHEST_IMAGE):
            words, truth = [word(s[question]) for s in said], "yes" if is_chest or question == XRAY else "no"
            over, given = bench.over(films), _bools(words)
            yield Found(question, pictures, {
                "answered": over.share(given),
                "yes": over.share((w == "yes" for w in words), given),
                "right": over.share((w == truth for w in words), given),
            })  # fmt: skip


def header(bench: Bench) -> Iterator[Found]:
    """(e) DICOM files whose header names a modality: answers that contradict it, told or untold."""
    import pydicom

    wheel = sorted(path for path in (Path(pydicom.__file__).parent / "data").rglob("*") if path.suffix in (".dcm", "") and path.is_file())
    read = [(name, a) for name, paths in (("pydicom's wheel", wheel), ("DATA/dicom", sorted((bench.data / DICOM).glob("*.dcm"))))
            for film in progress(bench.drawn([Film(path, DICOM, path.name) for path in paths]), name)
            if (a := _readable(bench.predictors[0], film.path)) is not None]  # fmt: skip
    over = Over([str(i) for i in range(len(read))], bench.seed)
    known, given = _bools(has_family(a.image.modality) for _, a in read), _bools(a.answer for _, a in read)
    against, told = _bools(contradicts(a.image.modality, a) for _, a in read), _bools(tells(a) for _, a in read)
    for source in dict.fromkeys(["all", *(name for name, _ in read)]):
        rows = _bools(source in ("all", name) for name, _ in read)
        yield Found(MODALITY, f"DICOM files, {source}", {
            "of the files read, header names a modality": over.share(known, rows),
            "answered, of these": over.share(given, rows & known),
            "contradict the header, of answered": over.share(against, rows & known & given),
            "... and nothing says so": over.share(against & ~told, rows & known & given),
        })  # fmt: skip


def _readable(predictor: Predictor, path: Path) -> Answer | None:
    try:
        return predictor.ask(path, MODALITY)
    except InputError:
        return None


def weak(bench: Bench) -> Iterator[Found]:
    """(f) Given answers with less than even odds, and (i) how far confidence is from accuracy, kind by kind."""
    rows = list[tuple[str, str, Answer, bool]]()  # group, kind, answer, whether its best candidate is right
    if bench.has(VQA_MED):
        films, said = bench.val
        for film, of in zip(films, said, strict=True):
            for r in film.facts["rows"]:
                kind = _kind(r)
                rows.append((film.group, kind, a := of[r["question"]], is_right(a, r["answer"])))
    cases = [(SETS[VQA_MED], kind, [r for r in rows if r[1] == kind]) for kind in sorted({r[1] for r in rows})]
    cases += [(SETS[VQA_MED], "all kinds", rows)] if rows else []
    for name, question, positive in ((FRACATLAS, FRACTURE, "fractured"), (KERMANY, PNEUMONIA, "pneumonia")):
        if bench.has(name):
            films, said = bench.fracatlas if name == FRACATLAS else bench.kermany
            truth = ["yes" if f.facts.get(positive) or f.facts.get("finding") == positive else "no" for f in films]
            found = [(f.group, question, s[question], is_right(s[question], t)) for f, s, t in zip(films, said, truth, strict=True)]
            cases.append((f"{SETS[name]}, even odds", question, found))
    for pictures, kind, found in cases:
        over, p = Over([g for g, *_ in found], bench.seed), np.array([probability(a) for *_, a, _ in found])
        right, given, offered = _bools(r for *_, r in found), _bools(a.answer for *_, a, _ in found), np.isfinite(p)
        few = given & offered & (p < WEAK)
        yield Found(kind, pictures, {
            "answered": over.share(given),
            "right of answered": over.share(right, given),
            f"under {WEAK}, of answered": over.share(few, given),
            "... right of these": over.share(right, few),
            "ECE": _ece(p, right, offered),
            "ECE of answered": _ece(p, right, offered & given),
            "... by chance alone": _ece_by_chance(p, offered & given, bench.seed),
        })  # fmt: skip


def _ece(p: NDArray[np.float64], right: Bools, rows: Bools) -> Figure:
    return {"value": calibration_error(p[rows], right[rows]), "n": int(rows.sum())}


def _ece_by_chance(p: NDArray[np.float64], rows: Bools, seed: int, draws: int = 200) -> Figure:
    """What the ECE of these confidences would be, on the average, if each were exactly the probability that its answer is right."""
    rng, chosen = np.random.default_rng(seed), p[rows]
    errors = (calibration_error(chosen, rng.random(len(chosen)) < chosen) for _ in range(draws))
    drawn = [error for error in errors if error is not None]
    return {"value": float(np.mean(drawn)) if drawn else None, "n": len(chosen)}


def no_radiology(bench: Bench) -> Iterator[Found]:
    """(g) Pictures that are none are turned away, and radiology images are not."""
    questions = (FRACTURE, MODALITY, ORGAN)
    bases, missing = trust_pictures.bases(bench.pictures, bench.seed)
    if bench.limit is not None:
        bases = bases[:: max(1, len(bases) // bench.limit)]
    rows = list[tuple[trust_pictures.Base, str, list[Answer]]]()
    for base in progress(bases, "no radiology"):
        for variant, pixels in trust_pictures.variants(base, bench.seed):
            rows.append((base, variant, bench.predictors[0].ask_many(pixels, questions)))
    over = Over([f"{base.kind} {base.name}" for base, *_ in rows], bench.seed)
    away = _bools(all(a.answer is None for a in answers) for *_, answers in rows)
    told = _bools(any(map(turned_away, answers)) for *_, answers in rows)

    def found(pictures: str, taken: Bools) -> Found:
        each = {f'"{q}" not answered': _bools(answers[i].answer is None for *_, answers in rows) for i, q in enumerate(questions)}
        figures = {"no question answered": away, "said to be no radiology image": told, **each}
        return Found("turned away", pictures, {name: over.share(hits, taken) for name, hits in figures.items()})

    yield found("all", np.ones(len(rows), bool))
    for variant in trust_pictures.VARIANTS:
        yield found(variant, _bools(v == variant for _, v, _ in rows))
    for kind in sorted({base.kind for base in bases}):
        yield found(kind, _bools(base.kind == kind for base, *_ in rows))
    for source, what in missing.items():
        yield Found("turned away", source, {}, f"not there; {what}")


def radiology(bench: Bench) -> Iterator[Found]:
    """(g) Radiology images that are turned away, by what they are."""
    sets: dict[str, Callable[[], tuple[list[Film], Said]]] = {
        VQA_MED: lambda: bench.val,
        SLAKE: lambda: bench.slake,
        FRACATLAS: lambda: bench.fracatlas,
        KERMANY: lambda: bench.kermany,
    }
    all_films, all_said = list[Film](), list[Mapping[str, Answer]]()
    for name, of in sets.items():
        if bench.has(name):
            films, said = of()
            all_films, all_said = all_films + films, [*all_said, *said]
    if not all_films:
        return
    away = _bools(turned_away(s[MODALITY]) for s in all_said)
    over, families = bench.over(all_films), ["xr" if f.set in (FRACATLAS, KERMANY) else f.facts["family"] for f in all_films]
    for name in [name for name in sets if bench.has(name)]:
        rows = _bools(f.set == name for f in all_films)
        yield Found("turned away", SETS[name], {"turned away": over.share(away, rows)})
    for one in ("xr", "ct", "mr", "us"):
        yield Found("turned away", f"all sets, {one.upper()}", {"turned away": over.share(away, [f == one for f in families])})
    yield Found("turned away", "all sets", {"turned away": over.share(away)})


def _scaled(picture: Image.Image, share: float) -> Image.Image:
    return picture.resize((max(1, round(picture.width * share)), max(1, round(picture.height * share))), Image.Resampling.BICUBIC)


def _bordered(picture: Image.Image, share: float) -> Image.Image:
    """``share`` of the side, black, on every side."""
    return trust_pictures.bordered(picture, 2 * share / (1 + 2 * share))


def _cropped(picture: Image.Image, share: float) -> Image.Image:
    """Without ``share`` of the side on every side."""
    x, y = round(picture.width * share), round(picture.height * share)
    return picture.crop((x, y, picture.width - x, picture.height - y))


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    picture.save(packed := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(packed).convert(picture.mode)


TURN = "turned by 90 degrees"
CHANGES: dict[str, Change] = {
    "black border of 25%": lambda p: _bordered(p, 0.25),
    "black border of 60%": lambda p: _bordered(p, 0.60),
    TURN: lambda p: p.transpose(Image.Transpose.ROTATE_90),  # radiographs alone
    "half size": lambda p: _scaled(p, 0.5),
    "crop of 10%": lambda p: _cropped(p, 0.10),
    "JPEG quality 50": lambda p: _jpeg(p, 50),
}


def robustness(bench: Bench) -> Iterator[Found]:
    """(h) How many answers change though what is seen does not."""
    open_questions = {"modality family": MODALITY, "modality in detail": MODALITY, "plane": PLANE, "organ": ORGAN}
    if bench.has(VQA_MED):
        films, said = bench.val
        truth = {
            "modality family": [f.facts["family"] for f in films],
            **{kind: [f.facts.get(kind.partition(" ")[0]) for f in films] for kind in ("modality in detail", "plane", "organ")},
        }
        yield from _changes(bench, SETS[VQA_MED], films, said, open_questions, truth)
    if bench.has(FRACATLAS):
        films = [f for value in (1, 0) for f in bench.drawn([f for f in bench.fracatlas[0] if f.facts["fractured"] == value], MANY // 3)]
        questions = {**open_questions, "fracture": FRACTURE}
        yes = ["yes" if f.facts["fractured"] else "no" for f in films]
        unknown: list[str | None] = [None] * len(films)
        truths: dict[str, Sequence[str | None]] = dict.fromkeys(questions, unknown)
        truths |= {"modality family": ["xr"] * len(films), "fracture": yes}
        yield from _changes(bench, SETS[FRACATLAS], films, bench.said(films, tuple(questions.values())), questions, truths)


def _changes(
    bench: Bench, pictures: str, films: list[Film], before: Said, questions: Mapping[str, str], truth: Mapping[str, Sequence[str | None]]
) -> Iterator[Found]:
    for name, change in CHANGES.items():
        kept = [i for i, f in enumerate(films) if name != TURN or f.set != VQA_MED or f.facts["family"] == "xr"]
        after, over = bench.said([films[i] for i in kept], tuple(questions.values()), change), bench.over([films[i] for i in kept])
        for kind, question in questions.items():
            mine = (lambda a: family(a)) if kind == "modality family" else (lambda a: a)
            pairs = [(before[i][question], now[question]) for i, now in zip(kept, after, strict=True)]
            was, now = ([mine(word(a)) for a in side] for side in zip(*pairs, strict=True)) if pairs else ([], [])
            known = [None if truth[kind][i] is None else normalised(str(truth[kind][i])) for i in kept]
            labelled, given = _bools(known), _bools(was)
            figures = {
                "another answer, of given": over.share((a != b and b for a, b in zip(was, now, strict=True)), given),
                "... that contradicts it": over.share((not agree(a, b) for a, b in pairs), given),
                "no answer any more, of given": over.share((b is None for b in now), given),
            }
            for when, side in (("before", 0), ("after", 1)):
                hits = [mine(best(pair[side])) == t for pair, t in zip(pairs, known, strict=True)]
                figures |= {f"accuracy {when}": over.share(hits, labelled)} if labelled.any() else {}
            yield Found(f"{name}: {kind}", pictures, figures)


SECTIONS: dict[str, Callable[[Bench], Iterator[Found]]] = {
    "findings": findings,
    "normality": normality,
    "consistency": consistency,
    "body part": body_part,
    "header": header,
    "confidence": weak,
    "no radiology": no_radiology,
    "radiology": radiology,
    "robustness": robustness,
}


# --- the command ----------------------------------------------------------------------------------------------------------------


def measured(bench: Bench, run: Run, sections: Sequence[str]) -> Iterator[Row]:
    manifest = bench.predictors[0].manifest
    learned = {name for p in bench.predictors for name in tower_trained_on(p.manifest.provenance)} & SETS.keys()
    learned -= {VQA_MED, *bench.named}  # VQA-Med's validation part is apart
    for section in sections:
        print_note(f"{section} ...")
        for found in SECTIONS[section](bench):
            seen = any(SETS[name] in found.pictures for name in learned)
            figures = {name: _rounded(figure) for name, figure in found.figures.items()}
            yield run.row(manifest.backbone, f"pmclip-deploy {manifest.precision}", f"{section}: {found.part}", found.pictures,
                          {**figures, **({"learned from this set": {"value": True}} if seen else {})}, threads=None,
                          samples=max((f["n"] for f in figures.values()), default=0), not_measured=found.not_measured)  # fmt: skip


def _rounded(figure: Figure) -> Figure:
    def short(value: Any) -> Any:
        return [short(v) for v in value] if isinstance(value, list) else round(value, 4) + 0.0 if isinstance(value, float) else value

    return {key: short(value) for key, value in figure.items()}


def groups_from_file(path: Path) -> Groups:
    """{(set, group)} of lines "SET GROUP"."""
    try:
        lines = [line.split(None, 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'{path}: cannot be read ({type(error).__name__}); give a text file of lines "SET GROUP"') from None
    if wrong := [line for line in lines if len(line) != 2 or line[0] not in SETS]:
        raise InputError(f'{path}: "{" ".join(wrong[0])[:60]}" is no line "SET GROUP" with a set among {", ".join(SETS)}')
    return {(name, group.strip()) for name, group in lines}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bundle", type=Path, action="append", help="default: the embedded model; repeat it for cross-validation")
    parser.add_argument("--apart", type=Path, action="append", default=[], help='lines "SET GROUP", one file for each --bundle')
    parser.add_argument("--pictures", type=Path, default=Path("/"), help="where Debian's pictures were extracted; default: /")
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--limit", type=int, help="so many pictures of each set and class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    parser.add_argument("--rows", type=Path, help="JSON lines to render; no bundle is asked")
    parser.add_argument("--markdown", type=Path, action="append", help="a page whose tables are written anew from --rows; repeat it")
    options = parser.parse_args(arguments)
    try:
        if options.rows is not None:
            rows = read(options.rows)
            for page in options.markdown or [None]:
                trust_table.render(rows, page)
            return 0
        if options.data is None or not options.data.is_dir():
            raise UsageError("--data: give the folder that holds fracatlas, vqa-med-2019 and the others, or --rows to render a table")
        if options.limit is not None and options.limit < 2:
            raise UsageError("--limit: give 2 or more")
        bundles = options.bundle or [DEFAULT_BUNDLE]
        if len(options.apart) not in (0 if len(bundles) == 1 else len(bundles), len(bundles)):
            raise UsageError("--apart: give one file for each --bundle")
        _measure(options, bundles, [groups_from_file(path) for path in options.apart] or [set()])
    except PmclipError as error:
        print_error(str(error))
        return error.exit_code
    return 0


def _measure(options: argparse.Namespace, bundles: Sequence[Path], apart: Sequence[Groups]) -> None:
    predictors = [pm.load(path) for path in bundles]
    manifest, hashes = predictors[0].manifest, [p.model.sha256 for p in predictors]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    about = {"name": manifest.name, "version": manifest.version, "precision": manifest.precision, "sha256": sha256, "folds": len(hashes)}
    packages = versions("pmclip-deploy", "numpy", "onnxruntime", "pillow", "pydicom", "scikit-image", "scikit-learn")
    environment = {"bundle": about, "packages": packages, "answers": ANSWER_SCHEMA, "seed": options.seed, "limit": options.limit}
    run = Run(command_line("python -m pmclip_deploy.benchmarks.trust"), environment)
    bench = Bench(options.data, predictors, apart, options.pictures, options.seed, options.limit)
    rows = list(measured(bench, run, options.only or list(SECTIONS)))
    print(trust_table.markdown(rows, limited=True))
    if options.output is not None:
        append(options.output, rows)


if __name__ == "__main__":
    sys.exit(main())
