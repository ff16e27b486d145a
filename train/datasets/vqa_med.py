"""VQA-Med 2019 (ImageCLEF, Ben Abacha et al.): train.jsonl, val.jsonl, images/."""

from pathlib import Path

from pmclip_deploy.train.datasets import Question, normalised, rows_from_jsonl


def questions_from_vqa_med(folder: Path, split: str) -> list[Question]:
    return [
        Question(folder / "images" / row["image"], normalised(row["question"]), normalised(row["answer"]), row["category"])
        for row in rows_from_jsonl(folder / f"{split}.jsonl", ("image", "question", "answer", "category"))
    ]
