"""One schema for every dataset: a reader turns a folder into questions about images."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.errors import InputError


@dataclass(frozen=True)
class Question:
    image: Path
    question: str
    answer: str
    category: str  # what the question is about: "modality", "plane", "organ", "abnormality", "other"


def normalised(text: str) -> str:
    """Lower case, blanks folded, no closing full stop: how answers and questions are compared."""
    return " ".join(text.lower().split()).rstrip(".").strip()


def rows_from_jsonl(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if missing := [k for k in required if not isinstance(row.get(k), str)]:
                    raise InputError(f"{path}: line {number}: no {missing[0]!r}; each row needs {', '.join(required)}")
                rows.append(row)
    except OSError:
        raise InputError(f"{path}: not found; give the dataset's folder") from None
    except (ValueError, AttributeError):
        raise InputError(f"{path}: line {len(rows) + 1}: not a JSON object") from None
    return rows


def questions_from_folder(folder: Path, split: str) -> list[Question]:
    """The questions of one split, by the dataset that the folder holds. Raises InputError."""
    from pmclip_deploy.train.datasets import vqa_med, vqa_rad

    readers: dict[str, Callable[[Path, str], list[Question]]] = {
        "val.jsonl": vqa_med.questions_from_vqa_med,
        "questions.jsonl": vqa_rad.questions_from_vqa_rad,
    }
    for name, reader in readers.items():
        if (folder / name).is_file():
            return reader(folder, split)
    raise InputError(f"{folder}: no known dataset here; expected one of {', '.join(readers)}")
