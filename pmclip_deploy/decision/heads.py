"""A head's logits to a decision: kinds of question, thresholds, abstention."""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import Candidate
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.decision.evidence import NO_RADIOGRAPH, OUTSIDE

Floats: TypeAlias = NDArray[np.float32]
NEVER_SURE = "too few answers to this kind of question were right on validation images"


@dataclass(frozen=True)
class HeadLogits:
    """What the head says about N pairs of an image and a question.

    >>> import pmclip_deploy as pm
    >>> predictor = pm.load()
    >>> image, question = predictor.image_features("scan.dcm"), predictor.question_features(["in what plane is this image?"])
    >>> heads = predictor.head_logits(image[None], question)
    >>> len(heads), heads.answer.shape == (1, len(predictor.manifest.answers))
    (1, True)
    """

    answer: Floats  #: (N, A) f32 logits of the answers.
    kind: Floats  #: (N, K) f32 logits of the kinds of question.
    radiograph: Floats | None = None  #: (N,) f32 logits that the picture is a radiology image; None where the head has none.
    known: NDArray[np.bool_] | None = None  #: (N,) bool, whether a head that reads words knows one of the question's.

    def __repr__(self) -> str:
        return f"HeadLogits({len(self)} pairs, {self.answer.shape[1]} answers, {self.kind.shape[1]} kinds)"

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class Decision:
    """What a head's logits come to for one question."""

    kind: int
    candidates: tuple[Candidate, ...]  # every answer of the kind, best first
    probability: float
    rule: str | None = None  # which rule abstained: "kind", "question", "radiograph" or "confidence"
    reason: str | None = None


def decision_from_heads(manifest: Manifest, heads: HeadLogits, row: int) -> Decision:
    """The rules in their order; a later rule never overrules an earlier one. A comparison with NaN is false, and false abstains."""
    kinds = softmax(heads.kind[row])
    index = int(kinds.argmax())
    kind, limits = manifest.kinds[index], manifest.abstention
    if kind.reason is not None:
        return Decision(index, (), float(kinds[index]), "kind", kind.reason)
    logits = heads.answer[row, list(kind.answers)].astype(np.float64) / kind.temperature
    probabilities = sigmoid(logits) if kind.independent else softmax(logits)
    best = np.argsort(-logits, kind="stable")  # the probabilities' order, where those are so near 1 that they are equal
    candidates = tuple(Candidate(manifest.answers[kind.answers[i]], float(probabilities[i])) for i in best)
    decision = Decision(index, candidates, candidates[0].probability)
    if not kinds[index] >= limits.kind_threshold or (heads.known is not None and not heads.known[row]):
        return replace(decision, rule="question", reason=OUTSIDE)
    if heads.radiograph is not None and not heads.radiograph[row] >= limits.radiograph_threshold:
        return replace(decision, rule="radiograph", reason=NO_RADIOGRAPH)
    if kind.threshold >= 1:
        return replace(decision, rule="confidence", reason=NEVER_SURE)
    if not decision.probability >= kind.threshold:
        reason = f"the confidence {decision.probability:.2f} is under the bundle's threshold {kind.threshold:.2f}"
        return replace(decision, rule="confidence", reason=reason)
    return decision


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return np.asarray(shifted / shifted.sum())


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64))))  # a plain exp would overflow
