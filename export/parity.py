"""How far a bundle is from the fp32 PyTorch checkpoint it was made from: on pixels and tokens, on tensors, and on answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pmclip_deploy.bundle.contract import contract_of
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import TOKENIZER, WORDS
from pmclip_deploy.bundle.types import Abstention, Findings, Graph, Head, Kind, Words
from pmclip_deploy.classify import scores_from_bundle
from pmclip_deploy.decision.heads import Decision, decision_from_heads
from pmclip_deploy.errors import BundleError, ParityError, PmclipError
from pmclip_deploy.evaluation.rows import Row, normalised, pictures_of, sha256_of_rows
from pmclip_deploy.evaluation.statistics import Bootstrap, mcnemar
from pmclip_deploy.export.onnx_from_checkpoint import Modules, functions_of
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.opening import load
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.spec import ACCURACY_LOSS, AGREEMENT, CANDIDATE_AGREEMENT, TENSOR_GATES
from pmclip_deploy.tokens import tokenizer_from_file
from pmclip_deploy.train.findings.net import FindingsNet
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.heads.qcr import QCR
from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, MAML_SIZE
from pmclip_deploy.train.heads.words import LENGTH, Dictionary, words_tokenizer_json

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
Floats = NDArray[np.float32]

PIXELS = 1e-5  # largest difference of a normalised pixel, every precision; tokens must be equal
LABELLED = 100  # pictures, fewer of which cannot tell. Like candidates, labels are given however near the second is
DECIDED = 100  # of fewer decisions about findings all must agree, but for near-ties
NEAR_TIE = 0.25  # a finding's logit may be this far from a threshold and fall to the other side: at most 0.06 of probability

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
PARTS = ANSWERS, FINDINGS = "answers", "findings"  # of a bundle: each says something by itself, and has its own gates
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
NOT_CALIBRATED = "the probability is the head's own and was not calibrated on validation images"


def parity_of_bundle(
    bundle: Path,
    modules: Modules,
    rows: Sequence[Row] | None = None,
    images: Path | None = None,
    pictures: Sequence[Path] | None = None,
    progress: Progress = lambda items, what: items,
) -> tuple[str, dict[str, Any]]:
    """(the bundle's precision, {"stages": ..., "tensors": ..., "answers": ... or None, "labels" and "findings": ... where it has some});
    tensors over ``pictures``, or pydicom's."""
    return Reference(modules, rows, images, pictures, progress).parity_of(load(bundle, "cpu"))


@dataclass(frozen=True)
class Reference:
    """A checkpoint in fp32 PyTorch, and what it says to pictures and rows: computed once, compared with any number of bundles."""

    modules: Modules
    rows: Sequence[Row] | None = None
    images: Path | None = None
    pictures: Sequence[Path] | None = None
    progress: Progress = lambda items, what: items
    looked_at: Sequence[Path] = ()  # on which decisions about findings are compared; else the rows' pictures, or those of the tensors

    def parity_of(
        self, predictor: Predictor, answers: dict[str, Any] | None = None, findings: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Raises BundleError where the bundle is of another model, and ParityError where it computes what is no number.

        ``answers`` and ``findings`` that are known are not measured again.
        """
        theirs, ours = predictor.manifest, self.predictor.manifest
        if (theirs.backbone, theirs.head, theirs.answers, theirs.findings) != (ours.backbone, ours.head, ours.answers, ours.findings):
            raise BundleError(f"bundle {theirs.name} is not of checkpoint {self.modules.folder}; pass the one it was made from")
        reference, pictures = self.predictor, self.pictures or sample_pictures()
        try:
            measured = {**tensor_parity(reference, predictor, pictures, self.progress), "answers": answers}
            finite = all(f["cosine"] is not None for f in measured["tensors"].values())  # else the gate fails, whatever is answered
            if finite and answers is None and (said := self.said) is not None:
                assert self.rows is not None and self.images is not None
                measured["answers"] = answer_parity(self.rows, said, said_to(predictor, self.rows, self.images, self.progress))
            if finite and theirs.labels:
                if self.rows and self.images is not None:
                    pictures = [self.images / name for name in pictures_of(self.rows)[0]]
                measured["labels"] = label_parity(reference, predictor, self.progress(pictures, "Classifying"))
            if finite and theirs.findings:
                measured["findings"] = findings or finding_parity(theirs.findings, self.looks, self._looks(predictor))
        except BundleError as error:  # the head gives what is no number
            raise ParityError(f"{theirs.precision} misses parity with fp32 PyTorch: {error}") from None
        return theirs.precision, measured

    @cached_property
    def predictor(self) -> Predictor:
        return predictor_from_modules(self.modules)

    @cached_property
    def said(self) -> "Said | None":
        if not self.rows or self.images is None or self.predictor.manifest.head is None:
            return None
        return said_to(self.predictor, self.rows, self.images, self.progress)

    @cached_property
    def looks(self) -> tuple[Floats, Floats]:
        return self._looks(self.predictor)

    def _looks(self, predictor: Predictor) -> tuple[Floats, Floats]:
        """(N, F), (N, R): the logits of findings and regions, as `infer` takes them."""
        rows = [self.images / name for name in pictures_of(self.rows)[0]] if self.rows and self.images is not None else None
        pictures = self.looked_at or rows or self.pictures or sample_pictures()
        seen = [looked(predictor, picture_from_path(path).pixels) for path in self.progress(pictures, "Looking for findings")]
        finding, region = (np.stack([x[name].mean(0) for x in seen]) for name in ("finding", "region"))
        return finding, region


class TorchSession:
    """A PyTorch module behind the runtime's Session contract, so that the reference goes through the runtime's own path."""

    backend, device = "torch", "cpu"

    def __init__(self, contract: tuple[tuple[str, ...], tuple[str, ...]], function: Callable[..., Any]) -> None:
        self.inputs, self.outputs = contract
        self._function = function

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        out = self._function(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.inputs))
        return {name: x.numpy() for name, x in zip(self.outputs, out if isinstance(out, tuple) else (out,), strict=True)}


def predictor_from_modules(modules: Modules) -> Predictor:
    """The checkpoint itself, in PyTorch and fp32, behind the runtime: preprocessing, tokens and answers are the checkpoint's own."""
    manifest = manifest_from_modules(modules)
    contract = contract_of(manifest)
    sessions = {name: TorchSession(contract[name], function) for name, function in functions_of(modules).items() if name in contract}
    return Predictor(None, manifest, sessions, tokenizers_of(modules))


def tokenizers_of(modules: Modules) -> dict[str, Tokenizer]:
    tokenizers, words = {TOKENIZER: tokenizer_from_file(modules.folder / TOKENIZER)}, words_of(modules)
    return tokenizers if words is None else {**tokenizers, WORDS: Tokenizer.from_str(words)}


def words_of(modules: Modules) -> str | None:
    """What words.json holds, where the head reads words."""
    if modules.head is None or isinstance(modules.head, LiteHead):
        return None
    return words_tokenizer_json(Dictionary(tuple(modules.meta["dictionary"])))


def manifest_from_modules(modules: Modules) -> Manifest:
    """As a bundle of the checkpoint in fp32 has it, without files. Raises BundleError where checkpoint.json lacks what it needs."""
    meta, backbone, head = modules.meta, modules.backbone, modules.head
    try:
        manifest = Manifest(
            name=meta["name"],
            version=meta["version"],
            precision="fp32",
            target="cpu",
            backbone=backbone.name,
            preprocess=backbone.preprocess,
            context_length=backbone.context_length,
            pad_id=backbone.pad_id,
            embed_dim=backbone.embed_dim,
            logit_scale=float(meta["logit_scale"]),
            graphs={name: Graph(f"{name}.onnx", "fp32") for name in ("image", "text")},
            metrics=meta["metrics"],
            provenance=meta["provenance"],
        )
        if modules.findings is not None:
            manifest = _with_findings(manifest, meta["findings"], modules.findings)
        if head is None:
            return manifest
        graphs = {**manifest.graphs, "head": Graph("head.onnx", "fp32")}
        if isinstance(head, LiteHead):
            answering = Manifest.from_json({**manifest.to_json(), **{key: meta[key] for key in ("answers", "kinds", "abstention")},
                                            "graphs": {name: {"file": g.file, "precision": g.precision} for name, g in graphs.items()},
                                            "head": {"kind": "lite", "grey": {}}})  # fmt: skip
            seen = Head("lite", details=head.details)
            return replace(manifest, graphs=graphs, head=seen, answers=answering.answers, kinds=answering.kinds,
                           abstention=answering.abstention)  # fmt: skip
        networks = (("autoencoder", head.features.autoencoder, AUTOENCODER_SIZE), ("maml", head.features.maml, MAML_SIZE))
        grey = {name: side for name, network, side in networks if network is not None}
        if grey:
            graphs["features"] = Graph("features.onnx", "fp32")
        answers, closed = tuple(meta["answers"]), meta["closed_answers"]
        parts = {"closed": (0, closed), "open": (closed, len(answers))} if isinstance(head, QCR) else {"answer": (0, len(answers))}
        kinds = [Kind(name, tuple(range(*part)), note=NOT_CALIBRATED, independent=True) for name, part in parts.items()]
        return replace(
            manifest,
            graphs=graphs,
            head=Head(meta["head"]["kind"], Words(LENGTH, len(meta["dictionary"])), grey, "clip" in meta["head"]["features"]),
            answers=answers,
            kinds=tuple(kinds),
            abstention=Abstention(0.0, 0.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{modules.folder / 'checkpoint.json'}: {said}; train the head with `pmclip-deploy train vqa`") from None


def _with_findings(manifest: Manifest, data: Any, net: FindingsNet) -> Manifest:
    """Raises ValueError where ``data`` is no Findings, or of other findings or regions than the network's."""
    with_graph = replace(manifest, graphs={**manifest.graphs, FINDINGS: Graph("findings.onnx", "fp32")})
    findings = Manifest.from_json({**with_graph.to_json(), "findings": data}).findings
    if findings is None or (len(findings.findings), len(findings.regions)) != (net.pool.out_features, net.region.out_features):
        raise ValueError("its findings or regions are not those of the network's weights")
    return replace(with_graph, findings=findings)


def tensor_parity(reference: Predictor, predictor: Predictor, pictures: Sequence[Path], progress: Progress) -> dict[str, Any]:
    """{"stages": pixels and tokens, "tensors": of each graph the least and mean cosine over its rows and the largest difference}.

    Each side makes its own pixels and tokens; the head is given the reference's inputs.
    """
    both = reference, predictor
    read = [picture_from_path(path).pixels for path in progress(pictures, "Comparing")]
    pixels = [[tensor_from_pixels(x, p.manifest.preprocess) for x in read] for p in both]
    tokens = [p.tokens(QUESTIONS) for p in both]
    same_shape = [a.shape == b.shape for a, b in zip(*pixels, strict=True)]
    furthest = max((float(np.abs(a - b).max()) for a, b, same in zip(*pixels, same_shape, strict=True) if same), default=0.0)
    stages = {
        "pixels": {"n": len(read), "max_abs": furthest if all(same_shape) else None},
        "tokens": {"n": len(QUESTIONS), "equal": float(np.mean([np.array_equal(a, b) for a, b in zip(*tokens, strict=True)]))},
    }
    tensors = {
        "image": tensor_difference(*(np.stack([p.embedding_from_tensor(x) for x in of]) for p, of in zip(both, pixels, strict=True))),
        "text": tensor_difference(*(p.embed_texts(QUESTIONS) for p in both)),
    }
    if (head := reference.manifest.head) is not None:
        seen = [np.stack([p.seen(path) for path in pictures]) for p in both]
        if head.grey:
            own = reference.manifest.embed_dim if head.clip else 0
            tensors["features"] = tensor_difference(*(x[:, own:] for x in seen))
        asked = [p.asked(QUESTIONS) for p in both]
        if head.words is not None:
            stages["words"] = {"n": len(QUESTIONS), "equal": float((asked[0] == asked[1]).all(1).mean())}
        pairs = np.repeat(seen[0], len(QUESTIONS), 0), np.tile(asked[0], (len(pictures), 1))
        tensors["head"] = tensor_difference(*(_logits(p, pairs) for p in both))
    if reference.manifest.findings is not None:
        seen_by = [[looked(p, x) for x in read] for p in both]
        for output in contract_of(reference.manifest)["findings"][1]:
            rows = [np.concatenate([x[output] for x in of]) for of in seen_by]
            # A finding's logits over all pictures are one row: those of one picture are few, and near zero where it is near a tie.
            tensors[f"findings/{output}"] = tensor_difference(*(x.T if output == "finding" else x.reshape(len(x), -1) for x in rows))
    return {"stages": stages, "tensors": tensors}


def looked(predictor: Predictor, pixels: NDArray[np.uint8]) -> dict[str, Floats]:
    """What the graph "findings" gives of a picture and of its mirror image: each output (2, ...)."""
    findings = predictor.manifest.findings
    assert findings is not None
    tensor, session = tensor_from_pixels(pixels, findings.preprocess)[None], predictor._sessions["findings"]
    both = [session.run({"pixels": np.ascontiguousarray(x)}) for x in (tensor, tensor[..., ::-1])]  # one at a time, as `infer` does
    return {name: np.concatenate([x[name] for x in both]) for name in session.outputs}


def _logits(predictor: Predictor, pairs: tuple[NDArray[Any], NDArray[Any]]) -> Floats:
    heads = predictor.heads(*pairs)
    return np.concatenate([heads.answer, heads.kind, *([] if heads.radiograph is None else [heads.radiograph[:, None]])], 1)


@dataclass(frozen=True)
class Said:
    """To N rows."""

    best: NDArray[np.str_]  # (N,) best candidates, abstained or not
    given: NDArray[np.str_]  # (N,) answers; "" where it abstained


def said_to(predictor: Predictor, rows: Sequence[Row], images: Path, progress: Progress = lambda items, what: items) -> Said:
    """Each image and each question is encoded once, alone, as `infer` does."""
    names, picture = pictures_of(rows)
    questions = list(dict.fromkeys(row.question for row in rows))
    asked = {question: i for i, question in enumerate(questions)}
    seen = np.stack([predictor.seen(images / name) for name in progress(names, "Answering")])
    heads = predictor.heads(seen[picture], predictor.asked(questions)[[asked[row.question] for row in rows]])
    decisions = [decision_from_heads(predictor.manifest, heads, i) for i in range(len(rows))]
    return Said(np.array([_best(d) for d in decisions]), np.array([_best(d) if d.reason is None else "" for d in decisions]))


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


def answer_parity(rows: Sequence[Row], reference: Said, other: Said) -> dict[str, Any]:
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


def gate(precision: str, parity: Mapping[str, Any], gates: Mapping[str, Mapping[str, float]] = TENSOR_GATES) -> None:
    """Raises ParityError that names every figure out of its bounds."""
    if found := [text for part in misses(precision, parity, gates).values() for text in part]:
        raise ParityError(
            f"{precision} misses parity with fp32 PyTorch: {'; '.join(found)}; use a higher precision or other calibration images"
        )


def misses(precision: str, parity: Mapping[str, Any], gates: Mapping[str, Mapping[str, float]] = TENSOR_GATES) -> dict[str, list[str]]:
    """Every figure out of its bounds: of the graphs that answer, of "findings"."""
    answering, looking = list[str](), list[str]()
    for stage, figures in parity.get("stages", {}).items():
        furthest = figures.get("max_abs", 0.0)
        if furthest is None or furthest > PIXELS:
            answering.append(f"{stage} differ {'in size' if furthest is None else f'by up to {furthest:.3g} (limit {PIXELS:g})'}")
        if figures.get("equal", 1.0) < 1:
            answering.append(f"{stage} are equal in {figures['equal']:.0%} of the questions (limit 100%)")
    for graph, figures in parity["tensors"].items():
        for name, limit in gates[precision].items():
            figure = figures[name]
            if figure is None or not (figure <= limit if name == "max_abs" else figure >= limit):
                of = looking if part_of(graph) == FINDINGS else answering
                of.append(f"{graph} {name} {'is no number' if figure is None else f'{figure:.6g}'} (limit {limit:g})")
    if answers := parity["answers"]:
        if answers["agreement"] is not None and answers["agreement"] < AGREEMENT:
            answering.append(f"answers agree on {answers['agreement']:.2%} (limit {AGREEMENT:.0%})")
        if answers["candidate_agreement"] < CANDIDATE_AGREEMENT:
            answering.append(f"best candidates agree on {answers['candidate_agreement']:.2%} (limit {CANDIDATE_AGREEMENT:.0%})")
        if answers["difference"] < -ACCURACY_LOSS:
            answering.append(f"accuracy changes by {100 * answers['difference']:.2f} points (limit -{100 * ACCURACY_LOSS:g})")
    if (labels := parity.get("labels")) and labels["n"] >= LABELLED and labels["agreement"] < CANDIDATE_AGREEMENT:
        answering.append(f"labels agree on {labels['agreement']:.2%} of {labels['n']} pictures (limit {CANDIDATE_AGREEMENT:.0%})")
    if findings := parity.get("findings"):
        if findings["decisions"] >= DECIDED and findings["agreement"] < AGREEMENT:
            looking.append(f"findings agree on {findings['agreement']:.2%} of {findings['decisions']} decisions (limit {AGREEMENT:.0%})")
        if findings["decisions"] < DECIDED and findings["crossed"]:
            looking.append(f"{findings['crossed']} decisions about findings differ that are no near-ties (limit 0)")
    return {ANSWERS: answering, FINDINGS: looking}


def part_of(graph: str) -> str:
    """Of a graph, GRAPH/LAYER or GRAPH/OUTPUT."""
    return FINDINGS if graph.partition("/")[0] == FINDINGS else ANSWERS


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
