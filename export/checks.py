"""What a mean over few rows does not show: each column, each word, the answers of each kind, and the manifest beside the checkpoint."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.files import rows_from_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import LABELS, QUESTION_EMBEDDINGS, SIGNATURES, TOKENIZER
from pmclip_deploy.classify import bank_from_labels, templates_of
from pmclip_deploy.decision.heads import HeadLogits, decision_from_heads
from pmclip_deploy.decision.needs import asked_of
from pmclip_deploy.export.probes import QUESTIONS, TEXTS, Floats, findings_outputs
from pmclip_deploy.imaging.images import picture_from_image
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions.onnxruntime import import_onnxruntime
from pmclip_deploy.tokens import tokens_from_text

if TYPE_CHECKING:
    import onnx

    from pmclip_deploy.export.onnx_from_checkpoint import Modules
    from pmclip_deploy.export.reference import Reference

# What a manifest says of the model: each decides an answer, or says what an answer is worth.
OF_THE_MODEL = (
    "backbone", "preprocess", "context_length", "pad_id", "embed_dim", "logit_scale", "logit_bias", "head", "answers", "kinds",
    "abstention", "findings",
)  # fmt: skip
LEAD = 0.25  # in probability: a decision whose best candidate leads by less may fall otherwise
LEAST = 0.25  # of an output's root mean square: an error is relative to no less
SHORT_AND_LONG = (QUESTIONS[0], TEXTS[-1])  # in one batch, which ``infer`` never makes
TEXTS_OF_EACH = 7  # that the head is asked of a view

Images = Sequence[NDArray[np.uint8]]


def checks(of: "Reference", bundle: Predictor, pictures: Images) -> dict[str, Any]:
    """{"differ": [names], "outputs": {GRAPH/OUTPUT: figures}, "decisions": {"n", "crossed"} or None where there is no head}.

    ``pictures`` are (H, W) or (H, W, 3) u8, seen as they are and turned. Of an output's rows and columns ``row`` and ``column`` are the
    largest root mean square error, relative to that of the reference's. ``shift`` is the largest mean difference of a column.
    """
    words = _of_words(of.graphs, bundle)
    differ = differences(of.modules, of.predictor.manifest, bundle.manifest)
    return {"differ": differ, **checks_of_runs(of.predictor, bundle, pictures, words)}


def checks_of_runs(reference: Predictor, bundle: Predictor, pictures: Images, words: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``checks`` of what the graphs of both give, without "differ"."""
    views = [np.ascontiguousarray(view) for pixels in pictures for view in (pixels, np.rot90(pixels))]
    outputs = {**_of_image(reference, bundle, views), **_of_texts(reference, bundle), **(words or {})}
    if bundle.manifest.labels:
        outputs |= _of_labels(reference, bundle, pictures)
    if reference.manifest.findings is not None:
        outputs |= _of_findings(reference, bundle, views)
    decisions = None
    if reference.manifest.head is not None:
        of_head, decisions = _of_head(reference, bundle, views)
        outputs |= of_head
    return {"outputs": outputs, "decisions": decisions}


def differences(modules: "Modules", ours: Manifest, theirs: Manifest) -> list[str]:
    """What of a bundle's manifest and files must be the checkpoint's, and is not."""
    from pmclip_deploy.export.contents import files_as_they_are

    found = [name for name in OF_THE_MODEL if getattr(ours, name) != getattr(theirs, name)]
    if theirs.asked != asked_of(ours):
        found.append("asked")
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in files_as_they_are(modules).items()}
    there = {name: file.sha256 for name, file in theirs.files.items() if name in (*expected, SIGNATURES)}
    return found + sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name))


def error_of(reference: Floats, other: Floats) -> dict[str, Any]:
    """Of two (N, C), the figures of ``checks``; None where one is no number."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    least = max(LEAST * float(np.sqrt(np.square(a).mean())), 1e-12)

    def largest(axis: int) -> float:
        error, size = (np.sqrt(np.square(x).mean(axis)) for x in (b - a, a))
        return float((error / np.maximum(size, least)).max())

    figures = {"row": largest(1), "column": largest(0), "shift": float(np.abs((b - a).mean(0)).max())}
    return {"n": len(a), **{name: x if np.isfinite(x) else None for name, x in figures.items()}}


def _of_image(reference: Predictor, bundle: Predictor, views: Images) -> dict[str, Any]:
    """Of what goes into the head, each run as ``infer`` runs it; of towers alone, of single pictures."""
    head = reference.manifest.head
    runs = []
    for p in (reference, bundle):
        inputs = [p._graphs.inputs_of_head(picture_from_image(x), head) for x in views] if head else [_pixels(p, x) for x in views]
        runs.append({name: [p._sessions[name].run(of[name]) for of in inputs] for name in inputs[0]})
    return {
        f"{graph}/{output}": error_of(*(np.concatenate([out[output] for out in of[graph]]) for of in runs))
        for graph, outs in runs[0].items()
        for output in outs[0]
    }


def _pixels(predictor: Predictor, view: NDArray[np.uint8]) -> dict[str, dict[str, Floats]]:
    from pmclip_deploy.imaging.preprocess import tensor_from_pixels

    return {"image": {"pixels": tensor_from_pixels(view, predictor.manifest.preprocess)[None]}}


def _of_texts(reference: Predictor, bundle: Predictor) -> dict[str, Any]:
    both = (reference, bundle)
    found = {"text/embedding": error_of(*(p.embed_texts(TEXTS) for p in both))}
    tokens = [tokens_from_text(p._tokenizers[TOKENIZER], SHORT_AND_LONG, p.manifest.context_length, p.manifest.pad_id) for p in both]
    found["text/embedding of padded texts"] = error_of(
        *(p._sessions["text"].run({"tokens": x})["embedding"] for p, x in zip(both, tokens, strict=True))
    )
    if asked := bundle.manifest.asked:
        found[f"kept/{QUESTION_EMBEDDINGS}"] = error_of(*(p.question_features(asked) for p in both))
    return found


def _of_labels(reference: Predictor, bundle: Predictor, pictures: Images) -> dict[str, Any]:
    """Of the labels' embeddings, and of what the graph makes of them."""
    labels, scale = bundle.manifest.labels, reference.manifest.logit_scale
    bank = rows_from_bundle(bundle.path, bundle.manifest, LABELS, len(labels), bundle.manifest.embed_dim)
    seen = np.stack([reference.embed_image(x) for x in pictures])
    found = bundle.similarity(seen, bank)
    scores = np.zeros((len(seen), len(labels)), np.float32)
    np.put_along_axis(scores, found["index"], found["score"], 1)
    exact = scale * (seen / np.linalg.norm(seen, axis=1, keepdims=True)) @ bank.T
    expected = bank_from_labels(reference.embed_texts, labels, templates_of(reference.manifest))
    return {f"kept/{LABELS}": error_of(expected, bank), "kept/scores of labels": error_of(exact, scores)}


def _of_words(graphs: "Mapping[str, onnx.ModelProto]", bundle: Predictor) -> dict[str, Any]:
    """Of each tensor that is looked up by token, and of its sum with the positions: all words of the table, and all positions."""
    import onnx

    found = dict[str, Any]()
    for name, model in graphs.items():
        looked_up = [n for n in model.graph.node if n.op_type == "Gather" and n.input[1] == "tokens"]
        if not looked_up:
            continue
        sums = [n for n in model.graph.node if n.op_type == "Add" and any(x.output[0] in n.input for x in looked_up)]
        words = next(len(onnx.numpy_helper.to_array(w)) for w in model.graph.initializer if w.name == looked_up[0].input[0])
        tokens = np.resize(np.arange(words), (-(-words // _length(bundle.manifest, name)), _length(bundle.manifest, name)))
        wanted, theirs = [n.output[0] for n in (*looked_up, *sums)], _graph(bundle, name)
        if missing := set(wanted) - {x for n in theirs.graph.node for x in n.output}:
            found |= {f"words/{name}.{tensor}": dict.fromkeys(("n", "row", "column", "shift")) for tensor in sorted(missing)}
            continue
        both = [_computed(of, wanted, tokens) for of in (model, theirs)]
        for tensor in wanted:
            found[f"words/{name}.{tensor}"] = error_of(*(x[tensor].reshape(-1, x[tensor].shape[-1]) for x in both))
    return found


def _length(manifest: Manifest, graph: str) -> int:
    words = manifest.head.words if manifest.head is not None and graph == "head" else None
    return manifest.context_length if words is None else words.length


def _graph(bundle: Predictor, name: str) -> "onnx.ModelProto":
    import onnx

    assert bundle.path is not None
    return onnx.load(bundle.path / bundle.manifest.graphs[name].file)


def _computed(model: "onnx.ModelProto", names: Sequence[str], tokens: NDArray[np.int64]) -> Mapping[str, Floats]:
    """The inner tensors of these names, from tokens alone."""
    import onnx
    from onnx.utils import Extractor

    model.graph.value_info.extend(onnx.ValueInfoProto(name=name) for name in names)  # what may be cut out
    part = Extractor(model).extract_model(["tokens"], [*names])
    session = import_onnxruntime().InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run([*names], {"tokens": tokens}), strict=True))


def _of_findings(reference: Predictor, bundle: Predictor, views: Images) -> dict[str, Any]:
    runs = [[findings_outputs(p, x) for x in views] for p in (reference, bundle)]
    return {f"findings/{name}": error_of(*(np.concatenate([x[name].reshape(2, -1) for x in of]) for of in runs)) for name in runs[0][0]}


def _of_head(reference: Predictor, bundle: Predictor, views: Images) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of each kind's logits, from the reference's inputs; of decisions, from the bundle's own."""
    texts, both = [*QUESTIONS, *asked_of(reference.manifest), *TEXTS], (reference, bundle)
    view = np.repeat(np.arange(len(views)), TEXTS_OF_EACH)
    text = np.arange(len(view)) % len(texts)
    inputs = [(np.stack([p.image_features(x) for x in views])[view], p.question_features(texts)[text]) for p in both]
    ours, theirs, own = reference.head_logits(*inputs[0]), bundle.head_logits(*inputs[0]), bundle.head_logits(*inputs[1])
    found = {"head/kind": error_of(ours.kind, theirs.kind)}
    if ours.radiograph is not None and theirs.radiograph is not None:
        found["head/radiograph"] = error_of(ours.radiograph[:, None], theirs.radiograph[:, None])
    for kind in (kind for kind in reference.manifest.kinds if kind.answers):
        of = [x.answer[:, list(kind.answers)] for x in (ours, theirs)]
        alike = kind.independent or len(kind.answers) < 2  # else only differences within a row count
        found[f"head/answers to {kind.name}"] = error_of(*(x if alike else x - x.mean(1, keepdims=True) for x in of))
    return found, _of_decisions(reference.manifest, ours, own)


def _of_decisions(manifest: Manifest, reference: HeadLogits, other: HeadLogits) -> dict[str, Any]:
    """``crossed`` counts rows whose best candidates differ though the reference's leads by more than LEAD."""
    crossed = 0
    for row in range(len(reference)):
        ours, theirs = (decision_from_heads(manifest, x, row).candidates for x in (reference, other))
        lead = ours[0].probability - (ours[1].probability if len(ours) > 1 else 0.0) if ours else 0.0
        crossed += lead > LEAD and (not theirs or theirs[0].answer != ours[0].answer)
    return {"n": len(reference), "crossed": crossed}
