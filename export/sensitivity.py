"""Which layers cost the most when they are quantised: each one alone, by what it does to the answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from pmclip_deploy.decision.heads import decision_from_heads, sigmoid
from pmclip_deploy.errors import BundleError
from pmclip_deploy.export.probes import QUESTIONS, Progress, findings_outputs
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions import Session, SessionOptions, open_session

Say = Callable[[Predictor, Sequence[Path]], NDArray[np.float64]]


@dataclass(frozen=True)
class Effect:
    layer: str  # GRAPH/LAYER
    effect: float  # mean distance between what is said with and without it: probabilities of answers, or unit embeddings


def effects_of_layers(
    predictor_of: Callable[[Mapping[str, Session]], Predictor],
    sessions: Mapping[str, Session],
    layers: Sequence[str],
    quantised: Callable[[str, str], onnx.ModelProto],
    pictures: Sequence[Path],
    scratch: Path,
    progress: Progress,
    integer_kernels: bool = True,
    say: Say | None = None,
) -> list[Effect]:
    """The layers, the most harmful first.

    ``sessions`` are of the fp32 graphs, ``quantised`` makes of (graph, layer) the graph in which only that layer is; ``scratch`` is
    a folder for one of them at a time. Without ``integer_kernels`` what is between Q/DQ is computed in floats, as for TensorRT. ``say`` is
    ``said`` or ``said_of_findings``.
    """
    say = say or said
    before, options = say(predictor_of(sessions), pictures), SessionOptions("cpu", integer_kernels)
    found = []
    for name in progress(layers, "Ranking layers"):
        graph, _, layer = name.partition("/")
        path = scratch / "layer.onnx"
        path.write_bytes(quantised(graph, layer).SerializeToString())
        try:
            after = say(predictor_of({**sessions, graph: open_session(path, options)}), pictures)
            effect = float(np.linalg.norm(after - before, axis=1).mean())
        except BundleError:  # it computes no numbers
            effect = float("inf")
        found.append(Effect(name, effect))
    return sorted(found, key=lambda e: (-e.effect, e.layer))


def said(predictor: Predictor, pictures: Sequence[Path]) -> NDArray[np.float64]:
    """(N, K): a row for each picture and question with the answers' probabilities, or for each picture and text a unit embedding."""
    manifest = predictor.manifest
    if manifest.head is None:
        rows = np.concatenate([np.stack([predictor.embed_image(path) for path in pictures]), predictor.embed_texts(QUESTIONS)])
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float64)
    seen, asked = np.stack([predictor.image_features(path) for path in pictures]), predictor.question_features(QUESTIONS)
    heads = predictor.head_logits(np.repeat(seen, len(QUESTIONS), 0), np.tile(asked, (len(pictures), 1)))
    out = np.zeros((len(heads), len(manifest.answers)))
    for i, row in enumerate(out):
        decision = decision_from_heads(manifest, heads, i)
        known = {c.answer: c.probability for c in decision.candidates}
        for j in manifest.kinds[decision.kind].answers:
            row[j] = known.get(manifest.answers[j], 0.0)
    return out


def said_of_findings(predictor: Predictor, pictures: Sequence[Path]) -> NDArray[np.float64]:
    """(N, K): a row for each picture with the probability of each finding by each of its strata, and of each region."""
    findings = predictor.manifest.findings
    assert findings is not None
    curves = [(j, s.slope, s.intercept) for j, finding in enumerate(findings.findings) for s in finding.strata]
    curves = curves or [(j, 1.0, 0.0) for j in range(len(findings.findings))]
    rows = []
    for path in pictures:
        seen = {name: x.mean(0, dtype=np.float64) for name, x in findings_outputs(predictor, picture_from_path(path).pixels).items()}
        rows.append(sigmoid(np.array([*(slope * seen["finding"][j] + intercept for j, slope, intercept in curves), *seen["region"]])))
    return np.stack(rows)
