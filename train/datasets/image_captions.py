"""Images and captions as rows of JSON: train.jsonl, val.jsonl, test.jsonl of image and caption, and PMC-OA, which has such rows."""

from collections import Counter
from pathlib import Path

from pmclip_deploy.errors import InputError
from pmclip_deploy.train.datasets.schema import (
    SPLITS,
    Layout,
    Pair,
    caption_from_text,
    image_folder,
    is_there,
    lines_from_text,
    refuse_if_broken,
    row_from_line,
)

FIELDS = ("image", "caption")
# PMC-OA (Lin et al. 2023): its first release had splits, which pmc_oa.jsonl joins. Its images.zip holds one folder.
PMC_OA = (
    {"train": "train.jsonl", "val": "valid.jsonl", "test": "test.jsonl"},
    {"train": "pmc_oa.jsonl"},
    {"train": "pmc_oa_beta.jsonl"},
)
SUBFIGURES = "caption_T060_filtered_top4_sep_v0_subfigures"


def pairs_from_jsonl(path: Path, homes: tuple[Path, ...], skipped: Counter[str]) -> list[Pair]:
    """An image lies in the first of ``homes`` that has it, else in the last."""
    pairs, broken, rows = [], [], 0
    for number, line in lines_from_text(path):
        rows += 1
        try:
            row = row_from_line(line, FIELDS)
            image, caption = row["image"].strip(), caption_from_text(row["caption"])
            if not image:
                raise ValueError("empty")
        except ValueError:
            broken.append(number)
            continue
        pairs.append(Pair(next((home / image for home in homes[:-1] if is_there(home / image)), homes[-1] / image), caption))
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


def _of_pmc_oa(folder: Path) -> dict[str, Path]:
    """Split to file, of the first release that lies there whole."""
    releases = ({split: folder / name for split, name in names.items()} for names in PMC_OA)
    return next((release for release in releases if all(map(holds_captions, release.values()))), {})


def layouts(skipped: Counter[str]) -> tuple[Layout[Pair], ...]:
    return (
        Layout(
            "PMC-OA",
            "pmc_oa.jsonl, or train.jsonl, valid.jsonl and test.jsonl, of image, caption",
            lambda folder: tuple(_of_pmc_oa(folder)),
            lambda folder, split: pairs_from_jsonl(
                _of_pmc_oa(folder)[split], (image_folder(folder, f"images/{SUBFIGURES}", SUBFIGURES, "images"),), skipped
            ),
        ),
        Layout(
            "image-caption rows",
            "train.jsonl of image, caption",
            lambda folder: tuple(s for s in SPLITS if is_there(folder / f"{s}.jsonl") and holds_captions(folder / f"{s}.jsonl")),
            lambda folder, split: pairs_from_jsonl(folder / f"{split}.jsonl", (folder / "images", folder), skipped),
        ),
    )
