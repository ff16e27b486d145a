"""VQA-RAD (Lau et al. 2018): questions.jsonl, images/."""

from pathlib import Path

from pmclip_deploy.train.datasets import Question, normalised, rows_from_jsonl

CATEGORY = {"MODALITY": "modality", "PLANE": "plane", "ORGAN": "organ", "ABN": "abnormality", "PRES": "abnormality"}


def questions_from_vqa_rad(folder: Path, split: str) -> list[Question]:
    """``split`` is the official one ("train", "test"), whose images overlap; "all" gives every question."""
    rows = rows_from_jsonl(folder / "questions.jsonl", ("image", "question", "answer", "question_type", "official_split"))
    return [
        Question(
            folder / "images" / row["image"],
            normalised(row["question"]),
            normalised(row["answer"]),
            CATEGORY.get(row["question_type"].split(",")[0].strip(), "other"),
        )
        for row in rows
        if split in ("all", row["official_split"])
    ]
