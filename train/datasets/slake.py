"""SLAKE (Liu et al. 2021), its English questions: train.json, validate.json, test.json, imgs/."""

from pathlib import Path

from pmclip_deploy.train.datasets.schema import Layout, Question, is_there, question_from_text, rows_from_json

FILES = {"train": "train.json", "val": "validate.json", "test": "test.json"}
CATEGORY = {"Modality": "modality", "Plane": "plane", "Organ": "organ", "Abnormality": "abnormality"}
FIELDS = ("img_name", "question", "answer", "answer_type", "content_type")


def questions_from_slake(folder: Path, split: str) -> list[Question]:
    rows = rows_from_json(folder / FILES[split], FIELDS, lambda row: not isinstance(row, dict) or row.get("q_lang", "en") == "en")
    return [
        question_from_text(
            folder / "imgs" / row["img_name"],
            row["question"],
            row["answer"],
            CATEGORY.get(row["content_type"], "other"),
            row["answer_type"],
        )
        for row in rows
    ]


LAYOUT: Layout[Question] = Layout(
    "SLAKE",
    ", ".join(FILES.values()),
    lambda folder: tuple(split for split, name in FILES.items() if is_there(folder / name)),
    questions_from_slake,
)
