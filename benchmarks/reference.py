"""Whether a bundle says on this machine what its checkpoint says in fp32 PyTorch, without PyTorch: against a file made where that was.

    python -m pmclip_deploy.benchmarks.reference          # makes it anew, for the embedded checkpoint (needs the extra `export`)

The pictures are in pydicom's wheel. Only bundles of that checkpoint, in any precision, can be compared; for others nothing is known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.decision.heads import Decision, decision_from_heads
from pmclip_deploy.export.precisions import TENSOR_GATES
from pmclip_deploy.imaging.preprocess import resized
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.models import DEFAULT_CHECKPOINT, DEFAULT_REFERENCE
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.spec import AGREEMENT, CANDIDATE_AGREEMENT, Preprocess

Array = NDArray[Any]


def said(predictor: Predictor, pictures: Sequence[Path], questions: Sequence[str]) -> dict[str, Array]:
    """Pixels as hashes of their uint8 stage (P,), embeddings (P, D) and (Q, D), and of all P x Q pairs the best and the given answers."""
    read = [picture_from_path(path).pixels for path in pictures]
    seen, asked = np.stack([predictor.image_features(path) for path in pictures]), predictor.question_features(questions)
    heads = predictor.head_logits(np.repeat(seen, len(questions), 0), np.concatenate([asked] * len(pictures)))
    decisions = [decision_from_heads(predictor.manifest, heads, row) for row in range(len(heads))]
    best = [_best(decision) for decision in decisions]
    return {
        "pixels": np.array([_sha256(pixels, predictor.manifest.preprocess) for pixels in read]),
        "image": np.stack([predictor.embed_image(path) for path in pictures]),
        "text": predictor.embed_texts(questions),
        "best": np.array(best),
        "given": np.array(["" if decision.reason else answer for decision, answer in zip(decisions, best, strict=True)]),
    }


def agreement(predictor: Predictor, file: Path = DEFAULT_REFERENCE) -> tuple[dict[str, Any] | None, str | None]:
    """(figures, None) against the reference, or (None, why there is none)."""
    import pydicom

    made_from = predictor.manifest.provenance.get("export", {}).get("checkpoint_sha256")
    reference = np.load(file, allow_pickle=False)
    if made_from != str(reference["checkpoint_sha256"]):
        return None, "no fp32 reference of this bundle's checkpoint is here; pass --data FILE --images FOLDER"
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    pictures = [folder / name for name in reference["pictures"]]
    if missing := [path.name for path in pictures if not path.is_file()]:
        return None, f"pydicom's test picture {missing[0]} is not installed; pass --data FILE --images FOLDER"
    here = said(predictor, pictures, reference["questions"].tolist())
    answered = (here["given"] != "") | (reference["given"] != "")
    figures: dict[str, Any] = {"pictures": len(pictures), "questions": len(reference["questions"])}
    figures["pixels_equal"] = float((here["pixels"] == reference["pixels"]).mean())
    for tower in ("image", "text"):
        cosines = _cosines(here[tower], reference[tower])
        furthest = float(np.abs(here[tower] - reference[tower]).max())
        figures |= {f"{tower}_cosine": float(cosines.min()), f"{tower}_cosine_mean": float(cosines.mean()), f"{tower}_max_abs": furthest}
    differ = {name: here[name] != reference[name] for name in ("given", "best")}
    figures |= {"given_answers": int(answered.sum()), "given_differ": int(differ["given"].sum())}
    figures |= {"best_answers": len(answered), "best_differ": int(differ["best"].sum())}
    return figures, None


def misses(precision: str, figures: dict[str, Any]) -> list[str]:
    """Every figure of ``agreement`` outside export's gates. So few pairs cannot show 99%: as many may differ as chance lets."""
    limits = {"pixels_equal": 1.0} | {
        f"{tower}_{name}": limit for tower in ("image", "text") for name, limit in TENSOR_GATES[precision].items()
    }
    missed = [
        f"{name} {figures[name]:.6g} (limit {limit:g})"
        for name, limit in limits.items()
        if not (figures[name] <= limit if name.endswith("max_abs") else figures[name] >= limit)
    ]
    for name, limit in (("given", AGREEMENT), ("best", CANDIDATE_AGREEMENT)):
        n, most = figures[f"{name}_answers"], most_that_differ(figures[f"{name}_answers"], limit)
        if not figures[f"{name}_differ"] <= most:
            missed.append(f"{figures[f'{name}_differ']} of {n} {name} answers differ (limit {most})")
    return missed


def most_that_differ(n: int, limit: float) -> int:
    """The least k with P(Binomial(n, 1 - limit) > k) <= 1%: more would not be seen once in a hundred times where ``limit`` is kept."""
    k, at_most = 0, limit**n
    while at_most < 0.99:
        k += 1
        at_most += math.comb(n, k) * (1 - limit) ** k * limit ** (n - k)
    return k


def _best(decision: Decision) -> str:
    return decision.candidates[0].answer if decision.candidates else ""


def _sha256(pixels: NDArray[np.uint8], preprocess: Preprocess) -> str:
    return hashlib.sha256(np.ascontiguousarray(resized(pixels, preprocess)).tobytes()).hexdigest()


def _cosines(a: Array, b: Array) -> Array:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30))


def main() -> None:
    from pmclip_deploy.bundle.files import sha256_of_file
    from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint
    from pmclip_deploy.export.probes import QUESTIONS, sample_pictures
    from pmclip_deploy.export.reference import predictor_from_modules

    pictures = sample_pictures()
    outputs: dict[str, Any] = said(predictor_from_modules(modules_from_checkpoint(DEFAULT_CHECKPOINT)), pictures, QUESTIONS)
    np.savez_compressed(
        DEFAULT_REFERENCE,
        checkpoint_sha256=np.array(sha256_of_file(DEFAULT_CHECKPOINT / "model.safetensors")),
        pictures=np.array([path.name for path in pictures]),
        questions=np.array(QUESTIONS),
        **outputs,
    )
    print(
        f"wrote {DEFAULT_REFERENCE.name}: {DEFAULT_REFERENCE.stat().st_size:,} bytes, {len(pictures)} pictures, {len(QUESTIONS)} questions"
    )


if __name__ == "__main__":
    main()
