"""VQA-RAD (Lau et al. 2018) in three forms: rows of JSON, the MEVF authors' two JSON files, and the OSF release."""

from dataclasses import replace
from pathlib import Path

from pmclip_deploy.train.datasets.schema import (
    Layout,
    Question,
    image_folder,
    is_there,
    question_from_text,
    rows_from_json,
    rows_from_jsonl,
)

CATEGORY = {"MODALITY": "modality", "PLANE": "plane", "ORGAN": "organ", "ABN": "abnormality", "PRES": "abnormality"}
ROWS = "questions.jsonl"
MEVF = {"train": "trainset.json", "test": "testset.json"}
OSF = ("VQA_RAD Dataset Public.json", "VQA_RAD_Dataset_Public.json")
FIELDS = ("question", "answer", "answer_type", "question_type")


def questions_from_vqa_rad(folder: Path, split: str) -> list[Question]:
    """questions.jsonl, whose rows name their official split."""
    rows = rows_from_jsonl(folder / ROWS, ("image", "official_split", *FIELDS))
    return [_question(folder, row["image"], row) for row in rows if split in ("all", row["official_split"])]


def questions_from_mevf(folder: Path, split: str) -> list[Question]:
    """trainset.json and testset.json (Nguyen et al. 2019): the official split, framed questions among the training ones."""
    rows = rows_from_json(folder / MEVF[split], ("image_name", *FIELDS))
    return [_question(folder, row["image_name"], row) for row in rows]


def questions_from_osf(folder: Path, split: str) -> list[Question]:
    """The OSF release: phrase_type names the test questions. A row's ``question_frame`` is another wording of it, and is not read."""
    rows = rows_from_json(_osf_file(folder), ("image_name", "phrase_type", *FIELDS))
    official = ["test" if row["phrase_type"].strip().startswith("test") else "train" for row in rows]
    return [_question(folder, row["image_name"], row) for row, name in zip(rows, official, strict=True) if split in ("all", name)]


def _question(folder: Path, image: str, row: dict[str, str]) -> Question:
    images = image_folder(folder, "images", "VQA_RAD Image Folder", "VQA_RAD_Image_Folder")
    category = CATEGORY.get(row["question_type"].split(",")[0].strip(), "other")
    question = question_from_text(images / image, row["question"], row["answer"], category, row["answer_type"])
    return replace(question, phrase=str(row.get("phrase_type", "")).strip().lower().removeprefix("test_") or None)


def _osf_file(folder: Path) -> Path:
    return next((folder / name for name in OSF if is_there(folder / name)), folder / OSF[0])


LAYOUTS: tuple[Layout[Question], ...] = (
    Layout("VQA-RAD", ROWS, lambda folder: ("train", "test") if is_there(folder / ROWS) else (), questions_from_vqa_rad, True),
    Layout(
        "VQA-RAD, MEVF's files",
        ", ".join(MEVF.values()),
        lambda folder: tuple(split for split, name in MEVF.items() if is_there(folder / name)),
        questions_from_mevf,
    ),
    Layout("VQA-RAD, OSF", OSF[0], lambda folder: ("train", "test") if is_there(_osf_file(folder)) else (), questions_from_osf, True),
)
