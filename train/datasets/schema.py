"""The schema that every reader fills, and what readers share: rows of text and JSON, with errors that name file and line."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pmclip_deploy.bundle.checks import no_twin
from pmclip_deploy.errors import InputError
from pmclip_deploy.evaluation.rows import normalised
from pmclip_deploy.texts import lines_of_file
from pmclip_deploy.train.datasets.pictures import Member, Place

SPLITS = ("train", "val", "test")
BROKEN_SHARE = 0.01  # of a caption file's rows: more than that is not a slip but another format


@dataclass(frozen=True)
class Question:
    image: Path
    question: str
    answer: str
    category: str  # what the question is about: "modality", "plane", "organ", "abnormality", "other"
    closed: bool  # the dataset says so, or the answer is yes or no
    phrase: str | None = None  # how the wording came about, where the dataset says so: "freeform", "para" or "frame"


@dataclass(frozen=True, slots=True)
class Pair:
    image: Place
    caption: str


Row = TypeVar("Row", Question, Pair)


@dataclass(frozen=True)
class Layout(Generic[Row]):
    """One form in which a dataset lies in a folder."""

    name: str
    expects: str  # the files it is recognised by
    splits: Callable[[Path], tuple[str, ...]]  # those of SPLITS that the folder holds; none if something else lies there
    read: Callable[[Path, str], list[Row]]
    one_file: bool = False  # holds all splits, and is read as "all" in its own order


def question_from_text(image: Path, question: str, answer: str, category: str, answer_type: str = "") -> Question:
    """``answer_type`` is the dataset's own word ("CLOSED", "OPEN", in any case, with blanks); without one a yes or no is closed."""
    said = normalised(answer)
    closed = {"CLOSED": True, "OPEN": False}.get(answer_type.strip().upper(), said in ("yes", "no"))
    return Question(image, normalised(question), said, category, closed)


def caption_from_text(text: str) -> str:
    """With its blanks folded. Raises ValueError if there is none, or if it is no Unicode text (JSON may hold half a character)."""
    if not (caption := " ".join(text.split())):
        raise ValueError("empty")
    caption.encode()
    return caption


def image_key(image: Place) -> str:
    """What names an image wherever it lies. MedPix numbers (synpic54610) hold across datasets; SLAKE's files are all called source.jpg."""
    if isinstance(image, Member):
        return f"{image.shard.name}/{image.path}"
    return image.stem if re.fullmatch(r"synpic\d+", image.stem) else f"{image.parent.name}/{image.name}"


def is_there(path: Place, folder: bool = False) -> bool:
    """Whether it is a file (or folder); a name that none can have, or one in a folder that may not be read, is not there."""
    if isinstance(path, Member):
        return True
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError):
        return False


def images_there(rows: Collection[Row]) -> tuple[list[Row], int]:
    """(rows whose image file is there, number of images that are missing)"""
    missing = {image for image in {row.image for row in rows} if not is_there(image)}
    return [row for row in rows if row.image not in missing], len(missing)


def lines_from_text(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a dataset's UTF-8 file, blank lines left out. Raises InputError."""
    return lines_of_file(path, "give the dataset's folder")


def row_from_object(row: Any, required: tuple[str, ...]) -> dict[str, str]:
    """The fields of a JSON object as text, numbers too, since some answers are. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    texts = {k: str(v) for k, v in row.items() if isinstance(v, str | int | float) and not isinstance(v, bool)}
    if missing := [k for k in required if k not in texts]:
        raise ValueError(f"no {missing[0]!r}; each row needs {', '.join(required)}")
    return texts


def row_from_line(line: str, required: tuple[str, ...]) -> dict[str, str]:
    """Raises ValueError."""
    try:
        row = json.loads(line, object_pairs_hook=no_twin)
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object") from None
    return row_from_object(row, required)


def rows_from_jsonl(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    rows = []
    for number, line in lines_from_text(path):
        try:
            rows.append(row_from_line(line, required))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {error}") from None
    return rows


def rows_from_json(path: Path, required: tuple[str, ...], keep: Callable[[Any], bool] = lambda row: True) -> list[dict[str, str]]:
    """The rows of a JSON list for which ``keep`` holds."""
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "give the dataset's folder") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON in UTF-8") from None
    if not isinstance(entries, list):
        raise InputError(f"{path}: not a list of questions")
    rows = []
    for number, entry in enumerate(entries, 1):
        try:
            if keep(entry):
                rows.append(row_from_object(entry, required))
        except ValueError as error:
            raise InputError(f"{path}: entry {number}: {error}") from None
    return rows


def refuse_if_broken(path: Path, broken: list[int], rows: int) -> None:
    """Raises InputError where more than BROKEN_SHARE of a caption file's rows, of which ``broken`` are the lines, cannot be read."""
    if len(broken) > BROKEN_SHARE * rows:
        raise InputError(
            f"{path}: line {broken[0]}: not a row of image and caption ({len(broken)} of {rows} rows, more than {BROKEN_SHARE:.0%})",
            "correct the file",
        )


def ids_with_licence(path: Path, licence: dict[str, str], licences: Collection[str]) -> set[str]:
    """Those that ``path`` gives one of ``licences``. Raises InputError if there is none."""
    if not (kept := {key for key, value in licence.items() if value in licences}):
        known = ", ".join(sorted(set(licence.values())))
        raise InputError(f"{path}: no row has the licence {', '.join(licences)}", f"there are {known}")
    return kept


def image_folder(folder: Path, *names: str) -> Path:
    """The first of ``names`` that is there, else the first."""
    return next((folder / name for name in names if is_there(folder / name, folder=True)), folder / names[0])
