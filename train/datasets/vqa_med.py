"""VQA-Med 2019 (ImageCLEF, Ben Abacha et al.) in two forms: rows of JSON, and the official text files."""

from pathlib import Path

from pmclip_deploy.errors import InputError
from pmclip_deploy.train.datasets.image_captions import holds_captions
from pmclip_deploy.train.datasets.schema import (
    SPLITS,
    Layout,
    Question,
    image_folder,
    is_there,
    lines_from_text,
    question_from_text,
    rows_from_jsonl,
)

ARCHIVES = {"train": "ImageClef-2019-VQA-Med-Training", "val": "ImageClef-2019-VQA-Med-Validation", "test": "VQAMed2019Test"}
IMAGES = {"train": "Train_images", "val": "Val_images", "test": "VQAMed2019_Test_Images"}
BY_CATEGORY = {"modality": "C1_Modality", "plane": "C2_Plane", "organ": "C3_Organ", "abnormality": "C4_Abnormality"}
REFERENCE = "VQAMed2019_Test_Questions_w_Ref_Answers.txt"


def questions_from_vqa_med(folder: Path, split: str) -> list[Question]:
    """train.jsonl, val.jsonl, images/"""
    return [
        question_from_text(folder / "images" / row["image"], row["question"], row["answer"], row["category"])
        for row in rows_from_jsonl(folder / f"{split}.jsonl", ("image", "question", "answer", "category"))
    ]


def questions_from_vqa_med_text(folder: Path, split: str) -> list[Question]:
    """Lines of image|question|answer; of image|category|question|answer in the test set's reference file."""
    questions = []
    for path, category in _text_files(folder, split):
        fields = 4 if path.name == REFERENCE else 3
        home = path.parent.parent if path.parent.name == "QAPairsByCategory" else path.parent
        images = image_folder(home, IMAGES[split], "images")
        for number, line in lines_from_text(path):
            parts = [part.strip() for part in line.split("|", fields - 1)]
            if len(parts) < fields or not all(parts):
                raise InputError(
                    f"{path}: line {number}: expected {'image|category|question|answer' if fields == 4 else 'image|question|answer'}"
                )
            image = parts[0] if Path(parts[0]).suffix else f"{parts[0]}.jpg"
            about = category or (parts[1] if fields == 4 else category_of(parts[1]))
            questions.append(question_from_text(images / image, parts[-2], parts[-1], about))
    return questions


def category_of(question: str) -> str:
    """By the wording, which decides it: right for all 14,792 training and validation questions."""
    text = question.lower()
    if "plane" in text:
        return "plane"
    if "organ" in text or "part of the body" in text:
        return "organ"
    return "abnormality" if any(word in text for word in ("normal", "alarming", "wrong")) else "modality"


def _text_files(folder: Path, split: str) -> list[tuple[Path, str]]:
    """(file, its category, "" if it holds them all), as unpacked, or with the archive's files right in the folder."""
    for home in (folder, folder / ARCHIVES[split]):
        for place in (home / "QAPairsByCategory", home):
            files = [(place / f"{name}_{split}.txt", category) for category, name in BY_CATEGORY.items()]
            if all(is_there(path) for path, _ in files):
                return files
        for name in (f"All_QA_Pairs_{split}.txt", f"QA_Pairs_{split}.txt", *([REFERENCE] if split == "test" else [])):
            if is_there(home / name):
                return [(home / name, "")]
    return []


def _row_splits(folder: Path) -> tuple[str, ...]:
    return tuple(s for s in SPLITS if is_there(folder / f"{s}.jsonl") and not holds_captions(folder / f"{s}.jsonl"))


LAYOUTS: tuple[Layout[Question], ...] = (
    Layout("VQA-Med 2019", "train.jsonl, val.jsonl of image, category, question, answer", _row_splits, questions_from_vqa_med),
    Layout(
        "VQA-Med 2019, text files",
        "QAPairsByCategory/C1_Modality_train.txt and its like, or All_QA_Pairs_train.txt",
        lambda folder: tuple(split for split in SPLITS if _text_files(folder, split)),
        questions_from_vqa_med_text,
    ),
)
