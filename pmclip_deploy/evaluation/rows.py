"""Rows of {image, question, answer}, and how answers are compared."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.checks import no_twin
from pmclip_deploy.errors import InputError
from pmclip_deploy.texts import lines_of_file

Array = NDArray[Any]


def normalised(text: str) -> str:
    """Lower case, blanks folded, no closing full stops: how answers and questions are compared, here and in training."""
    return " ".join(text.lower().split()).rstrip(". ")


@dataclass(frozen=True)
class Row:
    image: str
    question: str
    answer: str
    category: str | None = None
    type: str | None = None  # of the answer: "open" or "closed"
    phrase: str | None = None  # of the question, as VQA-RAD says it: "freeform", "para" or "frame"


def pictures_of(rows: Sequence[Row]) -> tuple[list[str], Array]:
    """(the images in their order, (N,) int: which of them each row is about)"""
    names = list(dict.fromkeys(row.image for row in rows))
    place = {name: i for i, name in enumerate(names)}
    return names, np.array([place[row.image] for row in rows])


def rows_from_jsonl(path: Path, images: Path | None = None) -> list[Row]:
    """One row per line; with ``images``, every picture named must be there."""
    lines = list(lines_of_file(path, "pass a file of JSON lines {image, question, answer}"))
    if path.suffix == ".json" and lines and lines[0][1].lstrip().startswith("["):
        raise InputError(f"{path}: one JSON list, not JSON lines", f'of a dataset pass the folder, data="{path.parent}", and its split')
    rows = [_row(line, f"{path}, line {number}", images) for number, line in lines]
    if not rows:
        raise InputError(f"{path}: holds no rows", "pass a file of JSON lines {image, question, answer}")
    return rows


def sha256_of_rows(rows: Sequence[Row]) -> str:
    return hashlib.sha256("\n".join(f"{r.image}\t{r.question}\t{r.answer}" for r in rows).encode()).hexdigest()


def _row(line: str, where: str, images: Path | None) -> Row:
    try:
        data = json.loads(line, object_pairs_hook=no_twin)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON", "every line is one object {image, question, answer}") from error
    for key in ("image", "question", "answer"):
        if not isinstance(data, dict) or not isinstance(data.get(key), str) or not data[key].strip():
            raise InputError(f'{where}: "{key}" is missing, empty or no text', "every line is one object {image, question, answer}")
    if images is not None and not (images / data["image"]).is_file():
        raise InputError(f"{where}: its image {images / data['image']} is missing", "check the folder of images")
    category, answer_type = data.get("category"), str(data.get("answer_type", "")).strip().lower()
    return Row(
        data["image"],
        data["question"],
        data["answer"],
        category if isinstance(category, str) else None,
        answer_type if answer_type in ("open", "closed") else None,
    )


def types_of(rows: Sequence[Row]) -> list[str]:
    """Each row's group in the table by type; none where no row says its type."""
    return [row.type or "none" for row in rows] if any(row.type for row in rows) else []
