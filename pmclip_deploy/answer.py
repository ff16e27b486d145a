"""What a question about an image comes back as: frozen data, and its JSON form. Standard library only."""

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pmclip_deploy.spec import ANSWER_SCHEMA, CLASSIFICATION_SCHEMA

if TYPE_CHECKING:
    from pmclip_deploy.intent import Intent


@dataclass(frozen=True)
class ImageInfo:
    """Where the pixels came from and how they were rendered; no patient attribute."""

    source: str
    format: str  # "dicom", "png", "jpeg", "array"
    modality: str | None = None
    frame: int = 0  # counted from 0
    frames: int = 1
    rows: int = 0
    columns: int = 0
    transfer_syntax: str | None = None
    photometric: str | None = None
    window: tuple[float, float] | None = None  # (center, width) in modality units; None where none was applied
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """The bundle that answered, and what ran it."""

    bundle: str
    version: str
    precision: str
    backend: str
    device: str
    sha256: str  # of the bundle's manifest.json


@dataclass(frozen=True)
class Candidate:
    """A possible answer."""

    answer: str
    probability: float


@dataclass(frozen=True)
class Match:
    """A row of an index, and the cosine of its embedding with what was searched for."""

    id: str
    score: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Worth:
    """What answers about a finding were worth in validation, on pictures like this one that trained and tuned nothing."""

    finding: str
    found: bool
    stratum: str  # "plain films of the hand or wrist"
    n: int
    sensitivity: float
    specificity: float
    right_of_yes: tuple[int, int]  # (right, given)
    right_of_no: tuple[int, int]
    auroc: float
    auroc_ci95: tuple[float, float]

    def predictive_value(self, prevalence: float) -> float:
        """The share of such answers that are right where ``prevalence`` of the pictures have the finding (Bayes)."""
        if self.found:
            right, wrong = self.sensitivity * prevalence, (1 - self.specificity) * (1 - prevalence)
        else:
            right, wrong = self.specificity * (1 - prevalence), (1 - self.sensitivity) * prevalence
        return right / (right + wrong) if right + wrong else 0.0

    def sentence(self) -> str:
        right, given = self.right_of_yes if self.found else self.right_of_no
        measured = f"sensitivity {self.sensitivity:.2f}, specificity {self.specificity:.2f}"
        return f"in validation on {self.stratum} {right} of {given} such answers were right ({measured})"


@dataclass(frozen=True)
class Answer:
    """``answer`` is None where the model abstains; ``reason`` then says why."""

    question: str
    answer: str | None
    probability: float | None  # None where the file's header says it
    abstained: bool
    reason: str | None
    candidates: tuple[Candidate, ...]
    image: ImageInfo
    model: ModelInfo
    timings_ms: dict[str, float] = field(default_factory=dict)
    note: str | None = None  # how to read the probability, where that needs saying; where the header and the picture disagree
    source: str = "picture"  # or "header": read from the file
    understood_as: "Intent | None" = None
    worth: Worth | None = None  # of a finding

    def to_json(self) -> dict[str, Any]:
        return {"schema": ANSWER_SCHEMA, **asdict(self)}


@dataclass(frozen=True)
class Label:
    """A label, and how much of the image it has."""

    label: str
    share: float  # among the labels that were given, 1 in all: no probability
    score: float  # what the share was made of, in the units of the method; -inf where the label's embedding has no direction

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score if math.isfinite(self.score) else None}


@dataclass(frozen=True)
class Classification:
    """Labels for an image, the likeliest first."""

    method: str  # of classify.METHODS
    labels: tuple[Label, ...]
    image: ImageInfo
    model: ModelInfo
    timings_ms: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"schema": CLASSIFICATION_SCHEMA, **asdict(self), "labels": [label.to_json() for label in self.labels]}
