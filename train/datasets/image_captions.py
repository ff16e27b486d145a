"""Images and captions as rows of JSON: train.jsonl, val.jsonl, test.jsonl of image and caption, images beside them or in images/."""

from collections import Counter
from pathlib import Path

from pmclip_deploy.errors import InputError
from pmclip_deploy.train.datasets.schema import SPLITS, Layout, Pair, is_there, lines_from_text, refuse_if_broken, row_from_line

FIELDS = ("image", "caption")


def pairs_from_jsonl(folder: Path, split: str, skipped: Counter[str]) -> list[Pair]:
    path = folder / f"{split}.jsonl"
    pairs, broken, rows = [], [], 0
    for number, line in lines_from_text(path):
        rows += 1
        try:
            row = row_from_line(line, FIELDS)
            image, caption = row["image"].strip(), " ".join(row["caption"].split())
            if not image or not caption:
                raise ValueError("empty")
        except ValueError:
            broken.append(number)
            continue
        inside = folder / "images" / image
        pairs.append(Pair(inside if is_there(inside) else folder / image, caption))
    refuse_if_broken(path, broken, rows)
    skipped["broken row"] += len(broken)
    return pairs


def holds_captions(path: Path) -> bool:
    """Whether the first row that can be read has an image and a caption, which tells such a file from one of questions."""
    try:
        for _, (_, line) in zip(range(100), lines_from_text(path), strict=False):
            try:
                row_from_line(line, FIELDS)
                return True
            except ValueError:
                continue
    except InputError:  # told by whoever reads it
        pass
    return False


def layout(skipped: Counter[str]) -> Layout[Pair]:
    return Layout(
        "image-caption rows",
        "train.jsonl of image, caption",
        lambda folder: tuple(s for s in SPLITS if is_there(folder / f"{s}.jsonl") and holds_captions(folder / f"{s}.jsonl")),
        lambda folder, split: pairs_from_jsonl(folder, split, skipped),
    )
