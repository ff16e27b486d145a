"""Datasets: what lies in a folder decides the reader, which turns it into questions about images, or into images with captions."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pmclip_deploy.errors import InputError
from pmclip_deploy.evaluation.rows import normalised
from pmclip_deploy.train.datasets import image_captions, roco, rocov2, shards, slake, vqa_med, vqa_rad
from pmclip_deploy.train.datasets.schema import SPLITS, Layout, Pair, Question, Row, image_key, images_there, is_there

__all__ = [
    "SPLITS",
    "Pair",
    "Question",
    "image_key",
    "images_there",
    "is_there",
    "layout_of",
    "layout_of_questions",
    "normalised",
    "pairs_from_folder",
    "questions_from_folder",
]

QUESTIONS = (*vqa_rad.LAYOUTS, *vqa_med.LAYOUTS, slake.LAYOUT)


def questions_from_folder(folder: Path, split: str) -> list[Question]:
    """The questions of one split ("train", "val", "test", or "all"), by the dataset that the folder holds. Raises InputError.

    VQA-RAD's official splits share their images; ``pmclip_deploy.train.splits`` makes others.
    """
    return _rows(folder, split, layout_of_questions(folder))


def layout_of_questions(folder: Path) -> Layout[Question]:
    """Its ``splits(folder)`` are those that lie there. Raises InputError."""
    return _recognised(folder, QUESTIONS)


def pairs_from_folder(folder: Path, split: str, licences: Collection[str] = (), skipped: Counter[str] | None = None) -> list[Pair]:
    """The captions of one split ("train", "val", "test", or "all"), whether or not their images are there (``images_there``).

    ``licences`` keeps ROCO's and ROCOv2's rows of these alone ("CC BY"); ``skipped`` counts what is left out, by reason.
    Raises InputError.
    """
    return _rows(folder, split, _recognised(folder, _pairs(licences, Counter() if skipped is None else skipped)))


def layout_of(folder: Path, skipped: Counter[str]) -> Layout[Question] | Layout[Pair]:
    """The layout of whatever dataset lies in ``folder``. Raises InputError."""
    known: tuple[Layout[Any], ...] = (*QUESTIONS, *_pairs((), skipped))
    return _recognised(folder, known)


def _pairs(licences: Collection[str], skipped: Counter[str]) -> tuple[Layout[Pair], ...]:
    of_roco = (roco.layout(licences, skipped), rocov2.layout(licences, skipped))
    return (*of_roco, *image_captions.layouts(skipped), shards.layout(skipped))


def _recognised(folder: Path, layouts: tuple[Layout[Row], ...]) -> Layout[Row]:
    for layout in layouts:
        if layout.splits(folder):
            return layout
    known = "; ".join(f"{layout.name} ({layout.expects})" for layout in layouts)
    raise InputError(
        f"{folder}: {'' if is_there(folder, folder=True) else 'no such folder, '}no known dataset here", f"expected one of {known}"
    )


def _rows(folder: Path, split: str, layout: Layout[Row]) -> list[Row]:
    splits: tuple[str, ...] = layout.splits(folder)
    if split not in (*splits, "all"):
        raise InputError(f"{folder}: no split {split!r} in this {layout.name}", f"it holds {', '.join(splits)}")
    rows = [row for name in (splits if split == "all" and not layout.one_file else (split,)) for row in layout.read(folder, name)]
    if not rows:
        raise InputError(f"{folder}: split {split!r} is empty")
    return rows
