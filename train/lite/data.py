"""What pmclip-lite's head is taught: questions, those that they imply, and the images to train on."""

from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.train import kinds as K
from pmclip_deploy.train.datasets import Question
from pmclip_deploy.train.lite.vocabulary import Vocabulary
from pmclip_deploy.train.loop import Settings
from pmclip_deploy.train.modality import Facts, facts_by_image
from pmclip_deploy.train.questions import questions_for_training


@dataclass(frozen=True)
class Data:
    training: list[Question]  # of the first folder
    validation: list[Question]  # of the first folder
    everything: list[Question]  # the training questions of all folders
    paths: list[Path]  # the images to train on

    organs: dict[str, set[str]]  # of each finding that can be learned
    derived: list[K.Derived]
    facts: dict[Path, Facts]
    vocabulary: Vocabulary


def read_data(folders: list[Path], settings: Settings) -> Data:
    """Raises InputError and UsageError."""
    training, validation = questions_for_training(folders[:1])
    everything, _ = questions_for_training(folders)
    organs = K.organs_from_questions(training)
    return Data(
        training,
        validation,
        everything,
        settings.images(sorted({q.image for q in training}, key=lambda p: p.name)),
        organs,
        K.derived_from_questions(training, organs),
        facts_by_image(training),
        Vocabulary(training, sorted(organs)),
    )
