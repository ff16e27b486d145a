"""Splits by image: which images show the same picture, and questions parted so that no picture stands on both sides."""

import random
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from pmclip_deploy.errors import InputError, PmclipError
from pmclip_deploy.evaluation.rows import Row
from pmclip_deploy.train.datasets import Question, image_key, layout_of_questions, questions_from_folder
from pmclip_deploy.train.datasets.pictures import Place, picture_of

IMAGE_DISJOINT = "image-disjoint"
SAME_PICTURE = 0.995
P = TypeVar("P", bound=Place)
BLOCK = 512  # rows of the similarity matrix held at a time


def questions_of_split(folder: Path, split: str, seed: int) -> tuple[list[Question], list[Question]]:
    """(known, asked) questions: those that may train, and those of ``split``. Raises InputError.

    ``split`` is one of the dataset's own, whose known questions are its training split, or "image-disjoint", drawn by ``seed``.
    """
    if split == IMAGE_DISJOINT:
        return image_disjoint_split(questions_from_folder(folder, "all"), seed)
    asked = questions_from_folder(folder, split)
    return questions_from_folder(folder, "train") if "train" in layout_of_questions(folder).splits(folder) else [], asked


def rows_from_questions(questions: Sequence[Question]) -> list[Row]:
    """As `evaluate` takes them; an image is named by its whole path."""
    return [Row(str(q.image.absolute()), q.question, q.answer, q.category, "closed" if q.closed else "open", q.phrase) for q in questions]


def image_disjoint_split(questions: Sequence[Question], seed: int, held_out: float = 0.2) -> tuple[list[Question], list[Question]]:
    """(training, held-out) questions: images are drawn by ``seed`` until their share reaches ``held_out``, each with all its doubles.

    The draw depends on the images' names, not on where they lie or in which order the questions come. Where image files are
    missing, only their names can tell doubles. Neither side is empty. Raises InputError where there are not two pictures.
    """
    groups = image_groups({q.image for q in questions})
    order = sorted({q.image for q in questions}, key=lambda image: (image_key(image), str(image)))
    members: dict[int, set[str]] = {}
    for image in order:
        members.setdefault(groups[image], set()).add(image_key(image))
    drawn = list(members)
    random.Random(seed).shuffle(drawn)
    wanted, held, count = held_out * sum(map(len, members.values())), set(), 0
    if len(drawn) < 2:
        raise InputError("an image-disjoint split needs questions about two pictures or more", "give another --data")
    for group in drawn[:-1]:
        if count >= wanted:
            break
        held.add(group)
        count += len(members[group])
    sides: tuple[list[Question], list[Question]] = ([], [])
    for q in questions:
        sides[groups[q.image] in held].append(q)
    return sides


def without_pictures_of(questions: Sequence[Question], others: Sequence[Question]) -> list[Question]:
    """Those ``questions`` whose image is none of the ``others'``, by name (image_key) or by picture."""
    names = {image_key(q.image) for q in others}
    left = [q for q in questions if image_key(q.image) not in names]
    twins = shared_pictures({q.image for q in left}, {q.image for q in others})
    return [q for q in left if q.image not in twins]


def image_groups(images: Collection[Path]) -> dict[Path, int]:
    """Image to the number of its group: images of one name or one picture, and what these chain together."""
    paths = sorted(images)
    parent = list(range(len(paths)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        parent[i] = first.setdefault(image_key(path), i)
    seen, thumbnails = thumbnails_from_images(paths)
    place = {path: i for i, path in enumerate(paths)}
    index = [place[path] for path in seen]
    for start in range(0, len(seen), BLOCK):
        for a, b in np.argwhere(thumbnails[start : start + BLOCK] @ thumbnails.T > SAME_PICTURE).tolist():
            parent[root(index[start + a])] = root(index[b])
    return {path: root(i) for i, path in enumerate(paths)}


def shared_pictures(images: Collection[P], others: Collection[P]) -> set[P]:
    """Those of ``images`` that show the same picture as one of ``others``, whatever their names: thumbnails correlate above 0.995."""
    (paths, a), (rest, b) = thumbnails_from_images(images), thumbnails_from_images(others)
    if not rest:
        return set()
    most = [(a[start : start + BLOCK] @ b.T).max(1) for start in range(0, len(paths), BLOCK)]
    return {path for path, best in zip(paths, np.concatenate(most) if most else [], strict=True) if best > SAME_PICTURE}


def thumbnails_from_images(images: Collection[P]) -> tuple[list[P], NDArray[np.float32]]:
    """(sorted places, (N, 1024) f32 of zero mean and unit length); files that are missing or no image are left out."""
    places, rows = [], []
    bar = track(sorted(images, key=str), "reading images", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    for place in bar:
        try:
            rows.append(_thumbnail(place))
            places.append(place)
        except (OSError, ValueError, PmclipError, Image.DecompressionBombError):
            continue
    return places, np.stack(rows) if rows else np.zeros((0, 1024), np.float32)


def _thumbnail(place: Place) -> NDArray[np.float32]:
    with Image.open(place) if isinstance(place, Path) else Image.fromarray(picture_of(place).pixels) as image:
        image.draft("L", (64, 64))  # a JPEG is decoded at a fraction of its size
        x = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32).ravel()
    x -= x.mean()
    x /= max(float(np.linalg.norm(x)), 1e-6)
    return x
