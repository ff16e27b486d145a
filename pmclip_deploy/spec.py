"""What every stage must agree on, stated once: preprocessing, schemas, gates. Standard library only."""

from dataclasses import dataclass
from typing import Literal

CHECKPOINT_SCHEMA = "pmclip-deploy/checkpoint/1"
BUNDLE_SCHEMA = "pmclip-deploy/bundle/1"
ANSWER_SCHEMA = "pmclip-deploy/answer/1"
ANSWERS_SCHEMA = "pmclip-deploy/answers/2"
QUESTIONS_SCHEMA = "pmclip-deploy/questions/1"
CLASSIFICATION_SCHEMA = "pmclip-deploy/classification/1"
CLASSIFICATIONS_SCHEMA = "pmclip-deploy/classifications/2"
UNREADABLE_SCHEMA = "pmclip-deploy/unreadable/1"
EVALUATION_SCHEMA = "pmclip-deploy/evaluation/1"
INDEX_SCHEMA = "pmclip-deploy/index/1"
INDEXING_SCHEMA = "pmclip-deploy/indexing/1"
ARCHIVE_SCHEMA = "pmclip-deploy/archive/1"
ARCHIVING_SCHEMA = "pmclip-deploy/archiving/1"
DELETION_SCHEMA = "pmclip-deploy/deletion/1"
SEARCH_SCHEMA = "pmclip-deploy/search/1"
BENCH_SCHEMA = "pmclip-deploy/bench/1"

Resize = Literal["shortest", "squash", "pad"]
Interpolation = Literal["bicubic", "bilinear"]
METHODS = ("percentile", "max", "entropy", "mse")  # of calibration: how a tensor's range follows from its values; the first is the default

# The parity gates of answers, every precision; those of tensors stand in export/precisions/. Near-ties among 1,500 names of abnormalities,
# which are never given as answers, flip: hence two agreements.
AGREEMENT, CANDIDATE_AGREEMENT, ACCURACY_LOSS = 0.99, 0.97, 0.01


@dataclass(frozen=True)
class Preprocess:
    """From an 8-bit image to the image tower's input.

    ``resize`` is open_clip's ``resize_mode``: "shortest" scales the short side to ``size`` and crops the centre,
    "squash" scales both sides to ``size``, "pad" the long side, and centres the picture on black. ``mean`` and
    ``std`` are for values in 0..1. With ``trim`` the margins that show nothing are cut off first (imaging/margins.py). ``interpolation``
    names Pillow's antialiased filter.
    """

    size: int
    resize: Resize
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    trim: bool = False
    interpolation: Interpolation = "bicubic"
