"""What a manifest holds, as frozen data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pmclip_deploy.spec import Preprocess


@dataclass(frozen=True)
class Graph:
    """An ONNX graph of the bundle."""

    file: str
    precision: str
    float_layers: tuple[str, ...] = ()  # of a precision below fp32: the layers that stayed above it, so that the gates passed


@dataclass(frozen=True)
class Words:
    """A head's own reading of a question: WORDS makes its tokens, always ``length`` of them, filled up with ``pad_id``."""

    length: int
    pad_id: int


@dataclass(frozen=True)
class Head:
    """What the graph "head" answers from: the text tower's embedding, or the question's own ``words``.

    ``grey`` names the inputs of the graph "features" and the side of each in pixels: MEVF's auto-encoder and MAML network.
    """

    kind: str  # of HEADS
    words: Words | None = None
    grey: Mapping[str, int] = field(default_factory=dict)
    clip: bool = True  # whether it sees the image tower's embedding
    details: int = 0  # numbers that it sees beside the embedding; with any, both are means over a picture and its mirror image


@dataclass(frozen=True)
class Engine:
    """A TensorRT plan of one graph, and where it runs."""

    graph: str
    file: str
    backend: str  # its name in the registry (sessions)
    version: str  # of TensorRT
    compute_capabilities: tuple[str, ...]  # "8.9"
    platform: str  # "linux-x86_64"
    onnx_sha256: str  # of the graph's file and its weights, as they were built
    profile: tuple[int, int, int]  # least, usual and largest batch
    plugin_sha256: str | None = None


@dataclass(frozen=True)
class File:
    """A file of the bundle as it must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Kind:
    """A kind of question: which answers it has and when one of them is believed.

    A kind with a ``reason`` is one the model must not answer; the reason is the text shown.
    """

    name: str
    answers: tuple[int, ...]  # indices into Manifest.answers
    temperature: float = 1.0
    threshold: float = 0.0
    reason: str | None = None
    majority: int | None = None  # the training set's most frequent answer, an index into Manifest.answers
    note: str | None = None  # how to read the probability, where that needs saying
    independent: bool = False  # each answer has a probability of its own (a sigmoid), as MEVF and QCR are trained; else a softmax


@dataclass(frozen=True)
class Abstention:
    """What an answer must reach to be given; for all kinds of question."""

    kind_threshold: float
    radiograph_threshold: float
    curve: tuple[tuple[float, float], ...] = ()  # (coverage, accuracy) on validation data


@dataclass(frozen=True)
class Stratum:
    """Pictures of one modality family and one body region on which a finding was measured; none of them trained or tuned anything."""

    family: str  # of vocabulary.FAMILIES
    region: str  # of Findings.regions
    n: int
    positives: int
    auroc: float
    auroc_ci95: tuple[float, float]
    threshold: float  # of the finding's logit: from it on the answer is yes
    yes: tuple[int, int]  # (right, given)
    no: tuple[int, int]
    slope: float  # of the logistic curve from logit to probability, at the share of positives here
    intercept: float
    children: bool = False  # measured on children alone
    reason: str | None = None  # why it is not answered all the same

    @property
    def sensitivity(self) -> float:
        return self.yes[0] / self.positives

    @property
    def specificity(self) -> float:
        return self.no[0] / (self.n - self.positives)


@dataclass(frozen=True)
class Finding:
    """A finding that can be asked for, and what it was measured on."""

    name: str
    strata: tuple[Stratum, ...]
    map_hits: float | None = None  # share of right yes answers whose map had its peak where the finding is; None: no map is shown


@dataclass(frozen=True)
class Findings:
    """What the graph "findings" sees: pixels (B, 3, S, S) f32 -> finding (B, F), region (B, R), places (B, F, h, w) f32 logits.

    Its logits are the means over the picture and its mirror image.
    """

    preprocess: Preprocess
    regions: tuple[str, ...]  # of vocabulary.REGIONS; the last column is what is no radiograph of them
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Probe:
    """A finding that a bundle was taught by `train finding`: a linear model of the image's embedding (Predictor.probe_embedding)."""

    finding: Finding  # its strata of any of vocabulary.FAMILIES and REGIONS
    asked: tuple[str, ...] = ()  # questions about it, beside those by its name; to each a yes says that it is there
