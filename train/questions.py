"""The questions that pmclip-lite learns from, and those that it is validated on."""

import hashlib
from dataclasses import replace
from pathlib import Path

from pmclip_deploy.errors import InputError
from pmclip_deploy.train.datasets import Question, image_key, layout_of_questions, questions_from_folder
from pmclip_deploy.train.datasets.schema import BROKEN_SHARE
from pmclip_deploy.train.images import readable
from pmclip_deploy.train.splits import shared_pictures


def questions_for_training(folders: list[Path]) -> tuple[list[Question], list[Question]]:
    """(training, validation) questions. No training set keeps an image that any validation set has, by name or by picture."""
    training, validation = [], []
    for folder in folders:
        if "val" in layout_of_questions(folder).splits(folder):
            training += questions_from_folder(folder, "train")
            validation += questions_from_folder(folder, "val")
        else:
            training += questions_from_folder(folder, "all")
    held_out = {image_key(q.image) for q in validation}
    training = [q for q in training if image_key(q.image) not in held_out]
    whole = readable((q.image for q in training + validation), BROKEN_SHARE)
    training, validation = ([q for q in questions if q.image in whole] for questions in (training, validation))
    twins = shared_pictures({q.image for q in training}, {q.image for q in validation})
    training = [q for q in training if q.image not in twins]
    first = {image_key(q.image): q.image for q in reversed(training)}  # an image that stands in two datasets counts once
    training = [replace(q, image=first[image_key(q.image)]) for q in training]
    if not training:
        raise InputError(f"{folders[0]}: no training questions")
    return training, validation


def sha256_of_questions(questions: list[Question]) -> str:
    text = "\n".join(f"{q.image.name}\t{q.question}\t{q.answer}" for q in questions)
    return hashlib.sha256(text.encode()).hexdigest()
