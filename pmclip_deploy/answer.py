"""What a question about an image comes back as: frozen data, and its JSON form. Standard library only."""

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pmclip_deploy.spec import ANSWER_SCHEMA, CLASSIFICATION_SCHEMA

if TYPE_CHECKING:
    from pmclip_deploy.intent import Intent


@dataclass(frozen=True)
class ImageInfo:
    """Where the pixels came from and how they were rendered; no patient attribute.

    >>> import pmclip_deploy as pm
    >>> pm.load().ask("scan.dcm", "is this a CT?").image
    ImageInfo(dicom, 128 x 128, frame 0 of 1)
    """

    source: str  #: The path that was given; else "bytes", "PIL image", "array", "dataset", or the file object's type, as "BytesIO".
    format: str  #: "dicom", "png", "jpeg" or "array".
    modality: str | None = None  #: What the DICOM file says, "CR" for one.
    frame: int = 0  #: Counted from 0.
    frames: int = 1  #: How many the file holds.
    rows: int = 0  #: Height of the stored picture, in pixels.
    columns: int = 0  #: Width of the stored picture, in pixels.
    transfer_syntax: str | None = None  #: UID of the DICOM file's transfer syntax.
    photometric: str | None = None  #: DICOM's photometric interpretation.
    window: tuple[float, float] | None = None  #: (center, width) in modality units; None where none was applied.
    warnings: tuple[str, ...] = ()  #: What is unusual about the file, one line each.

    def __repr__(self) -> str:  # without the path, which may name a patient
        return f"ImageInfo({self.format}, {self.rows} x {self.columns}, frame {self.frame} of {self.frames})"


@dataclass(frozen=True)
class ModelInfo:
    """Which bundle answered, and on what.

    >>> import pmclip_deploy as pm
    >>> pm.load(device="cpu").model
    ModelInfo(pmclip-lite 0.1.0, int8, onnxruntime on cpu)
    """

    bundle: str  #: Name of the bundle.
    version: str  #: Version of the bundle.
    precision: str  #: "fp32", "fp16" or "int8".
    backend: str  #: "onnxruntime", for one. After `tune` each graph may have its own: "openvino, onnxruntime".
    device: str  #: "cpu", for one.
    sha256: str  #: Of the bundle's manifest.json; empty for a model that is no bundle.
    between: str = "f32"  #: What the graphs hold in float32 is computed in: "f32", or after `tune` also "bf16" or "f16".

    def __str__(self) -> str:
        reduced = "" if self.between == "f32" else f", {self.between} between operators"
        return f"{self.bundle} {self.version}, {self.precision}, {self.backend} on {self.device}{reduced}"

    def __repr__(self) -> str:
        return f"ModelInfo({self})"


@dataclass(frozen=True)
class Candidate:
    """An answer that was possible, and how likely it is.

    >>> import pmclip_deploy as pm
    >>> [candidate.answer for candidate in pm.load().ask("scan.dcm", "in what plane is this image?", top=2).candidates]
    ['axial', 'sagittal']
    """

    answer: str  #: The answer's text.
    probability: float  #: 0 to 1, calibrated on validation questions.

    def __repr__(self) -> str:
        return f"Candidate({self.answer!r}, probability={self.probability:.3g})"


@dataclass(frozen=True)
class Match:
    """A row of an index, and the cosine of its embedding with what was searched for.

    >>> import pmclip_deploy as pm
    >>> pm.Match("scans/17.dcm", 0.91)
    Match('scans/17.dcm', score=0.91)
    """

    id: str  #: The row's id: a path, a salted hash or a caption's id.
    score: float  #: The cosine, -1 to 1.

    def __repr__(self) -> str:
        return f"Match({self.id!r}, score={self.score:.3g})"

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Worth:
    """What answers about a finding were worth in validation, on pictures like this one that trained and tuned nothing.

    >>> import pmclip_deploy as pm
    >>> from pmclip_deploy.models import DEMO
    >>> worth = pm.load().ask(DEMO / "leg-1.dcm", "is there a fracture?").worth
    >>> worth.stratum, 0 < worth.predictive_value(prevalence=0.1) < 1
    ('plain films of the leg, knee, ankle or foot', True)
    """

    finding: str  #: The finding's name, "fracture".
    found: bool  #: Whether the answer says that the finding is there.
    stratum: str  #: Pictures like this one: "plain films of the hand or wrist".
    n: int  #: Validation pictures of this stratum.
    sensitivity: float  #: Share of the pictures with the finding that were answered yes.
    specificity: float  #: Share of the pictures without it that were answered no.
    right_of_yes: tuple[int, int]  #: (right, given) of the answers yes.
    right_of_no: tuple[int, int]  #: (right, given) of the answers no.
    auroc: float  #: Area under the ROC curve in this stratum.
    auroc_ci95: tuple[float, float]  #: Its 95% interval.

    def __repr__(self) -> str:
        measured = f"sensitivity={self.sensitivity:.3g}, specificity={self.specificity:.3g}"
        return f"Worth({self.finding!r}, found={self.found}, {self.stratum!r}, n={self.n}, {measured})"

    def predictive_value(self, prevalence: float) -> float:
        """The share of such answers that are right where ``prevalence`` of the pictures have the finding (Bayes); both 0 to 1."""
        if self.found:
            right, wrong = self.sensitivity * prevalence, (1 - self.specificity) * (1 - prevalence)
        else:
            right, wrong = self.specificity * (1 - prevalence), (1 - self.sensitivity) * prevalence
        return right / (right + wrong) if right + wrong else 0.0

    def sentence(self, prevalence: float | None = None) -> str:
        """The same in one line, as the command line and reports have it; with ``predictive_value`` if ``prevalence`` is given."""
        right, given = self.right_of_yes if self.found else self.right_of_no
        measured = f"sensitivity {self.sensitivity:.2f}, specificity {self.specificity:.2f}"
        said = f"in validation on {self.stratum} {right} of {given} such answers were right ({measured})"
        if prevalence is None:
            return said
        return f"{said}; if {prevalence:.0%} of pictures have it, {self.predictive_value(prevalence):.0%} of such answers are right"


@dataclass(frozen=True)
class Answer:
    """An answer to one question about one picture, or an abstention: then ``answer`` is None, and ``reason`` says why.

    >>> import pmclip_deploy as pm
    >>> predictor = pm.load()
    >>> predictor.ask("scan.dcm", "in what plane is this image?")
    Answer('axial', probability=None, source='header')
    >>> predictor.ask("scan.dcm", "how old is the patient?").abstained
    True
    """

    question: str  #: As it was asked.
    answer: str | None  #: None where the model abstains.
    probability: float | None  #: 0 to 1, calibrated; None where the file's header gives the answer.
    abstained: bool  #: Whether there is no answer.
    reason: str | None  #: Why there is none.
    candidates: tuple[Candidate, ...]  #: The likeliest answers, the likeliest first.
    image: ImageInfo  #: What was read.
    model: ModelInfo  #: What answered.
    timings_ms: dict[str, float] = field(default_factory=dict)  #: Milliseconds of each step of the call, and in total.
    note: str | None = None  #: How to read the probability, where that needs saying, and where the header and the picture disagree.
    source: str = "picture"  #: "picture", or "header" where the answer was read from the file.
    understood_as: "Intent | None" = None  #: How the question was read.
    worth: Worth | None = None  #: Of an answer about a finding, what such answers were worth in validation.

    def __repr__(self) -> str:  # without the question and the path, in which somebody may name a patient
        if self.answer is None:
            return f"Answer(None, reason={self.reason!r})"
        sure = None if self.probability is None else round(self.probability, 3)
        return f"Answer({self.answer!r}, probability={sure}, source={self.source!r})"

    def to_json(self) -> dict[str, Any]:
        """One of the answers that ``infer --json`` prints, of the schema pmclip-deploy/answer/1."""
        return {"schema": ANSWER_SCHEMA, **asdict(self)}


@dataclass(frozen=True)
class Label:
    """A label of a classification, its share or its probability, and its score.

    >>> import pmclip_deploy as pm
    >>> pm.Label("ct", share=0.998, score=1.74)
    Label('ct', share=0.998, score=1.74)
    """

    label: str  #: As it was given.
    share: float | None  #: Among the labels that were given, 1 in all. It is no probability. None if there is a probability.
    score: float  #: What the share or probability is made of, in the units of the method; -inf where the embedding has no direction.
    probability: float | None = None  #: Of this label alone, 0 to 1, by the sigmoid loss of models that have one; else None.

    def __repr__(self) -> str:
        said = f"share={self.share:.3g}" if self.share is not None else f"probability={self.probability:.3g}"
        return f"Label({self.label!r}, {said}, score={self.score:.3g})"

    def to_json(self) -> dict[str, Any]:
        """The fields by name; a score that is not finite is null."""
        return {**asdict(self), "score": self.score if math.isfinite(self.score) else None}


@dataclass(frozen=True)
class Classification:
    """Labels for an image, the likeliest first.

    >>> import pmclip_deploy as pm
    >>> done = pm.load().classify("scan.dcm", ["a plain film of a hand", "a chest CT"])
    >>> done.labels[0].label, done.method
    ('a chest CT', 'zero-shot')
    """

    method: str  #: "zero-shot", "cache" or "probe".
    labels: tuple[Label, ...]  #: The likeliest first.
    image: ImageInfo  #: What was read.
    model: ModelInfo  #: What embedded it.
    timings_ms: dict[str, float] = field(default_factory=dict)  #: Milliseconds of each step of the call, and in total.

    def __repr__(self) -> str:
        return f"Classification({self.labels[0] if self.labels else None!r} first of {len(self.labels)}, method={self.method!r})"

    def to_json(self) -> dict[str, Any]:
        """One of the classifications that ``classify --json`` prints, of the schema pmclip-deploy/classification/1."""
        return {"schema": CLASSIFICATION_SCHEMA, **asdict(self), "labels": [label.to_json() for label in self.labels]}
