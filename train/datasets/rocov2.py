"""ROCOv2 (Rückert et al. 2024) in its own layout: {train,valid,test}_captions.csv of ID and Caption, and the images of its archives."""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from pmclip_deploy.errors import InputError
from pmclip_deploy.texts import text_of_file
from pmclip_deploy.train.datasets.schema import Layout, Pair, caption_from_text, ids_with_licence, image_folder, is_there, refuse_if_broken

NAMES = {"train": "train", "val": "valid", "test": "test"}
LICENCES = "license_information.csv"


def pairs_from_rocov2(folder: Path, split: str, licences: Collection[str], skipped: Counter[str]) -> list[Pair]:
    """``licences`` keeps the rows of these alone, as the attributions in license_information.csv begin ("CC BY", "CC BY-NC")."""
    name = NAMES[split]
    home = image_folder(folder, name, f"{name}_images/{name}", f"{name}_images")
    kept = ids_with_licence(folder / LICENCES, dict(_licences(folder / LICENCES)), licences) if licences else set()
    path = folder / f"{name}_captions.csv"
    pairs, broken, rows = [], [], 0
    for number, row in _rows(path, ("ID", "Caption")):
        rows += 1
        key = row["ID"].strip()
        try:
            caption = caption_from_text(row["Caption"])
        except ValueError:
            key = ""
        if not key:
            broken.append(number)
        elif licences and key not in kept:
            skipped["other licence"] += 1
        else:
            pairs.append(Pair(home / f"{key}.jpg", caption))
    refuse_if_broken(path, broken, rows)
    skipped["broken row"] += len(broken)
    return pairs


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its last line, row); what a row lacks is "", and so is all of a row with too many cells. Raises InputError."""
    table = csv.DictReader(io.StringIO(text_of_file(path, "give the dataset's folder"), newline=""), restval="")
    try:
        if missing := set(columns) - set(table.fieldnames or ()):
            raise InputError(f"{path}: line 1: no column {min(missing)}", f"it needs {', '.join(columns)}")
        for row in table:
            yield table.line_num, dict.fromkeys(row, "") if None in row else row
    except csv.Error as error:
        raise InputError(f"{path}: line {table.line_num}: not CSV ({error})", "correct the file") from None


def _licences(path: Path) -> Iterator[tuple[str, str]]:
    """(ID, licence): an attribution is a licence and whom to credit, as in "CC BY-NC [Doe et al. (2020)]"."""
    for _, row in _rows(path, ("ID", "Attribution")):
        found = re.match(r"CC0|CC BY(?:-[A-Z]{2})*", row["Attribution"].strip())
        yield row["ID"].strip(), found[0] if found else row["Attribution"].strip()


def layout(licences: Collection[str], skipped: Counter[str]) -> Layout[Pair]:
    return Layout(
        "ROCOv2",
        "train_captions.csv of ID, Caption",
        lambda folder: tuple(split for split, name in NAMES.items() if is_there(folder / f"{name}_captions.csv")),
        lambda folder, split: pairs_from_rocov2(folder, split, licences, skipped),
    )
