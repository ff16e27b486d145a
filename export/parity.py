"""How far a bundle is from the fp32 PyTorch checkpoint it was made from: on tensors, and on answers."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pmclip_deploy.bundle import TOKENIZER
from pmclip_deploy.errors import ParityError, PmclipError
from pmclip_deploy.evaluate import Bootstrap, Row, normalised
from pmclip_deploy.export.onnx_from_checkpoint import Modules, head_of
from pmclip_deploy.pixels import picture_from_path, tensor_from_pixels
from pmclip_deploy.predictor import CONTRACT, Decision, Predictor, decision_from_heads, load
from pmclip_deploy.tokens import tokenizer_from_file

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
Floats = NDArray[np.float32]

# Least cosine and largest absolute difference of any row (fp32); mean cosine, where the answers decide (int8).
TENSOR_GATES = {"fp32": {"cosine": 0.9999, "max_abs": 1e-3}, "int8": {"cosine_mean": 0.98}}
# Of answers, every precision. Near-ties among 1,500 names of abnormalities, which are never given as answers, flip: hence two agreements.
AGREEMENT, CANDIDATE_AGREEMENT, ACCURACY_LOSS = 0.99, 0.97, 0.01

# Real CT, MR, US and secondary captures inside pydicom's own wheel.
SAMPLES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "JPEG2000.dcm",
    "693_J2KI.dcm",
    "examples_palette.dcm",
    "examples_ybr_color.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
)
QUESTIONS = (
    "is there a fracture?",
    "what imaging modality was used?",
    "in which plane was this image taken?",
    "which organ system is shown in the image?",
    "what abnormality is seen in the image?",
    "was the scan taken with contrast?",
    "is this a t1 weighted, t2 weighted, or flair image?",
    "is the study normal?",
    "what is the patient's name?",
)


def parity_of_bundle(
    bundle: Path,
    modules: Modules,
    rows: Sequence[Row] | None = None,
    images: Path | None = None,
    pictures: Sequence[Path] | None = None,
    progress: Progress = lambda items, what: items,
) -> tuple[str, dict[str, Any]]:
    """(the bundle's precision, {"tensors": ..., "answers": ... or None}); tensors over ``pictures`` or those in pydicom's wheel."""
    predictor = load(bundle, "cpu")
    reference = reference_for(modules, predictor, bundle)
    tensors = tensor_parity(reference, predictor, pictures or sample_pictures(), progress)
    answers = None if rows is None or images is None else answer_parity(reference, predictor, rows, images, progress)
    return predictor.manifest.precision, {"tensors": tensors, "answers": answers}


class TorchSession:
    """A PyTorch module behind the runtime's Session contract, so that the reference goes through the runtime's own path."""

    backend, device = "torch", "cpu"

    def __init__(self, graph: str, function: Callable[..., Any]) -> None:
        self.inputs, self.outputs = CONTRACT[graph]
        self._function = function

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        out = self._function(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.inputs))
        return {name: x.numpy() for name, x in zip(self.outputs, out if isinstance(out, tuple) else (out,), strict=True)}


def reference_for(modules: Modules, predictor: Predictor, bundle: Path) -> Predictor:
    """The checkpoint in PyTorch, in fp32, with the bundle's own answers and thresholds."""
    functions = {"image": modules.clip.encode_image, "text": modules.clip.encode_text, "head": head_of(modules)}
    sessions = {name: TorchSession(name, function) for name, function in functions.items()}
    return Predictor(bundle, predictor.manifest, sessions, tokenizer_from_file(modules.folder / TOKENIZER))


def tensor_parity(reference: Predictor, predictor: Predictor, pictures: Sequence[Path], progress: Progress) -> dict[str, Any]:
    """Per graph: least and mean cosine over its rows, largest absolute difference. The head is given the reference's embeddings."""
    tensors = [tensor_from_pixels(picture_from_path(p).pixels, predictor.manifest.preprocess) for p in progress(pictures, "Comparing")]
    images = [np.stack([p.embedding_from_tensor(x) for x in tensors]) for p in (reference, predictor)]
    texts = [p.embed_texts(QUESTIONS) for p in (reference, predictor)]
    pairs = np.repeat(images[0], len(QUESTIONS), 0), np.tile(texts[0], (len(tensors), 1))
    heads = [np.concatenate([(h := p.heads(*pairs)).answer, h.kind, h.radiograph[:, None]], 1) for p in (reference, predictor)]
    return {"image": tensor_difference(*images), "text": tensor_difference(*texts), "head": tensor_difference(*heads)}


def answer_parity(reference: Predictor, predictor: Predictor, rows: Sequence[Row], images: Path, progress: Progress) -> dict[str, Any]:
    """Over real questions: how often both say the same, and the difference in accuracy with a paired 95% interval.

    ``agreement`` is of what is said, over the ``answered`` rows: those where at least one of the two does not abstain (None without any).
    ``candidate_agreement`` and the accuracies are of the best candidates of all rows, abstained or not.
    """
    names = list(dict.fromkeys(row.image for row in rows))
    questions = list(dict.fromkeys(row.question for row in rows))
    tensors = (
        tensor_from_pixels(picture_from_path(images / name).pixels, predictor.manifest.preprocess) for name in progress(names, "Answering")
    )
    embedded = [[p.embedding_from_tensor(x) for p in (reference, predictor)] for x in tensors]
    place, asked = {name: i for i, name in enumerate(names)}, {question: i for i, question in enumerate(questions)}
    of_row = np.array([place[row.image] for row in rows])
    best, said = [], []
    for which, p in enumerate((reference, predictor)):
        text = p.embed_texts(questions)[[asked[row.question] for row in rows]]
        heads = p.heads(np.stack([pair[which] for pair in embedded])[of_row], text)
        decisions = [decision_from_heads(p.manifest, heads, i) for i in range(len(rows))]
        best.append(np.array([_best(d) for d in decisions]))
        said.append(np.array([_best(d) if d.reason is None else "" for d in decisions]))
    truth = np.array([normalised(row.answer) for row in rows])
    right = [np.array([normalised(x) for x in b]) == truth for b in best]
    change = right[1].astype(float) - right[0]
    answered = (said[0] != "") | (said[1] != "")
    return {
        "n": len(rows),
        "images": len(names),
        "data_sha256": hashlib.sha256("\n".join(f"{r.image}\t{r.question}\t{r.answer}" for r in rows).encode()).hexdigest(),
        "answered": int(answered.sum()),
        "agreement": float((said[0] == said[1])[answered].mean()) if answered.any() else None,
        "candidate_agreement": float((best[0] == best[1]).mean()),
        "accuracy_fp32": float(right[0].mean()),
        "accuracy": float(right[1].mean()),
        "difference": float(change.mean()),
        "difference_ci95": Bootstrap(of_row, 0).interval(change, np.ones(len(rows))),
    }


def gate(precision: str, parity: Mapping[str, Any], gates: Mapping[str, Mapping[str, float]] = TENSOR_GATES) -> None:
    """Raises ParityError that names every figure out of its bounds."""
    misses = []
    for graph, figures in parity["tensors"].items():
        for name, limit in gates[precision].items():
            if not (figures[name] <= limit if name == "max_abs" else figures[name] >= limit):
                misses.append(f"{graph} {name} {figures[name]:.6g} (limit {limit:g})")
    if answers := parity["answers"]:
        if answers["agreement"] is not None and answers["agreement"] < AGREEMENT:
            misses.append(f"answers agree on {answers['agreement']:.2%} (limit {AGREEMENT:.0%})")
        if answers["candidate_agreement"] < CANDIDATE_AGREEMENT:
            misses.append(f"best candidates agree on {answers['candidate_agreement']:.2%} (limit {CANDIDATE_AGREEMENT:.0%})")
        if answers["difference"] < -ACCURACY_LOSS:
            misses.append(f"accuracy changes by {100 * answers['difference']:.2f} points (limit -{100 * ACCURACY_LOSS:g})")
    if misses:
        raise ParityError(
            f"{precision} misses parity with fp32 PyTorch: {'; '.join(misses)}; use a higher precision or other calibration images"
        )


def sample_pictures() -> list[Path]:
    """Of the pictures in pydicom's wheel, those that this machine can read."""
    import pydicom

    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    return [folder / name for name in SAMPLES if (folder / name).is_file() and _readable(folder / name)]


def _readable(path: Path) -> bool:
    try:
        picture_from_path(path)
    except PmclipError:
        return False
    return True


def _best(decision: Decision) -> str:
    return decision.candidates[0].answer if decision.candidates else ""


def tensor_difference(reference: Floats, other: Floats) -> dict[str, Any]:
    """Of two (N, D): least and mean cosine of their rows, largest absolute difference, largest value."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    # Rounded so that the manifest does not change with the last bits of another CPU's arithmetic.
    return {
        "n": len(a),
        "cosine": float(np.round(cosine.min(), 5)),
        "cosine_mean": float(np.round(cosine.mean(), 5)),
        "max_abs": float(f"{np.abs(a - b).max():.2g}"),
        "largest": float(f"{np.abs(a).max():.2g}"),
    }
