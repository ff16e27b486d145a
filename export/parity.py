"""How far a bundle is from the fp32 PyTorch checkpoint it was made from: on pixels and tokens, on tensors, and on answers."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.bundle.contract import contract_of
from pmclip_deploy.bundle.types import Findings
from pmclip_deploy.classify import scores_from_bundle
from pmclip_deploy.errors import BundleError, ParityError
from pmclip_deploy.evaluation.rows import Row, normalised, pictures_of, sha256_of_rows
from pmclip_deploy.evaluation.statistics import Bootstrap, mcnemar
from pmclip_deploy.export.checks import checks, checks_of_runs
from pmclip_deploy.export.probes import QUESTIONS, Floats, Progress, computing_nothing_twice, findings_outputs, sample_pictures
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.opening import load
from pmclip_deploy.predictor import Predictor

if TYPE_CHECKING:
    from pmclip_deploy.export.onnx_from_checkpoint import Modules
    from pmclip_deploy.export.reference import Reference, RowOutputs

NEAR_TIE = 0.25  # a finding's logit may be this far from a threshold and fall to the other side: at most 0.06 of probability


def parity_of_bundle(
    bundle: Path,
    modules: "Modules",
    rows: Sequence[Row] | None = None,
    images: Path | None = None,
    pictures: Sequence[Path] | None = None,
    progress: Progress = lambda items, what: items,
) -> tuple[str, dict[str, Any]]:
    """(the bundle's precision, {"stages": ..., "tensors": ..., "answers": ... or None, "labels" and "findings": ... where it has some});
    tensors over ``pictures``, or pydicom's."""
    from pmclip_deploy.export.reference import Reference

    return parity_of(Reference(modules, rows, images, pictures, progress), load(bundle, "cpu"))


def parity_of(
    reference: "Reference", bundle: Predictor, answers: dict[str, Any] | None = None, findings: dict[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """As parity_of_bundle. Raises BundleError where the bundle is of another model, and ParityError where it computes what is no number.

    ``answers`` and ``findings`` that are known are not measured again.
    """
    theirs, ours = bundle.manifest, reference.predictor.manifest
    if (theirs.backbone, theirs.head, theirs.answers, theirs.findings) != (ours.backbone, ours.head, ours.answers, ours.findings):
        raise BundleError(f"bundle {theirs.name} is not of checkpoint {reference.modules.folder}", "pass the one it was made from")
    pictures, bundle = reference.pictures or sample_pictures(), computing_nothing_twice(bundle)
    try:
        measured = {**tensor_parity(reference.predictor, bundle, pictures, reference.progress), "answers": answers}
        measured["checks"] = checks(reference, bundle, [picture_from_path(x).pixels for x in sample_pictures()])
        if all(f["cosine"] is not None for f in measured["tensors"].values()):  # else the gate fails, whatever is answered
            measured |= _parity_of_parts(reference, bundle, pictures, answers, findings)
    except BundleError as error:  # the head gives what is no number
        raise ParityError(f"{theirs.precision} misses parity with fp32 PyTorch: {error}") from None
    return theirs.precision, measured


def _parity_of_parts(
    reference: "Reference", bundle: Predictor, pictures: Sequence[Path], answers: dict[str, Any] | None, findings: dict[str, Any] | None
) -> dict[str, Any]:
    """Of answers, labels and findings, as far as there are some."""
    measured, rows, images = dict[str, Any](), reference.rows, reference.images
    if answers is None and (said := reference.row_outputs) is not None:
        from pmclip_deploy.export.reference import outputs_for

        assert rows is not None and images is not None
        measured["answers"] = answer_parity(rows, said, outputs_for(bundle, rows, images, reference.progress))
    if bundle.manifest.labels:
        if rows and images is not None:
            pictures = [images / name for name in pictures_of(rows)[0]]
        measured["labels"] = label_parity(reference.predictor, bundle, reference.progress(pictures, "Classifying"))
    if (known := bundle.manifest.findings) is not None:
        measured["findings"] = findings or finding_parity(known, reference.looks, reference.looks_of(bundle))
    return measured


def parity_of_runs(reference: Predictor, other: Predictor) -> dict[str, Any]:
    """The part of ``parity_of`` that needs no checkpoint: how far a bundle is, run in another way, from the same bundle.

    Both see the pictures in pydicom's wheel. Raises BundleError where a head gives what is no number.
    """
    pictures = sample_pictures()
    read = [picture_from_path(path).pixels for path in pictures]
    measured = {**tensor_parity(reference, other, pictures, lambda items, what: items), "answers": None}
    measured["checks"] = {"differ": [], **checks_of_runs(reference, other, read)}
    if (known := reference.manifest.findings) is not None:
        looked = [[findings_outputs(p, pixels) for pixels in read] for p in (reference, other)]
        logits = [(np.stack([x["finding"].mean(0) for x in of]), np.stack([x["region"].mean(0) for x in of])) for of in looked]
        measured["findings"] = finding_parity(known, *logits)
    return measured


def tensor_parity(reference: Predictor, predictor: Predictor, pictures: Sequence[Path], progress: Progress) -> dict[str, Any]:
    """{"stages": pixels and tokens, "tensors": of each graph the least and mean cosine over its rows and the largest difference}.

    Each side makes its own pixels and tokens; the head is given the reference's inputs.
    """
    both = reference, predictor
    read = [picture_from_path(path).pixels for path in progress(pictures, "Comparing")]
    pixels = [[tensor_from_pixels(x, p.manifest.preprocess) for x in read] for p in both]
    tokens = [p.tokens(QUESTIONS) for p in both]
    stages = {
        "pixels": _pixel_difference(*pixels),
        "tokens": {"n": len(QUESTIONS), "equal": float(np.mean([np.array_equal(a, b) for a, b in zip(*tokens, strict=True)]))},
    }
    tensors = {
        "image": tensor_difference(*(np.stack([p.embedding_from_tensor(x) for x in of]) for p, of in zip(both, pixels, strict=True))),
        "text": tensor_difference(*(p.embed_texts(QUESTIONS) for p in both)),
    }
    if reference.manifest.head is not None:
        of_head = _head_parity(reference, predictor, pictures)
        stages, tensors = stages | of_head["stages"], tensors | of_head["tensors"]
    if reference.manifest.findings is not None:
        tensors |= _findings_graph_parity(reference, predictor, read)
    return {"stages": stages, "tensors": tensors}


def _pixel_difference(reference: Sequence[Floats], other: Sequence[Floats]) -> dict[str, Any]:
    same_shape = [a.shape == b.shape for a, b in zip(reference, other, strict=True)]
    differences = (float(np.abs(a - b).max()) for a, b, same in zip(reference, other, same_shape, strict=True) if same)
    furthest = float(np.max([0.0, *differences]))  # Python's max may lose NaN
    return {"n": len(reference), "max_abs": furthest if all(same_shape) else None}


def _head_parity(reference: Predictor, predictor: Predictor, pictures: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Of what the head reads, stages and tensors, and of what it gives."""
    head, both = reference.manifest.head, (reference, predictor)
    assert head is not None
    stages, tensors = dict[str, Any](), dict[str, Any]()
    seen = [np.stack([p.image_features(path) for path in pictures]) for p in both]
    if head.grey:
        own = reference.manifest.embed_dim if head.clip else 0
        tensors["features"] = tensor_difference(*(x[:, own:] for x in seen))
    asked = [p.question_features(QUESTIONS) for p in both]
    if head.words is not None:
        stages["words"] = {"n": len(QUESTIONS), "equal": float((asked[0] == asked[1]).all(1).mean())}
    pairs = np.repeat(seen[0], len(QUESTIONS), 0), np.tile(asked[0], (len(pictures), 1))
    tensors["head"] = tensor_difference(*(_logits(p, pairs) for p in both))
    return {"stages": stages, "tensors": tensors}


def _findings_graph_parity(reference: Predictor, predictor: Predictor, read: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
    tensors, seen = dict[str, Any](), [[findings_outputs(p, x) for x in read] for p in (reference, predictor)]
    for output in contract_of(reference.manifest)["findings"][1]:
        rows = [np.concatenate([x[output] for x in of]) for of in seen]
        # A finding's logits over all pictures are one row: those of one picture are few, and near zero where it is near a tie.
        tensors[f"findings/{output}"] = tensor_difference(*(x.T if output == "finding" else x.reshape(len(x), -1) for x in rows))
    return tensors


def _logits(predictor: Predictor, pairs: tuple[NDArray[Any], NDArray[Any]]) -> Floats:
    heads = predictor.head_logits(*pairs)
    return np.concatenate([heads.answer, heads.kind, *([] if heads.radiograph is None else [heads.radiograph[:, None]])], 1)


def label_parity(reference: Predictor, predictor: Predictor, pictures: Iterable[Path]) -> dict[str, Any]:
    """How often both name the same of the bundle's labels, whose embeddings are fp32's."""
    same = []
    for path in pictures:
        scores = [scores_from_bundle(predictor, p.embed_image(path)) for p in (reference, predictor)]
        same.append(bool(scores[0].argmax() == scores[1].argmax()))
    return {"n": len(same), "agreement": float(np.mean(same))}


def finding_parity(findings: Findings, reference: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> dict[str, Any]:
    """How often a finding is on the same side of its threshold: (N, F) and (N, R) logits of each, for each stratum of each finding.

    ``agreement`` is over the ``decisions`` on pictures in which fp32 sees the stratum's region (None without any). ``crossed`` counts,
    over all pictures and strata, decisions that differ though fp32's logit is further from the threshold than NEAR_TIE.
    """
    columns = [(j, s) for j, finding in enumerate(findings.findings) for s in finding.strata]
    thresholds, of = [s.threshold for _, s in columns], [j for j, _ in columns]
    margins = [np.asarray(logits[:, of] - np.array(thresholds), np.float64) for logits, _ in (reference, other)]  # (N, strata)
    same = ((margins[0] >= 0) == (margins[1] >= 0)) & np.isfinite(margins[1])
    seen = reference[1][:, [findings.regions.index(s.region) for _, s in columns]] >= 0
    return {
        "n": len(same),
        "decisions": int(seen.sum()),
        "agreement": float(same[seen].mean()) if seen.any() else None,
        "crossed": int((~same & (np.abs(margins[0]) > NEAR_TIE)).sum()),
    }


def answer_parity(rows: Sequence[Row], reference: "RowOutputs", other: "RowOutputs") -> dict[str, Any]:
    """Over real questions: how often both say the same, and the difference in accuracy with a paired 95% interval and McNemar's test.

    ``agreement`` is of what is said, over the ``answered`` rows: those where at least one of the two does not abstain (None without any).
    ``candidate_agreement`` and the accuracies are of the best candidates of all rows, abstained or not.
    """
    truth = np.array([normalised(row.answer) for row in rows])
    right = [np.array([normalised(x) for x in said.best]) == truth for said in (reference, other)]
    answered = (reference.given != "") | (other.given != "")
    sample = Bootstrap(pictures_of(rows)[1], 0)

    def over(member: NDArray[np.bool_]) -> dict[str, Any]:
        change = (right[1].astype(float) - right[0]) * member
        told = answered & member
        return {
            "n": int(member.sum()),
            "answered": int(told.sum()),
            "agreement": float((reference.given == other.given)[told].mean()) if told.any() else None,
            "candidate_agreement": float((reference.best == other.best)[member].mean()),
            "accuracy_fp32": float(right[0][member].mean()),
            "accuracy": float(right[1][member].mean()),
            "difference": float(change.sum() / member.sum()),
            "difference_ci95": sample.interval(change, member),
            "mcnemar": mcnemar(int((change > 0).sum()), int((change < 0).sum())),
        }

    by = {what: [getattr(row, what) or "none" for row in rows] for what in ("type", "category")}
    return {
        **over(np.ones(len(rows), bool)),
        "images": len({row.image for row in rows}),
        "data_sha256": sha256_of_rows(rows),
        "by": {
            what: {name: over(np.array([x == name for x in labels])) for name in sorted(set(labels))}
            for what, labels in by.items()
            if set(labels) != {"none"}
        },
    }


def tensor_difference(reference: Floats, other: Floats) -> dict[str, Any]:
    """Of two (N, D): least and mean cosine of their rows, largest absolute difference, largest value; None where it is no number."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    # Rounded so that the manifest does not change with the last bits of another CPU's arithmetic.
    figures = {
        "cosine": np.round(cosine.min(), 5),
        "cosine_mean": np.round(cosine.mean(), 5),
        "max_abs": f"{np.abs(a - b).max():.2g}",
        "largest": f"{np.abs(a).max():.2g}",
    }
    return {"n": len(a), **{name: float(x) if np.isfinite(float(x)) else None for name, x in figures.items()}}
