"""Pictures and questions that an export measures on: which are taken, and what each graph is given of them."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy.errors import InputError
from pmclip_deploy.evaluation.rows import rows_from_jsonl
from pmclip_deploy.export.gates import FINDINGS
from pmclip_deploy.export.probes import QUESTIONS, Progress
from pmclip_deploy.imaging.preprocess import grey_from_pixels, tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.predictor import Predictor

IMAGES, QUESTIONS_READ = 256, 256  # taken of a folder or of a training set to calibrate on, evenly spread over their sorted names
FEW = 16  # pictures, where each is asked about many times


def feeds_of(predictor: Predictor, paths: Sequence[Path], questions: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Of each graph the inputs that real pictures and questions give, one after the other."""
    manifest, read = predictor.manifest, partial(_pixels, progress=progress)
    feeds: dict[str, Any] = {
        "image": ({"pixels": tensor_from_pixels(x, manifest.preprocess)[None]} for x in read(paths, "Calibrating the image tower")),
        "text": ({"tokens": x} for x in predictor.tokens(questions)),
    }
    if (head := manifest.head) is not None:
        asked, some = predictor.question_features(questions), spread(paths, FEW)
        name = "text" if head.words is None else "tokens"
        feeds["head"] = (
            {"image": predictor.image_features(path)[None], name: asked[i :: len(some)][:1]}
            for i, path in enumerate(some)
            if i < len(asked)
        )
        if head.grey:
            feeds["features"] = (
                {n: grey_from_pixels(x, side)[None] for n, side in head.grey.items()} for x in read(some, "Calibrating the features")
            )
    if manifest.findings is not None:
        preprocess = manifest.findings.preprocess
        feeds[FINDINGS] = ({"pixels": tensor_from_pixels(x, preprocess)[None]} for x in read(paths, "Calibrating what looks for findings"))
    return feeds


def _pixels(paths: Sequence[Path], what: str, progress: Progress) -> Iterator[Any]:
    for path in progress(paths, what):
        yield picture_from_path(path).pixels


def spread(found: Sequence[Any], count: int) -> list[Any]:
    return [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]


def images_of(sources: Sequence[Path]) -> tuple[Path, list[Path]]:
    """(their root, paths) of folders, or of the rows of training sets with images/ beside them, IMAGES in all where there are several.

    Raises InputError.
    """
    roots, paths = list[Path](), list[Path]()
    for source in sources:
        if source.suffix == ".jsonl":
            root = source.parent / "images"
            found = [root / name for name in sorted({row.image for row in rows_from_jsonl(source, root)})]
        else:
            root = source
            found = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".dcm")) if source.is_dir() else []
        if not found:
            raise InputError(f"{source}: no images (.jpg, .png, .dcm) to calibrate on", "give a folder of training images")
        roots.append(root)
        paths += found if len(sources) == 1 else spread(found, IMAGES // len(sources))
    return Path(os.path.commonpath(roots)), paths


def questions_of(source: Path) -> list[str]:
    if source.suffix != ".jsonl":
        return list(QUESTIONS)
    return spread(sorted({row.question for row in rows_from_jsonl(source)}), QUESTIONS_READ)
