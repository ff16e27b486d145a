"""ROCO (Pelka et al. 2018) in its own layout: data/{train,validation,test}/radiology/ with captions, links, licences and images/."""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from pmclip_deploy.train.datasets.schema import Layout, Pair, ids_with_licence, is_there, lines_from_text, refuse_if_broken

FOLDERS = {"train": "train", "val": "validation", "test": "test"}


def pairs_from_roco(folder: Path, split: str, licences: Collection[str], skipped: Counter[str]) -> list[Pair]:
    """``licences`` keeps the rows of these alone, as licences.txt words them ("CC BY", "CC BY-NC", "NO-CC CODE"); none keeps all."""
    home = _home(folder, split)
    names = _names_from_links(home / "dlinks.txt")
    kept = ids_with_licence(home / "licences.txt", _licences(home / "licences.txt"), licences) if licences else set()
    path = home / "captions.txt"
    pairs, broken, rows = [], [], 0
    for number, line in lines_from_text(path):
        rows += 1
        key, _, text = line.partition("\t")
        caption = " ".join(text.split())
        if not caption or key not in names:
            broken.append(number)
        elif licences and key not in kept:
            skipped["other licence"] += 1
        else:
            pairs.append(Pair(home / "images" / names[key], caption))
    refuse_if_broken(path, broken, rows)
    skipped["broken row"] += len(broken)
    return pairs


def _names_from_links(path: Path) -> dict[str, str]:
    """ROCO id to the name under which ROCO's fetch.py saves the image: PMC number, underscore, name in the archive."""
    names = {}
    for _, line in lines_from_text(path):
        parts = line.split("\t")
        if len(parts) >= 3 and (archive := re.search(r"/(PMC\d+)\.tar\.gz", parts[1])):
            names[parts[0]] = f"{archive[1]}_{Path(parts[-1].strip()).name}"
    return names


def _licences(path: Path) -> dict[str, str]:
    """ROCO id to licence, of lines id,name,licence; a name may hold commas."""
    rows = (line for number, line in lines_from_text(path) if number > 1)
    return {line.partition(",")[0]: line.rpartition(",")[2].strip() for line in rows}


def _home(folder: Path, split: str) -> Path:
    inside = folder / "data" / FOLDERS[split] / "radiology"
    return inside if is_there(inside, folder=True) else folder / FOLDERS[split] / "radiology"


def layout(licences: Collection[str], skipped: Counter[str]) -> Layout[Pair]:
    return Layout(
        "ROCO",
        "data/train/radiology/captions.txt and dlinks.txt",
        lambda folder: tuple(split for split in FOLDERS if is_there(_home(folder, split) / "captions.txt")),
        lambda folder, split: pairs_from_roco(folder, split, licences, skipped),
    )
