"""Films: radiographs with what is known of them, from the datasets that `train findings` reads, and the folds that part them by patient."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.checks import no_twin
from pmclip_deploy.console import counted
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train import kinds as K
from pmclip_deploy.train.datasets import Question, is_there
from pmclip_deploy.train.datasets.schema import lines_from_text
from pmclip_deploy.train.findings.gate import stratified_folds
from pmclip_deploy.train.findings.groups import group_of_row, kept_for_demo
from pmclip_deploy.train.nonradiographs import nonradiographs
from pmclip_deploy.train.questions import questions_for_training

FINDINGS = ("fracture", "pneumonia")
REGIONS = ("hand", "leg", "hip", "shoulder", "chest", "other")  # "other": all that is no radiograph of the others
PREPROCESS = Preprocess(320, "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), trim=True)
NO_RADIOLOGY, HELD_OUT, SEED = 900, 200, 11  # pictures that are no radiology images: how many, how many of them never train, their seed
LABELS = "labels.jsonl"

TRAIN, VAL = -1, -2  # in place of a fold: what trains every network, what trains none
Box = tuple[float, float, float, float]  # x, y, width, height, as shares of the picture


@dataclass(frozen=True, eq=False)
class Film:
    """A picture and what is known of it; None is unknown."""

    name: str
    image: Path | NDArray[np.uint8]
    source: str
    part: Literal["folds", "train", "val"]  # what measures by cross-validation, what trains every network, what trains none
    group: str  # of a patient, or of films that may show one; stays together
    findings: tuple[bool | None, ...]  # of FINDINGS
    regions: tuple[bool | None, ...]  # of REGIONS
    boxes: tuple[Box, ...] | None = None  # of the first finding; () where it is known to be nowhere
    size: tuple[int, int] | None = None  # (width, height) as it was published
    children: bool = False
    views: int = 1  # ways in which it is seen
    weight: float = 1.0  # times that it is seen in an epoch, on average

    def pixels(self) -> NDArray[np.uint8]:
        """(H, W) or (H, W, 3). Raises InputError."""
        return picture_from_path(self.image).pixels if isinstance(self.image, Path) else self.image

    def sha256(self) -> str:
        """Of the picture and of all that is known of it."""
        content = self.image.read_bytes() if isinstance(self.image, Path) else self.image.tobytes()
        known = json.dumps([self.name, self.part, self.group, self.findings, self.regions, self.boxes, self.views, self.weight])
        return hashlib.sha256(known.encode() + content).hexdigest()


def films_from_folders(folders: Sequence[Path], limit: int = 0) -> list[Film]:
    """Those of all datasets but for the demo's, and pictures that are no radiology images. Raises InputError.

    ``limit`` takes as many of each dataset and part, spread over it.
    """
    known = [[film for film in films if not kept_for_demo(film.group)] for folder in folders for films in _films_from_folder(folder)]
    return [film for films in [*known, *_films_of_no_radiology()] for film in _spread(films, limit)]


def folds_of_films(films: Sequence[Film], count: int) -> NDArray[np.int64]:
    """(N,): the fold that a film is held out of, or TRAIN or VAL. Films of a group share it; each source is spread over all folds.

    Raises UsageError where a source has fewer groups than there are folds.
    """
    folds = np.array([{"folds": 0, "train": TRAIN, "val": VAL}[film.part] for film in films], np.int64)
    for source in dict.fromkeys(film.source for film in films if film.part == "folds"):
        own = [i for i, film in enumerate(films) if film.part == "folds" and film.source == source]
        of = stratified_folds([films[i].group for i in own], [any(films[i].findings) for i in own], count)
        if len(of) < count:
            raise UsageError(
                f"{source}: {counted(len(of), 'group')} of films cannot be parted into {count} folds", "lower --folds, or raise --limit"
            )
        folds[own] = [of[films[i].group] for i in own]
    return folds


def sha256_of_films(films: Sequence[Film]) -> str:
    return hashlib.sha256("\n".join(film.sha256() for film in films).encode()).hexdigest()


def _films_from_folder(folder: Path) -> list[list[Film]]:
    """Of each part. Raises InputError."""
    if not is_there(folder / LABELS):
        training, validation = questions_for_training([folder])
        return [_films_of_questions(folder, training, "train"), _films_of_questions(folder, validation, "val")]
    rows = list(_rows(folder))
    if not rows:
        raise InputError(f"{folder / LABELS}: holds no rows", "give FracAtlas's or Kermany's folder")
    reader = _film_of_fracatlas if "boxes" in rows[0][1] else _film_of_kermany
    films = []
    for number, row in rows:
        try:
            films.append(reader(folder, row))
        except (KeyError, TypeError, ValueError) as error:
            kind = {"KeyError": "is missing"}.get(type(error).__name__, "cannot be read")
            raise InputError(f"{folder / LABELS}: line {number}: {error} {kind}", "compare it with the lines before it") from None
    return [films]


def _rows(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines_from_text(folder / LABELS):
        try:
            row = json.loads(line, object_pairs_hook=no_twin)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{folder / LABELS}: line {number}: not a JSON object")
        yield number, row


def _film_of_fracatlas(folder: Path, row: dict[str, Any]) -> Film:
    labels, fractured = row["labels"], bool(row["labels"]["fractured"])
    return Film(
        name=f"{folder.name}/{Path(row['image']).name}",
        image=folder / row["image"],
        source="FracAtlas",
        part="folds",
        group=group_of_row(row),
        findings=_findings(fracture=fractured),
        regions=tuple(bool(labels.get(region, 0)) for region in REGIONS),
        boxes=tuple((float(x), float(y), float(w), float(h)) for x, y, w, h in row["boxes"]),
        size=_size(row),
        views=12 if fractured else 5,
        weight=3 if fractured else 1,
    )


def _film_of_kermany(folder: Path, row: dict[str, Any]) -> Film:
    name = Path(row["image"]).name
    return Film(
        name=f"{folder.name}/{name}",
        image=folder / row["image"],
        source="Kermany",
        part="folds",
        group=group_of_row(row),
        findings=_findings(fracture=False, pneumonia=row["labels"]["finding"] == "pneumonia"),
        regions=_region("chest"),
        size=_size(row),
        children=True,
        views=3,
        weight=0.25,
    )


def _size(row: dict[str, Any]) -> tuple[int, int]:
    width, height = row["original_size"]
    return int(width), int(height)


def _films_of_questions(folder: Path, questions: Sequence[Question], part: Literal["train", "val"]) -> list[Film]:
    by_image: dict[Path, list[Question]] = {}
    for q in questions:
        by_image.setdefault(q.image, []).append(q)
    films = (_film_of_questions(f"{folder.name}/{image.name}", image, of, part) for image, of in sorted(by_image.items()))
    return [film for film in films if film is not None]


def _film_of_questions(name: str, image: Path, questions: Sequence[Question], part: Literal["train", "val"]) -> Film | None:
    """What the answers about a picture of VQA-Med say of it; None where they do not tell whether it is a radiograph."""
    modality = [q for q in questions if q.category == "modality"]
    named = [q.answer for q in modality if q.answer not in ("yes", "no")]
    agreed = [q.question for q in modality if q.answer == "yes"]
    organs = [q.answer for q in questions if q.category == "organ"]
    abnormalities = [q.answer for q in questions if q.category == "abnormality"]
    radiograph = any(answer.startswith("xr") for answer in named) or any(
        re.search("x-ray|plain film", question) and " or " not in question for question in agreed
    )
    fractured, regions = None, _UNKNOWN
    if not radiograph:
        if not named and not any(re.search(r"\bct\b|mri|ultrasound|mr |t1|t2|flair|contrast", q.question) for q in modality):
            return None
        regions = _region("other")
    elif "musculoskeletal" in organs:
        fractured = any(re.search(K.FINDINGS[0].pattern, answer) for answer in abnormalities) if abnormalities else None
    elif organs:
        regions = _REGION_OF_ORGAN.get(organs[0], _UNKNOWN)
    weight = {True: 2, False: 1, None: 0.12}[fractured]
    views = 4 if fractured else 1
    return Film(name, image, "VQA-Med 2019", part, name, _findings(fracture=fractured), regions, views=views, weight=weight)


def _films_of_no_radiology() -> list[list[Film]]:
    def film(i: int, pixels: NDArray[np.uint8], part: Literal["train", "val"]) -> Film:
        nothing = tuple(False for _ in FINDINGS)
        return Film(f"no radiology/{i}", pixels, "no radiology", part, str(i), nothing, _region("other"), weight=0.3)

    pictures = list(enumerate(nonradiographs(NO_RADIOLOGY, SEED)))
    return [[film(i, x, "train") for i, x in pictures[:-HELD_OUT]], [film(i, x, "val") for i, x in pictures[-HELD_OUT:]]]


def _spread(films: list[Film], limit: int) -> list[Film]:
    """``limit`` of them, evenly spaced; 0 takes all."""
    if not limit or len(films) <= limit:
        return films
    return [films[i * len(films) // limit] for i in range(limit)]


def _findings(**known: bool | None) -> tuple[bool | None, ...]:
    return tuple(known.get(name) for name in FINDINGS)


def _region(name: str) -> tuple[bool | None, ...]:
    return tuple(region == name for region in REGIONS)


_UNKNOWN: tuple[bool | None, ...] = tuple(None for _ in REGIONS)
_REGION_OF_ORGAN = {  # of VQA-Med's organ answers, for radiographs; bones may be of any region
    "lung, mediastinum, pleura": _region("chest"),
    **dict.fromkeys(("skull and contents", "face, sinuses, and neck", "gastrointestinal", "breast"), _region("other")),
}
