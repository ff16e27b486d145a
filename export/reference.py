"""A checkpoint in fp32 PyTorch behind the runtime, and what it says to pictures and questions: what every bundle is compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pmclip_deploy.bundle.contract import contract_of
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import TOKENIZER, WORDS
from pmclip_deploy.bundle.types import Abstention, Graph, Head, Kind, Words
from pmclip_deploy.decision.heads import Decision, decision_from_heads
from pmclip_deploy.errors import BundleError
from pmclip_deploy.evaluation.rows import Row, pictures_of
from pmclip_deploy.export.gates import FINDINGS
from pmclip_deploy.export.onnx_from_checkpoint import Modules, functions_of, onnx_from_modules
from pmclip_deploy.export.probes import Floats, Progress, computing_nothing_twice, findings_outputs, sample_pictures
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.tokens import tokenizer_from_text
from pmclip_deploy.train.checkpoint import Checkpoint
from pmclip_deploy.train.findings.net import FindingsNet
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.qcr import QCR
from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, MAML_SIZE
from pmclip_deploy.train.heads.words import LENGTH, Dictionary, words_tokenizer_json

NOT_CALIBRATED = "the probability is the head's own and was not calibrated on validation images"


@dataclass(frozen=True)
class Reference:
    """A checkpoint in fp32 PyTorch, and what it says to pictures and rows: computed once, compared with any number of bundles."""

    modules: Modules
    rows: Sequence[Row] | None = None
    images: Path | None = None
    pictures: Sequence[Path] | None = None
    progress: Progress = lambda items, what: items
    looked_at: Sequence[Path] = ()  # on which decisions about findings are compared; else the rows' pictures, or those of the tensors

    @cached_property
    def predictor(self) -> Predictor:
        return computing_nothing_twice(predictor_from_modules(self.modules))

    @cached_property
    def graphs(self) -> dict[str, onnx.ModelProto]:
        """In fp32, for the CPU."""
        return onnx_from_modules(self.modules)

    @cached_property
    def row_outputs(self) -> "RowOutputs | None":
        if not self.rows or self.images is None or self.predictor.manifest.head is None:
            return None
        return outputs_for(self.predictor, self.rows, self.images, self.progress)

    @cached_property
    def looks(self) -> tuple[Floats, Floats]:
        return self.looks_of(self.predictor)

    def looks_of(self, predictor: Predictor) -> tuple[Floats, Floats]:
        """(N, F), (N, R): the logits of findings and regions, as `infer` takes them."""
        rows = [self.images / name for name in pictures_of(self.rows)[0]] if self.rows and self.images is not None else None
        pictures = self.looked_at or rows or self.pictures or sample_pictures()
        seen = [findings_outputs(predictor, picture_from_path(path).pixels) for path in self.progress(pictures, "Looking for findings")]
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
    tokenizers, words = {TOKENIZER: tokenizer_from_text(modules.tokenizer, modules.folder / TOKENIZER)}, words_of(modules)
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
            logit_bias=meta.get("logit_bias"),
            metrics=meta["metrics"],
            provenance=meta["provenance"],
        )
        if modules.findings is not None:
            manifest = _with_findings(manifest, meta["findings"], modules.findings)
        if head is None:
            return manifest
        return _with_lite(manifest, meta, head) if isinstance(head, LiteHead) else _with_words(manifest, meta, head)
    except (KeyError, TypeError, ValueError) as error:
        said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{modules.folder / 'checkpoint.json'}: {said}", "train the head with `pmclip-deploy train vqa`") from None


def _with_lite(manifest: Manifest, meta: Checkpoint, head: LiteHead) -> Manifest:
    graphs = {**manifest.graphs, "head": Graph("head.onnx", "fp32")}
    answering = Manifest.from_json({**manifest.to_json(), **{key: meta[key] for key in ("answers", "kinds", "abstention")},
                                    "graphs": {name: {"file": g.file, "precision": g.precision} for name, g in graphs.items()},
                                    "head": {"kind": "lite", "grey": {}}})  # fmt: skip
    return replace(manifest, graphs=graphs, head=Head("lite", details=head.details), answers=answering.answers, kinds=answering.kinds,
                   abstention=answering.abstention)  # fmt: skip


def _with_words(manifest: Manifest, meta: Checkpoint, head: MEVF | QCR) -> Manifest:
    """MEVF's and QCR's, which read words and say how sure they are without a calibration."""
    networks = (("autoencoder", head.features.autoencoder, AUTOENCODER_SIZE), ("maml", head.features.maml, MAML_SIZE))
    grey = {name: side for name, network, side in networks if network is not None}
    answers, closed = tuple(meta["answers"]), meta["closed_answers"] or 0
    parts = {"closed": (0, closed), "open": (closed, len(answers))} if isinstance(head, QCR) else {"answer": (0, len(answers))}
    kinds = [Kind(name, tuple(range(*part)), note=NOT_CALIBRATED, independent=True) for name, part in parts.items()]
    return replace(
        manifest,
        graphs={**manifest.graphs, **{name: Graph(f"{name}.onnx", "fp32") for name in ("head", *["features"] * bool(grey))}},
        head=Head(meta["head"]["kind"], Words(LENGTH, len(meta["dictionary"])), grey, "clip" in meta["head"]["features"]),
        answers=answers,
        kinds=tuple(kinds),
        abstention=Abstention(0.0, 0.0),
    )


def _with_findings(manifest: Manifest, data: Any, net: FindingsNet) -> Manifest:
    """Raises ValueError where ``data`` is no Findings, or of other findings or regions than the network's."""
    with_graph = replace(manifest, graphs={**manifest.graphs, FINDINGS: Graph("findings.onnx", "fp32")})
    findings = Manifest.from_json({**with_graph.to_json(), "findings": data}).findings
    if findings is None or (len(findings.findings), len(findings.regions)) != (net.pool.out_features, net.region.out_features):
        raise ValueError("its findings or regions are not those of the network's weights")
    return replace(with_graph, findings=findings)


@dataclass(frozen=True)
class RowOutputs:
    """To N rows."""

    best: NDArray[np.str_]  # (N,) best candidates, abstained or not
    given: NDArray[np.str_]  # (N,) answers; "" where it abstained


def outputs_for(predictor: Predictor, rows: Sequence[Row], images: Path, progress: Progress = lambda items, what: items) -> RowOutputs:
    """Each image and each question is encoded once, alone, as `infer` does."""
    names, picture = pictures_of(rows)
    questions = list(dict.fromkeys(row.question for row in rows))
    asked = {question: i for i, question in enumerate(questions)}
    seen = np.stack([predictor.image_features(images / name) for name in progress(names, "Answering")])
    heads = predictor.head_logits(seen[picture], predictor.question_features(questions)[[asked[row.question] for row in rows]])
    decisions = [decision_from_heads(predictor.manifest, heads, i) for i in range(len(rows))]
    return RowOutputs(np.array([_best(d) for d in decisions]), np.array([_best(d) if d.reason is None else "" for d in decisions]))


def _best(decision: Decision) -> str:
    return decision.candidates[0].answer if decision.candidates else ""
